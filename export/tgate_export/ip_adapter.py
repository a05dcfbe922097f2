"""An IP-Adapter (arXiv 2308.06721) beside a U-Net: a picture's tokens that cross-attention attends to as to the text.

``attention(q, k_text, v_text) + scale * attention(q, k_picture, v_picture)`` is summed before the module's own output
layer, so what a method keeps or replaces of cross-attention is text and picture together. Tokens and scale are inputs
of the denoising graph; the tokens are made by the reference graph, once for a request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_engine.step import half
from tgate_export.checkpoints.base import Checkpoint, Stored, Tensors
from tgate_export.checkpoints.directory import TensorFiles
from tgate_export.checkpoints.files import plain, present, read_json
from tgate_export.families.base import ConditioningInput
from tgate_export.ip_adapter_file import IpAdapterFile

TOKENS, SCALE = "reference", "reference_scale"
"""Conditioning: the picture's tokens [T, C], and what their attention is multiplied with [1]."""
ENCODER, PROJECTION = "image_encoder", "ip_adapter"
COMPONENTS = (ENCODER, PROJECTION)
"""Of the reference graph, in its order."""

_SELF, _CROSS = ".attn1", ".attn2"


class AdaptedCheckpoint(Checkpoint):
    """A checkpoint with an IP-Adapter and the encoder of its pictures.

    ``adapter``: its file. ``layers``: the U-Net's cross-attention modules by the numbers that the file has for them.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapter: IpAdapterFile, encoder: Path, unet: nn.Module, *, prefer_half: bool
    ) -> None:
        """``encoder``: a directory of CLIP's vision model. ``unet``: the checkpoint's, with or without memory for its
        weights. Raises :class:`ExportError` for an adapter of another architecture."""
        self._checkpoint = checkpoint
        self.where = f"{checkpoint.where} with IP-Adapter {adapter.path}"
        self.model_index: Mapping[str, Any] = checkpoint.model_index
        self.adapter = adapter
        self.layers = _layers(adapter, unet)
        self._encoder = encoder
        self._prefer_half = prefer_half
        self._tensors: dict[str, Tensors] = {}

    def config(self, component: str) -> Mapping[str, Any]:
        if component != ENCODER:
            return self._checkpoint.config(component)
        path = self._encoder / "config.json"
        if not present(path):
            raise ExportError(f"{path} is missing; --image-encoder wants the directory of CLIP's vision model")
        return read_json(path)

    def scheduler_config(self) -> Mapping[str, Any]:
        return self._checkpoint.scheduler_config()

    def tensors(self, component: str) -> Tensors:
        if component not in self._tensors:
            if component == ENCODER:
                self._tensors[component] = TensorFiles.open(self._encoder, self._prefer_half)
            elif component == PROJECTION:
                self._tensors[component] = _Projection(self.adapter)
            elif component == "unet":
                self._tensors[component] = _Joined(self._checkpoint.tensors(component), self.adapter, self.layers)
            else:
                return self._checkpoint.tensors(component)
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        return self._checkpoint.tokenizer(name)

    def token_limit(self, name: str) -> int | None:
        return self._checkpoint.token_limit(name)

    def further(self, file: str) -> Mapping[str, Any] | None:
        return self._checkpoint.further(file)

    def named_class(self, component: str) -> str | None:
        """None for the encoder, which comes from elsewhere whatever model_index.json says of one."""
        return None if component == ENCODER else self._checkpoint.named_class(component)

    def directory(self, component: str) -> Path | None:
        """Of the U-Net, that of the one without the adapter."""
        return self._encoder if component == ENCODER else self._checkpoint.directory(component)

    def licence(self) -> str:
        """The checkpoint's; an adapter's file names none."""
        return self._checkpoint.licence()


class PictureAttention(nn.Module):
    """A processor of diffusers' attention modules: ``encoder_hidden_states`` are (text [N, L, C], tokens [N, T, C],
    scale [N, 1])."""

    def __init__(self, width: int, inner: int) -> None:
        """``width``: of tokens; ``inner``: of keys and values."""
        super().__init__()
        self.to_k_ip = nn.Linear(width, inner, bias=False)
        self.to_v_ip = nn.Linear(width, inner, bias=False)

    def forward(
        self,
        attention: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, Tensor, Tensor],
        attention_mask: Tensor | None = None,
        **_options: object,
    ) -> Tensor:
        module: Any = attention
        text, tokens, scale = encoder_hidden_states
        if module.norm_cross:
            text = module.norm_encoder_hidden_states(text)
        query = module.to_q(hidden_states)
        own = _attend(query, module.to_k(text), module.to_v(text), module.heads)
        picture = _attend(query, self.to_k_ip(tokens), self.to_v_ip(tokens), module.heads)
        output: Tensor = module.to_out[0](own + scale.to(own.dtype).unsqueeze(1) * picture)
        return module.to_out[1](output) / module.rescale_output_factor


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """[N, L, heads * d] each, of any lengths."""
    split = (tensor.unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    return nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


def adapted(checkpoint: Checkpoint) -> AdaptedCheckpoint | None:
    """``checkpoint`` where it has an IP-Adapter; None where it has none."""
    return checkpoint if isinstance(checkpoint, AdaptedCheckpoint) else None


def inputs_of(checkpoint: Checkpoint) -> tuple[ConditioningInput, ...]:
    """What conditions the denoiser beside the prompt; nothing without an IP-Adapter."""
    if (own := adapted(checkpoint)) is None:
        return ()
    tokens = Conditioning(name=TOKENS, source="reference")
    scale = Conditioning(name=SCALE, source="scale", negative="same")
    return (
        ConditioningInput(tokens, (own.adapter.tokens, own.adapter.width), attended=True),
        ConditioningInput(scale, (1,), follows_dtype=False, attended=True),
    )


def attended(text: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """What the U-Net's cross-attention is given: with an IP-Adapter as :class:`PictureAttention` takes it."""
    return (text, conditioning[TOKENS], conditioning[SCALE]) if TOKENS in conditioning else text


