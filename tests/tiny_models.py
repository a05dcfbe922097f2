"""Small random-weight SDXL checkpoints, as the directories that diffusers reads and writes.

A few hundred thousand parameters are enough to exercise every rule of the method, provided that attention
matters to the result. With the default initialisation it hardly does: attention weights are near uniform and
an attention output is a small fraction of the residual it is added to, so that a wrong reuse would hide below
any tolerance. :func:`_strengthen_attention` therefore redraws the attention weights. ``tests/test_oracle.py``
checks that every rule of the method moves the final latents by far more than the parity tolerance.

All names in :data:`VARIANTS` are guided models; ``"consistency"`` distils guidance into its time embedding
(``time_cond_proj_dim``), as LCM-SDXL does, and runs the network on one half only.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BEGIN_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"

# Words the merge table knows; all other words fall back to single bytes.
_KNOWN_WORDS = ("red", "blue", "circle", "square", "above", "large", "small", "photo")


@dataclass(frozen=True, kw_only=True)
class TinyModel:
    """One variant's architecture. Widths in channels, lengths in tokens, latent sizes in latent pixels."""

    seed: int
    channels: tuple[int, ...]  # per level, the first is the finest
    layers_per_block: int
    transformer_layers: int | tuple[int, ...]  # per level
    heads: tuple[int, ...]  # per level; diffusers calls this attention_head_dim
    norm_groups: int
    down_blocks: tuple[str, ...]
    linear_projection: bool
    text_widths: tuple[int, int]  # hidden width of text_encoder and text_encoder_2
    pooled_width: int  # projection of text_encoder_2
    text_length: int  # tokens, both tokenizers
    text_layers: int
    latent_size: tuple[int, int]  # height, width: a size to test with
    vae_channels: tuple[int, ...]  # its length sets the factor: 2 ** (len - 1)
    sharpness: float = 1.0  # gain of the attention scores
    attention_gain: float = 1.0  # gain of the attention's output projection
    level_gain: float = 1.5  # gain from a level with attention into the next finer one
    force_zeros: bool  # force_zeros_for_empty_prompt
    scheduler: str
    legacy_eos: bool = False  # eos_token_id=2, as in the published SDXL: pooled at the largest token id
    half_on_disk: bool = False
    max_shard_size: str | None = None  # of the denoiser
    time_cond_width: int | None = None  # consistency models: the width of the guidance embedding

    @property
    def vae_factor(self) -> int:
        """Image pixels per latent pixel."""
        return int(2 ** (len(self.vae_channels) - 1))


_PLAIN, _CROSS = "DownBlock2D", "CrossAttnDownBlock2D"

