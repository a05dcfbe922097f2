"""What an export is asked to do, checked against the checkpoint before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Guidance
from tgate_engine.sampler import Sampler
from tgate_export.attention import AttentionSite, observe
from tgate_export.checkpoints import WEIGHTS, Checkpoint, open_checkpoint
from tgate_export.checkpoints.configs import check_code
from tgate_export.checkpoints.files import shown
from tgate_export.families import Model, find_model, location
from tgate_export.families.base import ConditioningInput, Family, Size
from tgate_export.lora import Lora, fuse_loras
from tgate_export.methods import find_method
from tgate_export.methods.base import Method, Network, Settings, Variant
from tgate_export.modules import fake_module
from tgate_export.plans import check_guidance
from tgate_export.sampling import check_steps, compile_sampler
from tgate_export.storage import check_tensors

MOST_BATCH = 1024
MOST_PIXELS = 1 << 14
"""Of a side."""

MOST_FRAMES = 1024
MOST_CLIP_SKIP = 256

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COMPONENTS = ("text", "image", "denoiser", "decoder")
"""Values of ``--components``. A model is conditioned by text or by an image."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What the user asks for. None stands for the model's own default; sizes are in pixels.

    ``weights``: one of :data:`~tgate_export.checkpoints.WEIGHTS`. ``components``: some of :data:`COMPONENTS`; None is
    everything for a checkpoint, and the denoiser alone without one. ``clip_skip``: last layers of CLIP's text encoders
    to leave out of a prompt's text. ``guidance_rescale``: from 0 to 1, see :class:`~tgate_export.step.DenoisingStep`.
    ``method``: one of :data:`~tgate_export.methods.METHODS`. ``sizes``: (width, height) of each, the default first, or
    ``height`` and ``width`` of the only one. ``batches``: least and largest number of images in a call, one for each
    set of graphs.
    """

    model: str
    method: str = "tgate"
    m: int | None = None
    k: int | None = None
    steps: int | None = None
    warm_up: int | None = None
    fidelity_interval: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    checkpoint: str | None = None
    weights: str = "checkpoint"
    components: Sequence[str] | None = None
    loras: Sequence[Lora] = ()
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    sizes: Sequence[tuple[int, int]] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batches: Sequence[tuple[int, int]] = ()
    dtype: str = "fp32"
    output: Path | None = None
    force: bool = False
    verify: bool = True


@dataclass(frozen=True)
class Job:
    """Everything about an export that is known before the first graph is traced.

    ``size``, ``latents`` and ``conditioning`` are those of one of ``sizes``; :meth:`at` gives the job at another.
    """

    settings: ExportSettings
    model: Model
    family: Family
    checkpoint: Checkpoint
    components: tuple[str, ...]
    method: Method
    method_settings: Settings
    sampler: Sampler
    guidance: Guidance
    guidance_scale: float
    batches: tuple[tuple[int, int], ...]
    sizes: tuple[Size, ...]
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

    def at(self, size: Size) -> Job:
        """The job at one of its sizes."""
        latents = self.family.latents(self.checkpoint, size)
        conditioning = tuple(self.family.conditioning(self.checkpoint, size))
        return replace(self, size=size, latents=latents, conditioning=conditioning)

    def inputs_from(self, source: str) -> tuple[ConditioningInput, ...]:
        """The conditioning of that source, in the family's order."""
        return tuple(c for c in self.conditioning if c.conditioning.source == source)


def prepare(settings: ExportSettings) -> Job:
    """Check everything that can be checked before work starts. Raises a TgateError for what the user can mend."""
    model = find_model(settings.model)
    family = model.family
    if settings.dtype not in DTYPES:
        raise ExportError(f"unknown dtype {shown(settings.dtype)}; choose one of {', '.join(DTYPES)}")
    if settings.weights not in WEIGHTS:
        raise ExportError(f"unknown weights {shown(settings.weights)}; choose one of {', '.join(WEIGHTS)}")
    batches = tuple(settings.batches) or (model.batch,)
    for least, most in batches:
        if not 1 <= least <= most <= MOST_BATCH:
            raise ExportError(
                f"--batch takes N or LEAST:MOST with 1 <= LEAST <= MOST <= {MOST_BATCH}, got "
                f"{shown(least)}:{shown(most)}"
            )
    for (_, most), (least, other) in pairwise(sorted(batches)):
        if least <= most:
            raise ExportError(
                f"--batch ranges may not overlap, or one would never be used; got one up to {most} and {least}:{other}"
            )
    method = find_method(settings.method)
    steps = model.steps if settings.steps is None else settings.steps
    check_steps(steps)
    _check_numbers(settings)
    method_settings = method.settings(
        steps=steps,
        gate=min(model.gate, steps) if settings.m is None else settings.m,
        k=settings.k,
        w=settings.warm_up,
        f=settings.fidelity_interval,
        defaults={"k": model.self_interval, "w": model.warm_up},
    )
    scale = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    check_guidance(scale)
    components = _components(settings, family)

    checkpoint = _open(settings, model, components)
    check_checkpoint(family, checkpoint, directories(family, components), weights=settings.weights != "none")
    family.check_clip_skip(checkpoint, settings.clip_skip)
    guidance = family.guidance(checkpoint, scale)
    _check_rescale(settings, family, guidance)
    method.check(guided=guidance == "classifier-free")
    sizes = _sizes(settings, family, checkpoint)
    latents, conditioning = family.latents(checkpoint, sizes[0]), tuple(family.conditioning(checkpoint, sizes[0]))
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
        method=method,
        method_settings=method_settings,
        sampler=compiled,
        guidance=guidance,
        guidance_scale=scale,
        batches=batches,
        sizes=sizes,
        size=sizes[0],
        latents=latents,
        conditioning=conditioning,
        sites=sites,
        scheduler=scheduler,
        dtype=dtype,
        # Some decoders overflow in half precision and say so.
        decoder_dtype="float32" if family.config(checkpoint, family.decoder)["force_upcast"] else dtype,
        variants=method.variants(
            Network(sites=sites, guided=guidance == "classifier-free", after_gate=family.after_gate), method_settings
        ),
    )