def attach(unet: nn.Module, checkpoint: AdaptedCheckpoint) -> None:
    """Have a U-Net's cross-attention attend to pictures as well; the new weights are anything."""
    for name in checkpoint.layers.values():
        module: Any = unet.get_submodule(name)
        module.set_processor(PictureAttention(checkpoint.adapter.width, module.to_k.out_features))


def fill(unet: nn.Module, checkpoint: AdaptedCheckpoint) -> None:
    """Put the adapter's weights into a U-Net that it was attached to."""
    for number, name in checkpoint.layers.items():
        processor: Any = unet.get_submodule(f"{name}.processor")
        for which, layer in (("k", processor.to_k_ip), ("v", processor.to_v_ip)):
            layer.weight = nn.Parameter(checkpoint.adapter.read(number, which).float(), False)


@contextmanager
def as_diffusers(unet: nn.Module, conditioning: Mapping[str, Tensor]) -> Iterator[dict[str, Any]]:
    """While open, a U-Net attends to pictures by diffusers' own processors, over the same weights; gives the arguments
    of diffusers' pipeline that stand for a picture of those tokens, ``<name>.<half>`` to [B, ...]."""
    network: Any = unet
    names = [name for name, module in unet.named_modules() if isinstance(module, PictureAttention)]
    if not names:
        yield {}
        return
    tokens = [
        conditioning[half(TOKENS, which)] for which in ("negative", "positive") if half(TOKENS, which) in conditioning
    ]
    scale = float(conditioning[half(SCALE, "positive")].flatten()[0])
    before = {name: unet.get_submodule(name) for name in names}
    for name, own in before.items():
        weights: Any = own
        inner, width = weights.to_k_ip.weight.shape
        theirs: Any = IPAdapterAttnProcessor2_0(inner, width, num_tokens=(tokens[0].shape[1],), scale=scale)
        theirs.to_k_ip[0].weight, theirs.to_v_ip[0].weight = weights.to_k_ip.weight, weights.to_v_ip.weight
        network.get_submodule(name.removesuffix(".processor")).set_processor(theirs)
    kind = network.config.encoder_hid_dim_type
    network.encoder_hid_proj, network.config.encoder_hid_dim_type = nn.Identity(), "ip_image_proj"
    try:
        yield {"ip_adapter_image_embeds": [torch.cat(tokens).unsqueeze(1)]}
    finally:
        network.encoder_hid_proj, network.config.encoder_hid_dim_type = None, kind
        for name, own in before.items():
            network.get_submodule(name.removesuffix(".processor")).set_processor(own)


