"""The diffusers scheduler behind each sampler's name, and which options cannot be compiled."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Collection, Mapping
from typing import Any

import diffusers
import numpy as np
import torch

from tgate_engine.errors import ExportError
from tgate_engine.sampler import Fact
from tgate_export.checkpoints.configs import Wanted, check_code, check_value
from tgate_export.checkpoints.configs import declared as declared_values
from tgate_export.checkpoints.files import plain
from tgate_export.libraries import refusing
from tgate_export.recipes import FLOW_EULER, SAMPLERS, check_sampler

STOCHASTIC = ("DDPM", "KDPM2Ancestral", "TCD", "SDE", "Sde", "SASolver", "Stochastic", "UnCLIP", "RePaint")
"""Parts of class names that tell a scheduler which draws noise in a way that is not compiled."""

FACTS = (
    *("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "timestep_spacing", "steps_offset"),
    *("solver_order", "solver_type", "algorithm_type", "lower_order_final", "euler_at_final"),
    *("final_sigmas_type", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("use_lu_lambdas", "use_flow_sigmas", "flow_shift", "rescale_betas_zero_snr", "interpolation_type"),
    *("shift", "shift_terminal"),
    *("set_alpha_to_one", "clip_sample", "skip_prk_steps", "sigma_min", "sigma_max"),
)
"""Options worth recording beside the coefficients, where a scheduler has them."""

_LADDER_STEPS = 5

_WHERE = "the checkpoint's scheduler configuration"

ADVICE = f"Choose one of the samplers {', '.join(SAMPLERS)}."


TRAINED_UNDER = (
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
"""Schedulers of checkpoints whose noise is a table of betas, as every sampler here reads it."""

TRAINED_UNDER_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
"""Schedulers of checkpoints trained under EDM's preconditioning (arXiv 2206.00364, section 5), which has no betas."""

TRAINED_UNDER_FLOW = (FLOW_EULER,)
"""Schedulers of checkpoints trained by flow matching. Some such checkpoints bring one of :data:`TRAINED_UNDER`, told to
take flow matching's noise levels (``use_flow_sigmas``)."""

TRAINED_UNDER_TRIG = ("SCMScheduler",)
"""Schedulers of checkpoints distilled as TrigFlow (arXiv 2410.11081), whose noise is an angle."""

MU, PIPELINE_SIGMAS = "mu", "pipeline_sigmas"
"""What a pipeline hands to its scheduler beside the number of steps, kept in the configuration, where no class of
diffusers has such options: the shift of noise levels that it computes from the size (a number; with
``use_dynamic_shifting``), and whether it spaces noise levels itself, from 1 to 1/n (true)."""

_KNOWN = (*TRAINED_UNDER, *TRAINED_UNDER_EDM, *TRAINED_UNDER_FLOW, *TRAINED_UNDER_TRIG)

PIPELINE_SCALES = "pipeline_scales"
"""Kept beside :data:`MU` where a pipeline adds noise to pictures, from ``sigma_max`` to ``sigma_min``, and scales what
the network sees by itself: to σ / (σ + 1) of noise, which it tells the network as the timestep. To its scheduler it
gives latents and output, added and as much smaller (true)."""

MIDDLE = 1.3
"""The angle between both calls of a two-step trajectory under TrigFlow: what Sana-Sprint's pipeline has."""

TRAINING = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
    "prediction_type",
    "timestep_type",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "use_flow_sigmas",
    "flow_shift",
    "use_dynamic_shifting",
    "shift_terminal",
    "invert_sigmas",
)
"""Options that tell how a network was trained. All others choose among ways to sample from it."""

_LADDERS_OWN = ("sigma_min", "sigma_max")
"""Those that a class may list and read for some ways of spacing noise levels alone."""


def options_of(class_name: object) -> Collection[str]:
    """The options that a scheduler of that name lists; none for a name that is not known."""
    if class_name not in _KNOWN:
        return ()
    return declared_values(getattr(diffusers, str(class_name)))


