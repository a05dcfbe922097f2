"""Samplers by name: which diffusers scheduler each one is, and why others are none. Needs no diffusers."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from tgate_engine.errors import ExportError, shown
from tgate_engine.sampler import Fact


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sampler's name, in diffusers' terms.

    ``scheduler``: class in diffusers. ``paper``: where it is defined.
    ``overrides``: options that the name itself fixes, whatever the checkpoint says.
    ``unless_stated``: options set only where the checkpoint's configuration does not mention them.
    ``edm``: class and options for networks trained under EDM's preconditioning; None where diffusers has none.
    ``flow``: the same for networks trained by flow matching (arXiv 2210.02747, 2403.03206).
    """

    scheduler: str
    paper: str
    overrides: Mapping[str, Fact] = field(default_factory=dict)
    unless_stated: Mapping[str, Fact] = field(default_factory=dict)
    edm: tuple[str, Mapping[str, Fact]] | None = None
    flow: tuple[str, Mapping[str, Fact]] | None = None


def _dpmpp(order: int, *, karras: bool) -> dict[str, Fact]:
    return {"solver_order": order, "algorithm_type": "dpmsolver++", "use_karras_sigmas": karras}


def _edm_dpmpp(order: int, **further: Fact) -> tuple[str, Mapping[str, Fact]]:
    """EDM's own noise levels are Karras's unless the checkpoint has others (sigma_schedule)."""
    return "EDMDPMSolverMultistepScheduler", {"solver_order": order, "algorithm_type": "dpmsolver++", **further}


def _flow(scheduler: str, **options: Fact) -> tuple[str, Mapping[str, Fact]]:
    """A class that has noise levels of its own, told to take those of flow matching, and what such networks predict."""
    levels: dict[str, Fact] = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
    return scheduler, {**levels, "use_flow_sigmas": True, "prediction_type": "flow_prediction", **options}


FLOW_EULER = "FlowMatchEulerDiscreteScheduler"
"""diffusers' Euler for flow matching, whose configuration most such checkpoints bring."""

SAMPLERS: Mapping[str, Recipe] = {
    # DDIM clips to [-1, 1] by default, which suits pixels. Latents are not bounded, and the DDIM
    # configurations of Stable Diffusion switch it off; a configuration that is silent means the same.
    "ddim": Recipe(
        scheduler="DDIMScheduler",
        paper="Song et al., arXiv 2010.02502, equation 12 with eta = 0",
        unless_stated={"clip_sample": False},
    ),
    "euler": Recipe(
        scheduler="EulerDiscreteScheduler",
        paper="Karras et al., arXiv 2206.00364, algorithm 2",
        edm=("EDMEulerScheduler", {}),
        flow=(FLOW_EULER, {}),
    ),
    "dpmpp_2m": Recipe(
        scheduler="DPMSolverMultistepScheduler",
        paper="Lu et al., arXiv 2211.01095, algorithm 2",
        overrides=_dpmpp(2, karras=False),
        edm=_edm_dpmpp(2),
        flow=_flow("DPMSolverMultistepScheduler", solver_order=2, algorithm_type="dpmsolver++"),
    ),
    "dpmpp_2m_karras": Recipe(
        scheduler="DPMSolverMultistepScheduler",
        paper="Lu et al., arXiv 2211.01095, algorithm 2, at the noise levels of arXiv 2206.00364, equation 5",
        overrides=_dpmpp(2, karras=True),
        edm=_edm_dpmpp(2, sigma_schedule="karras"),
    ),
    "dpmpp_3m": Recipe(
        scheduler="DPMSolverMultistepScheduler",
        paper="Lu et al., arXiv 2211.01095, appendix",
        overrides=_dpmpp(3, karras=False),
        edm=_edm_dpmpp(3),
        flow=_flow("DPMSolverMultistepScheduler", solver_order=3, algorithm_type="dpmsolver++"),
    ),
    "unipc": Recipe(
        scheduler="UniPCMultistepScheduler",
        paper="Zhao et al., arXiv 2302.04867",
        flow=_flow("UniPCMultistepScheduler"),
    ),
    # Stable Diffusion leaves the Runge-Kutta start out, and calls the network n + 1 times.
    "pndm": Recipe(
        scheduler="PNDMScheduler",
        paper="Liu et al., arXiv 2202.09778, without the Runge-Kutta start",
        overrides={"skip_prk_steps": True},
    ),
    "lms": Recipe(scheduler="LMSDiscreteScheduler", paper="Katherine Crowson's k-diffusion; Adams-Bashforth"),
    "lcm": Recipe(
        scheduler="LCMScheduler",
        paper="Luo et al., arXiv 2310.04378, algorithm 3: stochastic",
        unless_stated={"clip_sample": False},
    ),
    "scm": Recipe(
        scheduler="SCMScheduler",
        paper="Lu and Song, arXiv 2410.11081, with the times of SANA-Sprint, arXiv 2503.09641: stochastic",
        # The pipeline multiplies latents by it before, and divides them after: of one that is 1 nothing is left.
        overrides={"sigma_data": 1.0},
    ),
    "euler_a": Recipe(
        scheduler="EulerAncestralDiscreteScheduler",
        paper="Katherine Crowson's k-diffusion, ancestral Euler: stochastic",
    ),
    "deis": Recipe(
        scheduler="DEISMultistepScheduler",
        paper="Zhang and Chen, arXiv 2204.13902",
        overrides={"algorithm_type": "deis"},
    ),
}

_TWICE = (
    "its step calls the network twice, the second time at a point that the first one found, and a plan's step is one "
    "call"
)
_NOISE = "it draws noise in every step in a way that is not compiled"
_REFUSED: Mapping[str, tuple[str, str]] = {
    "heun": (_TWICE, "euler or dpmpp_2m"),
    "dpm2": (_TWICE, "dpmpp_2m"),
    "kdpm2": (_TWICE, "dpmpp_2m"),
    "dpm2a": (_TWICE, "euler_a"),
    "dpmpp2s": (_TWICE, "dpmpp_2m"),
    "dpmpp2sa": (_TWICE, "euler_a"),
    "dpmsolversinglestep": (_TWICE, "dpmpp_2m"),
    "dpmppsde": (_NOISE, "euler_a"),
    "dpmpp2msde": (_NOISE, "dpmpp_2m, or euler_a"),
    "dpmpp3msde": (_NOISE, "dpmpp_3m, or euler_a"),
    "ddpm": (_NOISE, "ddim, or euler_a"),
    "tcd": (_NOISE, "lcm"),
    "sasolver": (_NOISE, "unipc, or euler_a"),
}
"""Samplers that people know and that are none here, by their names without marks: why, and what to take instead."""


def check_sampler(name: str) -> None:
    """Raises :class:`ExportError` for a name that is no sampler here, with the reason or the nearest name."""
    if name in SAMPLERS:
        return
    known = f"Known samplers: {', '.join(SAMPLERS)}."
    plain = re.sub(r"[^a-z0-9]", "", name[:64].lower().replace("++", "pp").removesuffix("scheduler"))
    plain = re.sub(r"(discrete|multistep|karras|inverse)", "", plain)
    if plain in _REFUSED:
        reason, instead = _REFUSED[plain]
        raise ExportError(f"sampler '{shown(name)}' cannot be exported: {reason}; take {instead}. {known}")
    near = difflib.get_close_matches(name[:64], SAMPLERS, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ExportError(f"there is no sampler '{shown(name)}'.{hint} {known}")
