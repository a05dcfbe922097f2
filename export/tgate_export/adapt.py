"""LoRAs for requests: checked against a bundle's weights, and kept beside them.

What is fused at export is gone into the weights (:mod:`tgate_export.lora`). An adapter is a LoRA's file, read by the
same rules, under the names that the bundle's weights have; a request adds it to copies of those that it changes.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from safetensors.torch import save
from torch import Tensor

from tgate_engine.adapter import BIAS, DOWN, FACTOR, MOST_BYTES, TURNED, UP, check_adapter_name
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.manifest import Adapter
from tgate_export.checkpoints.headers import read_header
from tgate_export.families import find_model
from tgate_export.lora import Layer, check_fits
from tgate_export.lora_files import DENOISERS, TEXT_ENCODERS, Change, LoraFile, Takes, read_lora
from tgate_export.methods.late import has_late

_MULTIPLY = ("Conv", "Gemm", "MatMul")
_BLOCK = re.compile(r"(?P<stem>.*\.layers)\.(?P<number>[0-9]{1,4})\.(?P<rest>.+)")
_MOST_BEHIND = 32
_RESNETS = "down_blocks.0.resnets."


@dataclass(frozen=True, kw_only=True)
class Adapted:
    """What was kept. ``adapter``: as the manifest has it. ``layers``: how many of each component it changes.
    ``unread``: how many more the LoRA changes that no graph reads, such as the last layers of a text encoder. ``left``:
    components that the LoRA changes and the bundle has not. ``bytes``: of the file."""

    adapter: Adapter
    layers: Mapping[str, int]
    unread: Mapping[str, int]
    left: tuple[str, ...]
    bytes: int


def adapt(place: Path, lora: Path, *, name: str, force: bool = False) -> Adapted:
    """Keep a LoRA's file in a bundle under a name, for requests to name.

    Raises :class:`ExportError` for a file that is missing, damaged, no LoRA, for another architecture, or changes
    nothing that the bundle has; :class:`~tgate_engine.errors.BundleError` where the bundle has the name already (unless
    ``force``) or cannot be written; and :class:`~tgate_engine.errors.RequestError` for what is no name.
    """
    check_adapter_name(name)
    bundle = Bundle.open(place)
    if not bundle.manifest.weights:
        raise ExportError(f"{place} was exported with --weights none, and a LoRA changes weights; export it with them")
    if any(has_late(shape.graphs) for shape in bundle.manifest.shapes):
        raise ExportError(
            f"{place} has two networks, and which of them LoRA {lora} is for is not known; fuse it into the "
            "checkpoint, and export that"
        )
    weights = _Weights(bundle)
    file = read_lora(lora, weights.takes)
    tensors: dict[str, Tensor] = {}
    layers: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for change in file.changes:
        if change.component not in weights.components:
            continue
        changed = weights.changed(file, change, tensors)
        tensors |= changed
        (layers if changed else unread)[change.component] += 1
    left = tuple(component for component in file.components if component not in weights.components)
    if not layers:
        raise ExportError(
            f"LoRA {lora} changes {', '.join((*left, *unread))} alone, and of that the bundle's graphs read nothing "
            f"(they read {', '.join(weights.components)}); export more --components, or take another LoRA"
        )
    content = save({key: tensors[key].contiguous() for key in sorted(tensors)})
    if len(content) > MOST_BYTES:
        raise ExportError(
            f"LoRA {lora} would take {len(content)} bytes in the bundle, and {MOST_BYTES} are the most of an adapter; "
            "fuse it at export (--lora), or make one of a lower rank"
        )
    own = f"adapters/{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    rank = max(tensor.shape[1] for key, tensor in tensors.items() if key.endswith(UP))
    adapter = Adapter(file=own, layers=layers.total(), rank=rank)
    bundle.save_adapter(name, adapter, content, force=force)
    return Adapted(adapter=adapter, layers=dict(layers), unread=dict(unread), left=left, bytes=len(content))


class _Weights:
    """A bundle's weights as the layers that a LoRA changes. ``components``: those there are."""

    def __init__(self, bundle: Bundle) -> None:
        self._stored = read_header(bundle.file(bundle.manifest.weights)).tensors
        self._used = _uses(bundle)
        known = (*DENOISERS, *TEXT_ENCODERS)
        self.components = tuple(c for c in known if any(name.startswith(f"{c}.") for name in self._stored))
        family = find_model(bundle.manifest.model).family
        blocks = {n.split(".")[4] for n in self._stored if n.startswith(f"unet.{_RESNETS}")}
        # All that diffusers asks of a U-Net's configuration, for names of the original code.
        unet = {"layers_per_block": len(blocks)} if blocks else None
        there = {*self.components, *family.text_components}
        self.takes = Takes.of(family.pipeline_classes[0], there, unet)
        self._layers = {component: self._layers_of(component) for component in self.components}
        self._behind = {c: _behind(self._layers[c]) if c in TEXT_ENCODERS else {} for c in self.components}

    def changed(self, file: LoraFile, change: Change, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the adapter's file holds of one change, by its names there; nothing of a layer that no graph reads.
        Raises :class:`ExportError` for a change that fits no layer."""
        layers, behind = self._layers[change.component], self._behind[change.component]
        layer = file.layer(change, {**layers, **behind})
        check_fits(file, change, layer, layers.get(layer, behind.get(layer)))
        if layer in behind:
            return {}
        where = f"LoRA {file.path} changes {change.component}.{layer}"
        factor = torch.tensor([file.strength(change, layer)], dtype=torch.float32)
        key = f"{change.component}.{layer}.weight"
        tensors = {}
        for weight in (name for name in (key, key + TURNED) if name in self._stored):
            self._check_alone(where, weight)
            tensors[weight + UP] = _held(change.up.flatten(1))
            tensors[weight + DOWN] = _held(change.down.flatten(1))
            tensors[weight + FACTOR] = factor
        if change.bias is not None:
            bias = f"{change.component}.{layer}.bias"
            self._check_alone(where, bias)
            tensors[bias + BIAS] = change.bias.float() * factor
        if twice := tensors.keys() & before.keys():
            raise ExportError(f"{where} twice ({min(twice)}); leave one of them out")
        return tensors

    def _check_alone(self, where: str, weight: str) -> None:
        """Tensors of one content are kept once, under the name of the first: what changes it would change both."""
        uses = self._used.get(weight, [])
        if max(Counter(graph for graph, _ in uses).values(), default=0) > 1:
            raise ExportError(
                f"{where}, whose tensor {weight!r} other layers of the bundle share; fuse the LoRA at export (--lora)"
            )

    def _layers_of(self, component: str) -> dict[str, Layer]:
        """By their names in the component: whatever has a weight, those that are multiplied with as what a LoRA can
        change."""
        layers = {}
        for name, stored in self._stored.items():
            key = name.removesuffix(TURNED)
            if not (key.startswith(f"{component}.") and key.endswith(".weight")):
                continue
            layer = key.removeprefix(f"{component}.").removesuffix(".weight")
            kinds = sorted({kind for _, kind in self._used.get(name, [])})
            shape = tuple(reversed(stored.shape)) if name != key else stored.shape
            bias = self._stored.get(f"{component}.{layer}.bias")
            changes = len(shape) > 1 and bool(kinds) and set(kinds) <= set(_MULTIPLY)
            layers[layer] = Layer(
                kind=" and ".join(kinds) or "tensor",
                weight=shape if changes else (),
                bias=None if bias is None else bias.shape,
            )
        return layers


def _behind(layers: Mapping[str, Layer]) -> dict[str, Layer]:
    """Layers of a text encoder behind those that the graphs read, which are like those before them: many models take
    what comes out of the last but one, or an earlier one (``--clip-skip``)."""
    there: dict[tuple[str, str], int] = {}
    for name in layers:
        if block := _BLOCK.fullmatch(name):
            key = block["stem"], block["rest"]
            there[key] = max(there.get(key, 0), int(block["number"]))
    return {
        f"{stem}.{last + more}.{rest}": layers[f"{stem}.{last}.{rest}"]
        for (stem, rest), last in there.items()
        for more in range(1, _MOST_BEHIND)
    }


def _uses(bundle: Bundle) -> dict[str, list[tuple[str, str]]]:
    """By the weights' names, who reads each: the graph's file, and the operator. A convolution of several groups is
    told apart."""
    uses: dict[str, list[tuple[str, str]]] = {}
    for spec in _graphs(bundle):
        model = onnx.load_model_from_string(bundle.read(spec))
        for node in model.graph.node:
            grouped = any(a.name == "group" and a.i != 1 for a in node.attribute)
            for name in node.input:
                uses.setdefault(name, []).append((spec, f"grouped {node.op_type}" if grouped else node.op_type))
    return uses


def _graphs(bundle: Bundle) -> Iterable[str]:
    return dict.fromkeys(spec.file for shape in bundle.manifest.shapes for spec in shape.graphs.values())


def _held(factor: Tensor) -> Tensor:
    """As the file holds it: no number is lost."""
    return factor.clone() if factor.dtype == torch.float16 else factor.float()
