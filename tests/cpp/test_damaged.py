"""C++ refuses every damaged bundle there is, for the same reason as Python; and what it reads of a sound one is what
Python reads."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.contract.conftest import SIZES
from tests.cpp.asking import lines
from tests.cpp.library import BUNDLE, PLAN, Failure, Library
from tests.cpp.library import Bundle as LoadedBundle
from tests.cpp.library import Session as LoadedSession
from tests.damaged import DAMAGES, Seen
from tests.fuzz.mutations import mutate_json
from tests.hostile import bad_values, leaves, put, sign
from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, PlanError, TgateError
from tgate_engine.footprint import buffers, memory
from tgate_engine.graph import BATCH, GraphSpec, TensorSpec
from tgate_engine.manifest import MANIFEST_FILE, Golden, Manifest, Shape
from tgate_engine.manifest_json import content_digest
from tgate_engine.plan import Plan
from tgate_engine.step import PAST, STEP_OUTPUTS
from tgate_export.methods.base import Settings
from tgate_runtime.session import Session, graphs_of

LARGEST = 2**63 - 1


@pytest.fixture(scope="session")
def probe(cpp_build: Path) -> Path:
    return cpp_build / "probe-bundle"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle. Read only."""
    return build(tmp_path_factory.mktemp("cpp") / "toy")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of two sizes, two ranges of batches and two plans with their baselines. Read only."""
    return build(tmp_path_factory.mktemp("cpp") / "large", SIZES)


# --- what is read -------------------------------------------------------------------------------


def of_tensor(tensor: TensorSpec) -> list[Any]:
    return [tensor.name, tensor.dtype, [-1 if dim == BATCH else dim for dim in tensor.shape]]


def of_graph(graph: GraphSpec) -> dict[str, Any]:
    return {
        "file": graph.file,
        "role": graph.role,
        "batch": list(graph.batch),
        "inputs": [*map(of_tensor, graph.inputs)],
        "outputs": [*map(of_tensor, graph.outputs)],
        "macs": [graph.macs.paper, graph.macs.all],
        "scratch_bytes": graph.scratch_bytes,
    }


def of_shape(shape: Shape) -> dict[str, Any]:
    return {
        "size": shape.size,
        "batch": list(shape.batch),
        "latents": list(shape.latents),
        "constants": {name: list(row) for name, row in shape.constants.items()},
        "graphs": {name: of_graph(graph) for name, graph in shape.graphs.items()},
    }


def of_plan(plan: Plan) -> dict[str, Any]:
    calls = [step.call for step in plan.steps]
    return {
        "name": plan.name,
        "guidance_scale": plan.guidance_scale,
        "initial_scale": plan.sampler.initial_scale,
        "sampler_steps": plan.sampler.steps,
        "lead_in": plan.sampler.lead_in,
        "sampler": plan.sampler.name,
        "prediction_type": plan.sampler.prediction_type,
        "baselines": list(plan.baselines),
        "stochastic": plan.sampler.stochastic,
        "reach": plan.sampler.reach,
        "graphs": list(plan.graphs()),
        "steps": [
            {
                "phase": step.phase,
                "graph": step.graph,
                "numbers": [call.timestep, call.input_scale, call.noise, *call.latents, *call.outputs],
                "reads": list(step.reads),
                "writes": list(step.writes),
            }
            for step, call in zip(plan.steps, calls, strict=True)
        ],
    }


def of_golden(golden: Golden) -> dict[str, Any]:
    return {
        "file": golden.file,
        "size": golden.size,
        "graph": golden.graph,
        "tolerance": golden.tolerance,
        "oracle": golden.oracle,
        "plan": None if golden.plan is None else of_plan(golden.plan),
    }


def of_manifest(m: Manifest) -> dict[str, Any]:
    same = ("model", "family", "licence", "weights", "samplers", "dtype", "frames", "fps", "guidance", "guidance_scale")
    return {
        **{key: getattr(m, key) for key in (*same, "zero_negative")},
        "shapes": [*map(of_shape, m.shapes)],
        "carries": sorted(m.carries, key=str.encode),
        "conditioning": [[c.name, c.source, c.negative] for c in m.conditioning],
        "tokenizers": [[t.file, t.input, t.length, t.pad_id] for t in m.tokenizers],
        "plans": {name: of_plan(plan) for name, plan in m.plans.items()},
        "plan_order": list(m.plans),
        "goldens": {name: of_golden(golden) for name, golden in m.goldens.items()},
        "files": {name: [digest.sha256, digest.bytes] for name, digest in m.files.items()},
        "sizes": list(m.sizes),
    }


def unlike(a: Any, b: Any, place: str = "") -> str:
    """Where two values differ; nowhere is "". Numbers of a shape's constants are float32 in C++."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return next(filter(None, (unlike(a[key], b[key], f"{place}.{key}") for key in a)), "")
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return next(
            filter(None, (unlike(x, y, f"{place}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))), ""
        )
    if ".constants." in place and isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return "" if math.isclose(a, b, rel_tol=2**-24, abs_tol=2**-149) else f"{place}: {a} and {b}"
    return "" if a == b and isinstance(a, bool) == isinstance(b, bool) else f"{place}: {a!r:.80} and {b!r:.80}"


def test_what_is_read_is_what_python_reads(probe: Path, good: Path, large: Path) -> None:
    for path, options in ((good, []), (large, []), (large, ["--no-digests"])):
        (told,) = lines(probe, "open", path, *options)
        assert unlike(told["ok"], of_manifest(Bundle.open(path).manifest)) == ""


def test_a_bundle_by_a_link_and_what_is_none(probe: Path, good: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(good)
    assert "ok" in lines(probe, "open", tmp_path / "link")[0]
    for path, says in (
        (tmp_path / "nothing", "is not a bundle: there is no such directory. Make one with `tgate-export`."),
        (good / MANIFEST_FILE, "is not a bundle: there is no such directory"),
        (tmp_path, "is not a bundle: it has no manifest.json"),
    ):
        (told,) = lines(probe, "open", path)
        assert told["code"] == "bundle"
        assert says in told["text"]


@pytest.mark.parametrize("size", ["4x4", "8x2"])
@pytest.mark.parametrize("images", [1, 4])
def test_memory_is_what_python_says(probe: Path, large: Path, size: str, images: int) -> None:
    manifest = Bundle.open(large).manifest
    shape = manifest.shapes_of(size)[0]
    for name, plan in manifest.plans.items():
        (told,) = lines(probe, "memory", large, name, size, images)
        assert told["ok"] == memory(plan, manifest, shape, batch=images)
        (told,) = lines(probe, "buffers", large, size, name, "default")
        assert told["ok"] == [*map(of_tensor, buffers(shape.graphs, [plan, manifest.plan("default")]).values())]


def test_memory_beyond_64_bits_is_as_much_as_they_hold(probe: Path, good: Path, tmp_path: Path) -> None:
    toy = Path(shutil.copytree(good, tmp_path / "toy"))
    edit_manifest(toy, lambda d: d["shapes"][0]["graphs"]["full"].update(scratch_bytes=LARGEST))
    (told,) = lines(probe, "memory", toy, "default", "4x4", 4)
    assert told["ok"]["scratch"] == told["ok"]["peak"] == LARGEST
    manifest = Bundle.open(toy).manifest
    assert told["ok"]["request"] == memory(manifest.plan("default"), manifest, manifest.shapes[0], batch=4)["request"]


SIGNATURES: dict[str, Any] = {
    "nothing": lambda d: None,
    "an input that nothing feeds": lambda d: _graph(d, "full")["inputs"][0].update(name="other"),
    "an output that is not given": lambda d: _graph(d, "full")["outputs"].pop(0),
    "a text graph without an input": lambda d: _graph(d, "text")["inputs"].pop(),
    "a text graph without an output": lambda d: _graph(d, "text")["outputs"].pop(),
    "a decoder of something else": lambda d: _graph(d, "decoder")["outputs"][0].update(name="picture"),
    "another form beside": lambda d: _graph(d, "unguided")["inputs"][0].update(dtype="float16"),
    # What is written to buffers without another look: each of these was beyond one.
    "latents of fewer numbers": lambda d: d["shapes"][0].update(latents=[1]),
    "latents of more numbers": lambda d: d["shapes"][0].update(latents=[64, 64]),
    "latents of as many numbers": lambda d: d["shapes"][0].update(latents=[32]),
    "a longer row": lambda d: _everywhere(d, "step", shape=["batch", 13]),
    "a row of half precision": lambda d: _everywhere(d, "step", dtype="float16"),
    "other earlier latents": lambda d: _everywhere(d, "latents.1", shape=["batch", 1, 1, 1]),
    "other next latents": lambda d: _everywhere(d, "next_latents", shape=["batch", 2, 8, 4]),
    "a carry of all images together": lambda d: _everywhere(d, "cross.0", shape=[1, 32]),
    "no latents": lambda d: _without(d, "latents"),
    "no row": lambda d: _without(d, "step"),
    "batches that no graph takes": lambda d: d["shapes"][0].update(batch=[1, 65536]),
    "a decoder of nothing": lambda d: _graph(d, "decoder")["inputs"].clear(),
    "a decoder of other latents": lambda d: _graph(d, "decoder")["inputs"][0].update(shape=[1, 200, 4, 4]),
    "a decoder of larger pictures": lambda d: _graph(d, "decoder")["outputs"][0].update(shape=[1, 400, 4, 3]),
    "a decoder of numbers": lambda d: _graph(d, "decoder")["outputs"][0].update(shape=[48]),
    "a decoder of floats": lambda d: _graph(d, "decoder")["outputs"][0].update(dtype="float32"),
    "a decoder of another size": lambda d: d["shapes"][0].update(width=64),
}


def _graph(data: dict[str, Any], name: str) -> Any:
    return data["shapes"][0]["graphs"][name]


def _tensors(data: dict[str, Any], *kinds: str) -> Iterator[list[Any]]:
    """The lists of tensors of the first shape's denoising graphs."""
    for graph in data["shapes"][0]["graphs"].values():
        yield from (graph[kind] for kind in kinds if graph["role"] == "denoise")


def _everywhere(data: dict[str, Any], tensor: str, **changed: Any) -> None:
    for each in itertools.chain(*_tensors(data, "inputs", "outputs")):
        if each["name"] == tensor:
            each.update(changed)


def _without(data: dict[str, Any], tensor: str) -> None:
    for inputs in _tensors(data, "inputs"):
        inputs[:] = [each for each in inputs if each["name"] != tensor]


def python_says(path: Path) -> str | None:
    try:
        graphs_of(Bundle.open(path))
    except BundleError as error:
        return str(error)
    return None


@pytest.mark.parametrize("what", SIGNATURES)
def test_signatures_are_checked_as_python_checks_them(
    probe: Path, library: Library, good: Path, tmp_path: Path, what: str
) -> None:
    toy = Path(shutil.copytree(good, tmp_path / "toy"))
    edit_manifest(toy, SIGNATURES[what])
    says = python_says(toy)
    (told,) = lines(probe, "signatures", toy)
    assert told == ({"ok": None} if says is None else {"code": "bundle", "text": says})
    assert (says is None) == (what == "nothing")
    if says is not None:
        with pytest.raises(Failure) as failure:
            LoadedSession(LoadedBundle(library, toy))
        assert (failure.value.code, str(failure.value)) == (BUNDLE, says)


@pytest.mark.parametrize("what", ["inputs", "outputs", "pictures", "noise"])
def test_image_graphs_are_for_the_pictures_of_their_size(probe: Path, tmp_path: Path, what: str) -> None:
    toy = build(tmp_path / "toy", Toy(pictured=True))
    assert lines(probe, "signatures", toy) == [{"ok": None}]

    def harm(data: dict[str, Any]) -> None:
        graph = _graph(data, "image")
        if what in ("inputs", "outputs"):
            graph[what].clear()
        else:
            graph["inputs"][what == "noise"].update(shape=[1, 400, 4, 3])

    edit_manifest(toy, harm)
    assert lines(probe, "signatures", toy) == [{"code": "bundle", "text": python_says(toy)}]


@pytest.mark.parametrize("what", ["nothing", "inputs", "outputs", "latents", "pictures"])
def test_a_small_decoder_is_checked_and_not_loaded(probe: Path, library: Library, tmp_path: Path, what: str) -> None:
    """Nobody looks at unfinished images here; a file that no engine could load shows that none is asked to."""
    toy = build(tmp_path / "toy", Toy(small=True), goldens=False)

    def harm(data: dict[str, Any]) -> None:
        graph = _graph(data, "small")
        if what in ("inputs", "outputs"):
            graph[what].clear()
        elif what != "nothing":
            graph["inputs" if what == "latents" else "outputs"][0].update(shape=[1, 2, 8, 4])

    edit_manifest(toy, harm)
    says = python_says(toy)
    assert (says is None) == (what == "nothing")
    assert lines(probe, "signatures", toy) == [{"ok": None} if says is None else {"code": "bundle", "text": says}]
    if says is None:
        garbage = b"no graph"
        (toy / "small.onnx").write_bytes(garbage)
        digest = {"sha256": hashlib.sha256(garbage).hexdigest(), "bytes": len(garbage)}
        edit_manifest(toy, lambda d: d["files"].update({"small.onnx": digest}))
        LoadedSession(LoadedBundle(library, toy))
        with pytest.raises(BundleError, match=r"small\.onnx is not an ONNX graph"):
            Session.open(toy)


@pytest.mark.parametrize("what", ["nothing", "latents", "a carry", "an input"])
def test_ranges_of_one_size_have_the_same_tensors(probe: Path, tmp_path: Path, what: str) -> None:
    """Their images lie in the buffers of one pool, which were made by the first."""
    toy = build(tmp_path / "toy", Toy(batches=[(1, 1), (4, 4)]), goldens=False)

    def harm(data: dict[str, Any]) -> None:
        own = {"shapes": data["shapes"][1:]}
        if what == "latents":
            own["shapes"][0].update(latents=[2, 8, 4])
            for tensor in ("latents", *PAST, "noise", *STEP_OUTPUTS):
                _everywhere(own, tensor, shape=["batch", 2, 8, 4])
            decoder = f"decoder-{what}.onnx"  # of its own, as no file is described twice
            _graph(own, "decoder").update(file=decoder)
            _graph(own, "decoder")["inputs"][0].update(shape=[1, 2, 8, 4])
            (toy / decoder).write_bytes((toy / "decoder.onnx").read_bytes())
            data["files"][decoder] = data["files"]["decoder.onnx"]
        elif what == "a carry":
            _everywhere(own, "cross.0", shape=["batch", 3200])
        elif what == "an input":
            _without(own, "latents.3")

    edit_manifest(toy, harm)
    says = python_says(toy)
    assert lines(probe, "signatures", toy) == [{"ok": None} if says is None else {"code": "bundle", "text": says}]
    assert (says is None) == (what == "nothing")
    assert says is None or "for 1 to 1 and 4 to 4 images" in says


def test_plan_files(probe: Path, good: Path, tmp_path: Path) -> None:
    plan = Bundle.open(good).manifest.plan("default")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan.to_json()))
    assert unlike(lines(probe, "plan", path)[0]["ok"], of_plan(plan)) == ""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("plan.json")
    assert "ok" in lines(probe, "plan", tmp_path / "link")[0]
    for file, says in (
        ("nothing", "there is no such plan file"),
        ("pipe", "is not a plan file"),
        (".", "is not a plan"),
    ):
        (told,) = lines(probe, "plan", tmp_path / file)
        assert (told["code"], says in told["text"]) == ("plan", True)
    rng = Random(3)
    sound = json.dumps(plan.to_json()).encode()
    for _ in range(150):
        path.write_bytes(mutate_json(sound, rng))
        (told,) = lines(probe, "plan", path)
        try:
            assert unlike(told.get("ok"), of_plan(Plan.load(path))) == ""
        except PlanError:
            assert told["code"] == "plan"


# --- what is refused ----------------------------------------------------------------------------


def harmed(good: Path, folder: Path, seen: Seen) -> dict[str, Path]:
    """A copy of the bundle for each damage that is seen then, damaged."""
    copies = {}
    for number, (what, damage) in enumerate(DAMAGES.items()):
        if damage.seen == seen:
            copies[what] = Path(shutil.copytree(good, folder / f"{number}"))
            damage.harm(copies[what])
    return copies


def code(error: type[TgateError]) -> str:
    return {BundleError: "bundle", PlanError: "plan"}[error]


@pytest.mark.parametrize(("seen", "mode"), [("opening", "paths"), ("graphs", "graphs"), ("tokenizers", "tokenizers")])
def test_damaged_bundles_are_refused(probe: Path, good: Path, tmp_path: Path, seen: Seen, mode: str) -> None:
    copies = harmed(good, tmp_path, seen)
    answers = dict(zip(copies, lines(probe, mode, paths=copies.values()), strict=True))
    unseen = {what: told["ok"] for what, told in answers.items() if "ok" in told}
    assert unseen == {}
    for what, told in answers.items():
        damage = DAMAGES[what]
        assert (what, told["code"]) == (what, code(damage.error))
        assert damage.says in told["text"], what
        assert "\n" not in told["text"]
        assert len(told["text"]) < 1000
    assert len(answers) > 10


@pytest.mark.parametrize("seen", ["graphs", "tokenizers"])
def test_damage_that_is_seen_later_does_not_keep_a_bundle_from_opening(
    probe: Path, good: Path, tmp_path: Path, seen: Seen
) -> None:
    copies = harmed(good, tmp_path, seen)
    assert [told for told in lines(probe, "paths", paths=copies.values()) if "ok" not in told] == []


def verdict(toy: Path, text: bytes) -> dict[str, Any]:
    """What Python says of a bundle with another manifest."""
    (toy / MANIFEST_FILE).write_bytes(text)
    try:
        return {"ok": of_manifest(Bundle.open(toy, check_digests=False).manifest)}
    except TgateError as error:
        return {"code": code(type(error)), "text": str(error)}


def disagreements(probe: Path, toy: Path, texts: list[bytes]) -> tuple[list[str], int]:
    """Manifests of which the two say different things, and how many open."""
    told = lines(probe, "manifests", shutil.copytree(toy, toy.parent / "theirs", dirs_exist_ok=True), texts=texts)
    odd, opened = [], 0
    for text, theirs in zip(texts, told, strict=True):
        ours = verdict(toy, text)
        opened += "ok" in ours
        if ours.get("code") != theirs.get("code") or ("ok" in ours and unlike(theirs["ok"], ours["ok"])):
            odd.append(f"Python: {ours!r:.300}; C++: {theirs!r:.300}")
        assert "\n" not in theirs.get("text", "")
        assert len(theirs.get("text", "")) < 1000
    return odd, opened


def small(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A toy bundle with a short plan, and its manifest's object without the digest."""
    toy = build(folder / "toy", Toy(settings={"default": Settings(steps=2, gate=1)}))
    data = json.loads((toy / MANIFEST_FILE).read_bytes())
    del data["digest"]
    adapters = {"style": {"file": data["samplers"], "layers": 2, "rank": 4}}
    return toy, {**data, "scheduler": {"betas": [0.1]}, "tools": {"torch": "2.13"}, "adapters": adapters}


def hostile_texts(data: dict[str, Any], every: int) -> Iterator[bytes]:
    for number, (place, leaf) in enumerate(leaves(data)):
        for value in bad_values(leaf)[number % every :: every]:
            yield sign(put(data, place, value)).encode()


@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_every_place_and_every_other_thing_is_the_same_to_both(probe: Path, tmp_path: Path, every: int) -> None:
    toy, data = small(tmp_path)
    texts = [*hostile_texts(data, every)]
    odd, opened = disagreements(probe, toy, texts)
    assert odd == []
    assert len(texts) > 5000 / every
    assert opened > 200 / every


@pytest.mark.parametrize("count", [400, pytest.param(8000, marks=pytest.mark.slow)])
def test_changed_manifests_are_the_same_to_both(probe: Path, tmp_path: Path, count: int) -> None:
    """Several small changes at once, and signed again where anybody can say what of."""
    toy, data = small(tmp_path)
    sound, rng, texts = json.dumps(data).encode(), Random(4), []
    for _ in range(count):
        changed = mutate_json(sound, rng)
        try:
            value = json.loads(changed)
            text = json.dumps({**value, "digest": content_digest(value)}, ensure_ascii=False).encode()
        except (ValueError, TypeError, RecursionError):
            text = changed
        texts.append(text)
    odd, opened = disagreements(probe, toy, texts)
    assert odd == []
    assert opened > count / 20


def test_a_manifest_of_hundreds_of_thousands_of_things_is_read_or_refused_in_seconds(
    probe: Path, tmp_path: Path
) -> None:
    toy, data = small(tmp_path)
    plan, shape = data["plans"]["default"], data["shapes"][0]
    names = [f"c{i}" for i in range(200_000)]
    many = {f"p{i}": {**plan, "name": f"p{i}"} for i in range(990)}
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"carries": {**data["carries"], **{key: {"of": "all"} for key in names}}}, True),
        ({"plans": {**data["plans"], "default": {**plan, "baselines": names}}}, False),
        ({"plans": {**data["plans"], **many}, "shapes": [{**shape, "width": 4 + i} for i in range(60)]}, True),
        ({"shapes": [{**shape, "constants": {**shape["constants"], **{key: [1] for key in names}}}]}, True),
        ({"tools": dict.fromkeys(names, "x"), "scheduler": dict.fromkeys(names, 0)}, True),
        (dict.fromkeys(names, 0), False),
        ({"shapes": [{**shape, "latents": [1] * 1_000_000}]}, False),
    ]
    texts = [json.dumps({**data, **c, "digest": content_digest({**data, **c})}).encode() for c, _ in cases]
    began = time.monotonic()
    told = lines(probe, "manifests", toy, texts=texts)
    assert time.monotonic() - began < 60
    assert ["ok" in line for line in told] == [opens for _, opens in cases]


