"""The list of methods; and plans are made of it where nothing is installed that builds graphs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tgate_engine.errors import MethodError
from tgate_engine.plan import Plan
from tgate_export.methods import METHODS, find_method
from tgate_export.plans import add_plan

HEAVY = ("accelerate", "diffusers", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "torch", "transformers")

ELSEWHERE = """
import json, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
import tgate_export.methods, tgate_export.plans
from pathlib import Path
from tgate_engine.bundle import Bundle
from tgate_export.plans import add_plan

plans = add_plan(Path({bundle!r}), name="other", m=7, k=3, steps=20, warm_up=1, save=False)
print(json.dumps({{name: plan.to_json() for name, plan in plans.items()}}))
try:
    add_plan(Path({bundle!r}), name="another", m=7, steps=33, save=False)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_every_method_has_the_name_it_is_listed_by() -> None:
    assert list(METHODS) == [
        "tgate",
        "guidance_delta",
        "tgate+guidance_delta",
        "deepcache",
        "tgate+deepcache",
        "forecast",
        "tome",
        "tgate+tome",
    ]
    assert all(find_method(name).name == name for name in METHODS)


def test_an_unknown_method_is_refused_with_those_there_are() -> None:
    with pytest.raises(MethodError, match=r"unknown method 'toca'; choose one of tgate, guidance_delta, tgate\+"):
        find_method("toca")


def test_a_plan_is_made_without_what_builds_graphs(mini_bundle: Path) -> None:
    """Of other settings and another number of steps; outside the bundle's tables one line names the extra."""
    script = ELSEWHERE.format(heavy=HEAVY, bundle=str(mini_bundle))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    made, refused = done.stdout.strip().splitlines()
    plans = {name: Plan.from_json(data) for name, data in json.loads(made).items()}
    assert list(plans) == ["other", "other.ungated", "other.guidance_stopped"]
    graphs = [step.graph for step in plans["other"].steps]
    # w = 1, k = 3, m = 7: computed at 0, 1, 3 and 6, the gate step; from 7 on cross-attention is reused.
    assert graphs == [
        *("full", "full", "reuse_self", "full", "reuse_self", "reuse_self", "full"),
        *("reuse_cross",) * 13,
    ]
    assert "33 steps" in refused
    assert "tgate-engine[export]" in refused


@pytest.mark.parametrize("method", [name for name in METHODS if name != "tgate"])
def test_a_plan_is_of_the_bundles_own_method(tiny_bundle: Callable[..., Path], method: str) -> None:
    bundle = tiny_bundle("conv_projection", method=method, batch=(2, 2))
    plans = add_plan(bundle, name="other", m=4 if find_method(method).gated else None, steps=6, save=False)
    assert plans["other"].settings["method"] == method
    before, shallow = ["full"] * 4, ["full", "shallow", "shallow", "full"]
    wanted = {
        "guidance_delta": [*before, "reuse_delta", "reuse_delta"],
        "tgate+guidance_delta": [*before, "reuse_cross", "reuse_cross"],
        "deepcache": [*shallow, "shallow", "shallow"],
        "tgate+deepcache": [*shallow, "reuse_cross", "shallow_reuse_cross"],
        "forecast": [*before, "full"],
        "tome": ["merged"] * 6,
        "tgate+tome": [*["merged"] * 4, "merged_reuse_cross", "merged_reuse_cross"],
    }
    assert [step.graph for step in plans["other"].steps] == wanted[method]
