"""The file of an IP-Adapter (arXiv 2308.06721), read as what it is: written by a stranger.

It holds ``image_proj.*``, which makes tokens of a picture's embedding, and ``ip_adapter.<i>.to_k_ip.weight`` and
``to_v_ip.weight``, by which cross-attention attends to them. Two kinds are read: the plain one, a linear layer over the
embedding, and Plus, a resampler over the last hidden states but one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import safetensors
import torch
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Stored
from tgate_export.checkpoints.files import present, quoted
from tgate_export.checkpoints.headers import read_header
from tgate_export.libraries import refusing

Kind = Literal["plain", "plus"]

MOST_BYTES = 8 << 30
MOST_TENSORS = 1 << 12
"""Of a file; SDXL's have some 200."""
TOKENS = 4
"""That a plain adapter makes of a picture, whose file does not say so."""

_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_FLOATS = ("F64", "F32", "F16", "BF16")
_ATTENTION = re.compile(r"([1-9][0-9]{0,3}|0)\.to_([kv])_ip\.weight")
_HEAD = 64
"""Width of a resampler's heads, whose file does not say so."""


@dataclass(frozen=True, kw_only=True, eq=False)
class IpAdapterFile:
    """``projection``: the tensors of ``image_proj`` by their names in diffusers' module, float32. ``pairs``: the
    numbers of its attention layers, in their order, to the shapes of ``to_k_ip`` and ``to_v_ip``."""

    path: Path
    kind: Kind
    projection: Mapping[str, Tensor]
    pairs: Mapping[int, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def tokens(self) -> int:
        """That it makes of a picture."""
        return TOKENS if self.kind == "plain" else int(self.projection["latents"].shape[1])

    @property
    def width(self) -> int:
        """Of its tokens."""
        return int(self.projection["norm.weight" if self.kind == "plain" else "norm_out.weight"].shape[0])

    @property
    def embedding(self) -> int:
        """Of what its encoder gives: the embedding's width, or the hidden states'."""
        return int(self.projection["image_embeds.weight" if self.kind == "plain" else "proj_in.weight"].shape[1])

    def build(self) -> nn.Module:
        """diffusers' module of ``image_proj``, its weights anything."""
        if self.kind == "plain":
            return ImageProjection(self.embedding, self.width, self.tokens)
        module: nn.Module = IPAdapterPlusImageProjection(
            embed_dims=self.embedding,
            output_dims=self.width,
            hidden_dims=int(self.projection["latents"].shape[2]),
            heads=self.projection["layers.0.attn.to_q.weight"].shape[0] // _HEAD,
            num_queries=self.tokens,
        )
        return module

    def read(self, number: int, which: str) -> Tensor:
        """``to_k_ip`` or ``to_v_ip`` (``which``: "k" or "v") of a layer, as it is stored; the caller owns it."""
        ((_, tensor),) = _tensors(self.path, [f"ip_adapter.{number}.to_{which}_ip.weight"])
        return tensor


def read_ip_adapter(path: Path) -> IpAdapterFile:
    """An IP-Adapter's file. Raises :class:`ExportError` for what is none, is damaged, or is of a kind that is not
    exported."""
    if not present(path):
        raise ExportError(f"IP-Adapter {path} does not exist; --ip-adapter wants a .safetensors file")
    if path.suffix in _PICKLES:
        raise ExportError(f"IP-Adapter {path} is a pickle by its name, which is never read; take its .safetensors file")
    stored = read_header(path).tensors
    size = path.stat().st_size
    if len(stored) > MOST_TENSORS or size > MOST_BYTES:
        raise ExportError(
            f"IP-Adapter {path} has {len(stored)} tensors in {size} bytes; {MOST_TENSORS} tensors in {MOST_BYTES} "
            "bytes are the most"
        )
    parts: dict[str, dict[str, Stored]] = {"image_proj": {}, "ip_adapter": {}}
    for key, form in stored.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise ExportError(
                f"IP-Adapter {path} has a tensor {quoted(key)}; the names in one begin with image_proj. and ip_adapter."
            )
        if form.dtype not in _FLOATS:
            raise ExportError(f"IP-Adapter {path}: {quoted(key)} is stored as {form.dtype}; floating point is wanted")
        parts[part][name] = form
    kind = _kind(path, parts["image_proj"], parts["ip_adapter"])
    pairs = _pairs(path, parts["ip_adapter"])
    for key, tensor in _tensors(path, stored):  # one at a time: SDXL's are nearly a gigabyte
        if not torch.isfinite(tensor).all():
            raise ExportError(f"IP-Adapter {path}: {quoted(key)} holds NaN or infinity; download it again")
    names = [f"image_proj.{name}" for name in parts["image_proj"]]
    own = {name.removeprefix("image_proj."): tensor for name, tensor in _tensors(path, names)}
    return IpAdapterFile(path=path, kind=kind, projection=_projection(path, kind, own), pairs=pairs)


def _projection(path: Path, kind: Kind, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of ``image_proj`` by their names in diffusers' module, which converts them itself."""
    loader: Any = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers
    where = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32)
    with refusing(f"IP-Adapter {path} has no image_proj of the {kind} kind", "download it again"):
        # Without memory for what the file does not hold, however large its shapes say that it were.
        module: nn.Module = loader(where, dict(own), low_cpu_mem_usage=True)
    made = dict(module.named_parameters())
    missing = [name for name, parameter in made.items() if parameter.is_meta]
    joined = sum("to_kv" in name for name in own)  # of which two are made
    if missing or len(made) != len(own) + joined:
        what = f"lacks {missing[0]}" if missing else f"has {len(own) + joined} tensors of image_proj for {len(made)}"
        raise ExportError(f"IP-Adapter {path} {what}; an adapter of the {kind} kind is damaged so: download it again")
    return {name: parameter.detach() for name, parameter in made.items()}


def _kind(path: Path, projection: Mapping[str, Stored], attention: Mapping[str, Stored]) -> Kind:
    """As diffusers tells them apart."""
    other = None
    if any("_lora." in name for name in attention) or "perceiver_resampler.proj_in.weight" in projection:
        other = "FaceID, which takes a face's embedding and no picture"
    elif "proj.weight" in projection:
        return "plain"
    elif "proj.3.weight" in projection:
        other = "Full, which gives cross-attention every patch"
    elif "norm.weight" in projection:
        other = "FaceID, which takes a face's embedding and no picture"
    elif {"latents", "proj_in.weight", "proj_out.weight"} <= set(projection):
        return "plus"
    if other is not None:
        raise ExportError(f"IP-Adapter {path} is of the kind {other}; the plain and the Plus kind are exported")
    first = (
        f"its first tensor is {quoted(min([*projection, *attention]))}" if projection or attention else "it is empty"
    )
    raise ExportError(f"IP-Adapter {path} holds no IP-Adapter of a kind that is known ({first})")


def _pairs(path: Path, attention: Mapping[str, Stored]) -> dict[int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of each layer's two weights."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, form in attention.items():
        match = _ATTENTION.fullmatch(name)
        if match is None:
            raise ExportError(
                f"IP-Adapter {path} has a tensor {quoted(f'ip_adapter.{name}')}; to_k_ip and to_v_ip of layers that "
                "are numbered are wanted"
            )
        found.setdefault(int(match[1]), {})[match[2]] = form.shape
    for number, shapes in found.items():
        if len(shapes) < 2:
            raise ExportError(
                f"IP-Adapter {path} has half of layer {number} (to_{next(iter(shapes))}_ip alone); download it again"
            )
    return {number: (found[number]["k"], found[number]["v"]) for number in sorted(found)}


def _tensors(path: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of those names, read one after the other."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name in names:
                yield name, file.get_tensor(name)
    except (OSError, safetensors.SafetensorError) as error:
        raise ExportError(
            f"IP-Adapter {path} is not a whole safetensors file ({error!s:.200}); download it again"
        ) from None
