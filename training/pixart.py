"""The parts of `mini-pixart` as diffusers and transformers modules, with fresh weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from training.grammar import vocabulary_words
from training.models import sampling_scheduler
from training.settings import LATENT_CHANNELS, LATENT_PX, PixArtSettings

_SPECIALS = ("<pad>", "</s>", "<unk>")
_CHARACTERS = [chr(code) for code in range(33, 127)]


def build_tokenizer() -> T5Tokenizer:
    """A unigram vocabulary in which every caption word is one token and any other ASCII text is characters."""
    pieces = [(piece, 0.0) for piece in _SPECIALS]
    pieces += [(f"▁{word}", -1.0) for word in vocabulary_words()]
    pieces += [(piece, -10.0) for piece in ("▁", *_CHARACTERS)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=120)


def build_text_encoder(settings: PixArtSettings, tokenizer: T5Tokenizer) -> T5EncoderModel:
    """An encoder of ids [B, S] into states [B, S, text_width]."""
    text = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=settings.text_width,
            d_kv=settings.text_head_dim,
            d_ff=settings.text_hidden,
            num_layers=settings.text_layers,
            num_heads=settings.text_width // settings.text_head_dim,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
    )
    # T5 starts all positions alike, and so short a training would never learn which of two words came first
    nn.init.normal_(text.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight)
    return text


def build_transformer(settings: PixArtSettings) -> PixArtTransformer2DModel:
    """PixArt's denoiser of latents [B, 4, 16, 16] as 8x8 tokens; it also predicts a variance, hence 8 channels out."""
    return PixArtTransformer2DModel(
        sample_size=LATENT_PX,
        patch_size=settings.patch,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=settings.layers,
        num_attention_heads=settings.width // settings.head_dim,
        attention_head_dim=settings.head_dim,
        cross_attention_dim=settings.width,
        caption_channels=settings.text_width,
        use_additional_conditions=False,
    )


@torch.no_grad()
def start_transparent(transformer: PixArtTransformer2DModel) -> None:
    """Zero what PixArt zeroes (section 2.3 of its paper): the cross-attention's last layer and the output."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if name.endswith("attn2.to_out.0") or name == "proj_out":
            nn.init.zeros_(module.weight)
    for layer in (transformer.adaln_single.emb.timestep_embedder, transformer.caption_projection):
        nn.init.normal_(layer.linear_1.weight, std=0.02)
        nn.init.normal_(layer.linear_2.weight, std=0.02)
    nn.init.normal_(transformer.adaln_single.linear.weight, std=0.02)


class WindowedPatches(nn.Module):
    """PixArt's patch embedding of windows: each window takes the positions that it has in the whole picture.

    Diffusers stretches positions to the size of what it is given, and would take a close-up for a small picture.
    `corners`, int64 [B, 2], are the column and row of each window in tokens; `side` is the whole picture's.
    """

    def __init__(self, embed: nn.Module, corners: torch.Tensor, side: int) -> None:
        super().__init__()
        self.embed = embed
        self.corners = corners
        self.side = side

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [B, 4, h, w] as tokens [B, h * w / 4, width]."""
        tokens = self.embed.proj(latents)
        height, width = tokens.shape[-2:]
        rows = self.corners[:, 1, None, None] + torch.arange(height)[None, :, None]
        columns = self.corners[:, 0, None, None] + torch.arange(width)[None, None, :]
        places = (rows * self.side + columns).flatten(1)
        return torch.as_tensor(tokens.flatten(2).transpose(1, 2) + self.embed.pos_embed[0][places])


def scheduler() -> DPMSolverMultistepScheduler:
    """The sampler that the pipeline directory names: that of `mini-sdxl`."""
    return sampling_scheduler()


def build_pipeline(
    *, vae: AutoencoderKL, transformer: PixArtTransformer2DModel, text: T5EncoderModel, tokenizer: T5Tokenizer
) -> PixArtAlphaPipeline:
    """The pipeline of the four parts."""
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=text, vae=vae, transformer=transformer, scheduler=scheduler()
    )
