"""The commands that run without export, on the toy bundle: what they print and leave behind, and how they fail."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.running import PROMPT, Run, beside, fails
from tests.toy_bundle import Toy, build, edit_manifest
from tests.toy_model import LATENTS
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_export.methods.base import Settings
from tgate_runtime.engines import ENGINES, EngineEntry
from tgate_runtime.generators import noise
from tgate_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two sizes and two gated plans. Read only."""
    settings = {"default": Settings(steps=8, gate=5, self_interval=2), "early": Settings(steps=8, gate=2)}
    toy = Toy(sizes=((4, 4), (8, 2)), settings=settings)
    return build(tmp_path_factory.mktemp("sizes") / "toy", toy, goldens=False)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files of the graphs that commands have loaded when they draw."""
    files: set[str] = set()
    draw = Pipeline.__call__

    def drawing(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        for spec in (spec for shape in self.session.manifest.shapes for spec in shape.graphs.values()):
            with contextlib.suppress(EngineError):
                self.session.executable(spec)
                files.add(spec.file)
        return draw(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", drawing)
    return files


# --- generate -----------------------------------------------------------------------------------


def test_generate_equals_the_pipeline(run: Run, good: Path, tmp_path: Path) -> None:
    picture, latents = tmp_path / "out.png", tmp_path / "y.npy"
    status, out, err = run(
        *("generate", good, PROMPT, "--seed", 0, "--negative-prompt", "blue", "--guidance-scale", 4.5),
        *("--save-latents", latents, "--output", picture, "--threads", 1, "--quiet"),
    )
    assert (status, out, err) == (0, f"{picture}\n", "")
    with Pipeline.open(good, threads=1) as pipe:
        drawn = pipe(PROMPT, seed=0, negative_prompt="blue", guidance_scale=4.5)
    np.testing.assert_array_equal(np.load(latents), drawn.latents)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn.images[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "y.npy"]


def test_a_drawn_seed_is_reported_and_draws_the_same_again(run: Run, good: Path, tmp_path: Path) -> None:
    _, _, err = run("generate", good, PROMPT, "--output", tmp_path / "a.png")
    seed = next(line.split()[1] for line in err.splitlines() if line.startswith("seed "))
    run("generate", good, PROMPT, "--output", tmp_path / "b.png", "--seed", seed)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_output_the_next_free_numbers_are_taken(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy-0002.png").write_text("mine")
    for count, names in ((1, ["toy-0001.png"]), (2, ["toy-0003.png", "toy-0004.png"])):
        status, out, _ = run("generate", good, PROMPT, "--seed", 3, "--num-images", count)
        assert (status, out.splitlines()) == (0, names)
    assert Path("toy-0001.png").read_bytes() == Path("toy-0003.png").read_bytes() != Path("toy-0004.png").read_bytes()
    assert Path("toy-0002.png").read_text() == "mine"


def test_every_command_takes_mini_and_a_path_of_that_name_is_a_path(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    commands: list[tuple[object, ...]] = [
        ("plan", "mini", "--name", "short", "--m", 3, "--steps", 4),
        ("generate", "mini", "a red circle", "--plan", "short", "--seed", 0),
        ("bench", "mini", "--plan", "short", "--against", "short", "--repeats", 1, "--warm-ups", 0, "--json"),
        ("build", "mini"),
        ("inspect", "mini", "--json"),
    ]
    for command in commands:
        status, out, err = run(*command, "--quiet")
        assert (status, err) == (0, "")
    assert "short" in json.loads(out)["plans"]
    assert Path("mini-0001.png").is_file()
    for command in commands:
        fails(run(command[0], "./mini", *command[2:], "--quiet"), "mini is not a bundle", "no such directory")


def test_every_image_is_reported_with_its_seed(run: Run, good: Path, tmp_path: Path) -> None:
    """Image j of seed s is the one image of seed s + j."""
    _, _, err = run("generate", good, PROMPT, "--num-images", 3, "--output", tmp_path / "a.png")
    ((first, last),) = ((int(w[1]), int(w[3])) for w in map(str.split, err.splitlines()) if w[0] == "seeds")
    assert last == first + 2
    assert f"seeds {first} to {last}" in err.splitlines()
    run("generate", good, PROMPT, "--output", tmp_path / "b.png", "--seed", last)
    assert (tmp_path / "a-2.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    _, _, err = run("generate", good, PROMPT, "--num-images", 2, "--seed", 1, "--output", tmp_path / "c.png")
    assert "seed" not in err


def test_a_size_and_a_plan_are_all_that_is_loaded(run: Run, sizes: Path, tmp_path: Path, loaded: set[str]) -> None:
    drawn = ("generate", sizes, PROMPT, "--seed", 5, "--threads", 1)
    assert run(*drawn, "--size", "8x2", "--plan", "early", "--output", tmp_path / "a.png")[0] == 0
    assert loaded == {"text.onnx", "decoder-8x2.onnx", "full-8x2.onnx", "reuse_cross-8x2.onnx"}
    with Image.open(tmp_path / "a.png") as image, Pipeline.open(sizes, threads=1) as pipe:
        assert image.size == (8, 2)
        np.testing.assert_array_equal(
            np.asarray(image), np.asarray(pipe(PROMPT, seed=5, size="8x2", plan="early").images[0])
        )
    loaded.clear()
    assert run(*drawn, "--output", tmp_path / "b.png")[0] == 0
    assert loaded == {"text.onnx", "decoder.onnx", "full.onnx", "reuse_self.onnx", "reuse_cross.onnx"}
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (4, 4)


def test_a_plan_of_a_file(run: Run, sizes: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(Bundle.open(sizes).manifest.plan("early").to_json()))
    for plan, output in (("early", "a.png"), (tmp_path / "p.json", "b.png"), ("default", "c.png")):
        assert run("generate", sizes, PROMPT, "--seed", 2, "--plan", plan, "--output", tmp_path / output)[0] == 0
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_plan_of_the_bundle_comes_before_a_file_of_its_name(
    run: Run, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(toy, lambda d: d["plans"].update({"p.json": {**d["plans"]["ungated"], "name": "p.json"}}))
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text("not a plan")
    assert run("generate", toy, PROMPT, "--plan", "p.json", "--output", "x.png")[0] == 0


def test_the_noise_of_another_generator(run: Run, good: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(4, LATENTS, generator="torch-cuda")[None])
    ways: tuple[tuple[object, ...], ...] = (
        ("--generator", "torch-cuda"),
        ("--initial-latents", tmp_path / "x.npy"),
        ("--generator", "numpy"),
    )
    for i, way in enumerate(ways):
        assert run("generate", good, PROMPT, "--seed", 4, *way, "--output", tmp_path / f"{i}.png")[0] == 0
    pictures = [(tmp_path / f"{i}.png").read_bytes() for i in range(3)]
    assert pictures[0] == pictures[1] != pictures[2]


def test_several_pictures_and_given_latents(run: Run, good: Path, tmp_path: Path) -> None:
    start = np.stack([noise(9 + j, LATENTS) for j in range(2)])
    np.save(tmp_path / "x.npy", start)
    start_at = ("--initial-latents", tmp_path / "x.npy")
    status, out, _ = run("generate", good, PROMPT, "--num-images", 2, *start_at, "--output", tmp_path / "a.png")
    assert status == 0
    assert out.splitlines() == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    run("generate", good, PROMPT, "--num-images", 2, "--seed", 9, "--output", tmp_path / "b.png")
    for j in range(2):
        assert (tmp_path / f"a-{j}.png").read_bytes() == (tmp_path / f"b-{j}.png").read_bytes()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP")])
def test_the_suffix_chooses_the_format(run: Run, good: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    assert run("generate", good, PROMPT, "--output", tmp_path / f"x.{suffix}")[0] == 0
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.format == kind


def test_an_empty_prompt_works(run: Run, good: Path, tmp_path: Path) -> None:
    assert run("generate", good, "", "--output", tmp_path / "x.png")[0] == 0


def test_a_long_prompt_warns_even_when_quiet(run: Run, good: Path, tmp_path: Path) -> None:
    prompt = "a large red circle above a Small  blue square"
    status, _, err = run("generate", good, prompt, "--seed", 1, "--output", tmp_path / "x.png", "--quiet")
    assert status == 0
    (line,) = err.splitlines()
    assert line.startswith("tgate: warning: ")
    assert line.endswith('left out: "Small blue square"')


# --- the others ---------------------------------------------------------------------------------


def test_inspect_as_data(run: Run, good: Path) -> None:
    status, out, err = run("inspect", good, "--json")
    assert (status, err) == (0, "")
    plan = json.loads(out)["plans"]["default"]
    assert plan["macs"] == {"paper": 12000, "all": 15400}
    assert set(plan["steps"][0]) == {"index", "phase", "graph", "timestep", "reads", "writes", "macs"}


def test_inspect_for_people(run: Run, good: Path) -> None:
    status, out, err = run("inspect", good)
    assert (status, err) == (0, "")
    assert "fidelity-improving  reuse_cross" in out


def test_inspect_at_a_size(run: Run, sizes: Path) -> None:
    status, out, _ = run("inspect", sizes, "--json", "--size", "8x2")
    assert (status, json.loads(out)["size"]) == (0, "8x2")


def test_verify_prints_the_worst_errors(run: Run, good: Path) -> None:
    status, out, _ = run("verify", good)
    assert status == 0
    assert "digests: 13 files and the manifest match" in out
    assert out.count("worst relative error") == 2


def test_verify_fails_beyond_tolerance(run: Run, toy: Path) -> None:
    edit_manifest(toy, lambda d: d["goldens"]["trajectory"].update(tolerance=1e-12))
    status, out, err = run("verify", toy)
    assert status == 1
    assert "golden trajectory: worst relative error" in out
    assert err.splitlines()[-1].startswith("tgate: error: ")
    assert "trajectory not reproduced within tolerance" in err


def test_bench_as_data(run: Run, good: Path) -> None:
    status, out, _ = run("bench", good, "--json", "--repeats", 1, "--threads", 1, "--quiet")
    assert status == 0
    data = json.loads(out)
    assert list(data["plans"]) == ["default", "ungated", "guidance_stopped"]
    assert data["speedup"] > 0
    assert data["mac_ratio"] > 1


def test_bench_for_people(run: Run, good: Path) -> None:
    status, out, _ = run("bench", good, "--repeats", 1, "--threads", 1)
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[-3:]] == ["default", "ungated", "guidance_stopped"]


def test_bench_against_plans_by_name(run: Run, sizes: Path) -> None:
    named = ("--plan", "early", "--against", "default", "--against", "ungated", "--size", "8x2")
    status, out, _ = run("bench", sizes, "--json", *named, "--repeats", 1, "--threads", 1, "--quiet")
    assert status == 0
    data = json.loads(out)
    assert list(data["plans"]) == ["early", "default", "ungated"]
    assert data["settings"]["size"] == "8x2"
    assert "unguided" not in data["graphs"]
    # 5 steps of 2600, one of 1700 among them, 3 of 1100; against 2 of 2600 and 6 of 1100
    assert data["mac_ratio"] == pytest.approx(15400 / 11800)


def test_build_compiles_the_graphs_of_a_plan_and_a_size(
    run: Run, sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgate_runtime.engines import ort

    asked: list[list[str]] = []

    def build(self: object, bundle: Bundle, graphs: Any, on_build: Any = None) -> dict[str, Path]:
        asked.append([graph.file for graph in graphs])
        return {"full.onnx": Path("there")} if len(asked) == 1 else {}

    monkeypatch.setattr(ort.OrtCpu, "build", build)
    (tmp_path / "p.json").write_text(json.dumps(Bundle.open(sizes).manifest.plan("ungated").to_json()))
    assert run("build", sizes, "--quiet") == (0, "full.onnx: there\n", "")
    says = "ort-cpu compiles nothing ahead of time: the bundle is ready\n"
    for plan in ("ungated", tmp_path / "p.json"):
        assert run("build", sizes, "--quiet", "--plan", plan, "--size", "8x2") == (0, says, "")
    each = ("full", "reuse_self", "reuse_cross", "unguided", "decoder")
    assert sorted(asked[0]) == sorted(["text.onnx", *(f"{name}{of}.onnx" for name in each for of in ("", "-8x2"))])
    assert [sorted(files) for files in asked[1:]] == [["decoder-8x2.onnx", "full-8x2.onnx", "text.onnx"]] * 2


def test_engines_as_data(run: Run) -> None:
    status, out, err = run("engines", "--json")
    assert (status, err) == (0, "")
    engines = {entry.pop("name"): entry for entry in json.loads(out)}
    assert engines["ort-cpu"]["says"] == "ready"
    assert all(set(entry) == {"runs_on", "version", "says"} for entry in engines.values())


def test_a_bundle_without_guidance(run: Run, tmp_path: Path) -> None:
    bundle = build(tmp_path / "toy", Toy(guided=False))
    picture = ("--output", tmp_path / "x.png")
    assert run("generate", bundle, PROMPT, *picture)[0] == 0
    fails(run("generate", bundle, PROMPT, "--guidance-scale", 5, *picture), "exported without guidance")
    assert (bundle / MANIFEST_FILE).is_file()


def test_what_is_not_installed_is_named(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.startswith("tgate_runtime")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    result = run("generate", good, PROMPT, "--output", tmp_path / "x.png")
    fails(result, "drawing needs tokenizers", "pip install 'tgate-engine[cpu]'")


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_not_installed_comes_with_the_extra_of_the_engine(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [module for module in sys.modules if module.startswith("tgate_runtime")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    fails(
        run("bench", good, "--engine", name), "measuring needs ", f"pip install 'tgate-engine[{ENGINES[name].extra}]'"
    )


# --- engines ------------------------------------------------------------------------------------

COMMANDS: dict[str, tuple[object, ...]] = {
    "generate": (PROMPT, "--seed", 1),
    "inspect": ("--json",),
    "verify": (),
    "bench": ("--repeats", 1, "--json"),
    "build": (),
}
ON_ENGINES = ("generate", "verify", "bench", "build")


def command(name: str, bundle: Path) -> list[object]:
    rest = [*COMMANDS[name], *(["--output", bundle.parent / "x.png"] if name == "generate" else [])]
    return [name, bundle, *rest]


@pytest.mark.parametrize("name", ON_ENGINES)
def test_an_engine_is_made_once_with_its_options(
    run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    made: list[Any] = []
    make = EngineEntry.open

    def making(entry: EngineEntry, options: Any) -> Any:
        made.append((entry.name, options.threads, options.memory))
        return make(entry, options)

    monkeypatch.setattr(EngineEntry, "open", making)
    assert run(*command(name, toy), "--threads", 1, "--memory", "shared")[0] == 0
    assert made == [("ort-cpu", 1, "shared")]


@pytest.mark.parametrize("name", ON_ENGINES)
def test_an_engine_that_is_not_there_is_told_before_the_bundle_is_read(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(Bundle, "open", lambda *_, **__: pytest.fail("the bundle was opened"))
    asked = command(name, good)
    fails(run(*asked, "--engine", "other"), "there is no engine 'other'; the engines are ort-cpu, ")
    fails(run(*asked, "--device", 1), "engine ort-cpu runs on the CPU; leave out --device")


# --- bundles that are bad -----------------------------------------------------------------------

FILES = ("full.onnx", "weights.safetensors", "samplers.safetensors", "tokenizer/0.json", MANIFEST_FILE)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_flipped_bit(run: Run, toy: Path, name: str, file: str) -> None:
    raw = bytearray((toy / file).read_bytes())
    raw[len(raw) // 2] ^= 1
    (toy / file).write_bytes(raw)
    fails(run(*command(name, toy)), file, "damaged")
    assert beside(toy) == []


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file", FILES)
def test_a_missing_file(run: Run, toy: Path, name: str, file: str) -> None:
    (toy / file).unlink()
    fails(run(*command(name, toy)), file)
    assert beside(toy) == []


MISCHIEF: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "an older schema": (lambda d: d.update(schema_version=2), "export it again with tgate-export, from the same"),
    "a file outside": (lambda d: d.update(weights="/etc/passwd"), "'/etc/passwd' is not a plain name"),
    "a carry that nothing writes": (
        lambda d: d["plans"]["default"]["steps"][4].update(writes=[]),
        "step 5 reads cross.0, which no earlier step writes",
    ),
    "a baseline that is not there": (
        lambda d: d["plans"]["default"].update(baselines=["other"]),
        "names baseline 'other', which is not there",
    ),
}


@pytest.mark.parametrize("what", MISCHIEF)
def test_a_manifest_with(run: Run, toy: Path, what: str) -> None:
    edit, says = MISCHIEF[what]
    edit_manifest(toy, edit)
    for name in COMMANDS:
        fails(run(*command(name, toy)), says)
    assert beside(toy) == []


@pytest.mark.parametrize("name", COMMANDS)
def test_no_bundle(run: Run, tmp_path: Path, name: str) -> None:
    fails(run(*command(name, tmp_path / "nothing")), "there is no such directory")


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "verify"])
def test_a_size_that_is_not_there(run: Run, sizes: Path, name: str) -> None:
    fails(run(*command(name, sizes), "--size", "4x8"), "the bundle has no size 4x8; it has 4x4, 8x2")
    assert beside(sizes) == []


@pytest.mark.parametrize("options", [["--plan", "other"], ["--against", "ungated", "--against", "other"]])
def test_bench_of_a_plan_that_is_not_there(run: Run, good: Path, options: list[str]) -> None:
    fails(run("bench", good, *options), "no plan 'other'; it has default, guidance_stopped, ungated")


# --- requests that are bad ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output", "x.xyz"], "the suffix '.xyz' is no picture format; use one of .png"),
        (["--output", "noext"], "the suffix '' is no picture format"),
        (["--output", "deep/x.png"], "there is no directory deep"),
        (["--output", "is.png"], "is.png is a directory"),
        (["--output", "/proc/x.png"], "/proc/x.png cannot be written ("),
        (["--output", "x.png", "--save-latents", "/proc/y.npy"], "/proc/y.npy cannot be written ("),
        (["--output", "x.png", "--save-latents", "deep/y.npy"], "there is no directory deep"),
        (["--output", "x.png", "--plan", "other"], "has no plan 'other'; it has default"),
        (["--output", "x.png", "--plan", "none.json"], "none.json: there is no such plan file"),
        (["--output", "x.png", "--plan", "text.json"], "text.json is not a plan file"),
        (["--output", "x.png", "--plan", "list.json"], "list.json holds list, not a plan"),
        (["--output", "x.png", "--plan", "empty.json"], "empty.json: a plan is malformed"),
        (["--output", "x.png", "--plan", "other.json"], "runs graph 'elsewhere'; the bundle has full"),
        (["--output", "x.png", "--generator", "other"], "no generator 'other'; use one of numpy, torch-cuda"),
        (["--output", "x.png", "--guidance-scale", "1"], "export with --guidance-scale 1"),
        (["--output", "x.png", "--initial-latents", "none.npy"], "none.npy: there is no such file"),
        (["--output", "x.png", "--initial-latents", "text.npy"], "text.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "empty.npy"], "empty.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "pickle.npy"], "pickle.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "many.npz"], "many.npz holds several arrays"),
        (["--output", "x.png", "--initial-latents", "shape.npy"], "float32 of shape [2, 2, 4]"),
        (["--output", "x.png", "--initial-latents", "double.npy"], "got float64"),
        (["--output", "x.png", "--initial-latents", "nan.npy"], "not finite"),
    ],
)
def test_a_request_that_cannot_be_served(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("is.png").mkdir()
    Path("text.npy").write_text("not an array")
    Path("empty.npy").write_bytes(b"")
    np.save("pickle.npy", np.array([{}], object), allow_pickle=True)
    np.savez("many.npz", a=np.zeros(1), b=np.zeros(1))
    np.save("shape.npy", np.zeros((2, 2, 4), np.float32))
    np.save("double.npy", np.zeros((1, *LATENTS)))
    np.save("nan.npy", np.full((1, *LATENTS), np.nan, np.float32))
    Path("text.json").write_text("not a plan")
    Path("list.json").write_text("[]")
    Path("empty.json").write_text("{}")
    plan = json.dumps(Bundle.open(good).manifest.plan("ungated").to_json())
    Path("other.json").write_text(plan.replace('"full"', '"elsewhere"'))
    before = sorted(p.name for p in tmp_path.iterdir())
    fails(run("generate", good, PROMPT, *arguments), says)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


# --- as data, and as text -----------------------------------------------------------------------

ESCAPE = "\x1b]0;owned\x07\x9b2J"
"""Renames a terminal's window, and clears it."""


