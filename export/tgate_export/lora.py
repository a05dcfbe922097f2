"""LoRAs, added into a checkpoint's weights before anything else sees them.

diffusers reads the file's format and peft computes each change. The network that they are loaded into has no weights
of its own: a weight is fused when it is read, in float32, one tensor at a time. Graphs, names and shapes stay as they
are without a LoRA.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import diffusers
import safetensors
import torch
import transformers
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Tensors

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

_PEFT_ROOT = "base_model.model."
_PEFT_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora", "lora_bias")
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.(?P<leaf>weight|bias)")
_OTHER_KINDS = {
    "a LyCORIS network that is no LoRA": (".hada_", ".lokr_", ".oft_", ".on_input"),
    "a DoRA": ("dora_scale", "lora_magnitude_vector"),
}


@dataclass(frozen=True)
class Lora:
    """A LoRA's file, and what its change is multiplied with."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ExportError(f"the scale of LoRA {self.path} is {self.scale}; it must be a finite number")

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``FILE`` or ``FILE:SCALE``. Raises :class:`ExportError` where the scale is no number."""
        file, colon, scale = text.rpartition(":")
        if not colon or "/" in scale or scale.endswith(".safetensors"):
            return cls(Path(text).expanduser())
        try:
            return cls(Path(file).expanduser(), float(scale))
        except ValueError:
            raise ExportError(f"--lora {text}: the scale {scale!r} is no number; give FILE or FILE:SCALE") from None


def fuse_loras(
    checkpoint: Checkpoint,
    loras: Sequence[Lora],
    build: Callable[[Checkpoint, str], nn.Module],
    *,
    components: Iterable[str],
) -> Checkpoint:
    """``checkpoint`` with all of ``loras`` added to its weights, in their order; itself where there are none.

    ``build`` makes a component's module from a checkpoint's configuration: a family's own method. ``components``:
    those that will be read; what a LoRA changes in others is left out. Raises :class:`ExportError` for a file that is
    missing, damaged, no LoRA, for another architecture, or changes none of ``components``.
    """
    return FusedCheckpoint(checkpoint, loras, build, components=components) if loras else checkpoint


class FusedCheckpoint(Checkpoint):
    """A checkpoint whose weights include LoRAs.

    ``fused``: the components that they change. ``loras``: which, in their order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        loras: Sequence[Lora],
        build: Callable[[Checkpoint, str], nn.Module],
        *,
        components: Iterable[str],
    ) -> None:
        """As :func:`fuse_loras`."""
        try:
            import peft  # noqa: F401
        except ImportError:
            raise ExportError("--lora needs the package peft; install it: pip install 'tgate-engine[export]'") from None
        self._checkpoint = checkpoint
        self.where = checkpoint.where
        self.model_index: Mapping[str, Any] = checkpoint.model_index
        self.loras = tuple(loras)
        wanted = tuple(components)
        files = [_read(lora.path, checkpoint) for lora in self.loras]
        for file in files:
            if not set(file.components) & set(wanted):
                raise ExportError(
                    f"LoRA {file.path} changes {', '.join(file.components)} alone, and only {', '.join(wanted)} will "
                    "be exported; export more --components, or leave it out"
                )
        self.fused = tuple(name for name in wanted if any(name in file.components for file in files))
        self._layers = {name: self._load(name, files, build) for name in self.fused}
        self._tensors: dict[str, Tensors] = {}

    def config(self, component: str) -> Mapping[str, Any]:
        return self._checkpoint.config(component)

    def scheduler_config(self) -> Mapping[str, Any]:
        return self._checkpoint.scheduler_config()

    def tensors(self, component: str) -> Tensors:
        if component not in self.fused:
            return self._checkpoint.tensors(component)
        if component not in self._tensors:
            where = f"{self.where}: {component} with {', '.join(str(lora.path) for lora in self.loras)}"
            self._tensors[component] = _FusedTensors(
                where, self._checkpoint.tensors(component), self._layers[component]
            )
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        return self._checkpoint.tokenizer(name)

    def token_limit(self, name: str) -> int | None:
        return self._checkpoint.token_limit(name)

    def licence(self) -> str:
        """The checkpoint's; a LoRA's file names none."""
        return self._checkpoint.licence()

    def _load(
        self, component: str, files: Sequence[_File], build: Callable[[Checkpoint, str], nn.Module]
    ) -> Mapping[str, nn.Module]:
        """peft's layers by name, each over a base without weights."""
        from peft.tuners.lora import LoraLayer

        module = _hollow(build, self._checkpoint, component)
        with torch.random.fork_rng(devices=[]):  # peft draws initial values before it loads the file's
            for position, (lora, file) in enumerate(zip(self.loras, files, strict=True)):
                if component in file.components:
                    file.load(module, component, f"lora_{position}", lora.scale)
        return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


