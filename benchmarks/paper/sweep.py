"""Tables 1, 2 and 6: the plans of an engine's bundle, with m, k, guidance scale, number of steps and sampler varied."""

from __future__ import annotations

from dataclasses import replace

from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_export.methods import find_method
from tgate_export.methods.base import settings_of
from tgate_export.methods.late import Late
from tgate_export.plans import make_plans, sampler_of

GATES = (5, 10, 15, 20)
INTERVALS = (3, 5)
SCALES = (3.5, 7.5)
LENGTHS = (15, 50)
SAMPLERS = ("euler", "ddim")


def sweep(bundle: Bundle) -> dict[str, Plan]:
    """The plans by what they vary; each variation of scale, length and sampler ungated and gated."""
    default = bundle.manifest.plan("default")
    m, n = settings_of(default.settings).gate, default.sampler.steps
    plans = {"ungated": _plan(bundle), **{f"m={gate}": _plan(bundle, m=gate) for gate in GATES}}
    plans |= {f"m={gate} k={k}": _plan(bundle, m=gate, k=k) for gate in GATES[1:3] for k in INTERVALS}
    k = settings_of(default.settings).self_interval
    for name, changes in (
        [(f"guidance {scale:g}", {"scale": scale}) for scale in SCALES]
        + [(f"n={length}", {"n": length}) for length in LENGTHS]
        + [(sampler, {"sampler": sampler}) for sampler in SAMPLERS]
    ):
        gate = max(1, round(m * int(changes.get("n", n)) / n))
        plans[f"{name}, ungated"] = _plan(bundle, **changes)
        plans[f"{name}, m={gate}"] = _plan(bundle, m=gate, **changes)
        plans[f"{name}, m={gate} k={k}"] = _plan(bundle, m=gate, k=k, **changes)
    return plans


def _plan(
    bundle: Bundle,
    *,
    m: int | None = None,
    k: int = 1,
    n: int | None = None,
    scale: float | None = None,
    sampler: str | None = None,
) -> Plan:
    """One plan of the paper's method; without ``m`` the ungated one."""
    manifest = bundle.manifest
    default = manifest.plan("default")
    steps = n or default.sampler.steps
    own = settings_of(default.settings)
    plans = make_plans(
        "other",
        find_method("tgate"),
        replace(own, steps=steps, gate=steps if m is None else m, self_interval=k),
        sampler=sampler_of(bundle, sampler or default.sampler.name, steps),
        guidance_scale=scale or default.guidance_scale,
        guided=manifest.guided,
        graphs=manifest.shapes[0].graphs,
        carries=manifest.carries,
        late=Late.of(default.settings, default.guidance_scale),
    )
    return plans["other" if m is not None else "other.ungated"]
