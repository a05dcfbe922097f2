"""What an export is asked to do, checked against the checkpoint before any work starts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Guidance
from tgate_engine.sampler import Sampler
from tgate_export.attention import AttentionSite, observe
from tgate_export.checkpoints import Checkpoint, Holder, open_checkpoint
from tgate_export.checkpoints.configs import check_code
from tgate_export.controlnets import residual_shapes, with_controls
from tgate_export.families import Model, location
from tgate_export.families.base import ConditioningInput, Family, Size, control_component
from tgate_export.ip_adapter import COMPONENTS, AdaptedCheckpoint
from tgate_export.ip_adapter_file import read_ip_adapter
from tgate_export.lora import fuse_loras
from tgate_export.methods.base import Method, Network, Program, Settings, Variant
from tgate_export.methods.forecast.fold import forecast
from tgate_export.methods.late import PREFIX, Late, shared_out
from tgate_export.modules import fake_module
from tgate_export.preview_decoder import COMPONENT, PreviewDecoder
from tgate_export.sampling import compile_sampler
from tgate_export.settings import DTYPES, Asked, ExportSettings, check_settings, encoder_of
from tgate_export.storage import check_tensors

__all__ = ["ExportSettings", "Job", "check_checkpoint", "directories", "prepare", "preview_of"]


@dataclass(frozen=True)
class Job:
    """Everything about an export that is known before the first graph is traced.

    ``size``, ``latents``, ``conditioning`` and ``controls`` are those of one of ``sizes``; :meth:`at` gives the job at
    another.
    ``method_settings``: what graphs are made for; ``plan_settings``: the default plan's, which runs some of them.
    ``controls``: by ControlNet, the shapes of what it adds to the denoiser's own, [C, h, w] each. ``late``: when a
    second network runs, where there is one.
    """

    settings: ExportSettings
    model: Model
    family: Family
    checkpoint: Checkpoint
    components: tuple[str, ...]
    method: Method
    method_settings: Settings
    plan_settings: Settings
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
    controls: Mapping[str, tuple[tuple[int, ...], ...]]
    preview: PreviewDecoder | None = None
    late: Late | None = None

    @property
    def guided(self) -> bool:
        return self.guidance == "classifier-free"

    def dtype_of(self, component: str) -> str:
        """The dtype of a component's weights and arithmetic."""
        return self.decoder_dtype if component == self.family.decoder else self.dtype

    def denoiser_of(self, variant: Variant) -> str:
        """The component that a graph is of."""
        return self.family.late_denoiser if variant.late else self.family.denoiser

    def ramp(self, variant: Variant) -> Tensor | None:
        """What a graph makes of the guidance scale; see :class:`~tgate_export.step.DenoisingStep`."""
        own = self.family.guidance_ramp(self.latents)
        if not variant.late or self.late is None or self.late.share == 1:
            return own
        share = torch.tensor(self.late.share)
        return share if own is None else own * share

    def made(self, program: Program, sampler: Sampler) -> Program:
        """What becomes of a method's program before it runs."""
        return program if self.late is None else shared_out(program, self.late.calls(sampler))

    def holder(self, component: str) -> Holder:
        """What holds a component's tensors."""
        return self.preview if self.preview is not None and component == COMPONENT else self.checkpoint

    def at(self, size: Size) -> Job:
        """The job at one of its sizes."""
        latents = self.family.latents(self.checkpoint, size)
        conditioning = tuple(self.family.conditioning(self.checkpoint, size))
        controls = self.controls
        if size != self.size:
            controls = _controls(self.settings, self.family, self.checkpoint, size)
        return replace(self, size=size, latents=latents, conditioning=conditioning, controls=controls)

    def inputs_from(self, source: str) -> tuple[ConditioningInput, ...]:
        """The conditioning of that source, in the family's order."""
        return tuple(c for c in self.conditioning if c.conditioning.source == source)


def prepare(settings: ExportSettings) -> Job:
    """Check everything that can be checked before work starts. Raises a TgateError for what the user can mend."""
    asked = check_settings(settings)
    model, method, components = asked.model, asked.method, asked.components
    family = model.family
    checkpoint = _open(settings, model, components)
    nets = [net.name for net in settings.controlnets]
    late = _late(settings, asked, family, checkpoint)
    parts = (*directories(family, components, checkpoint), *map(control_component, nets))
    check_checkpoint(family, checkpoint, parts, weights=settings.weights != "none")
    for net in nets:
        family.check_control(checkpoint, net)
    family.check_clip_skip(checkpoint, settings.clip_skip)
    guidance = family.guidance(checkpoint, asked.guidance_scale)
    _check_rescale(settings, guidance)
    if settings.guidance_rescale and not family.rescales_guidance(checkpoint):
        name = checkpoint.model_index["_class_name"]
        raise ExportError(f"--guidance-rescale: {name} does not rescale guidance; leave it out")
    method.check(guided=guidance == "classifier-free")
    sizes = _sizes(settings, family, checkpoint)
    latents, conditioning = family.latents(checkpoint, sizes[0]), tuple(family.conditioning(checkpoint, sizes[0]))
    sites = _observe(family, checkpoint, latents, conditioning)
    controls = _controls(settings, family, checkpoint, sizes[0])
    family.scaling(checkpoint)
    preview = preview_of(settings, family, checkpoint)
    scheduler = family.scheduler_config(checkpoint, sizes[0])
    if any(family.scheduler_config(checkpoint, size) != scheduler for size in sizes):
        raise ExportError(
            f"{checkpoint.where}: its noise levels depend on the size (use_dynamic_shifting), and a bundle has one set "
            "of them; export one --size a bundle"
        )
    compiled = compile_sampler(asked.sampler, scheduler, asked.plan_settings.steps)
    forecast(compiled, asked.plan_settings.left_out(compiled.lead_in))  # what it refuses is refused before the work
    dtype = DTYPES[settings.dtype]
    variants = method.variants(
        Network(
            sites=sites,
            guided=guidance == "classifier-free",
            after_gate=family.after_gate,
            deep=family.deep(checkpoint, settings.cache_branch),
            rows=latents[0] if family.frames_axis == 1 else 1,
            finest=family.finest(checkpoint, sites),
        ),
        asked.method_settings,
    )
    if late is not None:
        variants += tuple(replace(variant, name=PREFIX + variant.name, late=True) for variant in variants)
    return Job(
        settings=settings,
        model=model,
        family=family,
        checkpoint=checkpoint,
        components=components,
        method=method,
        method_settings=asked.method_settings,
        plan_settings=asked.plan_settings,
        sampler=compiled,
        guidance=guidance,
        guidance_scale=asked.guidance_scale,
        batches=asked.batches,
        sizes=sizes,
        size=sizes[0],
        latents=latents,
        conditioning=conditioning,
        sites=sites,
        scheduler=scheduler,
        dtype=dtype,
        # Some decoders overflow in half precision and say so.
        decoder_dtype="float32" if family.config(checkpoint, family.decoder).get("force_upcast") else dtype,
        variants=variants,
        controls=controls,
        preview=preview,
        late=late,
    )


