"""Single-file checkpoints: small networks written in the original layout read back as they were, bit for bit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import published
from tgate_export.checkpoints.base import Checkpoint, Stored
from tgate_export.checkpoints.single_file import SingleFileCheckpoint
from tgate_export.sampling import compile_sampler, compile_scheduler

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
    from safetensors.torch import load_file

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


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl", "ssd-1b"])
def test_every_parameter_reads_back_bit_for_bit(written: Callable[[str], tuple[Path, Small]], model: str) -> None:
    path, networks = written(model)
    checkpoint = SingleFileCheckpoint(path, model, build, configs=networks)
    for component, module in networks.modules.items():
        tensors = checkpoint.tensors(component)
        parameters = dict(module.named_parameters())
        assert parameters
        for name, parameter in parameters.items():
            read = tensors.read(name)
            assert read.dtype == (torch.float16 if model == "sdxl" else torch.float32)
            assert read.is_contiguous()
            assert torch.equal(read, parameter.detach().to(read.dtype)), (component, name)
        tensors.close()
        assert torch.equal(tensors.read(name), read)  # the last one, once more


def test_facts_are_the_published_ones(written: Callable[[str], tuple[Path, Small]]) -> None:
    path, networks = written("sd15")
    checkpoint = SingleFileCheckpoint(path, "sd15", build, configs=networks)
    assert checkpoint.where == str(path)
    assert checkpoint.model_index["_class_name"] == "StableDiffusionPipeline"
    assert checkpoint.config("unet")["cross_attention_dim"] == 8
    assert checkpoint.scheduler_config() == networks.scheduler_config()
    assert checkpoint.token_limit("tokenizer") == 77
    assert checkpoint.licence() == "unknown"
    with pytest.raises(ExportError, match=r"holds no tokenizer; .*--components denoiser,decoder.*diffusers directory"):
        checkpoint.tokenizer("tokenizer")


def test_a_tensor_belongs_to_its_reader(written: Callable[[str], tuple[Path, Small]]) -> None:
    path, networks = written("sd15")
    tensors = SingleFileCheckpoint(path, "sd15", build, configs=networks).tensors("unet")
    first = tensors.read("conv_in.weight")
    want = first.clone()
    first.zero_()
    assert torch.equal(tensors.read("conv_in.weight"), want)


def test_older_spellings_of_text_encoders(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    path, networks = written("sd15")
    old = changed(
        path, tmp_path / "old.safetensors", lambda d: {k.replace("r.text_model.", "r."): t for k, t in d.items()}
    )
    tensors = SingleFileCheckpoint(old, "sd15", build, configs=networks).tensors("text_encoder")
    for name, parameter in networks.modules["text_encoder"].named_parameters():
        assert torch.equal(tensors.read(name), parameter)
        assert torch.equal(tensors.read(f"text_model.{name}"), parameter)


def test_published_configurations_are_the_default(written: Callable[[str], tuple[Path, Small]]) -> None:
    """Against the real size, a small file is of another model."""
    path, _ = written("sd15")
    with pytest.raises(ExportError, match=r"for text 8 wide, and sd15 is SD 1\.x; choose another --model or file"):
        SingleFileCheckpoint(path, "sd15", build)


def test_a_file_of_another_model(written: Callable[[str], tuple[Path, Small]]) -> None:
    for file, model in (("sdxl", "sd15"), ("sd15", "sdxl"), ("sdxl", "ssd-1b"), ("ssd-1b", "sdxl")):
        path, _ = written(file)
        with pytest.raises(ExportError, match=rf"{re.escape(str(path))} holds .*, and {model} is .*") as caught:
            SingleFileCheckpoint(path, model, build, configs=written(model)[1])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            lambda d: {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 4)},
            "is a LoRA, no checkpoint",
            id="kohya LoRA",
        ),
        pytest.param(lambda d: {"unet.mid.lora.down.weight": torch.zeros(2, 4)}, "is a LoRA", id="diffusers LoRA"),
        pytest.param(
            lambda d: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(2)}, "give the directory", id="a component"
        ),
        pytest.param(lambda d: {"b": torch.zeros(2), "a": torch.zeros(1)}, "its first tensor is 'a'", id="anything"),
        pytest.param(
            lambda d: {
                k: torch.zeros(4, 9, 3, 3) if k.endswith("input_blocks.0.0.weight") else t for k, t in d.items()
            },
            "takes 9 channels, sd15 takes 4; inpainting",
            id="inpainting",
        ),
        pytest.param(
            lambda d: {
                k: torch.zeros(4, 8, 3, 3) if k.endswith("input_blocks.0.0.weight") else t for k, t in d.items()
            },
            "takes 8 channels, sd15 takes 4; instruct-pix2pix",
            id="instruct-pix2pix",
        ),
        pytest.param(
            lambda d: {k: torch.zeros(4) if k.endswith("attn2.to_k.weight") else t for k, t in d.items()},
            "no whole U-Net",
            id="flattened weights",
        ),
        pytest.param(
            lambda d: {**d, "control_model.time_embed.0.weight": torch.zeros(2)}, "holds a ControlNet", id="ControlNet"
        ),
        pytest.param(lambda d: {**d, "lora_te_x.alpha": torch.zeros(2)}, "holds a LoRA beside", id="LoRA beside"),
        pytest.param(
            lambda d: {**d, "something": torch.zeros(2)}, "has tensor 'something', which belongs to no", id="unknown"
        ),
        pytest.param(
            lambda d: {**d, "conditioner.embedders.0.model.ln_final.bias": torch.zeros(2)},
            "has tensor 'conditioner.embedders.0.model.ln_final.bias', which belongs to no",
            id="another model's encoder",
        ),
        pytest.param(lambda d: {**d, "scaled_fp8": torch.zeros(0)}, "has tensor 'scaled_fp8'", id="scaled fp8"),
        pytest.param(
            lambda d: {**d, "scale_factor": torch.tensor(0.13025)},
            "'scale_factor' holds [0.13",
            id="scale of another autoencoder",
        ),
        pytest.param(
            lambda d: {k: t for k, t in d.items() if "input_blocks.0.0." not in k}, "no whole U-Net", id="no input"
        ),
    ],
)
def test_files_that_are_refused(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    path, networks = written("sd15")
    bad = changed(path, tmp_path / "bad.safetensors", change)
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        SingleFileCheckpoint(bad, "sd15", build, configs=networks)
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        pytest.param(
            "vae", lambda k, t: None if k.startswith("first_stage") else t, "has no vae; merge one into it", id="no VAE"
        ),
        pytest.param(
            "unet",
            lambda k, t: None if "output_blocks.4.0.in_layers.2" in k else t,
            "has no tensor 'up_blocks.1.resnets.1.conv1.weight'",
            id="incomplete",
        ),
        pytest.param(
            "unet",
            lambda k, t: torch.zeros(3, 3) if k.endswith("time_embed.0.weight") else t,
            "of shape [3, 3], sd15 wants [16, 4]; the file is of another model",
            id="a shape",
        ),
        pytest.param(
            "text_encoder",
            lambda k, t: t.double().int() if k.endswith("final_layer_norm.bias") else t,
            "final_layer_norm.bias' of its text_encoder is I32, and weights must be one of F64, F32",
            id="whole numbers",
        ),
    ],
)
def test_components_that_are_refused(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    component: str,
    change: Callable[[str, Tensor], Tensor | None],
    message: str,
) -> None:
    path, networks = written("sd15")
    bad = changed(
        path,
        tmp_path / "bad.safetensors",
        lambda d: {key: new for key, tensor in d.items() if (new := change(key, tensor)) is not None},
    )
    checkpoint = SingleFileCheckpoint(bad, "sd15", build, configs=networks)
    with pytest.raises(ExportError, match=re.escape(message)):
        checkpoint.tensors(component)


def test_no_such_file_and_no_safetensors_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    with pytest.raises(ExportError, match="does not exist"):
        SingleFileCheckpoint(missing, "sd15", build)
    missing.write_bytes(b"not a checkpoint")
    with pytest.raises(ExportError, match="not a whole safetensors file"):
        SingleFileCheckpoint(missing, "sd15", build)


def test_other_models_want_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="read for sd15, sd21, sdxl, ssd-1b, not for pixart-alpha; convert it"):
        SingleFileCheckpoint(tmp_path / "x.safetensors", "pixart-alpha", build)


@pytest.mark.parametrize(
    ("model", "component", "key"),
    [
        pytest.param("sdxl", "unet", "model.diffusion_model.time_embedding.cond_proj.weight", id="LCM"),
        pytest.param(
            "sd15", "unet", "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip.weight", id="IP"
        ),
        pytest.param("sd15", "vae", "first_stage_model.decoder.time_mix.weight", id="a decoder of videos"),
        pytest.param("sd15", "vae", "vae.decoder.conv_in.weight", id="a second autoencoder"),
        pytest.param("sd15", "text_encoder", "cond_stage_model.model.ln_final.bias", id="a second encoder"),
        pytest.param("sdxl", "text_encoder", "conditioner.embedders.0.model.ln_final.bias", id="the refiner's encoder"),
        pytest.param("sdxl", "text_encoder_2", "conditioner.embedders.1.model.adapter.bias", id="an adapter"),
    ],
)
def test_tensors_that_nothing_reads_are_refused(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, model: str, component: str, key: str
) -> None:
    checkpoint = marked(written, tmp_path, model, {key: torch.zeros(2)})
    with pytest.raises(ExportError, match=re.escape(f"nothing in the model's {component} reads tensor {key!r};")):
        checkpoint.tensors(component)


def test_tensors_that_change_nothing_are_left_out(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    further = {
        "cond_stage_model.model.transformer.resblocks.23.ln_1.bias": torch.zeros(2),
        "cond_stage_model.model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.model.text_projection": torch.zeros(8, 10),
    }
    checkpoint = marked(written, tmp_path, "sd21", further)
    held = checkpoint.tensors("text_encoder").stored()
    modules = written("sd21")[1].modules
    assert {name.removeprefix("text_model.") for name in held} == {
        n for n, _ in modules["text_encoder"].named_parameters()
    }


QUANTISED = (
    *("weight_scale", "scale_weight", "scale_input", "comfy_quant", "SCB", "weight_format", "weight.absmax"),
    *("weight.quant_map", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4", "qzeros", "g_idx"),
)


@pytest.mark.parametrize("leaf", QUANTISED)
def test_quantised_weights_are_refused_by_name(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, leaf: str
) -> None:
    stem = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    key = f"model.diffusion_model.{stem}.{leaf}"
    with pytest.raises(ExportError, match=rf"its unet is quantised: tensor '{re.escape(key)}' \(U8\).*; give the"):
        marked(written, tmp_path, "sd15", {key: torch.zeros(2, dtype=torch.uint8)})
    key = f"first_stage_model.decoder.mid.attn_1.q.{leaf}"
    checkpoint = marked(written, tmp_path, "sd15", {key: torch.zeros(2)})
    checkpoint.tensors("unet")
    with pytest.raises(ExportError, match=f"its vae is quantised: tensor '{re.escape(key)}'"):
        checkpoint.tensors("vae")


def test_whole_numbers_are_no_weights(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    path, networks = written("sd15")
    key = "model.diffusion_model.time_embed.0.weight"
    bad = changed(path, tmp_path / "bad.safetensors", lambda d: {**d, key: (d[key] * 100).to(torch.int8)})
    with pytest.raises(ExportError, match=rf"tensor '{re.escape(key)}' of its unet is I8, and weights must be"):
        SingleFileCheckpoint(bad, "sd15", build, configs=networks)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float64])
def test_plain_floating_point_is_read_as_it_is(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, dtype: torch.dtype
) -> None:
    path, networks = written("sdxl")
    target = changed(
        path,
        tmp_path / "other.safetensors",
        lambda d: {k: t.to(dtype) if k.startswith(("model.", "conditioner.embedders.1")) else t for k, t in d.items()},
    )
    checkpoint = SingleFileCheckpoint(target, "sdxl", build, configs=networks)
    for component in ("unet", "text_encoder_2"):
        tensors = checkpoint.tensors(component)
        for name, parameter in networks.modules[component].named_parameters():
            read = tensors.read(name)
            assert read.dtype == dtype
            assert torch.equal(read.double(), parameter.detach().half().to(dtype).double())


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_what_is_stored_is_told_without_reading_it(
    written: Callable[[str], tuple[Path, Small]], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    path, networks = written(model)
    checkpoint = SingleFileCheckpoint(path, model, build, configs=networks)
    read: list[str] = []
    whole = type(checkpoint._file).__getitem__

    def noted(self: Any, key: str) -> Tensor:
        read.append(key)
        return whole(self, key)

    monkeypatch.setattr(type(checkpoint._file), "__getitem__", noted)
    for component, module in networks.modules.items():
        tensors = checkpoint.tensors(component)
        stored = tensors.stored()
        assert not read
        for name, parameter in module.named_parameters():
            dtype = "F16" if model == "sdxl" else "F32"
            assert stored[tensors.find(name)] == Stored(dtype, tuple(parameter.shape))
        with pytest.raises(ExportError, match="has no tensor 'nothing'"):
            tensors.find("nothing")
    assert torch.equal(tensors.read(name), parameter.detach().to(tensors.read(name).dtype))
    assert read


def test_each_tensor_is_told_by_its_own_dtype(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    """Of three that are one tensor in the file, too."""
    path, networks = written("sd21")
    key = "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight"
    target = changed(path, tmp_path / "mixed.safetensors", lambda d: {**d, key: d[key].bfloat16()})
    tensors = SingleFileCheckpoint(target, "sd21", build, configs=networks).tensors("text_encoder")
    stored = tensors.stored()
    halves = {name for name, held in stored.items() if held.dtype == "BF16"}
    assert halves == {f"text_model.encoder.layers.1.self_attn.{part}_proj.weight" for part in "qkv"}


EMPTY = torch.zeros(0)
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
VELOCITY = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("model", "tensors", "metadata"),
    [
        pytest.param("sdxl", {"v_pred": EMPTY}, {}, id="v_pred"),
        pytest.param("sd15", {"v_pred": EMPTY}, {"modelspec.prediction_type": "v"}, id="twice"),
        pytest.param("ssd-1b", {}, {"modelspec.predict_key": "v"}, id="ComfyUI's metadata"),
        pytest.param("sdxl", {}, {"modelspec.prediction_type": "v_prediction"}, id="model specification"),
        pytest.param("sdxl", {}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "False"}, id="kohya"),
        pytest.param("sd15", {}, {"ss_base_model_version": "sd_v1_v", "ss_v2": "False"}, id="kohya's version"),
    ],
)
def test_velocity_is_followed(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    model: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    config = marked(written, tmp_path, model, tensors, metadata).scheduler_config()
    assert config == {**written(model)[1].scheduler_config(), **VELOCITY}
    hand = diffusers.DDIMScheduler(
        **CONFIG, **VELOCITY, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    compiled, wanted = compile_sampler("ddim", config, 5), compile_scheduler(hand, 5, name="ddim")
    assert compiled.prediction_type == "v_prediction"
    assert compiled.calls == wanted.calls
    assert compiled.calls != compile_sampler("ddim", written(model)[1].scheduler_config(), 5).calls


@pytest.mark.parametrize(
    ("model", "tensors", "metadata"),
    [
        pytest.param("sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY}, {}, id="ztsnr"),
        pytest.param("sd15", {"v_pred": EMPTY, **schedule(True)}, {}, id="buffers"),
        pytest.param("sd15", {"v_pred": EMPTY, "betas": schedule(True)["betas"].bfloat16()}, {}, id="rounded"),
        pytest.param(
            "sdxl",
            {"v_pred": EMPTY, "denoiser.sigmas": schedule(True)["denoiser.sigmas"].clamp(max=4518.0)},
            {},
            id="σ",
        ),
        pytest.param("sdxl", {"v_pred": EMPTY}, {"ss_zero_terminal_snr": "True"}, id="kohya"),
        pytest.param("sd21", {"ztsnr": EMPTY}, {}, id="of a model that predicts velocity"),
    ],
)
def test_zero_terminal_snr_is_followed(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    model: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    config = marked(written, tmp_path, model, tensors, metadata).scheduler_config()
    rescaled = {**VELOCITY, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert config == {**written(model)[1].scheduler_config(), **rescaled}
    hand = diffusers.EulerDiscreteScheduler(**CONFIG, **rescaled)
    compiled, wanted = compile_sampler("euler", config, 4), compile_scheduler(hand, 4, name="euler")
    assert [call.timestep for call in compiled.calls] == [999, 749, 499, 249]
    assert compiled.calls == wanted.calls
    assert compiled.initial_scale == wanted.initial_scale == pytest.approx(4096)


def test_the_published_noise_schedule_says_nothing(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path
) -> None:
    """Networks that were trained further keep the buffers of their ancestor."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        held = {key: tensor.to(dtype) for key, tensor in schedule().items()}
        assert marked(written, tmp_path, "sd15", held).scheduler_config() == written("sd15")[1].scheduler_config()
    config = marked(written, tmp_path, "sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY, **schedule()}).scheduler_config()
    assert config["rescale_betas_zero_snr"] is True


def test_playground(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    """As diffusers reads such a file."""
    from diffusers.loaders.single_file_utils import _legacy_load_scheduler, create_vae_diffusers_config_from_ldm

    mean = torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).view(1, 4, 1, 1)
    std = torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).view(1, 4, 1, 1)
    tensors = {"edm_mean": mean, "edm_std": std}
    checkpoint = marked(written, tmp_path, "sdxl", tensors, {"modelspec.prediction_type": "epsilon"})

    with pytest.warns(FutureWarning):
        hand = _legacy_load_scheduler(None, tensors, "scheduler", scheduler_type="edm_dpm_solver_multistep")
    config = checkpoint.scheduler_config()
    assert config["_class_name"] == checkpoint.model_index["scheduler"][1] == type(hand).__name__
    read = type(hand).from_config(config)
    assert {**read.config, "_use_default_values": 0, "_class_name": 0} == {
        **hand.config,
        "_use_default_values": 0,
        "_class_name": 0,
    }
    assert compile_sampler("dpmpp_2m", config, 6).calls == compile_scheduler(hand, 6, name="dpmpp_2m").calls
    assert written("sdxl")[1].model_index["scheduler"][1] == "EulerDiscreteScheduler"

    params = {"ch": 4, "ch_mult": [1], "in_channels": 3, "out_ch": 3, "z_channels": 4, "num_res_blocks": 2}
    original = {"model": {"params": {"first_stage_config": {"params": {"ddconfig": params}}}}}
    vae = create_vae_diffusers_config_from_ldm(original, tensors, image_size=1024)
    built: Any = build(checkpoint, "vae").config
    assert built["scaling_factor"] == vae["scaling_factor"] == 0.5
    assert built["latents_mean"] == vae["latents_mean"].flatten().tolist()
    assert built["latents_std"] == vae["latents_std"].flatten().tolist()
    assert checkpoint.config("unet") == written("sdxl")[1].config("unet")


