"""What an export is asked to do, checked against the checkpoint before any work starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tgate_engine.errors import ExportError
from tgate_engine.sampler import Sampler
from tgate_engine.schedule import Schedule
from tgate_export.checkpoint import Checkpoint
from tgate_export.families import Model, find_model
from tgate_export.families.base import ConditioningInput, Family
from tgate_export.gating import Variant, variants
from tgate_export.sampling import compile_sampler

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What the user asks for. None stands for the model's own default; sizes are in pixels."""

    model: str
    m: int | None = None
    k: int | None = None
    steps: int | None = None
    warm_up: int = 2
    fidelity_interval: int = 1
    sampler: str | None = None
    guidance_scale: float | None = None
    checkpoint: str | None = None
    height: int | None = None
    width: int | None = None
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
    schedule: Schedule
    sampler: Sampler
    guidance_scale: float
    height: int
    width: int
    latents: tuple[int, int, int]
    conditioning: tuple[ConditioningInput, ...]
    dtype: str
    decoder_dtype: str
    variants: tuple[Variant, ...]

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


def prepare(settings: ExportSettings) -> Job:
    """Check everything that can be checked before work starts. Raises a TgateError for what the user can mend."""
    model = find_model(settings.model)
    family = model.family
    if settings.dtype not in DTYPES:
        raise ExportError(f"unknown dtype {settings.dtype!r}; choose one of {', '.join(DTYPES)}")
    low, high = settings.batch
    if not 1 <= low <= high:
        raise ExportError(f"--batch wants N or LOW:HIGH with 1 <= LOW <= HIGH, got {low}:{high}")
    steps = model.steps if settings.steps is None else settings.steps
    gate = model.gate if settings.m is None else settings.m
    interval = model.self_interval if settings.k is None else settings.k
    schedule_of(steps, gate, interval, settings.warm_up, settings.fidelity_interval)
    guidance = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    check_guidance(guidance)

    checkpoint = Checkpoint.open(settings.checkpoint or model.location(), prefer_half=settings.dtype != "fp32")
    found = checkpoint.model_index.get("_class_name")
    if found not in family.pipeline_classes:
        raise ExportError(
            f"{checkpoint.root} holds a {found}; --model {settings.model} wants {' or '.join(family.pipeline_classes)}"
        )
    family.check(checkpoint)
    for component in (family.denoiser, family.decoder, *family.text_components):
        checkpoint.tensors(component)

    multiple, default = family.size_multiple(checkpoint), family.default_size(checkpoint)
    height = default if settings.height is None else settings.height
    width = default if settings.width is None else settings.width
    for name, size in (("--height", height), ("--width", width)):
        if size < multiple or size % multiple:
            below = max(multiple, size // multiple * multiple)
            raise ExportError(
                f"{name} must be a multiple of {multiple} pixels for this model, got {size}; "
                f"the nearest are {below} and {below + multiple}"
            )
    compiled = compile_sampler(settings.sampler or model.sampler, checkpoint.scheduler_config(), steps)
    dtype = DTYPES[settings.dtype]
    vae = checkpoint.config(family.decoder)
    factor = checkpoint.vae_factor()
    return Job(
        settings=settings,
        model=model,
        family=family,
        checkpoint=checkpoint,
        schedule=schedule_of(steps, gate, interval, settings.warm_up, settings.fidelity_interval, compiled.lead_in),
        sampler=compiled,
        guidance_scale=guidance,
        height=height,
        width=width,
        latents=(int(vae["latent_channels"]), height // factor, width // factor),
        conditioning=tuple(family.conditioning(checkpoint, height, width)),
        dtype=dtype,
        # Some decoders overflow in half precision and say so.
        decoder_dtype="float32" if vae.get("force_upcast", True) else dtype,
        variants=variants(guided=guidance > 1, fidelity_reuse=settings.fidelity_interval > 1),
    )


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