class _FusedTensors:
    """One component's tensors, those that LoRAs change fused when they are read."""

    def __init__(self, where: str, wrapped: Tensors, layers: Mapping[str, nn.Module]) -> None:
        self._where = where
        self._wrapped = wrapped
        self._layers = layers

    def read(self, key: str) -> Tensor:
        tensor = self._wrapped.read(key)
        name, _, leaf = key.rpartition(".")
        layer: Any = self._layers.get(name)
        if layer is None or not (leaf == "weight" or (leaf == "bias" and any(layer.lora_bias.values()))):
            return tensor
        base = layer.get_base_layer()
        hollow = {parameter: held.data for parameter, held in base.named_parameters()}
        try:
            for parameter, data in hollow.items():
                values = tensor.to(torch.float32, copy=True) if parameter == leaf else torch.zeros(data.shape)
                getattr(base, parameter).data = values.reshape(data.shape)
            with torch.no_grad():
                layer.merge(adapter_names=list(layer.lora_A))
            fused: Tensor = getattr(base, leaf).data.to(tensor.dtype)
        finally:
            layer.merged_adapters.clear()
            for parameter, data in hollow.items():
                getattr(base, parameter).data = data
        if not torch.isfinite(fused).all():
            raise ExportError(f"{self._where}: {key!r} does not fit into {tensor.dtype}; choose a smaller LoRA scale")
        return fused

    def close(self) -> None:
        self._wrapped.close()


