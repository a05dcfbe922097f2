"""Text by a T5 encoder and its mask, which PixArt, Latte and LTX-Video share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family

KEEP, DROP = 0.0, -10000.0
"""What diffusers adds to attention scores of tokens that count and of padding."""


class T5Text(nn.Module):
    """Ids [B, T] to ``prompt_embeds`` [B, T, C] and ``prompt_mask`` [B, T], 1 for tokens and 0 for padding.

    ``masked``: whether the encoder is given the mask too.
    """

    def __init__(self, encoder: nn.Module, *, masked: bool = True) -> None:
        super().__init__()
        self.text_encoder = encoder
        self._masked = masked

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # All up to the end token counts, which only padding follows: a prompt may spell "<pad>" out, and the
        # tokenizer's mask, which diffusers passes on, has ones there.
        places = torch.arange(1, ids.shape[1] + 1, dtype=torch.float32)
        last = (places * (ids == self.text_encoder.config.eos_token_id)).amax(dim=1, keepdim=True)
        mask = (places <= last).float()
        states = self.text_encoder(ids, attention_mask=mask if self._masked else None).last_hidden_state
        return states, mask.to(states.dtype)


def t5_conditioning(
    family: Family, checkpoint: Checkpoint, length: int, *, negative_mask: str
) -> tuple[ConditioningInput, ...]:
    """The text's states and mask. ``negative_mask``: see :class:`~tgate_engine.manifest.Conditioning`."""
    width = int(family.config(checkpoint, "text_encoder")["d_model"])
    mask = Conditioning(name="prompt_mask", source="text", negative=negative_mask)
    return (
        ConditioningInput(Conditioning(name="prompt_embeds", source="text"), (length, width), attended=True),
        ConditioningInput(mask, (length,), mask=True, attended=True),
    )


def end_token(family: Family, checkpoint: Checkpoint, component: str) -> int:
    """The token that ends a text. Raises :class:`ExportError` where the encoder's config names none."""
    token = family.config(checkpoint, component)["eos_token_id"]
    if type(token) is not int:
        raise ExportError(
            f"{checkpoint.where}: {component}/config.json has eos_token_id = {token!r}; the one token that ends a text "
            "is wanted"
        )
    return token


def attention_bias(mask: Tensor, dtype_of: Tensor) -> Tensor:
    """A mask [N, T] as what is added to attention scores, [N, 1, T]."""
    return ((1 - mask.to(dtype_of.dtype)) * DROP + KEEP).unsqueeze(1)