_MODELS: dict[str, TinyModel] = {
    # SDXL's pattern: no attention at the finest level, few transformer layers at the next, most at the last.
    "sdxl_like": TinyModel(
        seed=22,  # tried beside 11 and 21: 11 amplifies rounding a hundredfold, 21 hides reuse
        channels=(16, 24, 32),
        layers_per_block=2,
        transformer_layers=(1, 2, 4),
        heads=(1, 2, 4),
        norm_groups=8,
        down_blocks=(_PLAIN, _CROSS, _CROSS),
        linear_projection=True,
        text_widths=(24, 40),
        pooled_width=40,
        text_length=77,
        text_layers=2,
        latent_size=(8, 12),
        vae_channels=(8, 8, 8, 8),
        force_zeros=True,
        scheduler="euler",
        legacy_eos=True,
        sharpness=1.5,
        level_gain=2.0,
    ),
    # The smallest: two levels, one layer, attention at the finest level, convolutional projections.
    "conv_projection": TinyModel(
        seed=12,
        channels=(16, 32),
        layers_per_block=1,
        transformer_layers=1,
        heads=(2, 2),
        norm_groups=4,
        down_blocks=(_CROSS, _PLAIN),
        linear_projection=False,
        text_widths=(16, 32),
        pooled_width=24,
        text_length=16,
        text_layers=2,
        latent_size=(8, 8),
        vae_channels=(8, 8, 16, 16),
        force_zeros=False,
        scheduler="dpm",
    ),
    "half_on_disk": TinyModel(
        seed=13,
        channels=(24, 48),
        layers_per_block=1,
        transformer_layers=(1, 3),
        heads=(2, 6),
        norm_groups=8,
        down_blocks=(_PLAIN, _CROSS),
        linear_projection=True,
        text_widths=(32, 16),
        pooled_width=16,
        text_length=24,
        text_layers=3,
        latent_size=(12, 8),
        vae_channels=(8, 8, 16),
        force_zeros=True,
        scheduler="euler",
        half_on_disk=True,
    ),
    "sharded": TinyModel(
        seed=14,
        channels=(16, 32, 32),
        layers_per_block=1,
        transformer_layers=(1, 1, 2),
        heads=(2, 4, 1),
        norm_groups=16,
        down_blocks=(_CROSS, _CROSS, _PLAIN),
        linear_projection=True,
        text_widths=(32, 32),
        pooled_width=32,
        text_length=20,
        text_layers=2,
        latent_size=(10, 14),  # neither halves evenly twice
        vae_channels=(4, 8, 8),
        force_zeros=False,
        scheduler="pndm",
        max_shard_size="200KB",
        # Attention at the finest level amplifies rounding: a sharper softmax would make this sampler chaotic.
        sharpness=1.5,
        level_gain=2.0,
    ),
    "consistency": TinyModel(
        seed=15,
        channels=(16, 32),
        layers_per_block=1,
        transformer_layers=(1, 2),
        heads=(1, 2),
        norm_groups=8,
        down_blocks=(_PLAIN, _CROSS),
        linear_projection=True,
        text_widths=(16, 24),
        pooled_width=24,
        text_length=16,
        text_layers=2,
        latent_size=(8, 8),
        vae_channels=(8, 8, 8, 8),
        force_zeros=True,
        scheduler="lcm",
        time_cond_width=16,
    ),
}

CONSISTENCY_VARIANT = "consistency"
VARIANTS: tuple[str, ...] = tuple(name for name in _MODELS if name != CONSISTENCY_VARIANT)


def tiny_model(variant: str) -> TinyModel:
    """Return the architecture of ``variant``.

    Raises:
        ValueError: no such variant; the message lists those there are.
    """
    if variant not in _MODELS:
        raise ValueError(f"no tiny SDXL variant {variant!r}; there are: {', '.join(sorted(_MODELS))}")
    return _MODELS[variant]


def latent_noise(variant: str, batch: int, seed: int = 0) -> torch.Tensor:
    """Unit-variance noise for ``variant``, float32 [batch, 4, height, width]; the same for the same seed."""
    height, width = tiny_model(variant).latent_size
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def make_tiny_sdxl(directory: Path | str, variant: str) -> Path:
    """Write the checkpoint of ``variant`` into ``directory`` and return the directory.

    The directory must be new or empty. The same variant always has the same weights. The global random state
    is left as it was. Each tokenizer is there twice: as ``tokenizer.json``, and as the ``vocab.json`` and
    ``merges.txt`` of the published SDXL.
    """
    model = tiny_model(variant)
    target = Path(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model.seed)
        pipe = _build(model)
    if model.half_on_disk:
        pipe.to(torch.float16)
    pipe.save_pretrained(target)
    for name in ("tokenizer", "tokenizer_2"):
        _save_vocabulary(target / name)
    if model.max_shard_size is not None:
        # The pipeline's save_pretrained shards every component or none; only the denoiser is to be sharded.
        denoiser = target / "unet"
        for written in denoiser.glob("*.safetensors"):
            written.unlink()
        pipe.unet.save_pretrained(denoiser, max_shard_size=model.max_shard_size)
    return target


