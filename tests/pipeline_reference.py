"""What diffusers itself makes of a checkpoint, to compare an export with.

:func:`mutate` writes a copy of a tiny checkpoint with one key of one configuration changed, and new weights where the
key changes their shapes. :class:`Reference` runs the real pipeline on it, as loaded by ``from_pretrained``, and takes
down what conditions the network, the final latents and what the autoencoder gives.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import diffusers
import PIL.Image
import safetensors.torch
import torch
import transformers
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from tests.oracle_families import FPS, MIN_GUIDANCE, MOTION_BUCKET, NOISE_AUGMENTATION
from tests.tiny_families import FAMILY_VARIANTS
from tests.tiny_models import tiny_model
from tgate_export.recipes import SAMPLERS

Pipeline = Any

STEPS = 3
MODEL_INDEX = "model_index"
LARGEST = 5_000_000
"""Parameters of a network that is still made. A larger one, of default sizes, keeps weights that do not fit."""


class Mark(Enum):
    """What stands for a key that is not in the file."""

    LEFT_OUT = "left out"

    def __repr__(self) -> str:
        return self.name


LEFT_OUT = Mark.LEFT_OUT


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One run, compared by identity.

    ``latents``: unit noise [1, ...]. ``augmentation``: SVD's noise on the picture, [1, 3, H, W].
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    image: PIL.Image.Image | None = None
    guidance_scale: float
    latents: Tensor
    augmentation: Tensor | None = None
    sampler: str


@dataclass(frozen=True)
class Result:
    """``conditioning``: ``<name>.<half>`` to [1, ...]. ``decoded``: what the autoencoder gives, before any clamping."""

    latents: Tensor
    conditioning: Mapping[str, Tensor] = field(default_factory=dict)
    decoded: Tensor | None = None


def variant_latents(variant: str) -> tuple[int, ...]:
    """Latents of a variant of ``tests/tiny_families.py`` or ``tests/tiny_models.py``, without the batch."""
    if variant in FAMILY_VARIANTS:
        return FAMILY_VARIANTS[variant].latents
    return (4, *tiny_model(variant).latent_size)


def config_file(component: str) -> str:
    """Where a component's configuration lies in a checkpoint."""
    if component == MODEL_INDEX:
        return "model_index.json"
    names = {"scheduler": "scheduler_config.json", "feature_extractor": "preprocessor_config.json"}
    name = "tokenizer_config.json" if component.startswith("tokenizer") else names.get(component, "config.json")
    return f"{component}/{name}"


def mutate(checkpoint: Path, target: Path, component: str, changes: Mapping[str, Any]) -> Path:
    """A copy of ``checkpoint``, hard links where nothing changes, with ``changes`` in a component's configuration.

    Weights are made new where the changed configuration gives them other names or shapes: what still fits is kept,
    the rest is drawn. Where the class cannot be built, or is of full size, the old weights stay.
    """
    shutil.copytree(checkpoint, target, copy_function=os.link)
    path = target / config_file(component)
    config = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        if value is LEFT_OUT:
            config.pop(key, None)
        else:
            config[key] = value
    text = json.dumps(config, indent=2)
    index = json.loads((checkpoint / "model_index.json").read_text("utf-8"))
    if component != MODEL_INDEX and (checkpoint / component / "config.json").is_file():
        _new_weights(index[component], config, checkpoint / component, target / component)
    path.unlink()
    path.write_text(text, "utf-8")
    return target


def _new_weights(names: tuple[str, str], config: Mapping[str, Any], old: Path, target: Path) -> None:
    library, name = names
    cls = getattr(diffusers if library == "diffusers" else transformers, name)
    try:
        with accelerate.init_empty_weights():
            shapes = {key: tuple(value.shape) for key, value in _build(cls, config).state_dict().items()}
            before = json.loads((old / "config.json").read_text("utf-8"))
            known = {key: tuple(value.shape) for key, value in _build(cls, before).state_dict().items()}
        if shapes == known or sum(math.prod(shape) for shape in shapes.values()) > LARGEST:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            module = _build(cls, config)
            _draw(module, _tensors(old))
    except Exception:  # diffusers or transformers cannot build it: the reference will say so
        return
    for path in target.glob("*"):
        path.unlink()
    module.save_pretrained(target)