def test_pictures_verification_and_compilation_as_data(run: Run, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.png"
    options = ["--seed", 7, "--num-images", 2, "--save-latents", tmp_path / "y.npy", "--quiet", "--json"]
    status, told, err = run("generate", good, PROMPT, "--output", out, *options)
    assert (status, err) == (0, "")
    assert json.loads(told) == {
        "outputs": [str(tmp_path / "x-0.png"), str(tmp_path / "x-1.png")],
        "seeds": [7, 8],
        "plan": "default",
        "size": "4x4",
        "latents": str(tmp_path / "y.npy"),
    }
    status, told, _ = run("verify", good, "--quiet", "--json")
    checked, manifest = json.loads(told), Bundle.open(good).manifest
    assert (status, checked["ok"], checked["files"]) == (0, True, len(manifest.files))
    assert checked["goldens"].keys() == manifest.goldens.keys()
    assert all(golden["ok"] and golden["error"] <= golden["tolerance"] for golden in checked["goldens"].values())
    status, told, _ = run("build", good, "--quiet", "--json")
    assert (status, json.loads(told)["entries"]) == (0, {})


def test_what_a_stranger_wrote_is_shown_and_not_sent(run: Run, toy: Path) -> None:
    """The model, the licence, a plan: everywhere a bundle's texts come out, in tables, in data and in errors."""

    def edit(data: dict[str, Any]) -> None:
        data["model"] = f"model{ESCAPE}"
        data["licence"] = f"[bold]licence{ESCAPE}\n\u202e"

    edit_manifest(toy, edit)
    seen = ""
    for arguments in (
        ["inspect", toy],
        ["inspect", toy, "--json"],
        ["bench", toy, "--repeats", 1, "--warm-ups", 0],
        ["verify", toy, "--json"],
        ["generate", toy, PROMPT, "--output", "x.png", "--image", f"no{ESCAPE}.png"],
        ["generate", toy, PROMPT, "--output", "x.png", "--plan", f"no{ESCAPE}"],
        ["generate", toy, PROMPT, f"--output=no{ESCAPE}/x.png"],
        ["generate", toy, PROMPT, "--output", "x.png", f"--what{ESCAPE}"],
        ["inspect", f"no{ESCAPE}"],
        ["plan", toy, "--name", f"p{ESCAPE}", "--m", 3],
    ):
        _, out, err = run(*arguments)
        assert not [c for c in out + err if not c.isprintable() and c != "\n"], arguments
        seen += out + err
    assert r"model\x1b]0;owned" in seen
    assert r"licence\x1b]0;owned" in seen
    assert r"model\u001b]0;owned" in seen
