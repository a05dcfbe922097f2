"""Small networks, and the one file that the original code (LDM) would write of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tgate_export.checkpoints import published
from tgate_export.checkpoints.base import Checkpoint
from tgate_export.checkpoints.single_file import SingleFileCheckpoint

LAYERS = 2
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


class Small(Checkpoint):
    """Small networks of a model's structure, by component, and their configurations."""

    def __init__(self, modules: Mapping[str, Any], model: str) -> None:
        self.where = "a small model"
        self.published = published.facts(model)
        self.model_index = self.published["model_index"]
        self.modules = modules

    def config(self, component: str) -> Mapping[str, Any]:
        config = self.modules[component].config
        found = config if isinstance(config, dict) else config.to_dict()
        return {key: value for key, value in found.items() if not key.startswith("_")}  # notes of the class, in no file

    def scheduler_config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = self.published["components"]["scheduler"]
        return config

    def tensors(self, component: str) -> Any:
        raise AssertionError("not asked for")

    def tokenizer(self, name: str) -> Path:
        raise AssertionError("not asked for")

    def token_limit(self, name: str) -> int | None:
        return 77

    def licence(self) -> str:
        return "openrail++"


def build(checkpoint: Checkpoint, component: str) -> nn.Module:
    config = checkpoint.config(component)
    module: nn.Module
    if component == "unet":
        module = diffusers.UNet2DConditionModel.from_config(config)
    elif component == "vae":
        module = diffusers.AutoencoderKL.from_config(config)
    else:
        projected = component == "text_encoder_2"
        cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        module = cls(transformers.CLIPTextConfig.from_dict(config))
    return module


def text_config(width: int, layers: int = 2) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=7,
        projection_dim=width + 2,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def small_vae() -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
    )


def small(model: str) -> Small:
    torch.manual_seed(5)
    if model in ("sd15", "sd21"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(4, 8, 8, 12),
            layers_per_block=LAYERS,
            attention_head_dim=2,
            norm_num_groups=4,
            cross_attention_dim=8,
            use_linear_projection=model == "sd21",
        )
        text = transformers.CLIPTextModel(text_config(8))
        return Small({"unet": unet, "vae": small_vae(), "text_encoder": text}, model)
    pruned: dict[str, Any] = {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": [1, [2, 2], [4, 4]],
        "reverse_transformer_layers_per_block": [[4, 4, 3], [2, 1, 1], 1],
    }
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8, 12),
        layers_per_block=LAYERS,
        attention_head_dim=(1, 2, 2),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=20,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=38,
        **(pruned if model == "ssd-1b" else {"transformer_layers_per_block": [1, 2, 3]}),
    )
    text = transformers.CLIPTextModel(text_config(8))
    second = transformers.CLIPTextModelWithProjection(text_config(12))
    modules = {"unet": unet, "vae": small_vae(), "text_encoder": text, "text_encoder_2": second}
    return Small(modules, model)


def unet_key(key: str, keys: frozenset[str]) -> str:
    """The original code's name of a U-Net's parameter."""
    stem, leaf = key.rsplit(".", 1)
    if stem in UNET_OUTSIDE:
        return f"{UNET_OUTSIDE[stem]}.{leaf}"
    match = re.fullmatch(r"(down_blocks|up_blocks)\.(\d+)\.(\w+)\.(\d+)\.(.+)|mid_block\.(\w+)\.(\d+)\.(.+)", key)
    assert match is not None, key
    side, block, part, layer, rest, middle_part, middle_layer, middle_rest = match.groups()
    if side is None:
        part, rest = middle_part, middle_rest
        place = f"middle_block.{'1' if part == 'attentions' else 2 * int(middle_layer)}"
    elif part in ("downsamplers", "upsamplers"):
        if part == "downsamplers":
            return f"input_blocks.{(int(block) + 1) * (LAYERS + 1)}.0.op.{leaf}"
        position = 2 if any(name.startswith(f"up_blocks.{block}.attentions.") for name in keys) else 1
        return f"output_blocks.{int(block) * (LAYERS + 1) + LAYERS}.{position}.conv.{leaf}"
    else:
        first = 1 if side == "down_blocks" else 0
        number = int(block) * (LAYERS + 1) + int(layer) + first
        name = "input_blocks" if side == "down_blocks" else "output_blocks"
        place = f"{name}.{number}.{'0' if part == 'resnets' else '1'}"
    if part == "resnets":
        inner, _ = rest.rsplit(".", 1)
        rest = f"{RESNET[inner]}.{leaf}"
    return f"{place}.{rest}"


