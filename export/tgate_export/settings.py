"""What the user asks of an export, and all of it that can be checked before PyTorch is loaded, which takes seconds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tgate_engine.control import check_control_name
from tgate_engine.errors import ExportError, RequestError, shown
from tgate_export.families import Model, find_model, find_text_model
from tgate_export.methods import find_method
from tgate_export.methods.base import Method, Settings
from tgate_export.places import local
from tgate_export.plans import check_guidance
from tgate_export.recipes import check_sampler

WEIGHTS = ("checkpoint", "random", "none")
"""Values of ``--weights``: the checkpoint's, random ones of its published structure, or none at all."""

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
COMPONENTS = ("text", "image", "denoiser", "decoder", "encoder", "reference")
"""Values of ``--components``. A model is conditioned by text or by an image; ``reference`` is an IP-Adapter's."""

MOST_BATCH = 1024
MOST_PIXELS = 1 << 14
"""Of a side."""

MOST_FRAMES = 1024
MOST_CLIP_SKIP = 256
MOST_BRANCH = 256
_PATH = 1024
"""Characters of a path in a message."""

MOST_SCALE = 1e10
"""What a LoRA may be multiplied with."""


@dataclass(frozen=True)
class Lora:
    """A LoRA's file, and what its change is multiplied with."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ExportError(f"the scale of LoRA {self.path} is {self.scale}; it must be a finite number")
        if abs(self.scale) > MOST_SCALE:
            raise ExportError(f"the scale of LoRA {self.path} is {self.scale:g}; {MOST_SCALE:g} at most is wanted")

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:SCALE``. Raises :class:`ExportError` where the scale is no number."""
        file, colon, scale = text.rpartition(":")
        if not colon or "/" in scale or scale.endswith(".safetensors"):
            return cls(_path(text))
        try:
            factor = float(scale)
        except ValueError:
            raise ExportError(
                f"--lora '{shown(text)}': the scale '{shown(scale)}' is no number; give FILE or FILE:SCALE"
            ) from None
        return cls(_path(file), factor)


MOST_CONTROLNETS = 16


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet: what requests call it, and where it lies, a diffusers directory or a hub id."""

    name: str
    location: str

    def __post_init__(self) -> None:
        try:
            check_control_name(self.name)
        except RequestError as error:
            raise ExportError(f"--controlnet: {error}") from None

    @classmethod
    def parse(cls, text: str) -> ControlNet:
        """``NAME=DIR``. Raises :class:`ExportError`."""
        name, equals, location = text.partition("=")
        if not equals or not location or not location.isprintable():
            raise ExportError(
                f"--controlnet '{shown(text)}': give NAME=DIR, what requests call it and a ControlNet's directory or "
                "hub id"
            )
        return cls(name, location)


def _path(text: str) -> Path:
    path = local(text)
    if path is None or not text.isprintable():
        raise ExportError(f"--lora '{shown(text)}': that is the name of no file; give FILE or FILE:SCALE")
    return path


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What the user asks for. None stands for the model's own default; sizes are in pixels.

    ``weights``: one of :data:`WEIGHTS`. ``components``: some of :data:`COMPONENTS`; None is
    everything for a checkpoint, and the denoiser alone without one. ``clip_skip``: last layers of CLIP's text encoders
    to leave out of a prompt's text. ``guidance_rescale``: from 0 to 1, see :class:`~tgate_export.step.DenoisingStep`.
    ``guidance_scale_2``: of a second network, for late steps.
    ``method``: one of :data:`~tgate_export.methods.METHODS`. ``cache_branch``: how many layers beside the last one the
    shallow calls of such a method compute. ``merge_ratio``: the share of tokens that a method merges; None is its own.
    ``preview_decoder``: the directory of a diffusers AutoencoderTiny (:mod:`tgate_export.preview_decoder`).
    ``sizes``: (width, height) of each, the default first, or ``height`` and ``width`` of the only one. ``batches``:
    least and largest number of images in a call, one for each set of graphs. ``ip_adapter``: an IP-Adapter's file;
    ``image_encoder``: the directory of its pictures' encoder; None is ``image_encoder`` beside the file.
    """

    model: str
    method: str | None = None
    m: int | None = None
    k: int | None = None
    steps: int | None = None
    warm_up: int | None = None
    fidelity_interval: int | None = None
    forecast_interval: int | None = None
    cache_interval: int | None = None
    refresh_interval: int | None = None
    sampler: str | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    checkpoint: str | None = None
    preview_decoder: Path | None = None
    weights: str = "checkpoint"
    components: Sequence[str] | None = None
    loras: Sequence[Lora] = ()
    controlnets: Sequence[ControlNet] = ()
    clip_skip: int = 0
    guidance_rescale: float = 0.0
    cache_branch: int = 0
    merge_ratio: float | None = None
    sizes: Sequence[tuple[int, int]] = ()
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    batches: Sequence[tuple[int, int]] = ()
    dtype: str = "fp32"
    output: Path | None = None
    force: bool = False
    verify: bool = True
    ip_adapter: Path | None = None
    image_encoder: Path | None = None

    @property
    def target(self) -> Path:
        """The bundle's directory."""
        return self.output or Path("bundles") / self.model


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Settings with the model's defaults filled in: what is known without its checkpoint."""

    model: Model
    method: Method
    method_settings: Settings
    plan_settings: Settings
    sampler: str
    guidance_scale: float
    guidance_scale_2: float
    batches: tuple[tuple[int, int], ...]
    components: tuple[str, ...]


