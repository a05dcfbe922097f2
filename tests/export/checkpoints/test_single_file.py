"""Single-file checkpoints: small networks written in the original layout read back as they were, bit for bit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.export.checkpoints.ldm import Small, build, changed, written
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Stored
from tgate_export.checkpoints.single_file import SingleFileCheckpoint

__all__ = ["written"]  # a fixture


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
            "takes 9 channels, sd15 takes 4; an inpainting checkpoint is read from a diffusers directory alone",
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


# --- a stranger's -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: {**d, "denoiser.sigmas": torch.zeros(1 << 17)}, "a mark is at most"),
        (lambda d: {**d, "scale_factor": torch.zeros(1, dtype=torch.complex64)}, "is C64"),
    ],
    ids=["size", "kind"],
)
def test_a_mark_is_as_small_as_marks_are(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, change: Any, why: str
) -> None:
    path, networks = written("sd15")
    with pytest.raises(ExportError, match=why):
        SingleFileCheckpoint(changed(path, tmp_path / "a.safetensors", change), "sd15", build, configs=networks)


@pytest.mark.parametrize(
    "metadata",
    [
        {"modelspec.encoder_layer": "²"},
        {"modelspec.encoder_layer": "9" * 10_000},
        {"modelspec.timestep_range": "9" * 10_000 + ",0"},
        {"ss_base_model_version": "sd_v1" * 10_000},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_metadata_of_a_stranger(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, metadata: dict[str, str]
) -> None:
    """Numbers that Python takes for digits and for none, and longer than it reads."""
    path, networks = written("sd15")
    target = tmp_path / "a.safetensors"
    save_file(load_file(path), target, metadata)
    with pytest.raises(ExportError, match=next(iter(metadata))) as caught:
        SingleFileCheckpoint(target, "sd15", build, configs=networks)
    assert len(str(caught.value)) < 400 + len(str(target))