@functools.cache
def _options() -> Mapping[str, Wanted]:
    """What some scheduler takes, by option. Samplers read what a checkpoint's own scheduler does not list, too."""
    known: dict[str, Wanted] = {}
    for name in _KNOWN:
        for key, wanted in declared_values(getattr(diffusers, name)).items():
            known[key] = known[key] | wanted if key in known else wanted
    return known


def make_scheduler(name: str, base_config: Mapping[str, Any]) -> Any:
    """The diffusers scheduler behind a sampler's name, made from the checkpoint's own configuration.

    Noise schedule, prediction type and timestep spacing follow the checkpoint, as ``from_config`` does for
    users of diffusers. Raises :class:`ExportError` on a name or a class of scheduler that is not known, and where the
    sampler does not read an option that tells how the network was trained.
    """
    check_sampler(name)
    scheduler = _make(name, base_config)
    key = _dropped(scheduler, base_config)
    if key is None:
        return scheduler
    fit = ", ".join(other for other in SAMPLERS if other != name and _reads_all(other, base_config))
    raise ExportError(
        f"the checkpoint's scheduler has {key} = {base_config[key]!r}, which tells how its network was trained and "
        f"which sampler {name!r} ({type(scheduler).__name__}) does not read; "
        f"{'choose one of ' + fit if fit else 'no sampler here reads all of its options'}"
    )


def _make(name: str, base_config: Mapping[str, Any]) -> Any:
    """A sampler's scheduler, whatever it reads of the configuration."""
    check_code(_WHERE, base_config)
    for key, value in base_config.items():
        if key in _options():
            check_value(_WHERE, key, value, _options()[key])
    recipe = SAMPLERS[name]
    kind, options = sampler_class(name, base_config)
    owner = base_config.get("_class_name", recipe.scheduler)
    if "_class_name" in base_config:
        from_config(getattr(diffusers, owner), base_config)  # diffusers loads it before anything else
    silent = {key: value for key, value in recipe.unless_stated.items() if key not in base_config}
    # Defaults that a pipeline has changed hold for its own scheduler; another class has its own (from_config).
    config = {k: v for k, v in base_config.items() if k != "_use_default_values" or kind != owner}
    return from_config(getattr(diffusers, kind), config, **options, **silent)


def sampler_class(name: str, base_config: Mapping[str, Any]) -> tuple[str, dict[str, Fact]]:
    """The class of diffusers that a sampler is for a checkpoint of that scheduler configuration, and the options that
    it is given over it. Raises :class:`ExportError` where the sampler does not know how the network was trained."""
    recipe = SAMPLERS[name]
    owner = base_config.get("_class_name", recipe.scheduler)
    if owner in TRAINED_UNDER_EDM:
        if recipe.edm is None:
            fit = ", ".join(other for other, known in SAMPLERS.items() if known.edm is not None)
            raise ExportError(
                f"the checkpoint's scheduler is {owner}: its network was trained under EDM's preconditioning, which "
                f"sampler {name!r} does not know. Choose one of {fit}"
            )
        return recipe.edm[0], dict(recipe.edm[1])
    if owner in TRAINED_UNDER_FLOW:
        return _flow_class(name, base_config)
    if owner in TRAINED_UNDER_TRIG and recipe.scheduler != owner:
        raise ExportError(
            f"the checkpoint's scheduler is {owner}: its network was distilled as TrigFlow, whose noise is an angle, "
            f"which sampler {name!r} does not know. Choose scm"
        )
    if recipe.scheduler in TRAINED_UNDER_TRIG and recipe.scheduler != owner:
        raise ExportError(
            f"the checkpoint's scheduler is {plain(owner)}, and sampler {name!r} knows no network but those that were "
            "distilled as TrigFlow (Sana-Sprint); leave --sampler out for the model's own"
        )
    if owner not in (*TRAINED_UNDER, *TRAINED_UNDER_TRIG):
        raise ExportError(
            f"the checkpoint's scheduler is {plain(owner)}; sampler {name!r} would read a noise schedule that such a "
            "model does not have. Models are exported whose noise is a table of betas (DDIM's, Euler's, DPM-Solver's "
            "and others' schedulers), EDM's, or flow matching's"
        )
    if _flows(base_config) and recipe.flow is not None and recipe.flow[0] == FLOW_EULER:
        return FLOW_EULER, {"shift": base_config.get("flow_shift", 1.0)}
    return recipe.scheduler, dict(recipe.overrides)