@pytest.mark.parametrize("seen", ["opening", "graphs", "tokenizers"])
def test_damaged_bundles_are_refused_by_the_library(library: Library, good: Path, tmp_path: Path, seen: Seen) -> None:
    """As a host meets it: when the bundle is opened, or else when a session is, and never later."""
    for what, path in harmed(good, tmp_path, seen).items():
        damage = DAMAGES[what]
        with pytest.raises(Failure) as failure:
            LoadedSession(LoadedBundle(library, path))
        assert failure.value.code == (PLAN if damage.error is PlanError else BUNDLE), what
        assert damage.says in str(failure.value), what
        if seen != "opening":
            LoadedBundle(library, path)


def test_a_bundle_with_an_ip_adapter_is_refused_by_name(library: Library, tmp_path: Path) -> None:
    path = build(tmp_path / "toy", Toy(refers=True))
    with pytest.raises(
        Failure, match=r"the bundle has an IP-Adapter \('reference'\), which this library does not draw"
    ):
        LoadedBundle(library, path)


def test_a_bundle_of_an_inpainting_model_is_refused_by_name(library: Library, tmp_path: Path) -> None:
    path = build(tmp_path / "toy", Toy(begins=True, inpaints=True))
    with pytest.raises(Failure, match="the bundle is of an inpainting model, which libtgate does not run"):
        LoadedBundle(library, path)


def test_a_bundle_with_controlnets_is_refused_by_name(library: Library, tmp_path: Path) -> None:
    """Which Python draws with."""
    path = build(tmp_path / "toy", Toy(controls=("edges",)))
    with pytest.raises(
        Failure, match="the bundle has ControlNets, which libtgate does not run; draw with the Py"
    ) as told:
        LoadedBundle(library, path)
    assert told.value.code == BUNDLE