def _late(settings: ExportSettings, asked: Asked, family: Family, checkpoint: Checkpoint) -> Late | None:
    """When a second network runs. Raises a TgateError for what two networks do not take, and one does not."""
    below = family.late(checkpoint)
    if below is None:
        if settings.guidance_scale_2 is not None:
            raise ExportError(
                f"--guidance-scale-2 {settings.guidance_scale_2:g} would change nothing: {checkpoint.where} has one "
                "network; leave it out"
            )
        return None
    late = Late(below=below, guidance=asked.guidance_scale_2, beside=asked.guidance_scale)
    late.check(asked.plan_settings)
    return late


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


def preview_of(settings: ExportSettings, family: Family, checkpoint: Checkpoint) -> PreviewDecoder | None:
    """The small decoder that is asked for; None where none is. Raises :class:`ExportError` for what is none, and for
    one of another model."""
    if settings.preview_decoder is None:
        return None
    preview = PreviewDecoder(settings.preview_decoder, prefer_half=settings.dtype != "fp32")
    preview.check(family, checkpoint)
    preview.scaling()
    return preview


def directories(family: Family, components: Sequence[str], checkpoint: Checkpoint | None = None) -> tuple[str, ...]:
    """The checkpoint's directories behind some of :data:`~tgate_export.settings.COMPONENTS`, each once; where the
    checkpoint is not known yet, those that it may have."""
    may_have = tuple(filter(None, (family.denoiser, family.late_denoiser)))
    folders = {
        "text": family.text_components,
        "image": family.image_components if checkpoint is None else family.image_parts(checkpoint),
        "denoiser": may_have if checkpoint is None else family.denoisers(checkpoint),
        "decoder": (family.decoder,),
        "encoder": (family.decoder,),
        "reference": COMPONENTS,
    }
    return tuple(dict.fromkeys(name for component in components for name in folders[component]))


def _open(settings: ExportSettings, model: Model, components: Sequence[str]) -> Checkpoint:
    family = model.family
    # The configurations of all of them say what the denoiser takes; the weights of those exported are read.
    own = tuple(name for name in directories(family, components) if name not in COMPONENTS)
    names = (*own, *family.tokenizers)
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
    if settings.loras and family.late(checkpoint) is not None:
        raise ExportError(
            f"{checkpoint.where} has two networks ({family.denoiser}, {family.late_denoiser}), and which of them "
            f"{settings.loras[0].path} is for is not known; fuse it into the checkpoint first, and leave --lora out"
        )
    if settings.loras:
        checkpoint = fuse_loras(checkpoint, settings.loras, family.build, components=own)
    checkpoint = with_controls(checkpoint, settings.controlnets, prefer_half=settings.dtype != "fp32")
    if settings.ip_adapter is not None:
        return AdaptedCheckpoint(
            checkpoint,
            read_ip_adapter(settings.ip_adapter),
            encoder_of(settings),
            family.skeleton(checkpoint, family.denoiser),
            prefer_half=settings.dtype != "fp32",
        )
    return checkpoint


def _sizes(settings: ExportSettings, family: Family, checkpoint: Checkpoint) -> tuple[Size, ...]:
    """Every size to export, the default first."""
    frames = family.default_frames(checkpoint) if settings.frames is None else settings.frames
    height, width = settings.height, settings.width
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


def _controls(
    settings: ExportSettings, family: Family, checkpoint: Checkpoint, size: Size
) -> dict[str, tuple[tuple[int, ...], ...]]:
    return {net.name: residual_shapes(family, checkpoint, net.name, size) for net in settings.controlnets}


def _repeated(items: Sequence[object]) -> object:
    """The first item that is there twice."""
    return next(item for place, item in enumerate(items) if item in items[:place])


def _check_rescale(settings: ExportSettings, guidance: Guidance) -> None:
    rescale = settings.guidance_rescale
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
            return observe(
                denoiser,
                lambda: family.denoise(denoiser, noised, numbers, numbers, inputs),
                images=rows,
                joint=not family.facts.cross_attention,
            )
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
