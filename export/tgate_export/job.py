"""What an export is asked to do, checked against the checkpoint before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Guidance
from tgate_engine.sampler import Sampler
from tgate_engine.schedule import Schedule
from tgate_export.checkpoints import WEIGHTS, Checkpoint, open_checkpoint
from tgate_export.families import Model, find_model, location
from tgate_export.families.base import ConditioningInput, Family, Size
from tgate_export.gating import AttentionSite, Variant, observe, variants
from tgate_export.lora import Lora, fuse_loras
from tgate_export.modules import fake_module
from tgate_export.sampling import compile_sampler
from tgate_export.storage import check_tensors

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COMPONENTS = ("text", "image", "denoiser", "decoder")
"""Values of ``--components``. A model is conditioned by text or by an image."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What the user asks for. None stands for the model's own default; sizes are in pixels.

    ``weights``: one of :data:`~tgate_export.checkpoints.WEIGHTS`. ``components``: some of :data:`COMPONENTS`; None is
    everything for a checkpoint, and the denoiser alone without one. ``clip_skip``: last layers of CLIP's text encoders
    to leave out of a prompt's text. ``guidance_rescale``: from 0 to 1, see :class:`~tgate_export.gating.GatedStep`.
    """

    model: str
    m: int | None = None
    k: int | None = None
    steps: int | None = None
    warm_up: int | None = None
    fidelity_interval: int = 1
    sampler: str | None = None
    guidance_scale: float | None = None
    checkpoint: str | None = None
    weights: str = "checkpoint"
    components: Sequence[str] | None = None
    loras: Sequence[Lora] = ()
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batch: tuple[int, int] = (1, 1)
    dtype: str = "fp32"
    output: Path | None = None
    force: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Job:
    """Everything about an export that is known before the first graph is traced."""

    settings: ExportSettings
    model: Model
    family: Family
    checkpoint: Checkpoint
    components: tuple[str, ...]
    schedule: Schedule
    sampler: Sampler
    guidance: Guidance
    guidance_scale: float
    size: Size
    latents: tuple[int, ...]
    conditioning: tuple[ConditioningInput, ...]
    sites: tuple[AttentionSite, ...]
    scheduler: Mapping[str, Any]
    dtype: str
    decoder_dtype: str
    variants: tuple[Variant, ...]

    @property
    def guided(self) -> bool:
        return self.guidance == "classifier-free"

    def dtype_of(self, component: str) -> str:
        """The dtype of a component's weights and arithmetic."""
        return self.decoder_dtype if component == self.family.decoder else self.dtype

    def inputs_from(self, source: str) -> tuple[ConditioningInput, ...]:
        """The conditioning of that source, in the family's order."""
        return tuple(c for c in self.conditioning if c.conditioning.source == source)


def prepare(settings: ExportSettings) -> Job:
    """Check everything that can be checked before work starts. Raises a TgateError for what the user can mend."""
    model = find_model(settings.model)
    family = model.family
    if settings.dtype not in DTYPES:
        raise ExportError(f"unknown dtype {settings.dtype!r}; choose one of {', '.join(DTYPES)}")
    if settings.weights not in WEIGHTS:
        raise ExportError(f"unknown weights {settings.weights!r}; choose one of {', '.join(WEIGHTS)}")
    low, high = settings.batch
    if not 1 <= low <= high:
        raise ExportError(f"--batch wants N or LOW:HIGH with 1 <= LOW <= HIGH, got {low}:{high}")
    steps = model.steps if settings.steps is None else settings.steps
    gate = min(model.gate, steps) if settings.m is None else settings.m
    interval = model.self_interval if settings.k is None else settings.k
    warm_up = model.warm_up if settings.warm_up is None else settings.warm_up
    schedule_of(steps, gate, interval, warm_up, settings.fidelity_interval)
    scale = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    check_guidance(scale)
    components = _components(settings, family)

    checkpoint = _open(settings, model, components)
    check_checkpoint(family, checkpoint, directories(family, components), weights=settings.weights != "none")
    family.check_clip_skip(checkpoint, settings.clip_skip)
    guidance = family.guidance(checkpoint, scale)
    _check_rescale(settings, family, guidance)
    size = _size(settings, family, checkpoint)
    latents, conditioning = family.latents(checkpoint, size), tuple(family.conditioning(checkpoint, size))
    sites = _observe(family, checkpoint, latents, conditioning)
    family.scaling(checkpoint)
    scheduler = family.scheduler_config(checkpoint)
    compiled = compile_sampler(model.sampler if settings.sampler is None else settings.sampler, scheduler, steps)
    dtype = DTYPES[settings.dtype]
    return Job(
        settings=settings,
        model=model,
        family=family,
        checkpoint=checkpoint,
        components=components,
        schedule=schedule_of(steps, gate, interval, warm_up, settings.fidelity_interval, compiled.lead_in),
        sampler=compiled,
        guidance=guidance,
        guidance_scale=scale,
        size=size,
        latents=latents,
        conditioning=conditioning,
        sites=sites,
        scheduler=scheduler,
        dtype=dtype,
        # Some decoders overflow in half precision and say so.
        decoder_dtype="float32" if family.config(checkpoint, family.decoder)["force_upcast"] else dtype,
        variants=variants(
            guided=guidance == "classifier-free",
            fidelity_reuse=settings.fidelity_interval > 1,
            after_gate=family.after_gate,
        ),
    )


def check_checkpoint(
    family: Family, checkpoint: Checkpoint, components: Sequence[str], *, weights: bool = True
) -> None:
    """Check that a checkpoint is of a family, and the tensors of those components, without reading their values.

    ``weights``: False where there are none. Raises :class:`ExportError`.
    """
    family.check_pipeline(checkpoint)
    family.check(checkpoint)
    for component in components if weights else ():
        check_tensors(checkpoint, component, family.skeleton(checkpoint, component))


