"""A checkpoint in one .safetensors file, in the layout of the original code (LDM), as model-sharing sites publish it.

Such a file holds tensors alone: configurations are the published ones of the model it is said to be. diffusers'
converters name the tensors; what they are given is mapped from the file, so that of a component only the few
tensors that they split or turn take memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
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
from tgate_export.checkpoints.base import Checkpoint
from tgate_export.checkpoints.directory import spellings
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
_OPEN_CLIP = ("cond_stage_model.model.", "conditioner.embedders.1.model.")

# What a U-Net is, by (size embedding, attention in the middle, width of the text).
_KNOWN = {
    (False, True, 768): "SD 1.x",
    (False, True, 1024): "SD 2.x",
    (True, True, 2048): "SDXL",
    (True, True, 1280): "the SDXL refiner",
    (True, False, 2048): "SSD-1B",
}

_CONVERT = "convert it to a diffusers directory first"


class SingleFileCheckpoint(Checkpoint):
    """One file in LDM layout, and the published configurations of the model that it is said to hold.

    Nothing in the file tells how its network was trained: a fine-tune to another prediction type than the published
    one is refused only where the file is marked so.
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
                f"{path}: a single file is read for {', '.join(SINGLE_FILE_MODELS)}, not for {model}; {_CONVERT}"
            )
        self.where = str(path)
        self._model = model
        self._build = build
        self._configs = configs or PublishedCheckpoint(model, build)
        self.model_index: Mapping[str, Any] = self._configs.model_index
        self._file = _File(path)
        self._tensors: dict[str, _Converted] = {}
        self._check_layout()
        self._check_model()

    def config(self, component: str) -> Mapping[str, Any]:
        return self._configs.config(component)

    def scheduler_config(self) -> Mapping[str, Any]:
        return self._configs.scheduler_config()

    def tensors(self, component: str) -> _Converted:
        if component not in self._tensors:
            self._tensors[component] = self._open(component)
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        raise ExportError(
            f"{self.where} is a single file, which holds no {name}; export without text "
            f"(--components denoiser,decoder), or {_CONVERT}"
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
            found = f"its first tensor is {min(keys)!r}" if keys else "it is empty"
            what = f"is no checkpoint in the original layout: nothing in it begins with {_UNET!r} ({found})"
        raise ExportError(f"{self.where} {what}")

    def _check_model(self) -> None:
        """The few facts by which networks of one layout differ, before anything is converted."""
        config = self.config("unet")
        context = next((key for key in sorted(self._file) if key.endswith(".attn2.to_k.weight")), None)
        if context is None or _FIRST_CONVOLUTION not in self._file:
            raise ExportError(f"{self.where} has no whole U-Net; download it again")
        found = (
            _SIZE_EMBEDDING in self._file,
            any(key.startswith(_MIDDLE_ATTENTION) for key in self._file),
            self._file.shape(context)[1],
        )
        wanted = (
            config.get("addition_embed_type") == "text_time",
            config.get("mid_block_type", "UNetMidBlock2DCrossAttn") == "UNetMidBlock2DCrossAttn",
            int(config["cross_attention_dim"]),
        )
        if found != wanted:
            raise ExportError(
                f"{self.where} holds {_describe(found)}, and {self._model} is {_describe(wanted)}; "
                "choose another --model or file"
            )
        channels = self._file.shape(_FIRST_CONVOLUTION)[1]
        if channels != config["in_channels"]:
            raise ExportError(
                f"{self.where}: its U-Net takes {channels} channels, {self._model} takes {config['in_channels']}; "
                "inpainting and image-to-image checkpoints cannot be exported"
            )
        prediction = str(self.scheduler_config().get("prediction_type", "epsilon"))
        marked = "v_prediction" if "v_pred" in self._file else "edm" if "edm_mean" in self._file else prediction
        if marked != prediction:
            raise ExportError(
                f"{self.where} is marked to predict {marked!r}, {self._model} predicts {prediction!r}; {_CONVERT}"
            )

    def _open(self, component: str) -> _Converted:
        converted = _Converted(f"{self.where}: its {component}", functools.partial(self._convert, component))
        with accelerate.init_empty_weights(include_buffers=False):
            module = self._build(self, component)
        for name, parameter in module.named_parameters(remove_duplicate=False):
            converted.expect(name, tuple(parameter.shape), self._model)
        return converted

    def _convert(self, component: str) -> Mapping[str, Tensor | None]:
        part = self._file.part(component)
        config = self.config(component)
        try:
            if component == "unet":
                tensors: Mapping[str, Tensor | None] = convert_ldm_unet_checkpoint(part, config)
            elif component == "vae":
                tensors = convert_ldm_vae_checkpoint(part, config)
            elif part.prefix in _OPEN_CLIP:
                named = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
                tensors = convert_open_clip_checkpoint(named, part, prefix=part.prefix)
            else:
                tensors = convert_ldm_clip_checkpoint(part)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            raise ExportError(
                f"{self.where}: its {component} cannot be converted ({type(error).__name__}: {error}); "
                "the file is incomplete, or of another model"
            ) from None
        return tensors


class _File(Mapping[str, Tensor]):
    """A safetensors file as a mapping, its tensors views of the mapped file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.prefix = ""
        if not path.is_file():
            raise ExportError(f"checkpoint {path} does not exist; --checkpoint wants an existing .safetensors file")
        try:
            file: Any = safetensors.safe_open(path, framework="pt")
            self._open = file
            self._keys = dict.fromkeys(file.keys())
        except (OSError, safetensors.SafetensorError) as error:
            raise ExportError(
                f"{path} is not a whole safetensors file ({error}); download the checkpoint again"
            ) from None

    def part(self, component: str) -> _File:
        """The tensors of one component, under the names that they have in the whole file."""
        for prefix in _PREFIXES.get(component, ()):
            keys = dict.fromkeys(key for key in self._keys if key.startswith(prefix))
            if keys:
                part = object.__new__(_File)
                part._path, part._open, part._keys, part.prefix = self._path, self._open, keys, prefix
                return part
        raise ExportError(
            f"{self._path} has no {component}; merge one into it, leave it out with --components, or {_CONVERT}"
        )

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._open.get_slice(key).get_shape())

    def __getitem__(self, key: str) -> Tensor:
        if key not in self._keys:
            raise KeyError(key)
        try:
            tensor: Tensor = self._open.get_tensor(key)
        except (OSError, safetensors.SafetensorError) as error:
            raise ExportError(f"{self._path}: tensor {key!r} cannot be read ({error}); download it again") from None
        return tensor

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


class _Converted:
    """One component's tensors under diffusers' names."""

    def __init__(self, where: str, convert: Callable[[], Mapping[str, Tensor | None]]) -> None:
        self._where = where
        self._convert = convert
        self._tensors: Mapping[str, Tensor | None] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def expect(self, key: str, shape: tuple[int, ...], model: str) -> None:
        """Raises :class:`ExportError` unless there is a tensor of that key and shape."""
        found = tuple(self._find(key).shape)
        if _squeezed(found) != _squeezed(shape):  # 1x1 convolutions may be held as linear layers
            raise ExportError(
                f"{self._where} has {key!r} of shape {list(found)}, {model} wants {list(shape)}; "
                "the file is of another model"
            )
        self._shapes[key] = shape

    def read(self, key: str) -> Tensor:
        """A copy of the tensor of that key, in the file's dtype and the module's shape."""
        tensor = self._find(key)
        return tensor.reshape(self._shapes.get(key, tuple(tensor.shape))).clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of views of the file and of what the conversion made; a later read converts again."""
        self._tensors = {}

    def _find(self, key: str) -> Tensor:
        if not self._tensors:
            self._tensors = self._convert()
        for candidate in spellings(key):
            tensor = self._tensors.get(candidate)
            if tensor is not None:
                return tensor
        raise ExportError(
            f"{self._where} has no tensor {key!r} (it has {len(self._tensors)} others); "
            "the file is incomplete, or of another model"
        )


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