def load_tiny_sdxl(directory: Path | str) -> StableDiffusionXLPipeline:
    """Load a directory of :func:`make_tiny_sdxl` in float32 on the CPU, silently."""
    pipe = StableDiffusionXLPipeline.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build(model: TinyModel) -> StableDiffusionXLPipeline:
    vocabulary, merges = _vocabulary()
    ids = {"bos_token_id": vocabulary[BEGIN_TOKEN], "eos_token_id": vocabulary[END_TOKEN]}
    if model.legacy_eos:
        ids["eos_token_id"] = 2
    text_encoders: list[Any] = []
    for position, width in enumerate(model.text_widths):
        config = CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=model.text_layers,
            num_attention_heads=2,
            max_position_embeddings=model.text_length,
            hidden_act=("quick_gelu", "gelu")[position],
            projection_dim=model.pooled_width,
            pad_token_id=ids["eos_token_id"],
            **ids,
        )
        text_encoders.append((CLIPTextModel, CLIPTextModelWithProjection)[position](config).eval())
        _spread_text(text_encoders[-1])

    time_ids_width = 8
    unet = UNet2DConditionModel(
        sample_size=model.latent_size[0],
        block_out_channels=model.channels,
        layers_per_block=model.layers_per_block,
        transformer_layers_per_block=model.transformer_layers,
        attention_head_dim=model.heads,
        norm_num_groups=model.norm_groups,
        down_block_types=model.down_blocks,
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(model.down_blocks)),
        cross_attention_dim=sum(model.text_widths),
        use_linear_projection=model.linear_projection,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_ids_width,
        projection_class_embeddings_input_dim=model.pooled_width + 6 * time_ids_width,
        time_cond_proj_dim=model.time_cond_width,
    ).eval()
    _strengthen_attention(unet, model)
    _fit_last_layer(unet, model)

    levels = len(model.vae_channels)
    vae = AutoencoderKL(
        block_out_channels=model.vae_channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.13025,
        sample_size=model.latent_size[0] * model.vae_factor,
    ).eval()

    # As in the published SDXL, the second tokenizer pads with "!" (id 0) and the first with the end token.
    tokenizers = [
        CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=model.text_length, pad_token=pad)
        for pad in (END_TOKEN, "!")
    ]
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoders[0],
        text_encoder_2=text_encoders[1],
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet,
        scheduler=_scheduler(model.scheduler),
        force_zeros_for_empty_prompt=model.force_zeros,
        add_watermarker=False,
    )


def _scheduler(name: str) -> Any:
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if name == "euler":
        return EulerDiscreteScheduler(**noise, timestep_spacing="leading")
    if name == "dpm":
        return DPMSolverMultistepScheduler(**noise)
    if name == "pndm":
        return PNDMScheduler(**noise, skip_prk_steps=True)
    if name == "lcm":
        noise.pop("steps_offset")
        return LCMScheduler(**noise)
    raise ValueError(f"no scheduler {name!r} here; there are: euler, dpm, pndm, lcm")


def _strengthen_attention(unet: UNet2DConditionModel, model: TinyModel) -> None:
    """Redraw the attention weights so that attention, self and cross, dominates the result.

    Queries and keys get a spread that makes the softmax uneven; values and the output projection gain
    variance, so that the attention output outweighs the residual stream it joins. The layers that lead from
    there to the next finer level are enlarged, or the finest level's skip connections would drown it. The
    embedding of the pooled text is enlarged, so that the prompt matters outside cross-attention as well.
    """
    with torch.no_grad():
        for name, module in unet.named_modules():
            if isinstance(module, Attention):
                for linear, gain in (
                    (module.to_q, math.sqrt(model.sharpness)),
                    (module.to_k, math.sqrt(model.sharpness)),
                    (module.to_v, 1.5),
                    (module.to_out[0], model.attention_gain),
                ):
                    linear.weight.normal_(std=gain / math.sqrt(linear.in_features))
            elif name.endswith("proj_out"):
                fan_in = module.weight[0].numel()
                module.weight.normal_(std=model.level_gain / math.sqrt(fan_in))
            elif name.endswith("upsamplers.0.conv"):
                module.weight.normal_(std=model.level_gain / math.sqrt(module.weight[0].numel()))
        for embedding in (unet.add_embedding.linear_1, unet.add_embedding.linear_2):
            embedding.weight.normal_(std=1.5 / math.sqrt(embedding.in_features))


