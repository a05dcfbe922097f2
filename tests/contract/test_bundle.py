"""Bundles: opened distrustfully, and given more plans in place."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import Place, bad_values, leaves, put, sign
from tests.toy_bundle import Toy, build, edit_manifest, make_plan
from tgate_engine.atomic import locked, staging, write_atomically
from tgate_engine.bundle import Bundle, digests_of, sha256_of
from tgate_engine.errors import BundleError, PlanError, TgateError
from tgate_engine.footprint import memory
from tgate_engine.manifest import MANIFEST_FILE, Adapter, FileDigest
from tgate_engine.manifest_json import MOST_BYTES, content_digest, dump_manifest, parse_manifest
from tgate_engine.plan import Plan
from tgate_export.methods.base import Settings

FILES = (
    "full.onnx",
    "text.onnx",
    "decoder.onnx",
    "weights.safetensors",
    "samplers.safetensors",
    "tokenizer/0.json",
    "golden/image.safetensors",
    MANIFEST_FILE,
)


def test_every_file_is_listed_and_checked(good: Path) -> None:
    bundle = Bundle.open(good)
    assert dict(bundle.manifest.files) == digests_of(good)
    assert set(bundle.manifest.files) > {*FILES} - {MANIFEST_FILE}
    assert bundle.size_bytes() == sum(p.stat().st_size for p in good.rglob("*") if p.is_file())


def test_digests_are_sha256(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"abc")
    (tmp_path / MANIFEST_FILE).write_text("not listed")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_of(tmp_path / "sub" / "x") == abc
    assert digests_of(tmp_path) == {"sub/x": FileDigest(sha256=abc, bytes=3)}
    (tmp_path / "a b").write_text("")
    with pytest.raises(BundleError, match="'a b' is not a plain name"):
        digests_of(tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_seen(toy: Path, name: str) -> None:
    raw = bytearray((toy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (toy / name).write_bytes(raw)
    with pytest.raises(BundleError) as error:
        Bundle.open(toy)
    assert "damaged" in str(error.value)
    assert name in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(toy: Path, name: str) -> None:
    (toy / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.open(toy, check_digests=False)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_seen_without_digests(toy: Path, name: str) -> None:
    os.truncate(toy / name, (toy / name).stat().st_size - 1)
    if name == MANIFEST_FILE:  # its last byte is a line break, which means nothing
        os.truncate(toy / name, (toy / name).stat().st_size - 1)
    with pytest.raises(BundleError, match=name):
        Bundle.open(toy, check_digests=False)


def test_a_file_that_is_a_link_is_refused(toy: Path, good: Path) -> None:
    (toy / "full.onnx").unlink()
    (toy / "full.onnx").symlink_to(good / "full.onnx")
    with pytest.raises(
        BundleError, match=r"full\.onnx is missing or not a plain file \(full\.onnx is a link, and links"
    ):
        Bundle.open(toy)
    (toy / MANIFEST_FILE).rename(toy / "other.json")
    (toy / MANIFEST_FILE).symlink_to("other.json")
    with pytest.raises(BundleError, match=r"as a plain file \(manifest\.json is a link, and links .*: `cp -rL`"):
        Bundle.open(toy)


def test_a_directory_that_is_a_link_is_refused(toy: Path, good: Path) -> None:
    (toy / "tokenizer").rename(toy.parent / "elsewhere")
    (toy / "tokenizer").symlink_to(toy.parent / "elsewhere")
    with pytest.raises(BundleError, match=r"tokenizer/0\.json is missing or not .* \(tokenizer is a link, and links"):
        Bundle.open(toy)
    Bundle.open(good)


def test_a_file_is_one_that_the_manifest_lists(good: Path) -> None:
    bundle = Bundle.open(good)
    assert bundle.file("tokenizer/0.json") == good / "tokenizer" / "0.json"
    for name in (MANIFEST_FILE, "other.onnx", "../x"):
        with pytest.raises(BundleError, match="the manifest lists no file"):
            bundle.file(name)


def graphs(data: dict[str, Any]) -> Any:
    return data["shapes"][0]["graphs"]


MISCHIEF: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a graph without its file": (lambda d: graphs(d)["full"].update(file="other"), "lists no file 'other'"),
    "weights without their file": (lambda d: d.update(weights="other"), "lists no file 'other'"),
    "samplers without their file": (lambda d: d.update(samplers="other"), "lists no file 'other'"),
    "a tokenizer without its file": (lambda d: d["tokenizers"][1].update(file="other"), "lists no file 'other'"),
    "a golden without its file": (lambda d: d["goldens"]["image"].update(file="other"), "lists no file 'other'"),
    "a golden of another size": (lambda d: d["goldens"]["image"].update(size="5x5"), "has no size 5x5; it has 4x4"),
    "a golden of another graph": (lambda d: d["goldens"]["image"].update(graph="other"), "names graph 'other'"),
    "a shape without a constant": (lambda d: d["shapes"][0].update(constants={}), "4x4 has no constant 'time_ids'"),
    "a constant without numbers": (
        lambda d: d["shapes"][0]["constants"].update(time_ids=[]),
        "4x4 has no constant 'time_ids'",
    ),
    "a plan that reads an unwritten carry": (
        lambda d: d["plans"]["default"]["steps"][4].update(writes=[]),
        "step 5 reads cross.0, which no earlier step writes",
    ),
    "a plan that a shape has no graph for": (
        lambda d: d["shapes"].append({**d["shapes"][0], "graphs": {"unguided": graphs(d)["unguided"]}}),
        "step 0 runs graph 'full'; the bundle has unguided",
    ),
    "a golden plan that reads an unwritten carry": (
        lambda d: d["goldens"]["trajectory"]["plan"]["steps"][4].update(writes=[]),
        "step 5 reads cross.0, which no earlier step writes",
    ),
    "a baseline that is not there": (
        lambda d: d["plans"].pop("ungated"),
        "plan 'default' names baseline 'ungated', which is not there. Make it again with `tgate plan`.",
    ),
    "a plan of another guidance": (
        lambda d: d["plans"]["ungated"].update(guidance_scale=1),
        "plan 'ungated' has guidance scale 1.0, which does not fit a bundle with guidance. Make it again",
    ),
    "a number that is a text": (lambda d: d["shapes"][0].update(height="4"), "height: expected int, got '4'"),
    "no schema": (lambda d: d.pop("schema_version"), "this is not a tgate bundle"),
}


@pytest.mark.parametrize("what", MISCHIEF)
def test_a_manifest_with(toy: Path, what: str) -> None:
    edit, says = MISCHIEF[what]
    edit_manifest(toy, edit)
    with pytest.raises((BundleError, PlanError)) as error:
        Bundle.open(toy)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


MISTAKEN_FOR: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "two shapes of one size and batch": (lambda d: d["shapes"].append(d["shapes"][0]), "there are two shapes 4x4 of"),
    "a graph's file that is described twice": (
        lambda d: d["shapes"].append(
            {**d["shapes"][0], "width": 8, "graphs": {**graphs(d), "text": {**graphs(d)["text"], "batch": [2, 2]}}}
        ),
        "text.onnx is described twice, and differently",
    ),
    "two inputs of one name": (
        lambda d: graphs(d)["full"]["inputs"].append(graphs(d)["full"]["inputs"][0]),
        "inputs: 'latents' is there twice",
    ),
    "two conditionings of one name": (
        lambda d: d["conditioning"].append(d["conditioning"][0]),
        "conditioning: 'text' is there twice",
    ),
    "two tokenizers of one input": (
        lambda d: d["tokenizers"].append(d["tokenizers"][0]),
        "tokenizers: 'ids.0' is there twice",
    ),
    "a carry that is read twice": (
        lambda d: d["plans"]["default"]["steps"][-1]["reads"].append("cross.0"),
        "expected names that differ",
    ),
}
"""What is looked up by a name, and is there twice: one of them would be taken."""


@pytest.mark.parametrize("what", MISTAKEN_FOR)
def test_no_two_things_have_one_name(toy: Path, what: str) -> None:
    edit, says = MISTAKEN_FOR[what]
    edit_manifest(toy, edit)
    with pytest.raises(BundleError) as error:
        Bundle.open(toy)
    assert says in str(error.value)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [fifo, link_to_itself, device, Path.mkdir])
def test_what_is_no_plain_file_is_refused_at_once(toy: Path, name: str, make: Callable[[Path], object]) -> None:
    (toy / name).unlink()
    make(toy / name)
    with pytest.raises(BundleError, match=name) as error:
        Bundle.open(toy, check_digests=False)
    assert str(error.value).isprintable()


def test_a_manifest_beyond_its_bound_is_not_read(toy: Path) -> None:
    with (toy / MANIFEST_FILE).open("r+b") as file:
        file.truncate(2**40)  # a sparse file
    with pytest.raises(BundleError, match=f"it holds more than {MOST_BYTES} bytes"):
        Bundle.open(toy)


def test_a_file_is_read_whole_or_not_at_all(toy: Path) -> None:
    bundle = Bundle.open(toy, check_digests=False)
    assert bundle.read("full.onnx") == (toy / "full.onnx").read_bytes()
    raw = bytearray((toy / "full.onnx").read_bytes())
    raw[5] ^= 1
    (toy / "full.onnx").write_bytes(raw)
    with pytest.raises(BundleError, match=r"full\.onnx has SHA-256"):
        bundle.read("full.onnx")
    (toy / "full.onnx").write_bytes(raw + b"x")
    with pytest.raises(BundleError, match=rf"full\.onnx holds {len(raw) + 1} bytes, the manifest says {len(raw)}"):
        bundle.read("full.onnx")
    with pytest.raises(BundleError, match="lists no file 'other'"):
        bundle.read("other")


def test_a_change_after_checking_is_seen(toy: Path) -> None:
    bundle = Bundle.open(toy)
    for kept in (bundle, bundle.with_plans({})):
        kept.check_unchanged(kept.manifest.files)
    path = toy / "tokenizer" / "0.json"
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(content)
    os.utime(path, ns=times)
    for kept in (bundle, bundle.with_plans({})):
        with pytest.raises(BundleError, match=r"tokenizer/0\.json was changed after it was checked"):
            kept.check_unchanged(kept.manifest.files)
    kept.check_unchanged(["full.onnx", "weights.safetensors"])


# --- every place, every other thing -------------------------------------------------------------


def hostile_cases(data: dict[str, Any], *, every: int) -> Iterator[tuple[Place, Any]]:
    """One in ``every`` of all places and bad values, each value at some places and each place with some values."""
    for number, (place, leaf) in enumerate(leaves(data)):
        for value in bad_values(leaf)[number % every :: every]:
            yield place, value


@pytest.mark.parametrize("every", [16, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_a_manifest_holds_is_refused_in_a_line_or_works(tmp_path: Path, every: int) -> None:
    """Signed again, so that the digest helps nobody."""
    toy = build(tmp_path / "toy", Toy(settings={"default": Settings(steps=2, gate=1)}))
    data = json.loads((toy / MANIFEST_FILE).read_bytes())
    del data["digest"]
    data |= {"scheduler": {"betas": [0.1]}, "tools": {"torch": "2.13"}}
    refused: list[str] = []
    worked = 0
    for place, value in hostile_cases(data, every=every):
        text = sign(put(data, place, value)).encode()
        try:
            parse_manifest(text)
            (toy / MANIFEST_FILE).write_bytes(text)
            manifest = Bundle.open(toy, check_digests=False).manifest
            assert parse_manifest(dump_manifest(manifest)) == manifest
            for plan in manifest.plans.values():
                assert memory(plan, manifest, manifest.shapes[0], batch=manifest.shapes[0].batch[1])["peak"] < 2**70
            worked += 1
        except TgateError as error:
            refused.append(str(error))
    assert [text for text in refused if not text.isprintable() or len(text) > 1000] == []
    assert len(refused) > 4000 / every
    assert worked > 200 / every


def test_what_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such directory"):
        Bundle.open(tmp_path / "nothing")
    with pytest.raises(BundleError, match=r"it has no manifest\.json"):
        Bundle.open(tmp_path)
    (tmp_path / MANIFEST_FILE).mkdir()
    with pytest.raises(BundleError, match="it is not a plain file"):
        Bundle.open(tmp_path)


# --- more plans ---------------------------------------------------------------------------------


def planned(bundle: Bundle, name: str, **settings: Any) -> Plan:
    return make_plan(name, Settings(**settings), Toy(), bundle.manifest.shapes[0].graphs)


def test_plans_are_added_in_place(toy: Path) -> None:
    bundle = Bundle.open(toy)
    base = planned(bundle, "base", steps=4, gate=4)
    plan = replace(planned(bundle, "fast", steps=4, gate=2), baselines=("base",))
    told = bundle.save_plans({"fast": plan, "base": base})
    again = Bundle.open(toy)
    assert again.manifest == told.manifest
    assert again.manifest.plan("fast") == plan
    assert list(again.manifest.plans) == [*bundle.manifest.plans, "fast", "base"]
    assert "fast" not in bundle.manifest.plans
    assert [p.name for p in toy.parent.iterdir()] == ["toy"]
    assert dict(again.manifest.files) == digests_of(toy), "nothing but the manifest has changed"


def test_a_name_that_is_taken_needs_force(toy: Path) -> None:
    bundle = Bundle.open(toy)
    plan = planned(bundle, "ungated", steps=4, gate=4)
    before = (toy / MANIFEST_FILE).read_bytes()
    with pytest.raises(BundleError, match="already has a plan 'ungated'; use another --name, or --force"):
        bundle.save_plans({"new": planned(bundle, "new", steps=3, gate=2), "ungated": plan})
    assert (toy / MANIFEST_FILE).read_bytes() == before
    bundle.save_plans({"ungated": plan}, force=True)
    assert Bundle.open(toy).manifest.plan("ungated") == plan


def test_adapters_are_added_and_taken_out_in_place(toy: Path) -> None:
    before = (toy / MANIFEST_FILE).read_bytes()
    bundle = Bundle.open(toy)
    same = Adapter(file="adapters/1.safetensors", layers=2, rank=4)
    for name in ("a", "b"):
        bundle = bundle.save_adapter(name, same, b"first")
    other = Adapter(file="adapters/2.safetensors", layers=2, rank=4)
    with pytest.raises(BundleError, match="already has an adapter 'a'; use another --name, or --force to replace it"):
        bundle.save_adapter("a", other, b"second")
    assert Bundle.open(toy).manifest.adapters == {"a": same, "b": same}
    assert Bundle.open(toy).read(same.file) == b"first"
    bundle = bundle.save_adapter("a", other, b"second", force=True)
    bundle = bundle.remove_adapters(["b"])
    assert Bundle.open(toy).manifest == bundle.manifest
    assert sorted(path.name for path in (toy / "adapters").iterdir()) == ["2.safetensors"]
    (toy / other.file).write_bytes(b"seconD")
    with pytest.raises(BundleError, match=r"adapters/2\.safetensors has SHA-256"):
        Bundle.open(toy)
    (toy / other.file).unlink()
    with pytest.raises(BundleError, match=r"adapters/2\.safetensors is missing"):
        Bundle.open(toy)
    (toy / other.file).write_bytes(b"second")
    bundle.remove_adapters(["a"])
    assert (toy / MANIFEST_FILE).read_bytes() == before
    with pytest.raises(BundleError, match="has no adapter 'a'; it has none"):
        bundle.remove_adapters(["a"])


def test_what_cannot_be_opened_again_is_not_written(toy: Path, tmp_path: Path) -> None:
    before = (toy / MANIFEST_FILE).read_bytes()
    adapter = Adapter(file="adapters/1.safetensors", layers=2, rank=4)
    (toy / "adapters").symlink_to(tmp_path)
    with pytest.raises(BundleError, match=r"adapters is a link, and links in a bundle are not followed; remove it"):
        Bundle.open(toy).save_adapter("a", adapter, b"first")
    assert not list(tmp_path.glob("*.safetensors"))
    (toy / "adapters").unlink()
    assert (toy / MANIFEST_FILE).read_bytes() == before
    bundle = Bundle.open(toy).save_adapter("a", adapter, b"first")
    full = replace(bundle.manifest, adapters={str(number): adapter for number in range(1000)})
    (toy / MANIFEST_FILE).write_text(dump_manifest(full))
    with pytest.raises(BundleError, match="expected at most 1000 entries, got 1001"):
        bundle.save_adapter("a", Adapter(file="adapters/2.safetensors", layers=2, rank=4), b"second")
    assert Bundle.open(toy).manifest == full
    assert [path.name for path in (toy / "adapters").iterdir()] == ["1.safetensors"]


def test_what_ends_before_the_manifest_is_written_leaves_no_file(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what ends after it leaves the file that is listed."""
    before = (toy / MANIFEST_FILE).read_bytes()
    adapter, real = Adapter(file="adapters/1.safetensors", layers=2, rank=4), write_atomically

    def ends(path: Path, content: bytes, *, late: bool) -> None:
        if path.name != MANIFEST_FILE or late:
            real(path, content)
        if path.name == MANIFEST_FILE:
            raise KeyboardInterrupt

    for late in (False, True):
        monkeypatch.setattr("tgate_engine.bundle.write_atomically", partial(ends, late=late))
        with pytest.raises(KeyboardInterrupt):
            Bundle.open(toy).save_adapter("a", adapter, b"first")
        assert (toy / adapter.file).exists() == late
        assert ((toy / MANIFEST_FILE).read_bytes() != before) == late
    assert Bundle.open(toy).manifest.adapters == {"a": adapter}