def _flows(config: Mapping[str, Any]) -> bool:
    """Whether a configuration of :data:`TRAINED_UNDER` is of a network trained by flow matching."""
    return config.get("use_flow_sigmas") is True and config.get("prediction_type") == "flow_prediction"


def _flow_class(name: str, config: Mapping[str, Any]) -> tuple[str, dict[str, Fact]]:
    recipe, owner = SAMPLERS[name], config["_class_name"]
    if recipe.flow is None:
        fit = ", ".join(other for other, known in SAMPLERS.items() if known.flow is not None)
        raise ExportError(
            f"the checkpoint's scheduler is {owner}: its network was trained by flow matching, which sampler {name!r} "
            f"does not know. Choose one of {fit}"
        )
    kind, options = recipe.flow[0], dict(recipe.flow[1])
    if kind == owner:
        return kind, options
    if config.get("use_dynamic_shifting") or config.get(PIPELINE_SIGMAS) or config.get(PIPELINE_SCALES):
        raise ExportError(
            f"the pipeline of the checkpoint shifts or spaces noise levels itself, and hands them to {owner} alone; "
            f"sampler {name!r} would take others. Choose euler"
        )
    return kind, {**options, "flow_shift": config.get("shift", 1.0)}


def size_shift(config: Mapping[str, Any], places: int) -> float:
    """How far pipelines shift noise levels for latents of so many places (:data:`MU`): on the line through the two
    lengths that a configuration names. Raises :class:`ExportError`."""
    base, most, least, largest = numbers = [config.get(key, default) for key, default in _LINE.items()]
    for key, value in zip(_LINE, numbers, strict=True):
        check_value(_WHERE, key, value, _options()[key])
    if base == most:
        raise ExportError(
            f"{_WHERE} has base_image_seq_len = max_image_seq_len = {base}, and shifts by the size "
            "(use_dynamic_shifting); two lengths are wanted"
        )
    slope = (largest - least) / (most - base)
    return float(places * slope + (least - slope * base))


_LINE = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
"""Where pipelines have the line of :func:`size_shift`, and what they take where a configuration is silent."""


def set_timesteps(scheduler: Any, steps: int) -> None:
    """Set a scheduler's timesteps as the checkpoint's pipeline does (:data:`MU`, :data:`PIPELINE_SIGMAS`)."""
    mu = scheduler.config.get(MU) if scheduler.config.get("use_dynamic_shifting") else None
    shift = {} if mu is None else {"mu": mu}
    with np.errstate(all="ignore"):  # shift_terminal divides one step's by zero; coefficients tell
        if type(scheduler).__name__ in TRAINED_UNDER_TRIG:
            scheduler.set_timesteps(steps, intermediate_timesteps=MIDDLE if steps == 2 else None)
        elif scheduler.config.get(PIPELINE_SCALES):
            scheduler.set_timesteps(sigmas=np.linspace(0.0, 1.0, steps))
            scheduler.sigmas[-1] = scheduler.sigmas[-2]  # it ends at sigma_min
        elif scheduler.config.get(PIPELINE_SIGMAS):
            scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **shift)
        else:
            scheduler.set_timesteps(steps, **shift)