@pytest.mark.parametrize("minimum", [None, 0.01])
def test_cosxl(written: Callable[[str], tuple[Path, Small]], tmp_path: Path, minimum: float | None) -> None:
    tensors = {"edm_vpred.sigma_max": torch.tensor(120.0)}
    if minimum is not None:
        tensors["edm_vpred.sigma_min"] = torch.tensor([minimum])
    checkpoint = marked(written, tmp_path, "sdxl", tensors)
    hand = diffusers.EDMEulerScheduler(
        sigma_min=minimum or 0.002,
        sigma_max=120.0,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )
    config = checkpoint.scheduler_config()
    assert config["_class_name"] == checkpoint.model_index["scheduler"][1] == "EDMEulerScheduler"
    compiled, wanted = compile_sampler("euler", config, 7), compile_scheduler(hand, 7, name="euler")
    assert compiled.prediction_type == "v_prediction"
    assert [call.timestep for call in compiled.calls] == pytest.approx(
        [call.timestep for call in wanted.calls], abs=1e-6
    )
    for call, by_hand in zip(compiled.calls, wanted.calls, strict=True):
        for read, made in (
            ((call.input_scale,), (by_hand.input_scale,)),
            (call.latents, by_hand.latents),
            (call.outputs, by_hand.outputs),
        ):
            assert read == pytest.approx(made, rel=1e-5)
    assert checkpoint.config("vae") == written("sdxl")[1].config("vae")