def test_a_file_that_another_lists_by_now_stays(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files go under the manifest's lock: whoever adds the same again waits for it."""
    adapter = Adapter(file="adapters/1.safetensors", layers=2, rank=4)
    bundle = Bundle.open(toy).save_adapter("a", adapter, b"first")
    real = locked

    @contextmanager
    def then(path: Path) -> Iterator[None]:
        with real(path):
            yield
        monkeypatch.setattr("tgate_engine.bundle.locked", real)
        Bundle.open(toy).save_adapter("b", adapter, b"first")

    monkeypatch.setattr("tgate_engine.bundle.locked", then)
    bundle.remove_adapters(["a"])
    assert Bundle.open(toy).manifest.adapters == {"b": adapter}


def test_an_adapters_file_is_listed(toy: Path) -> None:
    data = json.loads((toy / MANIFEST_FILE).read_bytes())
    del data["digest"]
    data["adapters"] = {"a": {"file": "adapters/1.safetensors", "layers": 1, "rank": 1}}
    (toy / MANIFEST_FILE).write_text(json.dumps({**data, "digest": content_digest(data)}))
    with pytest.raises(BundleError, match=r"the manifest lists no file 'adapters/1\.safetensors'"):
        Bundle.open(toy)


def test_a_plan_that_does_not_fit_is_not_saved(toy: Path) -> None:
    bundle = Bundle.open(toy)
    plan = planned(bundle, "new", steps=4, gate=2)
    before = (toy / MANIFEST_FILE).read_bytes()
    with pytest.raises(PlanError, match="plan 'new' names baseline 'nothing'"):
        bundle.save_plans({"new": replace(plan, baselines=("nothing",))})
    with pytest.raises(PlanError, match="reads cross"):
        bundle.save_plans({"new": replace(plan, steps=tuple(replace(step, writes=()) for step in plan.steps))})
    assert (toy / MANIFEST_FILE).read_bytes() == before


def test_plans_can_be_added_in_memory_alone(good: Path) -> None:
    bundle = Bundle.open(good)
    plan = planned(bundle, "new", steps=4, gate=2)
    assert bundle.with_plans({"new": plan}).manifest.plan("new") == plan
    assert "new" not in Bundle.open(good).manifest.plans


def test_plans_are_taken_out_in_place(toy: Path) -> None:
    bundle = Bundle.open(toy)
    base, fast = planned(bundle, "base", steps=4, gate=4), planned(bundle, "fast", steps=4, gate=2)
    bundle.save_plans({"base": base, "fast": replace(fast, baselines=("base",))})
    assert "fast" not in bundle.manifest.plans
    with pytest.raises(BundleError, match="plan 'base' is what 'fast' is measured against, and stays as long"):
        Bundle.open(toy).remove_plans(["base"])
    told = bundle.remove_plans(["base", "fast", "base"])
    assert Bundle.open(toy).manifest == told.manifest == bundle.manifest
    assert dict(told.manifest.files) == digests_of(toy), "nothing but the manifest has changed"
    assert [p.name for p in toy.parent.iterdir()] == ["toy"]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["default"], "plan 'default' is taken by every request that names none; it stays"),
        (["ungated"], "plan 'ungated' is what 'default' is measured against"),
        (["new", "nothing"], "the bundle has no plan 'nothing'; it has default, guidance_stopped, new, ungated"),
        (["new", "guidance_stopped"], "plan 'guidance_stopped' is what 'default' is measured against"),
    ],
)
def test_a_plan_that_is_needed_stays_and_all_others_with_it(toy: Path, names: list[str], says: str) -> None:
    bundle = Bundle.open(toy)
    bundle.save_plans({"new": planned(bundle, "new", steps=4, gate=2)})
    before = (toy / MANIFEST_FILE).read_bytes()
    with pytest.raises(BundleError, match=says):
        bundle.remove_plans(names)
    assert (toy / MANIFEST_FILE).read_bytes() == before