def check_checkpoint(
    family: Family, checkpoint: Checkpoint, components: Sequence[str], *, weights: bool = True
) -> None:
    """Check that a checkpoint is of a family, and the tensors of those components, without reading their values.

    ``weights``: False where there are none. Raises :class:`ExportError`.
    """
    family.check_pipeline(checkpoint)
    check_code(checkpoint.where, checkpoint.model_index)
    family.check(checkpoint)
    for component in components if weights else ():
        check_tensors(checkpoint, component, family.skeleton(checkpoint, component))


def directories(family: Family, components: Sequence[str]) -> tuple[str, ...]:
    """The checkpoint's directories behind some of :data:`COMPONENTS`, each once."""
    folders = {
        "text": family.text_components,
        "image": family.image_components,
        "denoiser": (family.denoiser,),
        "decoder": (family.decoder,),
    }
    return tuple(dict.fromkeys(name for component in components for name in folders[component]))


def _check_numbers(settings: ExportSettings) -> None:
    """Refuse sizes that no model makes before a checkpoint is opened; what its own can make is asked for later."""
    sides = [side for size in settings.sizes for side in size]
    sides += [side for side in (settings.height, settings.width) if side is not None]
    for name, values, most in (
        ("--size", sides, MOST_PIXELS),
        ("--frames", [] if settings.frames is None else [settings.frames], MOST_FRAMES),
        ("--clip-skip", [settings.clip_skip] if settings.clip_skip else [], MOST_CLIP_SKIP),
    ):
        for value in values:
            if value > most:
                raise ExportError(f"{name} must be at most {most}, got {shown(value)}")


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
            f"got {shown(', '.join(settings.components)) if settings.components else 'none'}"
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
    names = (*directories(family, components), *family.tokenizers)
    checkpoint = open_checkpoint(
        settings.model,
        settings.checkpoint or location(settings.model),
        weights=settings.weights,
        components=names,
        build=family.build,
        elsewhere={} if settings.checkpoint else model.elsewhere,
        prefer_half=settings.dtype != "fp32",
    )
    family.check_pipeline(checkpoint)  # a LoRA is read by its pipeline's rules
    if not settings.loras:
        return checkpoint
    return fuse_loras(checkpoint, settings.loras, family.build, components=directories(family, components))


def _sizes(settings: ExportSettings, family: Family, checkpoint: Checkpoint) -> tuple[Size, ...]:
    """Every size to export, the default first."""
    if settings.frames is not None and family.frames_axis is None:
        raise ExportError(f"--frames is for video models; {settings.model} makes pictures")
    frames = family.default_frames(checkpoint) if settings.frames is None else settings.frames
    height, width = settings.height, settings.width
    if settings.sizes and (height is not None or width is not None):
        raise ExportError("give --size, or --height and --width, not both")
    pairs = list(settings.sizes)
    if not pairs:
        if height is None or width is None:
            default = family.default_size(checkpoint)
            height = default.height if height is None else height
            width = default.width if width is None else width
        pairs = [(width, height)]
    sizes = tuple(Size(height=height, width=width, frames=frames) for width, height in pairs)
    for size in sizes:
        family.check_size(checkpoint, size)
    if len(set(sizes)) < len(sizes):
        raise ExportError(f"--size names {_repeated([str(size) for size in sizes])} more than once")
    return sizes


def _repeated(items: Sequence[object]) -> object:
    """The first item that is there twice."""
    return next(item for place, item in enumerate(items) if item in items[:place])


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
        inputs = {c.conditioning.name: torch.zeros(rows, *c.shape) for c in conditioning}
        noised, numbers = torch.zeros(rows, *latents), torch.ones(rows)
        log = logging.getLogger("torch._subclasses.fake_tensor")  # tells of errors before it raises them
        log.disabled = True
        try:
            return observe(denoiser, lambda: family.denoise(denoiser, noised, numbers, numbers, inputs), images=rows)
        except ExportError as error:
            raise ExportError(f"{checkpoint.where}: the {family.denoiser}'s {error}") from None
        except Exception as error:  # PyTorch and diffusers raise many kinds for shapes that do not fit
            message = " ".join(str(error).split())
            raise ExportError(
                f"{checkpoint.where}: the {family.denoiser} does not take what conditions it "
                f"({type(error).__name__}: {message:.300}); its configuration and those beside it do not fit each other"
            ) from None
        finally:
            log.disabled = False
