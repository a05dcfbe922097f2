"""Samplers by name: which diffusers scheduler each one is, and which options cannot be compiled."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers

from tgate_engine.errors import ExportError
from tgate_engine.sampler import Fact


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A sampler's name, in diffusers' terms.

    ``scheduler``: class in diffusers. ``paper``: where it is defined.
    ``overrides``: options that the name itself fixes, whatever the checkpoint says.
    ``unless_stated``: options set only where the checkpoint's configuration does not mention them.
    """

    scheduler: str
    paper: str
    overrides: Mapping[str, Fact] = field(default_factory=dict)
    unless_stated: Mapping[str, Fact] = field(default_factory=dict)


def _dpmpp(order: int, *, karras: bool) -> dict[str, Fact]:
    return {"solver_order": order, "algorithm_type": "dpmsolver++", "use_karras_sigmas": karras}


SAMPLERS: Mapping[str, Recipe] = {
    # DDIM clips to [-1, 1] by default, which suits pixels. Latents are not bounded, and the DDIM
    # configurations of Stable Diffusion switch it off; a configuration that is silent means the same.
    "ddim": Recipe(
        scheduler="DDIMScheduler",
        paper="Song et al., arXiv 2010.02502, equation 12 with eta = 0",
        unless_stated={"clip_sample": False},
    ),
    "euler": Recipe(scheduler="EulerDiscreteScheduler", paper="Karras et al., arXiv 2206.00364, algorithm 2"),
    "dpmpp_2m": Recipe(
        scheduler="DPMSolverMultistepScheduler",
        paper="Lu et al., arXiv 2211.01095, algorithm 2",
        overrides=_dpmpp(2, karras=False),
    ),
    "dpmpp_2m_karras": Recipe(
        scheduler="DPMSolverMultistepScheduler",
        paper="Lu et al., arXiv 2211.01095, algorithm 2, at the noise levels of arXiv 2206.00364, equation 5",
        overrides=_dpmpp(2, karras=True),
    ),
    "dpmpp_3m": Recipe(
        scheduler="DPMSolverMultistepScheduler",
        paper="Lu et al., arXiv 2211.01095, appendix",
        overrides=_dpmpp(3, karras=False),
    ),
    "unipc": Recipe(scheduler="UniPCMultistepScheduler", paper="Zhao et al., arXiv 2302.04867"),
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

STOCHASTIC = ("DDPM", "KDPM2Ancestral", "TCD", "SDE", "Sde", "SASolver", "Stochastic", "UnCLIP", "RePaint")
"""Parts of class names that tell a scheduler which draws noise in a way that is not compiled."""

FACTS = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "timestep_spacing", "steps_offset"),
    *("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final"),
    *("final_sigmas_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_lu_lambdas", "use_flow_sigmas", "flow_shift", "rescale_betas_zero_snr", "interpolation_type"),
    *("set_alpha_to_one", "clip_sample", "skip_prk_steps", "sigma_min", "sigma_max"),
)
"""Options worth recording beside the coefficients, where a scheduler has them."""

ADVICE = f"Choose one of the samplers {', '.join(SAMPLERS)}."


def make_scheduler(name: str, base_config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler behind a sampler's name, made from the checkpoint's own configuration.

    Noise schedule, prediction type and timestep spacing follow the checkpoint, as ``from_config`` does for
    users of diffusers. Raises :class:`ExportError` on a name that is not known or a flow-matching model.
    """
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ExportError(f"there is no sampler {name!r}.{hint} Known samplers: {', '.join(SAMPLERS)}.")
    recipe = SAMPLERS[name]
    owner = str(base_config.get("_class_name", ""))
    if owner.startswith("FlowMatch"):
        raise ExportError(
            f"the checkpoint's scheduler is {owner}; sampler {name!r} would read a noise schedule that a "
            "flow-matching model does not have. Pass the checkpoint's own scheduler to compile_scheduler."
        )
    cls = getattr(diffusers, recipe.scheduler)
    # Options of other schedulers, which a class would keep unread, with a warning.
    read = {key: value for key, value in base_config.items() if key in inspect.signature(cls.__init__).parameters}
    silent = {key: value for key, value in recipe.unless_stated.items() if key not in base_config}
    try:
        return cls.from_config(read, **recipe.overrides, **silent)
    except Exception as error:
        raise ExportError(
            f"diffusers cannot make a {recipe.scheduler} for sampler {name!r} from the checkpoint's "
            f"scheduler configuration: {one_line(error)}"
        ) from error


def declared(scheduler: Any) -> dict[str, Any]:
    """The options that this class reads. ``from_config`` also keeps those of other classes, unread."""
    return {
        key: scheduler.config.get(key)
        for key in inspect.signature(type(scheduler).__init__).parameters
        if key != "self"
    }


def refuse_options(scheduler: Any) -> None:
    """Raises :class:`ExportError` for options that cannot be linear or deterministic, before any probing."""
    kind = type(scheduler).__name__
    if any(part in kind for part in STOCHASTIC):
        raise ExportError(f"{kind} draws noise in every step, and is not compiled. {ADVICE}")
    options = declared(scheduler)
    for key in ("thresholding", "clip_sample"):
        if options.get(key):
            raise ExportError(
                f"{kind} has {key}=True, which is not linear and would change the images if left out. "
                f"If the model works on latents, set {key} to false in its scheduler_config.json. "
                "Otherwise choose a sampler that has no such option."
            )
    algorithm = str(options.get("algorithm_type") or "")
    if algorithm.startswith("sde") or options.get("stochastic_sampling"):
        what = f"algorithm_type={algorithm!r}" if algorithm.startswith("sde") else "stochastic_sampling=True"
        raise ExportError(f"{kind} has {what}, which draws noise in every step, and is not compiled. {ADVICE}")
    if options.get("variance_type") in ("learned", "learned_range"):
        raise ExportError(
            f"{kind} has variance_type={options['variance_type']!r}: it would drop the model's variance "
            "channels itself. Set variance_type to null, and let the model return the latents' channels only."
        )
    if options.get("solver_p") is not None:
        raise ExportError(f"{kind} has solver_p, a scheduler inside the scheduler. Set solver_p to null.")


def facts(scheduler: Any) -> dict[str, Fact]:
    """Where the coefficients come from: class, version of diffusers, and the options that matter."""
    options = declared(scheduler)
    found: dict[str, Fact] = {
        "scheduler": type(scheduler).__name__,
        "diffusers": str(diffusers.__version__),
    }
    for key in FACTS:
        value = options.get(key)
        if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
            found[key] = value
    return found


def one_line(error: Exception) -> str:
    """A library's exception as the end of our own sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