def test_plans_that_are_added_at_once_are_all_kept(toy: Path) -> None:
    """Each has opened the bundle before any of them writes; two have the same name, and one of those is told."""
    count = 8
    opened = threading.Barrier(count)

    def add(number: int) -> str:
        name = f"new{max(1, number)}"
        bundle = Bundle.open(toy)
        plan = planned(bundle, name, steps=4, gate=2 + number % 3)
        opened.wait(60)
        bundle.save_plans({name: plan})
        return name

    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(add, number) for number in range(count)]
    failed = [job for job in jobs if job.exception()]
    assert [str(job.exception()).partition(";")[0] for job in failed] == [f"{toy} already has a plan 'new1'"]
    saved = {job.result() for job in jobs if job not in failed}
    assert saved == {f"new{number}" for number in range(1, count)}
    assert saved <= Bundle.open(toy).manifest.plans.keys()
    assert [p.name for p in toy.iterdir() if p.name.startswith(".")] == []


ADD = """
import os, signal, sys
from dataclasses import replace
from functools import partial
from tgate_engine.bundle import Bundle
bundle = Bundle.open(sys.argv[1])
plan = replace(bundle.manifest.plan("default"), name=sys.argv[2], baselines=())
if len(sys.argv) > 3:
    os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
bundle.save_plans({sys.argv[2]: plan})
"""


