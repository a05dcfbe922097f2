"""A checkpoint in one .safetensors file, in the layout of the original code (LDM), as model-sharing sites publish it.

Such a file holds tensors alone: configurations are the published ones of the model it is said to be, but for what
its marks say (:mod:`~tgate_export.checkpoints.marks`). diffusers' converters name the tensors; what they are given is
mapped from the file, so that of a component only the few tensors that they split or turn take memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import safetensors
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Stored
from tgate_export.checkpoints.directory import spellings
from tgate_export.checkpoints.files import plain, present
from tgate_export.checkpoints.headers import read_header
from tgate_export.checkpoints.leftovers import check_marks, check_read, check_rest, check_storage
from tgate_export.checkpoints.marks import CONVERT, MARKS, check_scale, read_marks
from tgate_export.checkpoints.published import PublishedCheckpoint

SINGLE_FILE_MODELS = ("sd15", "sd21", "sdxl", "ssd-1b")
"""Models that a single file can hold."""

_UNET = "model.diffusion_model."
_FIRST_CONVOLUTION = f"{_UNET}input_blocks.0.0.weight"
_SIZE_EMBEDDING = f"{_UNET}label_emb.0.0.weight"
_MIDDLE_ATTENTION = f"{_UNET}middle_block.1."

# Where a component's tensors lie; the first prefix that a file has. OpenCLIP's encoders have their own names.
_PREFIXES: Mapping[str, tuple[str, ...]] = {
    "unet": (_UNET,),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
# Where else its tensors may lie, which then nothing reads.
_PLACES = {"unet": (_UNET,), "vae": _PREFIXES["vae"]}
_PLACES_OF_TEXT = {
    False: {"text_encoder": ("cond_stage_model.",)},
    True: {"text_encoder": ("conditioner.embedders.0.",), "text_encoder_2": ("conditioner.embedders.1.",)},
}
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")

# What a U-Net is, by (size embedding, attention in the middle, width of the text).
_KNOWN = {
    (False, True, 768): "SD 1.x",
    (False, True, 1024): "SD 2.x",
    (True, True, 2048): "SDXL",
    (True, True, 1280): "the SDXL refiner",
    (True, False, 2048): "SSD-1B",
}

# Networks that take more than latents, by their channels.
_CONDITIONED = {5: "depth-to-image", 7: "upscaling", 8: "instruct-pix2pix and other image-to-image"}
_INPAINTING = 9


@dataclass(frozen=True)
class _Built:
    """A component's module without its weights: its configuration with the class's defaults, and its shapes."""

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]


class SingleFileCheckpoint(Checkpoint):
    """One file in LDM layout, and the published configurations of the model that it is said to hold.

    What the file tells of itself changes them, or is refused: see :func:`~tgate_export.checkpoints.marks.read_marks`.
    A fine-tune to another prediction type that is not marked cannot be told.
    """

    def __init__(
        self,
        path: Path,
        model: str,
        build: Callable[[Checkpoint, str], nn.Module],
        *,
        configs: Checkpoint | None = None,
    ) -> None:
        """``build`` makes a component's module from this checkpoint's configuration: a family's own method.

        ``configs``: where configurations come from instead of the published ones of ``model``.
        """
        if model not in SINGLE_FILE_MODELS:
            raise ExportError(
                f"{path}: a single file is read for {', '.join(SINGLE_FILE_MODELS)}, not for {model}; {CONVERT}"
            )
        self.where = str(path)
        self._model = model
        self._build = build
        self._configs = configs or PublishedCheckpoint(model, build)
        self.model_index: Mapping[str, Any] = self._configs.model_index
        self._file = _File(path)
        self._built: dict[str, _Built] = {}
        self._tensors: dict[str, _Converted] = {}
        self._places = _PLACES | _PLACES_OF_TEXT["text_encoder_2" in self.model_index]
        self._check_layout()
        check_storage(self.where, "unet", self._held("unet"))
        self._check_model()
        check_marks(self.where, {key: self._file.stored(key) for key in MARKS if key in self._file})
        self._marks = read_marks(self.where, model, self._file, self._file.metadata(), self._configs.scheduler_config())
        self._check_rest()
        if "_class_name" in self._marks.scheduler:
            self.model_index = {**self.model_index, "scheduler": ["diffusers", self._marks.scheduler["_class_name"]]}

    def config(self, component: str) -> Mapping[str, Any]:
        config = self._configs.config(component)
        return {**config, **self._marks.vae} if component == "vae" else config

    def scheduler_config(self) -> Mapping[str, Any]:
        return self._marks.scheduler_config(self._configs.scheduler_config())

    def tensors(self, component: str) -> _Converted:
        if component not in self._tensors:
            self._tensors[component] = self._open(component)
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        raise ExportError(
            f"{self.where} is a single file, which holds no {name}; export without text "
            f"(--components denoiser,decoder), or {CONVERT}"
        )

    def token_limit(self, name: str) -> int | None:
        return self._configs.token_limit(name)

    def licence(self) -> str:
        """A file has no model card."""
        return "unknown"

    def _check_layout(self) -> None:
        keys = tuple(self._file)
        if any(key.startswith(_UNET) for key in keys):
            return
        if any("lora_" in key or ".lora." in key for key in keys):
            what = "is a LoRA, no checkpoint; give it with --lora, beside a checkpoint"
        elif any(key.startswith(("down_blocks.", "encoder.down_blocks.", "text_model.", "conv_in.")) for key in keys):
            what = "is one component of a diffusers checkpoint; give the directory that holds model_index.json"
        else:
            detail = f"its first tensor is {min(keys)!r}" if keys else "it is empty"
            what = f"is no checkpoint in the original layout: nothing in it begins with {_UNET!r} ({detail})"
        raise ExportError(f"{self.where} {what}")

    def _check_model(self) -> None:
        """The few facts by which networks of one layout differ, before anything is converted."""
        config = self._build_once("unet").config
        context = next((key for key in sorted(self._file) if key.endswith(".attn2.to_k.weight")), None)
        text = () if context is None else self._file.stored(context).shape
        first = self._file.stored(_FIRST_CONVOLUTION).shape if _FIRST_CONVOLUTION in self._file else ()
        if len(text) != 2 or len(first) != 4:
            raise ExportError(f"{self.where} has no whole U-Net; download it again")
        held = (
            _SIZE_EMBEDDING in self._file,
            any(key.startswith(_MIDDLE_ATTENTION) for key in self._file),
            text[1],
        )
        expected = (
            config["addition_embed_type"] == "text_time",
            config["mid_block_type"] == "UNetMidBlock2DCrossAttn",
            int(config["cross_attention_dim"]),
        )
        if held != expected:
            raise ExportError(
                f"{self.where} holds {_describe(held)}, and {self._model} is {_describe(expected)}; "
                "choose another --model or file"
            )
        channels = first[1]
        if channels != config["in_channels"]:
            what = _CONDITIONED.get(channels, "image-to-image")
            raise ExportError(
                f"{self.where}: its U-Net takes {channels} channels, {self._model} takes {config['in_channels']}; "
                + (
                    "an inpainting checkpoint is read from a diffusers directory alone"
                    if channels == _INPAINTING
                    else f"{what} checkpoints cannot be exported"
                )
            )

    def _check_rest(self) -> None:
        check_scale(self.where, self._file, lambda: float(self._build_once("vae").config["scaling_factor"]))
        placed = tuple(place for places in self._places.values() for place in places)
        check_rest(self.where, (key for key in self._file if not key.startswith(placed) and key not in MARKS))

    def _build_once(self, component: str) -> _Built:
        if component not in self._built:
            with accelerate.init_empty_weights(include_buffers=False):
                module: Any = self._build(self, component)
            config = module.config
            parameters = module.named_parameters(remove_duplicate=False)
            self._built[component] = _Built(
                config.to_dict() if hasattr(config, "to_dict") else config,
                {name: tuple(parameter.shape) for name, parameter in parameters},
            )
        return self._built[component]

    def _held(self, component: str) -> dict[str, Stored]:
        """Every tensor that lies where the component does."""
        keys = (key for key in self._file if key.startswith(self._places.get(component, ())))
        return {key: self._file.stored(key) for key in keys}

    def _open(self, component: str) -> _Converted:
        part = self._file.part(component)
        held = self._held(component)
        check_storage(self.where, component, held)
        if component == "text_encoder" and self._marks.layers_skipped:
            raise ExportError(
                f"{self.where}: its metadata says modelspec.encoder_layer = {self._marks.layers_skipped + 1}: prompts "
                f"are encoded without the last layers; leave the text out (--components denoiser,decoder)"
            )
        built = self._build_once(component)
        converted = _Converted(
            f"{self.where}: its {component}",
            part,
            lambda tensors: self._convert(component, part.prefix, tensors),
            built.shapes,
            self._model,
        )
        check_read(self.where, component, held.keys() - converted.read_keys())
        return converted

    def _convert(self, component: str, prefix: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor | None]:
        """A component's tensors under diffusers' names. Those of one layer may come as one, and are then split."""
        config = self._build_once(component).config
        converted: Mapping[str, Tensor | None]
        try:
            if component == "unet":
                converted = convert_ldm_unet_checkpoint(tensors, config)
            elif component == "vae":
                converted = convert_ldm_vae_checkpoint(tensors, config)
            elif prefix in _OPEN_CLIP:
                first = next((key for key in tensors if key.endswith(".attn.in_proj_bias")), None)
                width = config["hidden_size"] if first is None else len(tensors[first]) // 3
                named = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
                converted = convert_open_clip_checkpoint(named, tensors, prefix=prefix)
            else:
                converted = convert_ldm_clip_checkpoint(tensors)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ExportError(
                f"{self.where}: its {component} cannot be converted ({type(error).__name__}: {error!s:.200}); "
                "the file is incomplete, or of another model"
            ) from None
        return converted


class _File(Mapping[str, Tensor]):
    """A safetensors file as a mapping, its tensors views of the mapped file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.prefix = ""
        if not present(path):
            raise ExportError(
                f"checkpoint {plain(str(path), 1024)} does not exist; --checkpoint wants an existing .safetensors file"
            )
        self._header = read_header(path)
        self._keys = dict.fromkeys(self._header.tensors)
        try:
            self._open: Any = safetensors.safe_open(path, framework="pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise ExportError(
                f"{path} is not a whole safetensors file ({error!s:.200}); download the checkpoint again"
            ) from None

    def part(self, component: str) -> _File:
        """The tensors of one component, under the names that they have in the whole file."""
        for prefix in _PREFIXES.get(component, ()):
            keys = dict.fromkeys(key for key in self._keys if key.startswith(prefix))
            if keys:
                part = object.__new__(_File)
                part._path, part._header, part._open = self._path, self._header, self._open
                part._keys, part.prefix = keys, prefix
                return part
        raise ExportError(
            f"{self._path} has no {component}; merge one into it, leave it out with --components, or {CONVERT}"
        )

    def metadata(self) -> Mapping[str, str]:
        return self._header.metadata

    def stored(self, key: str) -> Stored:
        return self._header.tensors[key]

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        try:
            tensor: Tensor = self._open.get_tensor(key)
        except (OSError, safetensors.SafetensorError) as error:
            raise ExportError(
                f"{self._path}: tensor {key!r} cannot be read ({error!s:.200}); download it again"
            ) from None
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Converted:
    """One component's tensors under diffusers' names. What they are called and how large they are reads no values."""

    def __init__(
        self,
        where: str,
        part: _File,
        convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor | None]],
        shapes: Mapping[str, tuple[int, ...]],
        model: str,
    ) -> None:
        """``shapes``: those of the module's parameters. Raises :class:`ExportError` unless all are there."""
        self._where = where
        self._part = part
        self._convert = convert
        self._shapes = shapes
        self._tensors: Mapping[str, Tensor | None] = {}
        self._sources = _sources(part, convert)
        converted = convert({key: torch.empty(part.stored(key).shape, device="meta") for key in part})
        for key, shape in shapes.items():
            tensor = converted[self.find(key)]
            held = () if tensor is None else tuple(tensor.shape)
            if _squeezed(held) != _squeezed(shape):  # 1x1 convolutions may be held as linear layers
                raise ExportError(
                    f"{where} has {key!r} of shape {list(held)}, {model} wants {list(shape)}; "
                    "the file is of another model"
                )

    def stored(self) -> Mapping[str, Stored]:
        """What parameters read, in the module's shapes; what else the file holds of the component is harmless."""
        names = {self.find(key): shape for key, shape in self._shapes.items()}
        return {name: Stored(self._part.stored(self._sources[name]).dtype, shape) for name, shape in names.items()}

    def find(self, key: str) -> str:
        for candidate in spellings(key):
            if candidate in self._sources:
                return candidate
        raise ExportError(
            f"{self._where} has no tensor {key!r} (it has {len(self._sources)} others); "
            "the file is incomplete, or of another model"
        )

    def read_keys(self) -> frozenset[str]:
        """Tensors of the file that parameters take their values from."""
        return frozenset(self._sources[self.find(key)] for key in self._shapes)

    def read(self, key: str) -> Tensor:
        """A copy of the tensor of that key, in the file's dtype and the module's shape."""
        name = self.find(key)
        if not self._tensors:
            self._tensors = self._convert(self._part)
        tensor = self._tensors[name]
        assert tensor is not None  # find knows those that the conversion makes
        return tensor.reshape(self._shapes.get(key, tuple(tensor.shape))).clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of views of the file and of what the conversion made; a later read converts again."""
        self._tensors = {}


def _sources(part: _File, convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor | None]]) -> dict[str, str]:
    """Which tensor of the file each converted one is made of.

    A conversion renames, splits and turns tensors. One that holds its own number everywhere tells where it went.
    """
    keys = tuple(part)
    numbered = {}
    for number, key in enumerate(keys):
        rank = len(part.stored(key).shape)
        # Three rows, for those that are split in three; as many columns as the split takes for one.
        shape = (1, 1) if key.endswith(".text_projection") else (3, 1, 1, 1, 1)[:rank]
        numbered[key] = torch.full(shape, number)
    converted = convert(numbered).items()
    # A split that is given too little makes nothing of it.
    return {name: keys[int(tensor.flatten()[0])] for name, tensor in converted if tensor is not None and tensor.numel()}


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _describe(facts: tuple[bool, bool, int]) -> str:
    if facts in _KNOWN:
        return _KNOWN[facts]
    sizes, middle, width = facts
    return (
        f"a U-Net with{'' if sizes else 'out'} size conditioning, with{'' if middle else 'out'} attention in the "
        f"middle, for text {width} wide"
    )