SIGMA_MAX = {"edm_vpred.sigma_max": torch.tensor(120.0)}
PLAYGROUND = {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}


@pytest.mark.parametrize(
    ("model", "tensors", "metadata", "message"),
    [
        # Two marks that disagree.
        ("sdxl", {"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, "by tensor 'v_pred' its prediction type"),
        ("sdxl", {"v_pred": EMPTY}, {"ss_v_parameterization": "False"}, "by its ss_v_parameterization epsilon"),
        ("sdxl", {}, {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"}, "contradicts itself"),
        ("sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY}, {"ss_zero_terminal_snr": "False"}, "its zero terminal SNR is True"),
        ("sdxl", SIGMA_MAX, {"modelspec.prediction_type": "epsilon"}, "by tensor 'edm_vpred.sigma_max' v_prediction"),
        ("sdxl", {**SIGMA_MAX, "ztsnr": EMPTY}, {}, "by tensor 'ztsnr' its zero terminal SNR is True"),
        ("sdxl", {**PLAYGROUND, "v_pred": EMPTY}, {}, "by tensor 'edm_mean' epsilon"),
        ("sdxl", {**PLAYGROUND, **SIGMA_MAX}, {}, "not parts or both of them"),
        # Parts of marks, and marks without sense.
        ("sdxl", {"edm_mean": torch.zeros(4)}, {}, "it has the marks edm_mean, and wants edm_mean and edm_std"),
        ("sdxl", {"edm_vpred.sigma_min": torch.tensor(0.1)}, {}, "it has the marks edm_vpred.sigma_min, and wants"),
        ("sdxl", {**SIGMA_MAX, "edm_vpred.sigma_min": torch.tensor(130.0)}, {}, "goes from 130 to 120"),
        ("sdxl", {"edm_vpred.sigma_max": torch.tensor(-1.0)}, {}, "holds [-1.0], and must hold 1 positive number;"),
        (
            "sdxl",
            {**PLAYGROUND, "edm_std": torch.zeros(4)},
            {},
            "'edm_std' holds [0.0, 0.0, 0.0, 0.0], and must hold 4",
        ),
        ("sdxl", {**PLAYGROUND, "edm_mean": torch.full((4,), torch.nan)}, {}, "must hold 4 finite numbers"),
        ("sdxl", {**PLAYGROUND, "edm_mean": torch.zeros(3)}, {}, "must hold 4 finite numbers"),
        ("sdxl", {"ztsnr": EMPTY}, {}, "by tensor 'ztsnr' its terminal SNR is zero, where epsilon says nothing"),
        ("sd15", schedule(True), {}, "its terminal SNR is zero, where epsilon says nothing"),
        # Noise schedules of other models.
        ("sd15", {"betas": schedule(beta_end=0.02)["betas"]}, {}, "tensor 'betas' holds 1000 numbers, 0.00085 to 0.02"),
        ("sd15", {"alphas_cumprod": torch.linspace(1, 0, 10)}, {}, "'alphas_cumprod' holds 10 numbers, 1 to 0"),
        ("sdxl", {"denoiser.sigmas": EMPTY}, {}, "'denoiser.sigmas' holds 0 numbers, nothing"),
        # Marks of another model than --model says.
        ("sd15", {**SIGMA_MAX}, {}, "marks it as an EDM model, which is known of sdxl alone"),
        ("sd21", {"global_step": torch.tensor(875000)}, {}, "by tensor 'global_step' (875000, SD 2 base) it predicts"),
        ("sd21", {}, {"modelspec.prediction_type": "epsilon"}, "by its modelspec.prediction_type it predicts epsilon"),
        ("sd21", {}, {"modelspec.resolution": "512x512"}, "modelspec.resolution = '512x512', and SD 2 of that size"),
        ("sd21", {}, {"modelspec.resolution": "large"}, "modelspec.resolution = 'large'"),
        ("sd21", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "sd21 is stable-diffusion-v2-768-v"),
        ("sdxl", {}, {"modelspec.architecture": "stable-diffusion-v1"}, "sdxl is stable-diffusion-xl-v1-base"),
        ("sdxl", {}, {"modelspec.architecture": "stable-diffusion-xl-v1-refiner"}, "sdxl is stable-diffusion-xl-v1"),
        ("sdxl", {}, {"modelspec.architecture": "Stable-Diffusion-XL-v1-base/lora"}, "'Stable-Diffusion-XL-v1-base/lo"),
        ("sd15", {}, {"modelspec.architecture": "stable-diffusion-v1/inpainting"}, "sd15 is stable-diffusion-v1;"),
        ("sd15", {}, {"ss_v2": "True"}, "ss_v2 = 'True'; sd15 is not of Stable Diffusion 2"),
        ("sd21", {}, {"ss_v2": "False"}, "ss_v2 = 'False'; sd21 is of Stable Diffusion 2"),
        ("sd15", {}, {"ss_base_model_version": "sdxl_base_v1-0"}, "ss_base_model_version = 'sdxl_base_v1-0'; sd15 is"),
        ("sdxl", {}, {"ss_base_model_version": "sdxl_refiner_v1-0"}, "sdxl is sdxl_base_v1-0"),
        # Marks that cannot be followed.
        ("sdxl", {}, {"modelspec.prediction_type": "sample"}, "which is none of epsilon, eps, v, v_prediction"),
        ("sdxl", {}, {"ss_zero_terminal_snr": "maybe"}, "ss_zero_terminal_snr = 'maybe', which is none of true"),
        ("sdxl", {}, {"modelspec.timestep_range": "200,1000"}, "trained for a part of the 1000 timesteps"),
        ("sdxl", {}, {"_quantization_metadata": "{}"}, "its weights are quantised"),
        ("sd15", {}, {"modelspec.encoder_layer": "last"}, "modelspec.encoder_layer = 'last', and 1 is the last"),
    ],
)
def test_marks_that_are_refused(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    model: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    message: str,
) -> None:
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        marked(written, tmp_path, model, tensors, metadata)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'marked.safetensors'}: ")
    assert "\n" not in said
    assert "; " in said  # what to do next


@pytest.mark.parametrize(
    ("model", "metadata"),
    [
        ("sd15", {"modelspec.architecture": "stable-diffusion-v1", "modelspec.resolution": "768x768"}),
        ("sd15", {"modelspec.prediction_type": "epsilon", "ss_v2": "False", "ss_base_model_version": "sd_v1"}),
        ("sd15", {"ss_base_model_version": "sd_1.5", "modelspec.timestep_range": "0,1000"}),
        ("sd21", {"modelspec.architecture": "stable-diffusion-v2-768-v", "ss_v2": "True"}),
        ("sd21", {"modelspec.resolution": "768x768", "ss_base_model_version": "sd_v2_v"}),
        ("sd21", {"modelspec.resolution": "512x512", "modelspec.prediction_type": "v"}),
        ("sdxl", {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.resolution": "512x512"}),
        ("sdxl", {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.encoder_layer": "2", "ss_v2": "False"}),
        ("ssd-1b", {"modelspec.architecture": "stable-diffusion-xl-v1-base", "ss_zero_terminal_snr": "None"}),
        ("sdxl", {"modelspec.title": "v_pred", "modelspec.author": "ztsnr", "format": "pt", "prompt": "{}"}),
    ],
)
def test_metadata_that_agrees_changes_nothing(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, model: str, metadata: Mapping[str, str]
) -> None:
    checkpoint = marked(written, tmp_path, model, metadata=metadata)
    networks = written(model)[1]
    assert checkpoint.scheduler_config() == networks.scheduler_config()
    assert checkpoint.model_index == networks.model_index
    for component, module in networks.modules.items():
        assert checkpoint.config(component) == networks.config(component)
        assert len(checkpoint.tensors(component).stored()) == len(list(module.named_parameters()))


def test_skipped_layers_touch_the_text_alone(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    checkpoint = marked(written, tmp_path, "sd15", metadata={"modelspec.encoder_layer": "2"})
    checkpoint.tensors("unet")
    with pytest.raises(ExportError, match=r"modelspec.encoder_layer = 2: prompts are encoded without the last"):
        checkpoint.tensors("text_encoder")


def test_configurations_are_read_with_defaults(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    """What published files leave unsaid is what its class says."""
    path, networks = written("sd15")

    class Silent(Small):
        def config(self, component: str) -> Mapping[str, Any]:
            defaults = inspect.signature(type(self.modules[component]).__init__).parameters
            config = super().config(component)
            return {k: v for k, v in config.items() if k not in defaults or v != defaults[k].default}

    silent = Silent(networks.modules, "sd15")
    assert not {"in_channels", "layers_per_block", "mid_block_type", "addition_embed_type"} & set(silent.config("unet"))
    assert "scaling_factor" not in silent.config("vae")
    scaled = changed(path, tmp_path / "scaled.safetensors", lambda d: {**d, "scale_factor": torch.tensor(0.18215)})
    checkpoint = SingleFileCheckpoint(scaled, "sd15", build, configs=silent)
    for component in ("unet", "vae"):
        tensors = checkpoint.tensors(component)
        for name, parameter in networks.modules[component].named_parameters():
            assert torch.equal(tensors.read(name), parameter)
