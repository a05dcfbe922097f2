"""Files of LoRAs: which layers they change, and with what.

Every key is read by itself, whatever else its file holds: a file of a few layers is read as one of all layers is. The
tables of names are diffusers', and where kohya's scripts joined a name with underscores, the model's own names say
where its dots were.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import safetensors
import torch
from diffusers.utils.state_dict_utils import (
    StateDictType,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Stored
from tgate_export.checkpoints.files import parse_object, present, quoted, read_json
from tgate_export.checkpoints.headers import read_header
from tgate_export.quiet import quiet

DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")

MOST_RANK = 4096
MOST_NUMBERS = 1 << 28
"""Of a tensor; the largest known has a rank of 1024 for 10240 outputs."""

MOST_TENSORS = 1 << 14
MOST_BYTES = 8 << 30
MOST_STRENGTH = 1e4
"""Of a LoRA: alpha over rank."""

MOST_PATTERNS = 4096
_PATTERN_LENGTH, _REPEATS = 256, 2
_SETTINGS = "lora_adapter_metadata"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_PEFT_ROOT = "base_model.model."
_PEFT_ALPHA = 8.0  # what peft takes where its settings name none
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias)")
_PARTS = {"A.weight": "down", "B.weight": "up", "B.bias": "bias"}
_KOHYA = re.compile(r"lora_(?P<part>unet|transformer|te1?|te2)_(?P<name>[^.]+)\.(?P<leaf>.+)")
_KOHYA_LEAVES = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
_OTHER_KINDS = {
    "a LyCORIS network that is no LoRA": (".hada_", ".lokr_", ".oft_", ".on_input"),
    "a DoRA": ("dora_scale", "lora_magnitude_vector"),
}
_OTHER_SETTINGS = ("use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication")
_INITS_THAT_CHANGE_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What a file holds for one layer.

    ``name``: the layer's in its component; kohya's, where ``joined``, has underscores for dots. ``down``
    [rank, inputs, ...], ``up`` [outputs, rank, ...] and ``bias`` [outputs], as they are stored. ``alpha``: the strength
    that the file gives the layer, if it does.
    """

    component: str
    name: str
    joined: bool
    down: Tensor
    up: Tensor
    bias: Tensor | None
    alpha: float | None

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def changes(self) -> bool:
        """Whether its product or its bias is anything at all: training begins with zeros in one of the matrices."""
        factors = bool(self.up.float().any() and self.down.float().any())
        return factors or (self.bias is not None and bool(self.bias.float().any()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Takes:
    """What LoRAs of a pipeline may change. ``pipeline``: its class in diffusers, or None. ``components``: by their
    names there, the denoiser first. ``unet``: the configuration of one, if that is the denoiser."""

    pipeline: Any
    components: tuple[str, ...]
    unet: Mapping[str, Any] | None

    @staticmethod
    def of(name: str, there: Collection[str], unet: Mapping[str, Any] | None) -> Takes:
        """Those of the pipeline of that name, of which the components ``there`` are."""
        with quiet():  # the class is one that a family knows: the exporter asks before it comes here
            pipeline: Any = getattr(diffusers, name, None)
        denoiser = next(component for component in DENOISERS if component in there)
        encoders = TEXT_ENCODERS if hasattr(pipeline, "load_lora_into_text_encoder") else ()
        components = tuple(component for component in (denoiser, *encoders) if component in there)
        return Takes(pipeline=pipeline, components=components, unet=unet)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoraFile:
    """A file's changes. ``settings``: by component, what peft knew of its training."""

    path: Path
    takes: Takes
    changes: tuple[Change, ...]
    settings: Mapping[str, Mapping[str, Any]]

    @property
    def components(self) -> tuple[str, ...]:
        changed = {change.component for change in self.changes}
        return tuple(name for name in (*DENOISERS, *TEXT_ENCODERS) if name in changed)

    def layer(self, change: Change, names: Collection[str]) -> str:
        """The name that a layer has among ``names``, or what comes closest."""
        name = change.name
        if change.joined:
            joined = {known.replace(".", "_"): known for known in names}
            for spelled in (name, name.removeprefix("text_model_"), f"text_model_{name}"):
                if spelled in joined:
                    return joined[spelled]
            name = self._original(change)
        # transformers' models of CLIP have lost the level text_model, but not all of them
        spellings = (name, name.removeprefix("text_model."), f"text_model.{name}")
        return next((spelled for spelled in spellings if spelled in names), name)

    def strength(self, change: Change, layer: str) -> float:
        """What the product of a change's matrices is multiplied with: alpha / rank. Raises :class:`ExportError`.

        ``layer``: its name in the model, which patterns may match as well as the name in the file.
        """
        names = (change.name, layer)
        settings = self.settings.get(change.component, {})
        try:
            rank = float(_matching(settings, "rank_pattern", names, settings.get("r", change.rank)))
            standard = settings.get("lora_alpha", _PEFT_ALPHA) if settings else change.rank
            alpha = change.alpha
            if alpha is None:
                alpha = float(_matching(settings, "alpha_pattern", names, standard))
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise ExportError(
                f"LoRA {self.path}: its settings for the {change.component} are damaged ({error!s:.200}); download it "
                "again"
            ) from None
        where = f"LoRA {self.path}: its settings give {change.component}.{change.name}"
        if rank != change.rank:
            raise ExportError(
                f"{where} the rank {rank:g}, and its tensors have {change.rank}; they belong to another file: "
                "download both again"
            )
        if not math.isfinite(alpha):
            raise ExportError(f"{where} the strength {alpha}; it must be a finite number: download it again")
        strength = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        if not 0 < abs(strength) <= MOST_STRENGTH:
            raise ExportError(
                f"{where} the strength {alpha:g} over the rank {rank:g}; 0 changes nothing, and more than "
                f"{MOST_STRENGTH:g} times its rank is damage: download it again"
            )
        return strength

    def _original(self, change: Change) -> str:
        """What diffusers makes of a name which the model has not: for SDXL, kohya's are those of the original code."""
        pipeline, unet = self.takes.pipeline, self.takes.unet
        if change.component not in DENOISERS or not hasattr(pipeline, "lora_state_dict"):
            return change.name
        pair = {f"lora_unet_{change.name}.lora_{side}.weight": torch.zeros(1) for side in ("down", "up")}
        config = None if unet is None else SimpleNamespace(**unet)
        try:
            with quiet():
                converted = pipeline.lora_state_dict(pair, unet_config=config)[0]
        except Exception:  # the converters raise many kinds for a name that they do not know
            return change.name
        match = _FACTOR.fullmatch(_peft_name(next(iter(converted)).removeprefix("unet."), change.component))
        return match["module"] if match else change.name


def read_lora(path: Path, pipeline: Takes) -> LoraFile:
    """A LoRA's file, for a pipeline. Raises :class:`ExportError`, which names what is wrong in it."""
    tensors, header = _stored(path)
    takes, denoiser = pipeline.components, pipeline.components[0]
    parts = {"unet": denoiser, "transformer": denoiser, "te": "text_encoder", "te1": "text_encoder"}
    parts["te2"] = "text_encoder_2"
    bare = _component_of_bare_names(path, tensors, takes)
    layers: dict[tuple[str, str, bool], dict[str, str]] = {}
    for key in tensors:
        if kohya := _KOHYA.fullmatch(key):
            component, name = parts[kohya["part"]], kohya["name"]
            part = _KOHYA_LEAVES.get(kohya["leaf"])
        else:
            component, _, inner = (f"{bare}.{key.removeprefix(_PEFT_ROOT)}" if bare else key).partition(".")
            match = _FACTOR.fullmatch(_peft_name(inner, component))
            name, part = (match["module"], _PARTS[match["part"]]) if match else ("", None)
        if component not in takes:
            raise ExportError(
                f"LoRA {path} is for another architecture: it has {key!r}, and LoRAs of this model change "
                f"{', '.join(takes)}"
            )
        if part is None:
            raise ExportError(
                f"LoRA {path} has a tensor {key!r}, which is no part of a LoRA; only a plain LoRA can be fused"
            )
        parts_of_layer = layers.setdefault((component, name, kohya is not None), {})
        if part in parts_of_layer:
            raise ExportError(
                f"LoRA {path} changes one layer twice, in {parts_of_layer[part]!r} and {key!r}; leave one of them out"
            )
        parts_of_layer[part] = key
    changes = tuple(_change(path, tensors, layer, keys) for layer, keys in layers.items())
    if not any(change.changes for change in changes):
        raise ExportError(f"LoRA {path} changes nothing: it is as training begins, all zeros; give a trained one")
    settings = {name: _of_component(header, name) for name in takes}
    if bare and not settings[bare]:
        settings[bare] = _neighbour(path)
    for component, fields in settings.items():
        _check_settings(path, component, fields)
    return LoraFile(path=path, takes=pipeline, changes=changes, settings=settings)


def _stored(path: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """A file's tensors, and the settings in its header, which diffusers' training scripts write there."""
    if not present(path):
        raise ExportError(f"LoRA {path} does not exist; a .safetensors file is wanted")
    if path.suffix in _PICKLES:
        raise ExportError(f"LoRA {path} is a pickle by its name, which is never read; convert it to .safetensors")
    said = read_header(path)
    _check_sizes(path, said.tensors)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in said.tensors}
    except (OSError, safetensors.SafetensorError) as error:
        raise ExportError(f"LoRA {path} is not a whole safetensors file ({error!s:.200}); download it again") from None
    for kind, marks in _OTHER_KINDS.items():
        if any(mark in key for key in tensors for mark in marks):
            raise ExportError(f"LoRA {path} is {kind}; only a plain LoRA can be fused")
    if not any("lora" in key for key in tensors):
        raise ExportError(
            f"LoRA {path} holds no LoRA ({f'its first tensor is {min(tensors)!r}' if tensors else 'it is empty'})"
        )
    return tensors, parse_object(said.metadata.get(_SETTINGS, "{}"), f"LoRA {path}: its {_SETTINGS}")


def _check_sizes(path: Path, stored: Mapping[str, Stored]) -> None:
    """Raises :class:`ExportError` for tensors larger than a layer's change can be, before they take memory."""
    size = path.stat().st_size
    if len(stored) > MOST_TENSORS or size > MOST_BYTES:
        raise ExportError(
            f"LoRA {path} has {len(stored)} tensors in {size} bytes; {MOST_TENSORS} tensors in {MOST_BYTES} bytes are "
            "the most"
        )
    for key, tensor in stored.items():
        rank = min(tensor.shape[:2], default=0)
        if math.prod(tensor.shape) > MOST_NUMBERS or rank > MOST_RANK:
            raise ExportError(
                f"LoRA {path}: {quoted(key)} has shape {list(tensor.shape)}; a LoRA's tensors have {MOST_NUMBERS} "
                f"numbers and a rank of {MOST_RANK} at most"
            )


def _component_of_bare_names(path: Path, tensors: Collection[str], takes: tuple[str, ...]) -> str | None:
    """Whose the names are that begin with no component's, as peft writes them; None where they begin with one."""
    named = tuple(f"{name}." for name in (*DENOISERS, *TEXT_ENCODERS))
    keys = [key for key in tensors if not _KOHYA.fullmatch(key)]
    if not keys or any(key.startswith(named) for key in keys):
        return None
    if not all(key.removeprefix(_PEFT_ROOT).startswith("text_model.") for key in keys):
        return takes[0]
    encoders = [name for name in takes if name in TEXT_ENCODERS]
    if len(encoders) != 1:
        raise ExportError(
            f"LoRA {path} changes a text encoder, and {keys[0]!r} does not say which; put the component's name before "
            f"its keys ({' or '.join(f'{name}.' for name in encoders) or f'this model takes {takes[0]}. alone'})"
        )
    return encoders[0]


def _peft_name(name: str, component: str) -> str:
    """A key of diffusers' old or new naming, or of peft's, in peft's: by itself, as the rest of the file says nothing.

    diffusers' own reader takes one naming for a file of a text encoder, and tells it by layers which the file may lack.
    """
    named = {name: None}
    if component in TEXT_ENCODERS:
        for kind in (StateDictType.DIFFUSERS_OLD, StateDictType.DIFFUSERS):
            named = convert_state_dict_to_peft(named, original_type=kind)
    return str(next(iter(convert_unet_state_dict_to_peft(named))))


def _change(path: Path, tensors: Mapping[str, Tensor], layer: tuple[str, str, bool], keys: Mapping[str, str]) -> Change:
    """What a file holds for one layer. ``keys``: of its parts."""
    component, name, joined = layer
    if "down" not in keys or "up" not in keys:
        raise ExportError(
            f"LoRA {path} has half of a change of {component}.{name} ({next(iter(keys.values()))!r}); download it again"
        )
    for part, key in keys.items():
        tensor = tensors[key]
        if part == "alpha":
            if tensor.numel() != 1 or tensor.is_complex() or not math.isfinite(tensor.item()):
                raise ExportError(f"LoRA {path}: {key!r} is not one finite number; download it again")
        elif tensor.dtype not in _FLOATS:
            raise ExportError(
                f"LoRA {path}: {key!r} is stored as {tensor.dtype}, and a LoRA must be stored as floating-point "
                "numbers; use a file that is not quantized"
            )
        elif not torch.isfinite(tensor.float()).all():
            raise ExportError(f"LoRA {path}: {key!r} holds NaN or infinity; download it again, or train it again")
    down, up = tensors[keys["down"]], tensors[keys["up"]]
    if down.ndim < 2 or up.ndim < 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise ExportError(
            f"LoRA {path}: {keys['up']!r} {list(up.shape)} and {keys['down']!r} {list(down.shape)} have no rank in "
            "common; download it again"
        )
    bias = tensors[keys["bias"]] if "bias" in keys else None
    alpha = float(tensors[keys["alpha"]].item()) if "alpha" in keys else None
    return Change(component=component, name=name, joined=joined, down=down, up=up, bias=bias, alpha=alpha)


def _of_component(settings: Mapping[str, Any], component: str) -> dict[str, Any]:
    inside = f"{component}."
    return {key.removeprefix(inside): value for key, value in settings.items() if key.startswith(inside)}


def _neighbour(path: Path) -> dict[str, Any]:
    """What peft writes beside the file, without which a LoRA's strength is taken to be its rank."""
    file = path.parent / "adapter_config.json"
    if not present(file):
        return {}
    try:
        return read_json(file)
    except ExportError as error:
        raise ExportError(f"{error}; LoRA {path} needs it") from None


def _check_settings(path: Path, component: str, settings: Mapping[str, Any]) -> None:
    """Raises :class:`ExportError` where peft would compute something else than a plain LoRA."""
    other = next((f"{field}={settings[field]!r}" for field in _OTHER_SETTINGS if settings.get(field)), None)
    start = str(settings.get("init_lora_weights", ""))
    if start.startswith(_INITS_THAT_CHANGE_THE_MODEL):  # it fits the weights that this left, which are not here
        other = f"init_lora_weights={start!r}"
    if other:
        raise ExportError(
            f"LoRA {path}: its {component} was trained with {other}, and only a plain LoRA can be fused; let peft "
            "convert it into one"
        )


def _matching(settings: Mapping[str, Any], field: str, names: Collection[str], standard: Any) -> Any:
    """A layer's value by peft's rule: that of the first pattern which is the end of one of its names, from a dot on."""
    patterns = settings.get(field) or {}
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"{field} has {len(patterns)} patterns, {MOST_PATTERNS} are the most")
    for pattern, value in patterns.items():
        if any(_pattern(pattern).match(name) for name in names):
            return value
    return standard


@functools.lru_cache(maxsize=2 * MOST_PATTERNS)
def _pattern(text: str) -> re.Pattern[str]:
    """One of peft's patterns. Raises ValueError for one that could take a lifetime: names of layers repeat little."""
    if len(text) > _PATTERN_LENGTH or len(re.findall(r"[*+{]", text)) > _REPEATS or re.search(r"\)[*+?{]", text):
        raise ValueError(f"the pattern {quoted(text)} repeats too much")
    return re.compile(rf"(.*\.)?({text})$")
