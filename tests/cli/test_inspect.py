"""The numbers behind ``tgate inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.toy_bundle import Toy, build
from tgate_cli.inspect import carry_bytes, describe, guidance_stopped, memory, shortened, ungated
from tgate_engine.bundle import Bundle
from tgate_engine.schedule import Schedule
from tgate_runtime.backends import Buffer
from tgate_runtime.binding import Binding
from tgate_runtime.session import Session

SCHEDULES = {
    "default": Schedule(steps=8, gate=5, self_interval=2),
    "fast": Schedule(steps=4, gate=2, fidelity_interval=2),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("inspect") / "toy", Toy(schedules=SCHEDULES)))


def test_a_plan_step_by_step(bundle: Bundle) -> None:
    data = json.loads(json.dumps(describe(bundle)))
    plan = data["plans"]["default"]
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
    assert plan["macs_ungated"] == {"paper": 8 * 2000, "all": 8 * 2600}
    assert all(sum(s["macs"][what] for s in plan["steps"]) == plan["macs"][what] for what in ("paper", "all"))


def test_sizes(bundle: Bundle) -> None:
    data = describe(bundle)
    on_disk = {p.name: p.stat().st_size for p in bundle.path.rglob("*") if p.is_file()}
    assert data["bytes"]["weights"] == on_disk["weights.safetensors"]
    assert data["bytes"]["graphs"] == sum(size for name, size in on_disk.items() if name.endswith(".onnx"))
    assert data["bytes"]["total"] == sum(p.stat().st_size for p in bundle.path.rglob("*") if p.is_file())
    # Two self carries for both halves, two cross carries for one, 32 features of 4 bytes.
    assert data["plans"]["default"]["carry_bytes"] == (2 * 2 + 2) * 32 * 4
    assert carry_bytes(bundle.manifest.plan("default"), bundle.manifest, batch=3) == 3 * (2 * 2 + 2) * 32 * 4


def test_the_plans_that_it_is_compared_with(bundle: Bundle, tmp_path: Path) -> None:
    plan = bundle.manifest.plan("default")
    assert [s.graph for s in ungated(plan, bundle.manifest).steps] == ["full"] * 8
    stopped = guidance_stopped(plan, bundle.manifest)
    assert stopped is not None
    assert [s.graph for s in stopped.steps] == ["full"] * 5 + ["unguided"] * 3
    stopped.check(bundle.manifest)
    alone = Bundle.open(build(tmp_path / "toy", Toy(guided=False))).manifest
    assert guidance_stopped(alone.plan("default"), alone) is None


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


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_request_takes_the_memory_that_is_said(bundle: Bundle, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that a binding allocates, and nothing else."""
    with Session.open(bundle, threads=1) as session:
        plan, taken = bundle.manifest.plan(name), []
        allocate = session.backend.allocate

        def counting(shape: tuple[int, ...], dtype: str) -> Buffer:
            buffer = allocate(shape, dtype)
            taken.append(buffer.read().nbytes)
            return buffer

        monkeypatch.setattr(session.backend, "allocate", counting)
        for batch in (1, 2):
            taken.clear()
            Binding(session, plan, batch)
            assert memory(plan, bundle.manifest, batch=batch)["request"] == sum(taken)


def test_scratch_is_the_hungriest_step(mini_bundle: Path) -> None:
    manifest = Bundle.open(mini_bundle).manifest
    need = {name: memory(manifest.plan(name), manifest) for name in manifest.plans}
    assert need["ungated"]["request"] < need["default"]["request"]  # it has no carries
    for name, plan in manifest.plans.items():
        most = max(manifest.graphs[graph].scratch_bytes for graph in plan.graphs())
        assert 0 < most <= need[name]["scratch"]
        assert need[name]["peak"] == sum(need[name][part] for part in ("weights", "request", "scratch"))