def test_a_killed_writer_holds_no_lock_and_its_leftover_goes(toy: Path) -> None:
    before = (toy / MANIFEST_FILE).read_bytes()
    killed = subprocess.run([sys.executable, "-c", ADD, str(toy), "one", "killed"], timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [p.name for p in toy.iterdir() if p.name.startswith(".")]
    assert len(left) == 1
    assert (toy / MANIFEST_FILE).read_bytes() == before
    assert Bundle.open(toy).manifest.files == digests_of(toy), "what it left is no part of the bundle"
    subprocess.run([sys.executable, "-c", ADD, str(toy), "two"], timeout=60, check=True)
    assert [p.name for p in toy.iterdir() if p.name.startswith(".")] == []
    assert "two" in Bundle.open(toy).manifest.plans


BOTH = """
import sys
from dataclasses import replace
from functools import partial
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
bundle, turns = Bundle.open(sys.argv[1]), 0
plan = replace(bundle.manifest.plan("default"), baselines=())
input()
for turn in range(20):
    if sys.argv[2] == "add":
        bundle.save_plans({f"new{turn}": replace(plan, name=f"new{turn}")})
    else:
        bundle.remove_plans([f"old{turn}"])
"""


def test_two_processes_add_and_take_out_at_once(toy: Path) -> None:
    """Neither brings back what the other took out, nor loses what it added."""
    bundle = Bundle.open(toy)
    plan = replace(bundle.manifest.plan("default"), baselines=())
    bundle.save_plans({f"old{i}": replace(plan, name=f"old{i}") for i in range(20)})
    both = [
        subprocess.Popen([sys.executable, "-c", BOTH, str(toy), what], stdin=subprocess.PIPE, text=True)
        for what in ("add", "remove")
    ]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(60) for process in both] == [0, 0]
    for process in both:
        assert process.stdin is not None
        process.stdin.close()
    assert list(Bundle.open(toy).manifest.plans) == [*bundle.manifest.plans, *(f"new{i}" for i in range(20))]
    assert [p.name for p in toy.iterdir() if p.name.startswith(".")] == []