def _build(cls: Any, config: Mapping[str, Any]) -> Any:
    if issubclass(cls, transformers.PreTrainedModel):
        return cls(cls.config_class.from_dict(dict(config)))
    return cls.from_config(dict(config))


def _tensors(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


@torch.no_grad()
def _draw(module: torch.nn.Module, known: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in known and known[name].shape == parameter.shape:
            parameter.copy_(known[name])
        elif parameter.dim() > 1:
            parameter.normal_(std=1 / math.sqrt(math.prod(parameter.shape[1:])))
        else:
            parameter.add_(0.1 * torch.randn(parameter.shape))


class Reference:
    """A tiny checkpoint's pipeline in diffusers. Components that a mutation leaves alone are loaded once."""

    def __init__(self, checkpoint: Path) -> None:
        index = json.loads((checkpoint / "model_index.json").read_text("utf-8"))
        self.pipeline = str(index["_class_name"])
        self.checkpoint = checkpoint
        self._parts: dict[str, Any] = {}
        self._parts = {
            name: part
            for name, part in self.load(checkpoint, None).components.items()
            if part is not None and name != "scheduler"  # a pipeline may change its scheduler's configuration
        }

    def load(self, directory: Path, changed: str | None) -> Pipeline:
        """The pipeline in ``directory``, whose component ``changed`` is not the base's."""
        shared = {} if changed == MODEL_INDEX else {n: p for n, p in self._parts.items() if n != changed}
        options = {"add_watermarker": False} if "XL" in self.pipeline else {}
        cls = diffusers.DiffusionPipeline if changed == MODEL_INDEX else getattr(diffusers, self.pipeline)
        with _quietly():
            pipe = cls.from_pretrained(directory, dtype=torch.float32, local_files_only=True, **options, **shared)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def run(self, directory: Path, changed: str | None, request: Request) -> Result | str:
        """What diffusers makes of ``directory``, or why it cannot."""
        try:
            with _quietly():
                result = self._run(self.load(directory, changed), request)
        except Exception as error:  # whatever diffusers raises, of any kind, is its answer
            return f"{type(error).__name__}: {str(error).strip()[:200]}"
        for tensor in (result.latents, *result.conditioning.values(), result.decoded):
            if tensor is not None and not tensor.isfinite().all():
                return "diffusers gives values that are not finite"
        return result

    def default_size(self, directory: Path, changed: str | None) -> tuple[int, int] | str:
        """Height and width in pixels where the user names none."""
        try:
            with _quietly():
                return self._default_size(self.load(directory, changed))
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip()[:200]}"

    def _default_size(self, pipe: Pipeline) -> tuple[int, int]:
        seen: dict[str, int] = {}
        real = inspect.signature(pipe.prepare_latents)

        class Enough(Exception):
            pass

        def stop(*args: Any, **kwargs: Any) -> None:
            bound = real.bind(*args, **kwargs).arguments
            seen.update(height=int(bound["height"]), width=int(bound["width"]))
            raise Enough

        options: dict[str, Any] = {"use_resolution_binning": False} if "PixArt" in _kind(pipe) else {}
        with mock.patch.object(pipe, "prepare_latents", stop):
            try:
                pipe("a photo", num_inference_steps=1, **options)
            except Enough:
                return seen["height"], seen["width"]
        raise AssertionError("the pipeline prepares no latents")

    def _run(self, pipe: Pipeline, request: Request) -> Result:
        pipe.scheduler = scheduler_of(pipe.scheduler, request.sampler)
        conditioning: dict[str, Tensor] = {}
        finals: list[Tensor] = []
        images: list[Tensor] = []
        step, decode = pipe.scheduler.step, pipe.vae.decode

        @functools.wraps(step)
        def record_step(*args: Any, **kwargs: Any) -> Any:
            output = step(*args, **kwargs)
            finals.append(output[0])
            return output

        def record_decode(*args: Any, **kwargs: Any) -> Any:
            output = decode(*args, **kwargs)
            images.append(output[0])
            return output

        pipe.scheduler.step = record_step
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(pipe.vae, "decode", record_decode))
            stack.enter_context(_no_noise(pipe.scheduler))
            stack.enter_context(_conditioning(pipe, request, conditioning))
            pipe(**_call(pipe, request))
        return Result(finals[-1], conditioning, torch.cat(images))


