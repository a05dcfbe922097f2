"""Names, graphs and steps of ControlNets: what fits together, and what does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.contract.plans import build as plan_of
from tests.contract.plans import graph
from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.control import (
    check_control_name,
    control_graph,
    controls_for,
    nets_in,
    nets_of,
    picture_name,
    scales_by_step,
)
from tgate_engine.errors import BundleError, RequestError
from tgate_engine.footprint import buffers, memory
from tgate_engine.graph import CONTROL
from tgate_export.methods.base import FULL, Settings
from tgate_export.methods.tgate import REUSE_CROSS, REUSE_SELF

NETS = ("edges", "depth")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("control") / "toy", Toy(controls=NETS))


@pytest.mark.parametrize("name", ["canny", "a", "0", "Depth_2-b", "x" * 64])
def test_names(name: str) -> None:
    assert check_control_name(name) == name


@pytest.mark.parametrize("name", ["", "-a", "a.b", "a b", "x" * 65, "é", None, 3])
def test_what_is_no_name(name: Any) -> None:
    with pytest.raises(RequestError, match="a ControlNet's name is 1 to 64 letters"):
        check_control_name(name)


@pytest.mark.parametrize("calls", [1, 2, 7, 25, 50])
def test_scales_are_those_of_diffusers(calls: int) -> None:
    """The formula of its pipelines, for many parts of the way."""
    plan, tried = plan_of({"g": graph("", "")}, ["g"] * calls), 0
    for start in np.linspace(0, 0.9, 10):
        for end in np.linspace(start + 0.1, 1, 5):
            keeps = [1.0 - float(i / calls < start or (i + 1) / calls > end) for i in range(calls)]
            if any(keeps):
                assert scales_by_step(plan, scale=1.0, start=start, end=end) == tuple(keeps)
                tried += 1
    assert tried


def test_a_shape_knows_its_controlnets(path: Path) -> None:
    graphs = Bundle.open(path).manifest.shapes[0].graphs
    assert nets_in(graphs) == NETS
    assert nets_of(graphs[FULL]) == NETS
    both, one = (control_graph(graphs, name, "edges").file for name in (FULL, REUSE_CROSS))
    assert (both, one) == ("control-edges-negative-positive.onnx", "control-edges-negative.onnx")
    assert control_graph(graphs, REUSE_SELF, "edges").file == both
    beside = controls_for(graphs, [FULL, REUSE_SELF])
    assert [*beside] == [f"control-{net}-negative-positive" for net in NETS]
    assert not nets_in({name: spec for name, spec in graphs.items() if spec.role == CONTROL})


def test_what_they_take_is_counted(path: Path, tmp_path: Path) -> None:
    """Pictures and residuals have buffers, one for all graphs of both halves and of one."""
    manifest = Bundle.open(path).manifest
    plain = Bundle.open(build(tmp_path / "plain", Toy())).manifest
    own, without = (buffers(m.shapes[0].graphs, [m.plan("default")]) for m in (manifest, plain))
    assert {name for name in own if name not in without} == {
        *(f"control.{net}" for net in NETS),
        *map(picture_name, NETS),
        *(f"control.{net}.{i}.{half}" for net in NETS for i in (0, 1) for half in ("negative", "positive")),
    }
    asked, plainly = (memory(m.plan("default"), m, m.shapes[0], batch=3)["request"] for m in (manifest, plain))
    assert asked - plainly == 3 * 2 * (4 + 4 * 4 * 3 + 4 * 32 * 4)


def _graphs(data: dict[str, Any]) -> dict[str, Any]:
    graphs: dict[str, Any] = data["shapes"][0]["graphs"]
    return graphs


def _without(data: dict[str, Any]) -> None:
    del _graphs(data)["control-edges-negative"]


def _unused(data: dict[str, Any]) -> None:
    del _graphs(data)["control-edges-negative"]["outputs"][0]
    for name in ("reuse_cross", "reuse_both"):
        graph = _graphs(data)[name]
        graph["inputs"] = [t for t in graph["inputs"] if not t["name"].startswith("control.edges")]


def _no_scale(data: dict[str, Any]) -> None:
    graph = _graphs(data)["reuse_cross"]
    graph["inputs"] = [t for t in graph["inputs"] if t["name"] != "control.edges"]


def _scale_alone(data: dict[str, Any]) -> None:
    graph = _graphs(data)["reuse_cross"]
    graph["inputs"] = [t for t in graph["inputs"] if not t["name"].startswith("control.edges.")]


def _another_form(data: dict[str, Any]) -> None:
    _graphs(data)["control-edges-negative"]["outputs"][0]["shape"] = ["batch", 31]


def _another_picture(data: dict[str, Any]) -> None:
    _graphs(data)["control-edges-negative"]["inputs"][-1]["shape"] = ["batch", 4, 5, 3]


def _anothers_picture(data: dict[str, Any]) -> None:
    _graphs(data)["control-edges-negative"]["inputs"][-1]["name"] = picture_name("depth")


def _other_batches(data: dict[str, Any]) -> None:
    _graphs(data)["control-edges-negative"]["batch"] = [1, 8]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_without, "takes 2 tensors of ControlNet 'edges', which no graph gives as they are"),
        (_unused, "graph 'control-edges-negative' gives what no denoising graph takes"),
        (_no_scale, "graph 'reuse_cross' takes of ControlNet 'edges' residuals without their scale"),
        (_scale_alone, "graph 'reuse_cross' takes of ControlNet 'edges' a scale without residuals"),
        (_another_form, "in another form than control-edges-negative.onnx gives it"),
        (_another_picture, "graph 'control-edges-negative' does not take one picture for each image, of 4 x 4 pixels"),
        (_anothers_picture, "does not take one picture for each image"),
        (_other_batches, "is for 1 to 8 images, and its shape for 1 to 4"),
    ],
)
def test_what_does_not_fit_is_refused_when_a_bundle_is_opened(
    tmp_path: Path, damage: Callable[[dict[str, Any]], None], told: str
) -> None:
    place = build(tmp_path / "toy", Toy(controls=NETS))
    edit_manifest(place, damage)
    with pytest.raises(BundleError, match=told):
        Bundle.open(place)


def test_a_gate_is_where_the_second_phase_begins(path: Path) -> None:
    plan = Bundle.open(path).manifest.plan("default")
    assert plan.gate == 5
    assert replace(plan, steps=plan.steps[:5]).gate is None
    assert Settings(steps=8, gate=5).gate == plan.gate