def _fit_last_layer(unet: UNet2DConditionModel, model: TinyModel) -> None:
    """Solve the last convolution, by ridge regression, for the noise in noised random images.

    With a random last layer the initial noise is never removed: it dominates the final latents, and what late
    steps do disappears in it. A crude denoiser lets each step count.
    """
    height, width = model.latent_size
    batch = 12
    clean = torch.randn(batch, 4, height, width)
    noise = torch.randn(batch, 4, height, width)
    timesteps = torch.randint(20, 1000, (batch,))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)[timesteps].float().view(-1, 1, 1, 1)
    features: list[torch.Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _module, inputs: features.append(inputs[0]))
    with torch.no_grad():
        unet(
            signal.sqrt() * clean + (1 - signal).sqrt() * noise,
            timesteps,
            encoder_hidden_states=torch.randn(batch, model.text_length, sum(model.text_widths)),
            added_cond_kwargs={
                "text_embeds": torch.randn(batch, model.pooled_width),
                "time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * batch),
            },
            timestep_cond=None if model.time_cond_width is None else torch.randn(batch, model.time_cond_width),
        )
        hook.remove()
        columns = torch.nn.functional.unfold(features[0], kernel_size=3, padding=1)  # [batch, 9 C, h w]
        inputs = columns.transpose(1, 2).flatten(0, 1).double()  # [batch h w, 9 C]
        wanted = noise.flatten(2).transpose(1, 2).flatten(0, 1).double()  # [batch h w, 4]
        penalty = 1e-2 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ wanted)  # [9 C, 4]
        unet.conv_out.weight.copy_(solution.T.reshape(unet.conv_out.weight.shape))
        unet.conv_out.bias.zero_()


def _spread_text(encoder: torch.nn.Module) -> None:
    """Give the token embeddings unit variance: CLIP's own initialisation makes all prompts look alike."""
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("token_embedding.weight"):
                parameter.normal_(std=1.0)
            elif name.endswith("text_projection.weight"):
                parameter.normal_(std=1.0 / math.sqrt(parameter.shape[1]))


def _byte_symbols() -> list[str]:
    """The 256 printable stand-ins of byte-level BPE, in byte order: CLIP's alphabet."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = (code for code in range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's layout in small: bytes, bytes ending a word, merges, begin token, end token (the largest id)."""
    symbols = _byte_symbols()
    # "!" must have id 0, which SDXL's second tokenizer pads with; CLIP's table begins with printable bytes.
    symbols = sorted(symbols, key=lambda symbol: (ord(symbol) >= 256, ord(symbol)))
    tokens = symbols + [symbol + "</w>" for symbol in symbols]
    merges: list[tuple[str, str]] = []
    for word in _KNOWN_WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts = [pair[0] + pair[1], *parts[2:]]
    tokens += list(dict.fromkeys(left + right for left, right in merges))
    tokens += [BEGIN_TOKEN, END_TOKEN]
    return {token: identifier for identifier, token in enumerate(tokens)}, merges


def _save_vocabulary(directory: Path) -> None:
    vocabulary, merges = _vocabulary()
    (directory / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    (directory / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def directory_bytes(directory: Path | str) -> int:
    """Size of all files below ``directory``, in bytes."""
    return sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())


def sharded_files(directory: Path | str) -> list[str]:
    """Weight files of the denoiser, in the order of their names; one unless the checkpoint is sharded."""
    index = Path(directory) / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    if index.exists():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return ["diffusion_pytorch_model.safetensors"]