def _kind(pipe: Pipeline) -> str:
    return type(pipe).__name__


def _call(pipe: Pipeline, request: Request) -> dict[str, Any]:
    height, width = (side * pipe.vae_scale_factor for side in request.latents.shape[-2:])
    common: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "latents": request.latents.clone(),
        "output_type": "pt",
        "height": height,
        "width": width,
    }
    if request.image is not None:
        return common | {
            "image": request.image,
            "num_frames": request.latents.shape[1],
            "min_guidance_scale": MIN_GUIDANCE,
            "max_guidance_scale": request.guidance_scale,
            "fps": FPS,
            "motion_bucket_id": MOTION_BUCKET,
            "noise_aug_strength": NOISE_AUGMENTATION,
        }
    common |= {"prompt": request.prompt, "guidance_scale": request.guidance_scale}
    if request.negative_prompt is not None:
        common["negative_prompt"] = request.negative_prompt
    if "PixArt" in _kind(pipe):
        common |= {"use_resolution_binning": False, "clean_caption": False}
    if "Latte" in _kind(pipe):
        common |= {"clean_caption": False, "video_length": request.latents.shape[2]}
    return common


def scheduler_of(loaded: Any, sampler: str) -> Any:
    """The scheduler of a sampler's name, as users of diffusers change a loaded pipeline's; its own is left as it is.

    One option is given where a configuration is silent: samplers do not clip latents unless told to, whatever the
    class's default (``unless_stated``; docs/models.md).
    """
    recipe, own = SAMPLERS[sampler], type(loaded).__name__
    kind, options = recipe.edm if own.startswith("EDM") and recipe.edm else (recipe.scheduler, recipe.overrides)
    defaults = loaded.config.get("_use_default_values", ())
    silent = {k: v for k, v in recipe.unless_stated.items() if k not in loaded.config or k in defaults}
    wanted = {**options, **silent}
    if own == kind and all(loaded.config.get(key) == value for key, value in wanted.items()):
        return loaded
    return getattr(diffusers, kind).from_config(loaded.config, **wanted)


@contextmanager
def _no_noise(scheduler: Any) -> Iterator[None]:
    """Stochastic schedulers add zeros: what they compute without noise is compared, the noise has tests of its own."""
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    with mock.patch.object(module, "randn_tensor", lambda shape, **_: torch.zeros(shape)):
        yield


@contextmanager
def _conditioning(pipe: Pipeline, request: Request, found: dict[str, Tensor]) -> Iterator[None]:
    """Take down what the pipeline's own methods give the network."""
    kind = _kind(pipe)

    def spy(name: str, take: Callable[[Any], None]) -> Any:
        real = getattr(pipe, name)

        def spied(*args: Any, **kwargs: Any) -> Any:
            output = real(*args, **kwargs)
            take(output)
            return output

        return mock.patch.object(pipe, name, spied)

    def note(**tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            if tensor is not None:
                found[name.replace("__", ".")] = tensor.detach().float()

    def text(out: Any) -> None:
        if "XL" in kind:
            note(prompt_embeds__positive=out[0], prompt_embeds__negative=out[1])
            note(pooled__positive=out[2], pooled__negative=out[3])
        elif "PixArt" in kind:
            note(prompt_embeds__positive=out[0], prompt_embeds__negative=out[2])
            note(prompt_mask__positive=out[1], prompt_mask__negative=out[3])
        else:
            note(prompt_embeds__positive=out[0], prompt_embeds__negative=out[1])

    with ExitStack() as stack:
        if request.image is None:
            stack.enter_context(spy("encode_prompt", text))
        else:
            stack.enter_context(spy("_encode_image", lambda out: note(image_embeds__positive=out[-1:])))
            stack.enter_context(spy("_encode_vae_image", lambda out: note(image_latents__positive=out[-1:])))
            augmentation = request.augmentation
            assert augmentation is not None
            stack.enter_context(
                mock.patch.object(sys.modules[type(pipe).__module__], "randn_tensor", return_value=augmentation)
            )
        yield


@contextmanager
def _quietly() -> Iterator[None]:
    """Libraries say much about odd configurations, on stderr."""
    levels = diffusers_logging.get_verbosity(), transformers.logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers.logging.set_verbosity(levels[1])