class Reference(nn.Module):
    """A picture, uint8 [1, S, S, 3], to its tokens, and before them those of none, which the negative half attends to:
    [1, T, C] each.

    As diffusers' pipeline has it, none is a picture of zeros to a Plus adapter, and an embedding of zeros to a plain
    one. With nothing guided there are the picture's tokens alone.
    """

    def __init__(
        self,
        encoder: nn.Module,
        projection: nn.Module,
        normalisation: tuple[Sequence[float], Sequence[float]],
        *,
        hidden: bool,
        guided: bool,
    ) -> None:
        """``normalisation``: mean and deviation of colours, as CLIP has them. ``hidden``: whether the adapter takes the
        encoder's last hidden states but one, and not its embedding."""
        super().__init__()
        self.image_encoder = encoder
        self.ip_adapter = projection
        self._hidden, self._guided = hidden, guided
        for name, numbers in zip(("mean", "std"), normalisation, strict=True):
            self.register_buffer(name, torch.tensor(numbers).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        pixels = picture.permute(0, 3, 1, 2).float() / 255
        pixels = ((pixels - self.mean) / self.std).to(next(self.image_encoder.parameters()).dtype)
        if self._hidden:
            both = torch.cat([torch.zeros_like(pixels), pixels]) if self._guided else pixels
            seen = self.image_encoder(both, output_hidden_states=True).hidden_states[-2]
        else:
            seen = self.image_encoder(pixels).image_embeds
            seen = torch.cat([torch.zeros_like(seen), seen]) if self._guided else seen
        tokens: Tensor = self.ip_adapter(seen)
        return tokens.split(1)


def check_encoder(where: object, adapter: IpAdapterFile, config: Mapping[str, Any]) -> int:
    """Pixels of a side of the pictures that the encoder takes. Raises :class:`ExportError` for one whose output does
    not fit the adapter."""
    key = "projection_dim" if adapter.kind == "plain" else "hidden_size"
    if config[key] != adapter.embedding:
        raise ExportError(
            f"IP-Adapter {adapter.path} takes {adapter.embedding} numbers, and the image encoder in {where} has {key} "
            f"= {config[key]}; give the one that the adapter was trained with (--image-encoder)"
        )
    return int(config["image_size"])


def _layers(adapter: IpAdapterFile, unet: nn.Module) -> dict[int, str]:
    """The U-Net's cross-attention modules by the file's numbers: as diffusers counts, those of its ``attn2`` take the
    odd ones, in the order of its modules."""
    network: Any = unet
    names = [name.removesuffix(".processor") for name in network.attn_processors]
    odd = [name for name in names if not name.endswith((_SELF, _CROSS))]
    if odd or network.config.only_cross_attention not in (False, None) or network.config.encoder_hid_dim_type:
        what = f"its attention module {plain(odd[0])}" if odd else "its only_cross_attention or encoder_hid_dim_type"
        raise ExportError(f"IP-Adapter {adapter.path}: the unet is none that one can be brought to ({what})")
    cross = [name for name in names if name.endswith(_CROSS)]
    layers = {2 * i + 1: name for i, name in enumerate(cross)}
    if set(layers) != set(adapter.pairs):
        raise ExportError(
            f"IP-Adapter {adapter.path} is for another architecture: it has {len(adapter.pairs)} layers (the last one "
            f"{max(adapter.pairs, default=0)}), and this model attends to text in {len(cross)} (the last one "
            f"{2 * len(cross) - 1}); give one of this model"
        )
    for number, name in layers.items():
        module = network.get_submodule(name)
        wanted = (module.to_k.out_features, adapter.width)
        for which, shape in zip("kv", adapter.pairs[number], strict=True):
            if shape != wanted:
                raise ExportError(
                    f"IP-Adapter {adapter.path} is for another architecture: its ip_adapter.{number}.to_{which}_ip is "
                    f"{list(shape)}, and {name} of this model wants {list(wanted)}; give one of this model"
                )
    if adapter.width != network.config.cross_attention_dim:
        raise ExportError(
            f"IP-Adapter {adapter.path} is for another architecture: its tokens have {adapter.width} numbers, and this "
            f"model attends to {network.config.cross_attention_dim}; give one of this model"
        )
    return layers


class _Projection:
    """The tensors of ``image_proj``, under diffusers' names."""

    def __init__(self, adapter: IpAdapterFile) -> None:
        self._adapter = adapter

    def stored(self) -> Mapping[str, Stored]:
        return {name: Stored("F32", tuple(tensor.shape)) for name, tensor in self._adapter.projection.items()}

    def find(self, key: str) -> str:
        if key not in self._adapter.projection:
            raise ExportError(f"IP-Adapter {self._adapter.path} has no {key} in its image_proj; download it again")
        return key

    def read(self, key: str) -> Tensor:
        return self._adapter.projection[self.find(key)].clone()

    def close(self) -> None:
        """Nothing is open."""


class _Joined:
    """A U-Net's tensors, and the adapter's, as :func:`attach` names them."""

    def __init__(self, tensors: Tensors, adapter: IpAdapterFile, layers: Mapping[int, str]) -> None:
        self._tensors, self._adapter = tensors, adapter
        self._own = {
            f"{name}.processor.to_{which}_ip.weight": (number, which)
            for number, name in layers.items()
            for which in "kv"
        }

    def stored(self) -> Mapping[str, Stored]:
        own = {
            key: Stored("F32", self._adapter.pairs[number]["kv".index(which)])
            for key, (number, which) in self._own.items()
        }
        return {**self._tensors.stored(), **own}

    def find(self, key: str) -> str:
        return key if key in self._own else self._tensors.find(key)

    def read(self, key: str) -> Tensor:
        return self._adapter.read(*self._own[key]) if key in self._own else self._tensors.read(key)

    def close(self) -> None:
        self._tensors.close()
