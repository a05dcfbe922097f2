"""A CLIP model with random weights, as people save theirs: a picture and a text to vectors of 12 numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from tests.tiny_models import BEGIN_TOKEN, END_TOKEN, _vocabulary


def save_clip(place: Path) -> Path:
    """Save one in a directory; always the same one."""
    torch.manual_seed(0)
    vocabulary, merges = _vocabulary()
    small: dict[str, Any] = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        max_position_embeddings=24,
        bos_token_id=vocabulary[BEGIN_TOKEN],
        eos_token_id=vocabulary[END_TOKEN],
        **small,
    )
    vision = CLIPVisionConfig(hidden_size=16, image_size=32, patch_size=8, **small)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(place)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=24, pad_token=END_TOKEN)
    CLIPProcessor(images, tokenizer).save_pretrained(place)
    return place
