"""The numbers behind ``tgate inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import Toy, build, edit_manifest
from tgate_cli.inspect import describe, shortened
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_export.methods.base import Settings

SETTINGS = {
    "default": Settings(steps=8, gate=5, self_interval=2),
    "fast": Settings(steps=4, gate=2, fidelity_interval=2),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two plans with their baselines, two sizes, two ranges of batches. Read only."""
    toy = Toy(settings=SETTINGS, sizes=((4, 4), (8, 2)), batches=((1, 1), (2, 4)))
    return Bundle.open(build(tmp_path_factory.mktemp("inspect") / "toy", toy, goldens=False))


def test_a_plan_step_by_step(bundle: Bundle) -> None:
    data = json.loads(json.dumps(describe(bundle)))
    plan = data["plans"]["default"]
    assert plan["settings"] == {"method": "tgate", "n": 8, "m": 5, "k": 2, "w": 2, "f": 1}
    assert [s["graph"] for s in plan["steps"]] == ["full"] * 3 + ["reuse_self", "full"] + ["reuse_cross"] * 3
    assert plan["steps"][3] == {
        "index": 3,
        "phase": "semantics-planning",
        "graph": "reuse_self",
        "timestep": 909.5,
        "reads": ["self.0", "self.1"],
        "writes": [],
        "macs": {"paper": 1600, "all": 1700},
    }
    assert plan["macs"] == {"paper": 4 * 2000 + 1600 + 3 * 800, "all": 4 * 2600 + 1700 + 3 * 1100}
    assert all(sum(s["macs"][what] for s in plan["steps"]) == plan["macs"][what] for what in ("paper", "all"))


def test_the_plans_that_it_is_compared_with(bundle: Bundle) -> None:
    plans = describe(bundle)["plans"]
    assert plans["default"]["baselines"] == {
        "ungated": {"macs": {"paper": 8 * 2000, "all": 8 * 2600}},
        "guidance_stopped": {"macs": {"paper": 5 * 2000 + 3 * 1000, "all": 5 * 2600 + 3 * 1300}},
    }
    assert plans["fast"]["baselines"] == {
        "fast.ungated": {"macs": {"paper": 4 * 2000, "all": 4 * 2600}},
        "fast.guidance_stopped": {"macs": {"paper": 2 * 2000 + 2 * 1000, "all": 2 * 2600 + 2 * 1300}},
    }
    assert plans["ungated"]["baselines"] == {}


def test_baselines_are_taken_as_they_are_stored(bundle: Bundle, tmp_path: Path) -> None:
    """Whatever the method: it is for export to know what a plan is to be measured against."""

    def edit(manifest: dict[str, Any]) -> None:
        manifest["plans"]["default"]["settings"] = {"method": "another", "rate": 0.5}
        manifest["plans"]["default"]["baselines"] = ["fast"]

    other = build(tmp_path / "toy", Toy(settings=SETTINGS))
    edit_manifest(other, edit)
    plan = describe(Bundle.open(other))["plans"]["default"]
    assert plan["settings"] == {"method": "another", "rate": 0.5}
    assert plan["baselines"] == {"fast": {"macs": describe(bundle)["plans"]["fast"]["macs"]}}


def test_bytes(bundle: Bundle) -> None:
    data = describe(bundle)
    on_disk = {p.name: p.stat().st_size for p in bundle.path.rglob("*") if p.is_file()}
    assert data["bytes"]["weights"] == on_disk["weights.safetensors"]
    assert data["bytes"]["graphs"] == sum(size for name, size in on_disk.items() if name.endswith(".onnx"))
    assert data["bytes"]["total"] == sum(p.stat().st_size for p in bundle.path.rglob("*") if p.is_file())
    # Two self carries for both halves, two cross carries for one, 32 features of 4 bytes.
    assert data["plans"]["default"]["carry_bytes"] == (2 * 2 + 2) * 32 * 4
    assert data["plans"]["ungated"]["carry_bytes"] == 0


def test_every_size_and_range_of_batches(bundle: Bundle) -> None:
    shapes = describe(bundle)["shapes"]
    assert [(s["width"], s["height"], s["batch"], s["latents"]) for s in shapes] == [
        (4, 4, [1, 1], [2, 4, 4]),
        (4, 4, [2, 4], [2, 4, 4]),
        (8, 2, [1, 1], [2, 2, 8]),
        (8, 2, [2, 4], [2, 2, 8]),
    ]
    on_disk = {p.name: p.stat().st_size for p in bundle.path.glob("*.onnx")}
    roles = {"text": "text", "decoder": "decode"}
    for shape in shapes:
        for name, graph in shape["graphs"].items():
            assert (graph["role"], graph["bytes"]) == (roles.get(name, "denoise"), on_disk[graph["file"]])
    assert shapes[3]["graphs"]["full"] == {
        "file": "full-8x2-batch-2-4.onnx",
        "role": "denoise",
        "bytes": on_disk["full-8x2-batch-2-4.onnx"],
        "macs": {"paper": 2000, "all": 2600},
    }


def test_plans_are_described_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["shapes"][1]["graphs"]["full"]["macs"] = {"paper": 5, "all": 7}

    path = build(tmp_path / "toy", Toy(sizes=((4, 4), (8, 2))), goldens=False)
    edit_manifest(path, edit)
    bundle = Bundle.open(path)
    ungated = {size: describe(bundle, size)["plans"]["ungated"]["macs"] for size in (None, "4x4", "8x2")}
    assert ungated == {size: {"paper": 8 * 2000, "all": 8 * 2600} for size in (None, "4x4")} | {
        "8x2": {"paper": 40, "all": 56}
    }
    at = describe(bundle, "8x2")
    assert (describe(bundle)["size"], at["size"]) == ("4x4", "8x2")
    assert at["plans"]["default"]["baselines"]["ungated"]["macs"] == {"paper": 40, "all": 56}
    assert at["plans"]["default"]["steps"][0]["macs"] == {"paper": 5, "all": 7}
    with pytest.raises(BundleError, match="no size 2x2; it has 4x4, 8x2"):
        describe(bundle, "2x2")


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ([], ""),
        (["self.0"], "self.0"),
        (["self.0", "self.1"], "self.0, self.1"),
        ([f"self.{i}" for i in range(70)], "self.0 … self.69 (70)"),
        ([f"{k}.{i}" for i in range(3) for k in ("cross", "self")], "cross.0 … cross.2 (3), self.0 … self.2 (3)"),
        ([f"self.{i}.mean" for i in range(4)], "self.0.mean … self.3.mean (4)"),
        (["odd", "self.0"], "odd, self.0"),
    ],
)
def test_long_lists_of_carries_are_shortened(names: list[str], shown: str) -> None:
    assert shortened(names) == shown