@dataclass(frozen=True, eq=False)
class _File:
    """A LoRA's tensors under diffusers' names, which begin with the component's.

    ``alphas``: kohya's strengths, named alike. ``metadata``: the settings it was trained with, named alike.
    """

    path: Path
    pipeline: Any
    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, float]
    metadata: Mapping[str, Any]

    @property
    def components(self) -> tuple[str, ...]:
        found = {key.split(".")[0] for key in self.tensors}
        return tuple(name for name in (*DENOISERS, *TEXT_ENCODERS) if name in found)

    def load(self, module: nn.Module, component: str, adapter: str, scale: float) -> None:
        """Make those of ``module``'s layers that it changes peft's, with an adapter of that name."""
        layers: dict[str, Any] = {name.replace(".base_layer", ""): part for name, part in module.named_modules()}
        factors, strengths = self._factors(module, component)
        self._check(component, layers, factors)
        inside = f"{component}."
        tensors = {key: tensor for key, tensor in self.tensors.items() if key.startswith(inside)}
        named: dict[str, Any] = {
            "network_alphas": {key: alpha for key, alpha in self.alphas.items() if key.startswith(inside)} or None,
            "metadata": {key: value for key, value in self.metadata.items() if key.startswith(inside)} or None,
            "prefix": component,
            "adapter_name": adapter,
        }
        try:
            with _quiet():
                if component in TEXT_ENCODERS:
                    self.pipeline.load_lora_into_text_encoder(tensors, text_encoder=module, **named)
                else:
                    _loader(module).load_lora_adapter(tensors, **named)
        except Exception as error:  # diffusers and peft raise many kinds
            raise ExportError(f"LoRA {self.path} does not load into the {component} ({_line(error)})") from None
        layers = dict(module.named_modules())
        for (name, side, leaf), tensor in factors.items():
            held = getattr(layers[name], f"lora_{side}", {})
            if adapter not in held or not torch.equal(getattr(held[adapter], leaf).flatten(), tensor.float().flatten()):
                raise ExportError(f"LoRA {self.path}: diffusers does not load its change of {component}.{name}")
        for name in dict.fromkeys(name for name, _, _ in factors):
            if name in strengths:  # where layers differ, diffusers' patterns of strengths miss most of them
                layers[name].lora_alpha[adapter] = strengths[name]
            layers[name].set_scale(adapter, scale)

    def _factors(
        self, module: nn.Module, component: str
    ) -> tuple[Mapping[tuple[str, str, str], Tensor], Mapping[str, float]]:
        """Its tensors by (name in ``module``, A or B, weight or bias), and its strengths by name in ``module``."""
        inside = f"{component}."
        keys = {key.removeprefix(inside): key for key in self.tensors if key.startswith(inside)}
        alphas = {}
        for key, alpha in self.alphas.items():  # their names lack what follows ".lora", unless it is "_lora"
            name = key.removeprefix(inside).removesuffix(".alpha")
            alphas[name if name.endswith(".weight") else f"{name}.lora.down.weight"] = (key.startswith(inside), alpha)
        factors: dict[tuple[str, str, str], Tensor] = {}
        strengths: dict[str, float] = {}
        for name, source in self._convert(keys, module, component).items():
            match = _FACTOR.fullmatch(name)
            if match is None:
                raise ExportError(f"LoRA {self.path} has a tensor {keys[source]!r}, which is no part of a LoRA")
            factors[match["module"], match["side"], match["leaf"]] = self.tensors[keys[source]]
            belongs, alpha = alphas.get(source, (False, 0.0))
            if belongs:
                strengths[match["module"]] = alpha
        return factors, strengths

    def _convert(self, names: Iterable[str], module: nn.Module, component: str) -> Mapping[str, str]:
        """What diffusers makes of names, with what each was."""
        same = {name: name for name in names}
        if component not in TEXT_ENCODERS:
            return dict(convert_unet_state_dict_to_peft(same))
        try:
            converted = convert_state_dict_to_peft(convert_state_dict_to_diffusers(same))
        except ValueError as error:
            raise ExportError(f"LoRA {self.path}: its {component} is in no known format ({_line(error)})") from None
        if hasattr(module, "text_model"):
            return dict(converted)
        return {name.removeprefix("text_model."): source for name, source in converted.items()}

    def _check(
        self, component: str, layers: Mapping[str, nn.Module], factors: Mapping[tuple[str, str, str], Tensor]
    ) -> None:
        for (name, side, leaf), tensor in factors.items():
            layer: Any = layers.get(name)
            weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
            where = f"LoRA {self.path} is for another architecture: it changes {component}.{name}"
            if weight is None or weight.ndim < 2:
                raise ExportError(f"{where}, which this model has not")
            if (name, "B" if side == "A" else "A", "weight") not in factors or (leaf == "weight" and tensor.ndim < 2):
                raise ExportError(f"LoRA {self.path} has half of a change of {component}.{name}; download it again")
            if leaf == "weight":
                axis, what = (1, "inputs") if side == "A" else (0, "outputs")
                if tensor.shape[axis] != weight.shape[axis]:
                    raise ExportError(
                        f"{where} with {tensor.shape[axis]} {what}, and this model's has {weight.shape[axis]}"
                    )