def vae_tensor(key: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The original code's name and shape of an autoencoder's parameter."""
    stem, leaf = key.rsplit(".", 1)
    attention = re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)", stem)
    if attention is not None:
        name = VAE_ATTENTION[attention[2]]
        wide = tensor[..., None, None] if tensor.ndim == 2 else tensor
        return f"{attention[1]}.mid.attn_1.{name}.{leaf}", wide
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)", r"down.\1", key)
    key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{3 - int(m[1])}", key)
    key = key.replace(".resnets.", ".block.").replace("conv_shortcut", "nin_shortcut")
    key = key.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    return key.replace("conv_norm_out", "norm_out"), tensor


def open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names, with queries, keys and values in one tensor."""
    written: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("text_model.")
        match = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if name == "embeddings.position_embedding.weight":
            written["positional_embedding"] = tensor
        elif name == "embeddings.token_embedding.weight":
            written["token_embedding.weight"] = tensor
        elif name.startswith("final_layer_norm."):
            written[name.replace("final_layer_norm", "ln_final")] = tensor
        elif name == "text_projection.weight":
            written["text_projection"] = tensor.t().contiguous()
        else:
            assert match is not None, key
            block = f"transformer.resblocks.{match[1]}"
            if match[2] in OPEN_CLIP:
                written[f"{block}.{OPEN_CLIP[match[2]]}.{match[3]}"] = tensor
            elif match[2] == "self_attn.q_proj":
                parts = [tensors[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
                written[f"{block}.attn.in_proj_{match[3]}"] = torch.cat(parts)
    return written


def original(model: Small, *, dtype: torch.dtype = torch.float32, text_is_open_clip: bool = False) -> dict[str, Tensor]:
    """All of a model's tensors in the original layout."""
    sdxl = "text_encoder_2" in model.modules
    written: dict[str, Tensor] = {}
    for component, module in model.modules.items():
        tensors = {key: tensor.detach().to(dtype) for key, tensor in module.named_parameters()}
        if component == "unet":
            keys = frozenset(tensors)
            written |= {f"model.diffusion_model.{unet_key(key, keys)}": tensor for key, tensor in tensors.items()}
        elif component == "vae":
            named = dict(vae_tensor(key, tensor) for key, tensor in tensors.items())
            written |= {f"first_stage_model.{key}": tensor for key, tensor in named.items()}
        elif component == "text_encoder_2" or text_is_open_clip:
            prefix = "conditioner.embedders.1.model." if sdxl else "cond_stage_model.model."
            written |= {prefix + key: tensor for key, tensor in open_clip(tensors).items()}
        else:
            prefix = "conditioner.embedders.0.transformer." if sdxl else "cond_stage_model.transformer."
            written |= {f"{prefix}text_model.{key.removeprefix('text_model.')}": t for key, t in tensors.items()}
    written |= beside(sdxl, dtype)
    return {key: tensor.contiguous().clone() for key, tensor in written.items()}


def beside(sdxl: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the published files hold beside weights."""
    if sdxl:
        return {
            "denoiser.sigmas": schedule()["denoiser.sigmas"].to(dtype),
            "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
            "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(7)[None],
        }
    return {
        **{key: tensor.to(dtype) for key, tensor in schedule().items() if key != "denoiser.sigmas"},
        "sqrt_alphas_cumprod": schedule()["alphas_cumprod"].sqrt(),
        "posterior_mean_coef1": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        "model_ema.diffusion_modelout2bias": torch.zeros(4),
        "first_stage_model.loss.logvar": torch.zeros(1),
        "global_step": torch.tensor(470000),
    }


def schedule(rescaled: bool = False, **options: Any) -> dict[str, Tensor]:
    """Stable Diffusion's noise schedule as diffusers computes it, under the names of the original code."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", **options}
    scheduler = diffusers.DDIMScheduler(**betas, rescale_betas_zero_snr=rescaled)
    kept = scheduler.alphas_cumprod
    return {"alphas_cumprod": kept, "betas": scheduler.betas, "denoiser.sigmas": ((1 - kept) / kept).sqrt()}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Small]]:
    """Files by model. Read only."""
    folder = tmp_path_factory.mktemp("single")
    made: dict[str, tuple[Path, Small]] = {}

    def make(model: str) -> tuple[Path, Small]:
        if model not in made:
            networks, path = small(model), folder / f"{model}.safetensors"
            dtype = torch.float16 if model == "sdxl" else torch.float32
            save_file(original(networks, dtype=dtype, text_is_open_clip=model == "sd21"), path)
            made[model] = (path, networks)
        return made[model]

    return make


def changed(
    path: Path,
    target: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    save_file(change(load_file(path)), target, metadata=dict(metadata or {}))
    return target


def marked(
    written: Callable[[str], tuple[Path, Small]],
    folder: Path,
    model: str,
    tensors: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> SingleFileCheckpoint:
    """The small file of a model with further tensors and metadata, read as that model."""
    path, networks = written(model)
    target = changed(path, folder / "marked.safetensors", lambda d: {**d, **(tensors or {})}, metadata)
    return SingleFileCheckpoint(target, model, build, configs=networks)