def timesteps_of(scheduler: Any) -> list[Any]:
    """The timestep of each call, once they are set. TrigFlow's last is where the trajectory ends."""
    return list(scheduler.timesteps[:-1] if type(scheduler).__name__ in TRAINED_UNDER_TRIG else scheduler.timesteps)


def pipeline_level(scheduler: Any, call: int) -> tuple[Any, Any]:
    """A call's noise level σ, and σ / (σ + 1), where a pipeline scales by it (:data:`PIPELINE_SCALES`); else None."""
    if not scheduler.config.get(PIPELINE_SCALES):
        return None, None
    level = scheduler.sigmas[call]
    return level, level / (level + 1)


def from_config(cls: Any, config: Mapping[str, Any], **options: Fact) -> Any:
    """What users of diffusers get: options that the class does not list stay in its configuration, where some classes
    read them all the same. Without diffusers' warnings about them. Raises :class:`ExportError`."""
    log = diffusers.utils.logging.get_logger("diffusers.configuration_utils")
    log.disabled = True
    what = f"diffusers cannot make a {cls.__name__} from the checkpoint's scheduler configuration"
    try:
        with refusing(what, "correct its scheduler_config.json"):
            return cls.from_config(dict(config), **options)
    finally:
        log.disabled = False


def _dropped(scheduler: Any, config: Mapping[str, Any]) -> str | None:
    """The first of :data:`TRAINING` that the checkpoint's own scheduler goes by and this one does not."""
    owner: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if type(scheduler).__name__ == FLOW_EULER and _flows(config):
        return None  # its betas mean nothing, and its shift has another name there
    listed = inspect.signature(type(scheduler).__init__).parameters
    for key in TRAINING:
        if config.get(key) is None or (key in listed and key not in _LADDERS_OWN):
            continue
        if owner is None:
            if key not in listed:
                return key
            continue
        default = from_config(owner, {k: v for k, v in config.items() if k != key}).config.get(key)
        if config[key] == default:
            continue
        if _ladder(from_config(owner, config)) == _ladder(from_config(owner, {**config, key: default})):
            continue
        own = {k: v for k, v in scheduler.config.items() if not k.startswith("_")}
        if _ladder(from_config(type(scheduler), own)) == _ladder(from_config(type(scheduler), {**own, key: default})):
            return key
    return None


def _reads_all(name: str, config: Mapping[str, Any]) -> bool:
    try:
        return _dropped(_make(name, config), config) is None
    except ExportError:
        return False


def _ladder(scheduler: Any) -> tuple[object, ...]:
    """What the noise levels, timesteps and targets of a scheduler come to, to compare."""
    try:
        with refusing("diffusers cannot run it", ADVICE):
            set_timesteps(scheduler, _LADDER_STEPS)
            parts = (getattr(scheduler, part, None) for part in ("timesteps", "sigmas", "alphas_cumprod"))
            numbers = [tuple(torch.as_tensor(part).tolist()) if part is not None else None for part in parts]
            first = float(getattr(scheduler, "init_noise_sigma", 1.0)), _scale(scheduler)
    except ExportError as error:  # the compiler of the sampler says so, with the steps that the user wants
        return (str(error),)
    return (*numbers, *first, scheduler.config.get("prediction_type"))


def _scale(scheduler: Any) -> object:
    """How the network's input is scaled in the first step, where sigma_data enters."""
    if not hasattr(scheduler, "scale_model_input"):
        return None
    return float(scheduler.scale_model_input(torch.ones(1, 1, 1, 1), scheduler.timesteps[0]))


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
    options = {
        **declared(scheduler),
        **{key: scheduler.config.get(key) for key in (MU, PIPELINE_SIGMAS, PIPELINE_SCALES)},
    }
    kept: dict[str, Fact] = {
        "scheduler": type(scheduler).__name__,
        "diffusers": str(diffusers.__version__),
    }
    for key in (*FACTS, MU, PIPELINE_SIGMAS, PIPELINE_SCALES):
        value = options.get(key)
        if isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value)):
            kept[key] = value
    return kept