def check_settings(settings: ExportSettings) -> Asked:
    """Raises a :class:`~tgate_engine.errors.TgateError` for what no checkpoint could mend."""
    model = find_model(settings.model)
    if settings.dtype not in DTYPES:
        raise ExportError(f"unknown dtype '{shown(settings.dtype)}'; choose one of {', '.join(DTYPES)}")
    if settings.weights not in WEIGHTS:
        raise ExportError(f"unknown weights '{shown(settings.weights)}'; choose one of {', '.join(WEIGHTS)}")
    tuned = None if _names_a_plan(settings) else model.tuned
    default = model.method if tuned is None else tuned[0]
    method = find_method(default if settings.method is None else settings.method)
    if "k" in method.takes and not model.facts.cross_attention:
        raise ExportError(
            f"method {method.name} reuses cross-attention, and {settings.model} has none of its own: its text and its "
            "picture attend to each other in one (joint attention); take --method "
            f"{'guidance_delta or ' if model.facts.guided else ''}forecast"
        )
    steps = model.steps if settings.steps is None else settings.steps
    method_settings = method.settings(
        steps=steps,
        gate=min(model.gate, steps) if settings.m is None and method.gated else settings.m,
        k=settings.k,
        w=settings.warm_up,
        f=settings.fidelity_interval,
        c=settings.cache_interval,
        g=settings.refresh_interval,
        r=settings.forecast_interval,
        ratio=settings.merge_ratio,
        defaults={"k": model.self_interval, "w": model.warm_up},
    )
    if settings.cache_branch and "c" not in method.takes:
        raise ExportError(
            f"--cache-branch {settings.cache_branch} would change nothing: method {method.name} makes no shallow call; "
            "leave it out"
        )
    sampler = model.sampler if settings.sampler is None else settings.sampler
    check_sampler(sampler)
    scale = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    check_guidance(scale)
    second = _second_scale(settings, model, scale)
    _check_numbers(settings)
    batches, components = _batches(settings, model), _components(settings, model)
    _check_options(settings, model)
    return Asked(
        model=model,
        method=method,
        method_settings=method_settings,
        plan_settings=method_settings if tuned is None else tuned[1],
        sampler=sampler,
        guidance_scale=scale,
        guidance_scale_2=second,
        batches=batches,
        components=components,
    )


def _names_a_plan(settings: ExportSettings) -> bool:
    """Whether the user names any part of a plan, or weights that are not the model's own."""
    named = settings.method, settings.steps, settings.m, settings.warm_up, settings.sampler, settings.guidance_scale
    intervals = settings.k, settings.fidelity_interval, settings.cache_interval, settings.refresh_interval
    others = settings.forecast_interval, settings.merge_ratio, settings.checkpoint
    return any(value is not None for value in (*named, *intervals, *others))


