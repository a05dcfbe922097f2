"""Bundles: opened distrustfully, and given more plans in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import Toy, edit_manifest, make_plan
from tgate_engine.bundle import Bundle, digests_of, sha256_of
from tgate_engine.errors import BundleError, PlanError
from tgate_engine.manifest import MANIFEST_FILE, FileDigest
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
    with pytest.raises(BundleError, match=r"full\.onnx is missing or not a plain file"):
        Bundle.open(toy)


def test_a_directory_that_is_a_link_is_refused(toy: Path, good: Path) -> None:
    (toy / "tokenizer").rename(toy.parent / "elsewhere")
    (toy / "tokenizer").symlink_to(toy.parent / "elsewhere")
    with pytest.raises(BundleError, match=r"tokenizer/0\.json is missing or not a plain file"):
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
