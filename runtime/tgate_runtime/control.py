"""Control pictures of a request: what its ControlNets look at, and at which steps each of them runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.control import MOST_SCALE, control_graph, nets_in, nets_of, scales_by_step
from tgate_engine.errors import RequestError, shown
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.image import fit
from tgate_runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Control:
    """What a request asks of one ControlNet of a bundle.

    ``image``: the picture that it looks at, made for it (edges, depth, …): RGB, resized (Lanczos) where it has another
    size than what is drawn. ``scale``: what it adds is multiplied with this; not 0. ``start``, ``end``: the part of the
    plan's network calls at which it runs, 0 to 1, as diffusers counts them
    (:func:`~tgate_engine.control.scales_by_step`). ``until_gate``: it stops where the plan's gate closes; else it goes
    on to ``end``.
    """

    image: Image.Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    until_gate: bool = False


Controls = Mapping[str, Control]
"""By the names of the bundle's ControlNets."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Steered:
    """A :class:`Control` as one image is drawn by it. ``picture``: uint8 [H, W, 3], of the size that is drawn.
    ``scales``: one for each step of the image's plan; at those of 0 the ControlNet does not run."""

    picture: NDArray[np.uint8]
    scales: tuple[float, ...]


def check_controls(controls: object, manifest: Manifest) -> None:
    """Raises :class:`RequestError` for control pictures of ControlNets that the bundle has not, and numbers that are
    none, change nothing or are out of bounds; no picture is read. None asks for nothing."""
    if controls is None:
        return
    if not isinstance(controls, Mapping):
        raise RequestError(
            'controls are Control(image=…) by the names of ControlNets, such as {"canny": Control(image=edges)}, got '
            f"{type(controls).__name__} {shown(controls)}"
        )
    known = nets_in(manifest.shapes[0].graphs)
    for name, control in controls.items():
        if name not in known:
            have = ", ".join(known) or "none; export it with --controlnet NAME=DIR"
            raise RequestError(f"the bundle has no ControlNet '{shown(name)}'; it has {have}")
        if not isinstance(control, Control):
            raise RequestError(
                f"ControlNet {name!r} takes a Control, which has its image, got {type(control).__name__} "
                f"{shown(control)}"
            )
        _check_numbers(name, control)


def _check_numbers(name: str, control: Control) -> None:
    scale, start, end = control.scale, control.start, control.end
    if not _number(scale) or not 0 < abs(scale) <= MOST_SCALE:
        raise RequestError(
            f"the scale of ControlNet {name!r} is {shown(scale)}; a number other than 0, which would change nothing, "
            f"and of at most {MOST_SCALE:.0f} is wanted"
        )
    if not _number(start) or not _number(end) or not 0 <= start < end <= 1:
        raise RequestError(
            f"ControlNet {name!r} runs from {shown(start)} to {shown(end)} of the way; two numbers from 0 to 1 are "
            "wanted, the first one smaller"
        )
    if not isinstance(control.until_gate, bool):
        raise RequestError(f"until_gate of ControlNet {name!r} must be True or False, got {shown(control.until_gate)}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def scales_of_controls(controls: Controls | None, plan: Plan, manifest: Manifest) -> dict[str, tuple[float, ...]]:
    """By ControlNet, the scale of each step of ``plan``, which is what is left of one where a request begins in the
    middle. Raises :class:`RequestError` as :func:`check_controls` does, for a ControlNet that runs at no step, and for
    a plan whose graphs take nothing of one."""
    check_controls(controls, manifest)
    scales = {}
    for name, control in (controls or {}).items():
        each = scales_by_step(
            plan,
            scale=float(control.scale),
            start=float(control.start),
            end=float(control.end),
            until_gate=control.until_gate,
        )
        graphs = manifest.shapes[0].graphs
        takes = [name in nets_of(graphs[step.graph]) for step in plan.steps]
        if not any(take and scale for take, scale in zip(takes, each, strict=True)):
            raise RequestError(
                f"ControlNet {name!r} would change nothing: the graphs of plan '{shown(plan.name)}' take nothing of it "
                "at those steps"
            )
        scales[name] = each
    return scales


def steered(session: Session, controls: Controls | None, plan: Plan, size: str | None = None) -> dict[str, Steered]:
    """What :meth:`~tgate_runtime.state.State.begin` takes for an image of such a request, by ControlNet. Thread-safe.

    ``plan``: as :func:`scales_of_controls` takes it. The ControlNets' graphs are loaded here, where they are not yet.
    Raises :class:`RequestError` as :func:`scales_of_controls` and :func:`~tgate_runtime.image.fit` do, and
    :class:`~tgate_engine.errors.EngineError` for a graph that the engine cannot load.
    """
    scales = scales_of_controls(controls, plan, session.manifest)
    shapes, result = session.shapes(size), {}
    for name, each in scales.items():
        assert controls is not None  # there are scales
        picture = fit(controls[name].image, shapes[0].width, shapes[0].height)
        result[name] = Steered(picture=np.asarray(picture, np.uint8), scales=each)
        for shape in shapes:
            for graph in dict.fromkeys(step.graph for step, scale in zip(plan.steps, each, strict=True) if scale):
                if name in nets_of(shape.graphs[graph]):
                    session.executable(control_graph(shape.graphs, graph, name))
    return result
