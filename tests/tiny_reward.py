"""An ImageReward with random weights, by its authors' names: small but for its head, whose sizes are fixed.

NumPy's frozen generator draws everything, so that an environment of other versions draws the same."""

from __future__ import annotations

import itertools
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = ("a", "large", "red", "circle", "small", "blue", "square", "of", "cafe", "lat", "##te", "##s", "'", ",", "!")
VOCABULARY = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
"""BLIP adds two to it, [DEC] and [ENC]."""

PROMPTS = (
    "a large red circle",
    "a small blue square " * 20,
    "Café LATTES, of a square's castle!",
    "[ENC] a circle [DEC]",
    "",
)
PICTURES = ((48, 48), (40, 57), (131, 90), (20, 31), (33, 32))
"""Height and width of one for each prompt."""
SEEDS = (7, 8)
"""Of pictures, and of those that they are compared with."""


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """Sizes. ``side``: of what its vision looks at, in pixels; its heads are as wide as BLIP's, 64."""

    side: int
    patch: int
    width: int
    heads: int
    blocks: int
    text_width: int
    text_heads: int
    text_layers: int
    seed: int

    @property
    def med_config(self) -> dict[str, Any]:
        """As the authors publish theirs, but for the sizes."""
        return {
            "architectures": ["BertModel"],
            "attention_probs_dropout_prob": 0.1,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.1,
            "hidden_size": self.text_width,
            "initializer_range": 0.02,
            "intermediate_size": 3 * self.text_width,
            "layer_norm_eps": 1e-12,
            "max_position_embeddings": 40,
            "model_type": "bert",
            "num_attention_heads": self.text_heads,
            "num_hidden_layers": self.text_layers,
            "pad_token_id": 0,
            "type_vocab_size": 2,
            "vocab_size": len(VOCABULARY) + 2,
            "encoder_width": 768,
            "add_cross_attention": True,
        }


TINY = {
    "one": Tiny(side=32, patch=8, width=64, heads=1, blocks=2, text_width=24, text_heads=3, text_layers=2, seed=0),
    "two": Tiny(side=48, patch=16, width=128, heads=2, blocks=1, text_width=32, text_heads=2, text_layers=3, seed=1),
}


def weights(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Tensors by name."""
    sees, reads = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{sees}cls_token": (1, 1, tiny.width),
        f"{sees}pos_embed": (1, (tiny.side // tiny.patch) ** 2 + 1, tiny.width),
        f"{sees}patch_embed.proj.weight": (tiny.width, 3, tiny.patch, tiny.patch),
        f"{sees}patch_embed.proj.bias": (tiny.width,),
        **_norm(f"{sees}norm", tiny.width),
        f"{reads}embeddings.word_embeddings.weight": (len(VOCABULARY) + 2, tiny.text_width),
        f"{reads}embeddings.position_embeddings.weight": (40, tiny.text_width),
        **_norm(f"{reads}embeddings.LayerNorm", tiny.text_width),
        **_linear("blip.vision_proj", tiny.width, 256),
        **_linear("blip.text_proj", tiny.text_width, 256),
    }
    for block in range(tiny.blocks):
        own = f"{sees}blocks.{block}"
        shapes |= _norm(f"{own}.norm1", tiny.width) | _norm(f"{own}.norm2", tiny.width)
        shapes |= _linear(f"{own}.attn.qkv", tiny.width, 3 * tiny.width)
        shapes |= _linear(f"{own}.attn.proj", tiny.width, tiny.width)
        shapes |= _linear(f"{own}.mlp.fc1", tiny.width, 4 * tiny.width)
        shapes |= _linear(f"{own}.mlp.fc2", 4 * tiny.width, tiny.width)
    wide = tiny.text_width
    for layer in range(tiny.text_layers):
        own = f"{reads}encoder.layer.{layer}"
        for attention, looked_at in (("attention", wide), ("crossattention", tiny.width)):
            shapes |= _linear(f"{own}.{attention}.self.query", wide, wide)
            shapes |= _linear(f"{own}.{attention}.self.key", looked_at, wide)
            shapes |= _linear(f"{own}.{attention}.self.value", looked_at, wide)
            shapes |= _linear(f"{own}.{attention}.output.dense", wide, wide)
            shapes |= _norm(f"{own}.{attention}.output.LayerNorm", wide)
        shapes |= _linear(f"{own}.intermediate.dense", wide, 3 * wide)
        shapes |= _linear(f"{own}.output.dense", 3 * wide, wide) | _norm(f"{own}.output.LayerNorm", wide)
    sizes = (wide, 1024, 128, 64, 16, 1)
    for place, (before, after) in zip((0, 2, 4, 6, 7), itertools.pairwise(sizes), strict=True):
        shapes |= _linear(f"mlp.layers.{place}", before, after)
    drawn = {name: _drawn(name, shape, tiny.seed) for name, shape in shapes.items()}
    return drawn | {f"{reads}embeddings.position_ids": torch.arange(40)[None]}


def save_reward(place: Path, tiny: Tiny) -> Path:
    """The directory that ``--reward-model`` wants."""
    place.mkdir(exist_ok=True)
    torch.save(weights(tiny), place / "ImageReward.pt")
    (place / "med_config.json").write_text(json.dumps(tiny.med_config))
    (place / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return place


def pictures(seed: int) -> list[Any]:
    """One for each prompt, uint8 [H, W, 3]."""
    draw = np.random.RandomState(seed)
    return [
        np.kron(draw.randint(0, 256, (8, 8, 3)), np.ones((17, 17, 1), int)).astype(np.uint8)[:height, :width]
        for height, width in PICTURES
    ]


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _linear(name: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (after, before), f"{name}.bias": (after,)}


def _drawn(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    values = np.random.RandomState(zlib.crc32(f"{name} {seed}".encode())).standard_normal(shape)
    if "orm" in name and name.endswith("weight"):
        values = 1 + 0.2 * values
    elif len(shape) == 1:
        values *= 0.2
    elif "embed" not in name or "proj" in name:
        values *= 1.5 / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))
