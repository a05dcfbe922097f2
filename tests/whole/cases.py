"""What the tests of whole trajectories share: plans of a bundle's own method, and how far two results are apart."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from tgate_engine.bundle import DEFAULT, Bundle
from tgate_engine.plan import Plan
from tgate_export.methods import find_method
from tgate_export.methods.late import Late
from tgate_export.plans import make_plans
from tgate_export.sampling import compile_sampler

TOLERANCE = 1e-4
"""Largest absolute difference over largest absolute value, float32."""

NAME, UNGATED, GUIDANCE_STOPPED = "case", "case.ungated", "case.guidance_stopped"
"""Names of the plan of a case, and of its baselines."""


def plans_of(
    bundle: Bundle,
    *,
    n: int,
    m: int,
    k: int = 1,
    f: int = 1,
    w: int = 2,
    g: int = 0,
    r: int = 0,
    sampler: str,
    guidance_scale: float | None = None,
) -> dict[str, Plan]:
    """The plan :data:`NAME` over a bundle's graphs, and its baselines. Settings that its method has not are left out.

    ``r``: with it, the method is forecasts alone. ``guidance_scale``: None is the bundle's.
    """
    manifest = bundle.manifest
    made = find_method("forecast" if r else str(manifest.plan(DEFAULT).settings["method"]))
    named = {name: value for name, value in {"k": k, "f": f, "w": w, "g": g}.items() if name in made.takes}
    return make_plans(
        NAME,
        made,
        made.settings(steps=n, gate=m, r=r or None, defaults={}, **named),
        sampler=compile_sampler(sampler, manifest.scheduler, n),
        guidance_scale=manifest.guidance_scale if guidance_scale is None else guidance_scale,
        guided=manifest.guided,
        graphs=manifest.shapes[0].graphs,
        carries=manifest.carries,
        late=Late.of(manifest.plan(DEFAULT).settings, manifest.plan(DEFAULT).guidance_scale),
    )


def relative(got: NDArray[np.float32], want: torch.Tensor | NDArray[np.float32]) -> float:
    """The largest absolute difference over the largest absolute value."""
    expected = np.asarray(want, np.float64)
    assert got.shape == expected.shape
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())