def _second_scale(settings: ExportSettings, model: Model, scale: float) -> float:
    """The second network's guidance scale; whether the checkpoint has one is asked for later."""
    asked = settings.guidance_scale_2
    if asked is None:
        return scale if model.guidance_scale_2 is None else model.guidance_scale_2
    check_guidance(asked)
    if not model.facts.late:
        raise ExportError(
            f"--guidance-scale-2 {asked:g} would change nothing: {settings.model} has one network; leave it out"
        )
    if scale <= 1:
        raise ExportError(
            f"--guidance-scale-2 {asked:g} would change nothing: with --guidance-scale {scale:g} there is no guidance, "
            "in either network; leave it out, or give a --guidance-scale above 1"
        )
    return asked


def check_text(model: str, *, checkpoint: str | None, clip_skip: int) -> None:
    """The same of what is asked for embeddings: a model that a prompt conditions, and where its text encoder lies.

    Raises :class:`ExportError`.
    """
    found = find_text_model(model)
    _check_most("--clip-skip", [clip_skip], MOST_CLIP_SKIP)
    _check_clip_skip(clip_skip, model, found)
    _check_place(checkpoint)


def _check_options(settings: ExportSettings, model: Model) -> None:
    """Options that a model does not have, and those that exclude each other."""
    if settings.weights != "checkpoint" and (settings.checkpoint is not None or settings.loras or settings.controlnets):
        raise ExportError(
            f"--weights {settings.weights} reads no checkpoint; leave out --checkpoint, --lora and --controlnet"
        )
    for lora in settings.loras:
        if not os.path.lexists(lora.path):
            raise ExportError(f"LoRA {lora.path} does not exist; --lora wants a .safetensors file")
    _check_place(settings.checkpoint)
    _check_preview(settings.preview_decoder, settings.model, model)
    _check_ip_adapter(settings, model)
    _check_controlnets(settings, model)
    if settings.frames is not None and not model.facts.video:
        raise ExportError(f"--frames is for video models; {settings.model} makes pictures")
    if settings.sizes and (settings.height is not None or settings.width is not None):
        raise ExportError("give --size, or --height and --width, not both")
    _check_clip_skip(settings.clip_skip, settings.model, model)
    rescale = settings.guidance_rescale
    if not 0 <= rescale <= 1:
        raise ExportError(f"--guidance-rescale must be from 0 to 1, got {rescale}")
    if rescale and not model.facts.rescales_guidance:
        raise ExportError(
            f"--guidance-rescale: the pipeline of {settings.model} does not rescale guidance; leave it out"
        )