def test_a_plan_goes_into_the_bundle_that_is_there_by_then(toy: Path, large: Path) -> None:
    """Exported again meanwhile: graphs and plans are others by now, and a plan that still fits is added."""
    bundle = Bundle.open(toy)
    plan = planned(bundle, "new", steps=4, gate=2)
    with staging(toy, force=True) as stage:
        shutil.copytree(large, stage, dirs_exist_ok=True)
    want = Bundle.open(large).manifest
    assert bundle.save_plans({"new": plan}).manifest == replace(want, plans={**want.plans, "new": plan})
    assert Bundle.open(toy).manifest.shapes == want.shapes


def test_a_bundle_that_may_not_be_written_to_is_one_line(good: Path) -> None:
    """Root may write anywhere, so it becomes somebody else for a moment."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(shutil.copytree(good, Path(folder) / "toy"))
        for path in (Path(folder), *place.rglob("*")):
            path.chmod(0o755)
        place.chmod(0o555)
        bundle = Bundle.open(place)
        plan = planned(bundle, "new", steps=4, gate=2)
        us = os.geteuid()
        os.seteuid(us or 65534)
        try:
            with pytest.raises(BundleError, match=r"manifest.json cannot be written \(Permission denied\); copy"):
                bundle.save_plans({"new": plan})
        finally:
            os.seteuid(us)
        assert "new" not in Bundle.open(place).manifest.plans
        place.chmod(0o755)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mx", "x" * 201, "", "\udcff"], ids=repr)
def test_a_name_that_no_reader_takes_is_not_written(good: Path, tmp_path: Path, name: str) -> None:
    path = Path(shutil.copytree(good, tmp_path / "toy"))
    before = (path / MANIFEST_FILE).read_bytes()
    plan = planned(Bundle.open(path), name, steps=4, gate=2)
    with pytest.raises(PlanError, match="a plan's name is 1 to 200 printable characters"):
        Bundle.open(path).save_plans({name: plan})
    assert (path / MANIFEST_FILE).read_bytes() == before