def directories(family: Family, components: Sequence[str]) -> tuple[str, ...]:
    """The checkpoint's directories behind some of :data:`COMPONENTS`, each once."""
    found = {
        "text": family.text_components,
        "image": family.image_components,
        "denoiser": (family.denoiser,),
        "decoder": (family.decoder,),
    }
    return tuple(dict.fromkeys(name for component in components for name in found[component]))


def _components(settings: ExportSettings, family: Family) -> tuple[str, ...]:
    """The components to export, in their order."""
    source = "image" if family.image_components else "text"
    possible = tuple(c for c in COMPONENTS if c in (source, "denoiser", "decoder"))
    if settings.components is None:
        return possible if settings.weights == "checkpoint" else ("denoiser",)
    odd = [c for c in settings.components if c not in possible]
    if odd or "denoiser" not in settings.components or len(set(settings.components)) < len(settings.components):
        raise ExportError(
            f"--components of {settings.model} are some of {', '.join(possible)}, the denoiser among them, each once; "
            f"got {', '.join(settings.components) or 'none'}"
        )
    if settings.weights != "checkpoint" and "text" in settings.components:
        raise ExportError(
            f"--weights {settings.weights} has no vocabulary, so no text; choose --components denoiser,decoder"
        )
    return tuple(c for c in possible if c in settings.components)


def _open(settings: ExportSettings, model: Model, components: Sequence[str]) -> Checkpoint:
    if settings.weights != "checkpoint" and (settings.checkpoint is not None or settings.loras):
        raise ExportError(f"--weights {settings.weights} reads no checkpoint; leave out --checkpoint and --lora")
    family = model.family
    # The configurations of all of them say what the denoiser takes; the weights of those exported are read.
    wanted = (*directories(family, components), *family.tokenizers)
    checkpoint = open_checkpoint(
        settings.model,
        settings.checkpoint or location(settings.model),
        weights=settings.weights,
        components=wanted,
        build=family.build,
        elsewhere={} if settings.checkpoint else model.elsewhere,
        prefer_half=settings.dtype != "fp32",
    )
    if not settings.loras:
        return checkpoint
    return fuse_loras(checkpoint, settings.loras, family.build, components=directories(family, components))


def _size(settings: ExportSettings, family: Family, checkpoint: Checkpoint) -> Size:
    height, width = settings.height, settings.width
    if height is None or width is None:
        default = family.default_size(checkpoint)
        height = default.height if height is None else height
        width = default.width if width is None else width
    if settings.frames is not None and family.frames_axis is None:
        raise ExportError(f"--frames is for video models; {settings.model} makes pictures")
    frames = family.default_frames(checkpoint) if settings.frames is None else settings.frames
    size = Size(height=height, width=width, frames=frames)
    family.check_size(checkpoint, size)
    return size


def _check_rescale(settings: ExportSettings, family: Family, guidance: Guidance) -> None:
    rescale = settings.guidance_rescale
    if not 0 <= rescale <= 1:
        raise ExportError(f"--guidance-rescale must be from 0 to 1, got {rescale}")
    if rescale and not family.rescales_guidance:
        raise ExportError(
            f"--guidance-rescale: {family.pipeline_classes[0]} does not rescale guidance; leave it out for "
            f"{settings.model}"
        )
    if rescale and guidance != "classifier-free":
        raise ExportError(
            f"--guidance-rescale {rescale} would change nothing: {settings.model} is exported without two halves to "
            "guide by; leave it out, or export with a --guidance-scale above 1"
        )


def _observe(
    family: Family, checkpoint: Checkpoint, latents: Sequence[int], conditioning: Sequence[ConditioningInput]
) -> tuple[AttentionSite, ...]:
    """The denoiser's attention modules, seen in one call without weights, which proves that its inputs fit it."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    denoiser = fake_module(mode, family, checkpoint, family.denoiser, torch.float32)
    rows = 2  # as many as guidance has halves
    with mode, torch.no_grad():
        given = {c.conditioning.name: torch.zeros(rows, *c.shape) for c in conditioning}
        noised, numbers = torch.zeros(rows, *latents), torch.ones(rows)
        log = logging.getLogger("torch._subclasses.fake_tensor")  # tells of errors before it raises them
        log.disabled = True
        try:
            return observe(denoiser, lambda: family.denoise(denoiser, noised, numbers, numbers, given))
        except ExportError as error:
            raise ExportError(f"{checkpoint.where}: the {family.denoiser}'s {error}") from None
        except Exception as error:  # PyTorch and diffusers raise many kinds for shapes that do not fit
            said = " ".join(str(error).split())
            raise ExportError(
                f"{checkpoint.where}: the {family.denoiser} does not take what conditions it "
                f"({type(error).__name__}: {said:.300}); its configuration and those beside it do not fit each other"
            ) from None
        finally:
            log.disabled = False


def schedule_of(steps: int, m: int, k: int, warm_up: int, fidelity_interval: int, lead_in: int = 0) -> Schedule:
    """The schedule of the user's settings, in the order of the command line."""
    return Schedule(
        steps=steps,
        gate=m,
        self_interval=k,
        warm_up=warm_up,
        fidelity_interval=fidelity_interval,
        lead_in=lead_in,
    )


def check_guidance(scale: float) -> None:
    """Raises :class:`ExportError` for a guidance scale that means nothing."""
    if not 0 <= scale < float("inf"):
        raise ExportError(f"the guidance scale must be a finite number of at least 0, got {scale}")