def _read(path: Path, checkpoint: Checkpoint) -> _File:
    """A LoRA's file, for a checkpoint's pipeline. Raises :class:`ExportError`."""
    if not path.is_file():
        raise ExportError(f"LoRA {path} does not exist; --lora wants a .safetensors file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            keys = tuple(file.keys())
            header: Mapping[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in keys}
    except (OSError, safetensors.SafetensorError) as error:
        raise ExportError(f"LoRA {path} is not a whole safetensors file ({error}); download it again") from None
    for kind, marks in _OTHER_KINDS.items():
        if any(mark in key for key in keys for mark in marks):
            raise ExportError(f"LoRA {path} is {kind}; only a plain LoRA can be fused")
    if not any("lora" in key for key in keys):
        raise ExportError(
            f"LoRA {path} holds no LoRA ({f'its first tensor is {min(keys)!r}' if keys else 'it is empty'})"
        )
    with _quiet():
        pipeline: Any = getattr(diffusers, str(checkpoint.model_index["_class_name"]), None)
    alphas: Mapping[str, float] = {}
    if hasattr(pipeline, "lora_state_dict"):
        unet = SimpleNamespace(**checkpoint.config("unet")) if "unet" in checkpoint.model_index else None
        try:
            with _quiet():
                tensors, found = pipeline.lora_state_dict(tensors, unet_config=unet)[:2]
        except Exception as error:  # the converters raise many kinds
            raise ExportError(f"LoRA {path} is in no format that diffusers reads ({_line(error)})") from None
        alphas = found or {}
    metadata = _settings(path, header)
    denoiser = next(name for name in DENOISERS if name in checkpoint.model_index)
    readable = (denoiser, *(TEXT_ENCODERS if hasattr(pipeline, "load_lora_into_text_encoder") else ()))
    if not any(key.startswith(tuple(f"{name}." for name in (*DENOISERS, *TEXT_ENCODERS))) for key in tensors):
        tensors = {f"{denoiser}.{key.removeprefix(_PEFT_ROOT)}": tensor for key, tensor in tensors.items()}
        metadata = metadata or _neighbour(path, denoiser)
    for key in tensors:
        component = key.split(".")[0]
        if component not in readable or component not in checkpoint.model_index:
            takes = ", ".join(name for name in readable if name in checkpoint.model_index)
            raise ExportError(
                f"LoRA {path} is for another architecture: it has {key!r}, and LoRAs of this model change {takes}"
            )
    return _File(path, pipeline, tensors, alphas, metadata)


def _settings(path: Path, header: Mapping[str, str]) -> Mapping[str, Any]:
    """What diffusers' training scripts write into the file's header."""
    text = header.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ExportError(f"LoRA {path} has an unreadable header ({error}); download it again") from None
    return settings if isinstance(settings, dict) else {}


def _neighbour(path: Path, component: str) -> Mapping[str, Any]:
    """What peft writes beside the file, without which a LoRA's strength is taken to be its rank."""
    file = path.parent / "adapter_config.json"
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text("utf-8"))
        return {f"{component}.{key}": settings[key] for key in _PEFT_FIELDS if settings.get(key) is not None}
    except (OSError, ValueError, AttributeError) as error:
        raise ExportError(f"{file} is not readable ({error}); LoRA {path} needs it") from None


def _hollow(build: Callable[[Checkpoint, str], nn.Module], checkpoint: Checkpoint, component: str) -> nn.Module:
    """A component on the CPU in float32, each of whose parameters takes the memory of one number."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = build(checkpoint, component)
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None:
                child._parameters[name] = nn.Parameter(torch.zeros(()).expand(parameter.shape), False)
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and warnings: what matters of them is checked here and raised."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    diffusers_level = diffusers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    diffusers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        diffusers.logging.set_verbosity(diffusers_level)
        if bars:
            transformers.logging.enable_progress_bar()


def _loader(module: nn.Module) -> Any:
    """``module`` with diffusers' loader of adapters, which not all of its networks have."""
    if not hasattr(module, "load_lora_adapter"):
        module.__class__ = type(type(module).__name__, (type(module), PeftAdapterMixin), {})
    return module


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}{'…' if len(text) > 200 else ''}"