def _check_controlnets(settings: ExportSettings, model: Model) -> None:
    """They are the model's, and each is called something else; where they lie on this machine, they are there."""
    nets = settings.controlnets
    if nets and not model.facts.controlnets:
        raise ExportError(f"--controlnet is for Stable Diffusion and SDXL; {settings.model} takes none, leave it out")
    if len(nets) > MOST_CONTROLNETS:
        raise ExportError(f"got {len(nets)} --controlnet, at most {MOST_CONTROLNETS} are taken")
    names = [net.name for net in nets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ExportError(f"--controlnet {twice[0]} is there {names.count(twice[0])} times; give each its own name")
    for net in nets:
        path = local(net.location)
        if net.location.startswith((".", "/", "~")) and not (path and path.is_dir()):
            raise ExportError(
                f"ControlNet {net.name}: {shown(net.location, _PATH)} is no directory; --controlnet wants a ControlNet "
                "in diffusers layout, or a hub id"
            )


def _check_place(checkpoint: str | None) -> None:
    """A checkpoint that is said to be on this machine is there."""
    place = checkpoint or ""
    path = local(place)
    if place.startswith((".", "/", "~")) and not (path and path.exists()):
        raise ExportError(
            f"checkpoint {shown(place, _PATH)} does not exist; --checkpoint wants a diffusers directory, a single "
            ".safetensors file or a hub id"
        )


def _check_preview(place: Path | None, name: str, model: Model) -> None:
    if place is not None and model.facts.video:
        raise ExportError(f"--preview-decoder is for models of pictures; {name} makes videos: leave it out")
    if place is not None and not place.is_dir():
        raise ExportError(
            f"--preview-decoder {shown(place, _PATH)}: there is no such directory; give that of a diffusers "
            "AutoencoderTiny (config.json and safetensors weights)"
        )


def _check_ip_adapter(settings: ExportSettings, model: Model) -> None:
    """What it holds, the exporter says later."""
    file = settings.ip_adapter
    if file is None:
        if settings.image_encoder is not None:
            raise ExportError("--image-encoder would change nothing: it is an IP-Adapter's; give --ip-adapter as well")
        return
    if not model.facts.ip_adapters:
        raise ExportError(f"--ip-adapter is for Stable Diffusion and SDXL; {settings.model} is exported without one")
    if settings.weights != "checkpoint":
        raise ExportError(f"--weights {settings.weights} reads no checkpoint; leave out --ip-adapter")
    if not os.path.lexists(file):
        raise ExportError(f"IP-Adapter {file} does not exist; --ip-adapter wants a .safetensors file")
    if not encoder_of(settings).is_dir():
        raise ExportError(
            f"{encoder_of(settings)} is no directory; --image-encoder wants the directory of CLIP's vision model, "
            "which the adapter was trained with"
        )


def encoder_of(settings: ExportSettings) -> Path:
    """Where the encoder of an IP-Adapter's pictures lies: where it is said to, or beside the adapter, as it is
    published."""
    assert settings.ip_adapter is not None
    return settings.image_encoder or settings.ip_adapter.parent / "image_encoder"


def _check_clip_skip(clip_skip: int, name: str, model: Model) -> None:
    """How many layers the text encoders have, the checkpoint says later."""
    if clip_skip and not model.facts.clip_skips:
        raise ExportError(f"--clip-skip is for models with CLIP text encoders; {name} has none")


def _check_numbers(settings: ExportSettings) -> None:
    """Refuse sizes that no model makes; what the checkpoint's own can make is asked for later."""
    sides = [side for size in settings.sizes for side in size]
    _check_most("--size", [*sides, settings.height, settings.width], MOST_PIXELS)
    _check_most("--frames", [settings.frames], MOST_FRAMES)
    _check_most("--clip-skip", [settings.clip_skip], MOST_CLIP_SKIP)
    _check_most("--cache-branch", [settings.cache_branch], MOST_BRANCH)


def _check_most(name: str, values: Sequence[int | None], most: int) -> None:
    for value in values:
        if value is not None and value > most:
            raise ExportError(f"{name} must be at most {most}, got {shown(value)}")


def _batches(settings: ExportSettings, model: Model) -> tuple[tuple[int, int], ...]:
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
    return batches


def _components(settings: ExportSettings, model: Model) -> tuple[str, ...]:
    """The components to export, in their order."""
    sources = [source for source in model.facts.sources if source != "text" or model.facts.text_graph]
    from_pictures = ("encoder",) if model.facts.from_pictures else ()
    reference = () if settings.ip_adapter is None else ("reference",)
    possible = tuple(c for c in COMPONENTS if c in (*sources, "denoiser", "decoder", *from_pictures, *reference))
    if not model.facts.text_graph and "text" in (settings.components or ()):
        raise ExportError(
            f"the text encoder of {settings.model} is not exported; leave out text, and encode prompts with tgate embed"
        )
    if settings.components is None:
        return possible if settings.weights == "checkpoint" else ("denoiser",)
    odd = [c for c in settings.components if c not in possible]
    if odd or "denoiser" not in settings.components or len(set(settings.components)) < len(settings.components):
        raise ExportError(
            f"--components of {settings.model} are some of {', '.join(possible)}, the denoiser among them, each once; "
            f"got {shown(', '.join(settings.components)) or 'none'}"
        )
    if reference and "reference" not in settings.components:
        raise ExportError("--ip-adapter would change nothing without reference among --components; add it")
    if settings.weights != "checkpoint" and "text" in settings.components:
        raise ExportError(
            f"--weights {settings.weights} has no vocabulary, so no text; choose --components denoiser,decoder"
        )
    return tuple(c for c in possible if c in settings.components)
