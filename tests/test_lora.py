"""LoRAs: what is fused tensor by tensor is what diffusers fuses into a whole pipeline."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.test_single_file import unet_key
from tests.tiny_models import load_tiny_sdxl
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.lora import FusedCheckpoint, Lora, fuse_loras

peft = pytest.importorskip("peft")

VARIANT = "conv_projection"
UNET_LAYERS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1"]
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]
ALL = ("unet", "vae", "text_encoder", "text_encoder_2")


def build(checkpoint: Checkpoint, component: str) -> nn.Module:
    config = checkpoint.config(component)
    module: nn.Module
    if component in ("unet", "vae", "transformer"):
        module = getattr(diffusers, config["_class_name"]).from_config(config)
    else:
        projected = component == "text_encoder_2"
        cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
        module = cls(transformers.CLIPTextConfig.from_dict(config))
    return module


@pytest.fixture(scope="module")
def directory(tiny_checkpoint: Callable[[str], Path]) -> Path:
    return tiny_checkpoint(VARIANT)


def adapters(directory: Path, components: tuple[str, ...], *, rank: int, alpha: int, seed: int) -> dict[str, Any]:
    """A pipeline's networks with peft's layers in them, no part of which is zero."""
    pipe = load_tiny_sdxl(directory)
    torch.manual_seed(seed)
    found = {}
    for name in components:
        module = getattr(pipe, name)
        layers = UNET_LAYERS if name == "unet" else TEXT_LAYERS
        module.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers))
        for key, parameter in module.named_parameters():
            if "lora_" in key:
                parameter.data.normal_(std=0.3)
        found[name] = module
    return found


def peft_tensors(module: Any) -> dict[str, Tensor]:
    return dict(peft.get_peft_model_state_dict(module))


def write_lora(
    directory: Path,
    folder: Path,
    components: tuple[str, ...] = ("unet",),
    *,
    rank: int = 3,
    alpha: int = 3,
    seed: int = 1,
    header: bool = False,
) -> Path:
    """A LoRA's file as diffusers' training scripts write it. ``header``: with the settings in it."""
    modules = adapters(directory, components, rank=rank, alpha=alpha, seed=seed)
    settings = {f"{name}_lora_adapter_metadata": m.peft_config["default"].to_dict() for name, m in modules.items()}
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        folder,
        **{f"{name}_lora_layers": convert(name, peft_tensors(module)) for name, module in modules.items()},
        **(settings if header else {}),
    )
    return folder / "pytorch_lora_weights.safetensors"


def convert(component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors if component == "unet" else dict(convert_state_dict_to_diffusers(tensors))


def write_kohya(
    directory: Path, path: Path, components: tuple[str, ...], *, mixed: bool, original: bool = False
) -> Path:
    """The same as kohya's scripts write it.

    ``mixed``: with a strength of its own for each layer. ``original``: with the original code's names.
    """
    written: dict[str, Tensor] = {}
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for name, module in adapters(directory, components, rank=2, alpha=2, seed=4).items():
        for key, tensor in peft_tensors(module).items():
            layer, side = key.rsplit(".", 2)[0], "lora_down" if ".lora_A." in key else "lora_up"
            if name != "unet" and not layer.startswith("text_model."):
                layer = f"text_model.{layer}"
            if original:
                layer = unet_key(f"{layer}.weight", frozenset()).removesuffix(".weight")
            stem = prefixes[name] + layer.replace(".", "_")
            written[f"{stem}.{side}.weight"] = tensor
            written[f"{stem}.alpha"] = torch.tensor(float(len(layer) % 5 + 1) if mixed else 1.5)
    save_file(written, path)
    return path


def eager(directory: Path, loras: list[tuple[Path, float]]) -> Any:
    """diffusers' own pipeline with them fused, one after the other."""
    pipe = load_tiny_sdxl(directory)
    for number, (path, scale) in enumerate(loras):
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=f"lora{number}")
        names = [
            name for name in ("unet", "text_encoder", "text_encoder_2") if hasattr(getattr(pipe, name), "peft_config")
        ]
        pipe.fuse_lora(components=names, lora_scale=scale, adapter_names=[f"lora{number}"])
        pipe.unload_lora_weights()
    return pipe


def fused(directory: Path, loras: list[tuple[Path, float]], components: tuple[str, ...] = ALL) -> FusedCheckpoint:
    checkpoint = fuse_loras(
        DirectoryCheckpoint(directory), [Lora(path, scale) for path, scale in loras], build, components=components
    )
    assert isinstance(checkpoint, FusedCheckpoint)
    return checkpoint


def assert_same(directory: Path, checkpoint: Checkpoint, pipe: Any, changed: tuple[str, ...]) -> None:
    plain = DirectoryCheckpoint(directory)
    for component in ALL:
        different = 0
        for name, want in getattr(pipe, component).named_parameters():
            found = checkpoint.tensors(component).read(name)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, want.detach(), rtol=0, atol=1e-6, msg=f"{component}.{name}")
            different += not torch.equal(found, plain.tensors(component).read(name))
        assert (different > 0) == (component in changed), component


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_unet_lora_is_what_diffusers_fuses(directory: Path, tmp_path: Path, scale: float) -> None:
    path = write_lora(directory, tmp_path)
    checkpoint = fused(directory, [(path, scale)])
    assert checkpoint.fused == ("unet",)
    assert_same(directory, checkpoint, eager(directory, [(path, scale)]), ("unet",))


def test_two_loras_and_text_encoders_add_up(directory: Path, tmp_path: Path) -> None:
    first = write_lora(directory, tmp_path / "a", ("unet", "text_encoder"), seed=2)
    second = write_lora(directory, tmp_path / "b", ("unet", "text_encoder", "text_encoder_2"), rank=2, seed=3)
    loras = [(first, 0.5), (second, -0.75)]
    touched = ("unet", "text_encoder", "text_encoder_2")
    checkpoint = fused(directory, loras)
    assert checkpoint.fused == touched
    assert_same(directory, checkpoint, eager(directory, loras), touched)


def test_strength_in_the_header(directory: Path, tmp_path: Path) -> None:
    components = ("unet", "text_encoder_2")
    path = write_lora(directory, tmp_path / "a", components, rank=2, alpha=6, header=True)
    assert_same(directory, fused(directory, [(path, 1.0)]), eager(directory, [(path, 1.0)]), components)


def test_kohyas_format(directory: Path, tmp_path: Path) -> None:
    components = ("unet", "text_encoder", "text_encoder_2")
    path = write_kohya(directory, tmp_path / "kohya.safetensors", components, mixed=False)
    assert_same(directory, fused(directory, [(path, 0.5)]), eager(directory, [(path, 0.5)]), components)


def test_kohyas_format_with_the_original_layout(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """For SDXL, its scripts name the U-Net's layers as the original code does."""
    directory = tiny_checkpoint("sdxl_like")
    path = write_kohya(directory, tmp_path / "kohya.safetensors", ("unet",), mixed=False, original=True)
    assert any("input_blocks_4_1_" in key for key in load_file(path))
    assert_same(directory, fused(directory, [(path, 0.5)]), eager(directory, [(path, 0.5)]), ("unet",))


def test_every_layer_has_the_strength_that_the_file_gives_it(directory: Path, tmp_path: Path) -> None:
    """Which diffusers itself misses where they differ."""
    components = ("unet", "text_encoder", "text_encoder_2")
    path = write_kohya(directory, tmp_path / "kohya.safetensors", components, mixed=True)
    checkpoint, plain = fused(directory, [(path, 0.5)]), DirectoryCheckpoint(directory)
    tensors = load_file(path)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}
    count = 0
    for component, prefix in prefixes.items():
        for name, _ in build(plain, component).named_parameters():
            stem = prefix + name.removesuffix(".weight").replace(".", "_")
            if f"{stem}.alpha" in tensors:
                up, down = (tensors[f"{stem}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
                weight = plain.tensors(component).read(name)
                change = (up @ down).reshape(weight.shape) * (0.5 * tensors[f"{stem}.alpha"] / down.shape[0])
                torch.testing.assert_close(checkpoint.tensors(component).read(name), weight + change, rtol=0, atol=1e-6)
                count += 1
    assert count == len(tensors) / 3


def test_pefts_own_format(directory: Path, tmp_path: Path) -> None:
    """Its tensors name no component, and its strength lies in a file beside it."""
    module = adapters(directory, ("unet",), rank=2, alpha=5, seed=7)["unet"]
    tensors = peft_tensors(module)
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, path)
    settings = {"r": 2, "lora_alpha": 5, "target_modules": UNET_LAYERS, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    module.fuse_lora()
    module.unload_lora()
    checkpoint = fused(directory, [(path, 1.0)])
    for name, want in module.named_parameters():
        torch.testing.assert_close(checkpoint.tensors("unet").read(name), want.detach(), rtol=0, atol=1e-6)


def test_half_precision_is_fused_in_float32(directory: Path, tmp_path: Path) -> None:
    path = write_lora(directory, tmp_path / "lora")
    half = tmp_path / "half"
    load_tiny_sdxl(directory).to(torch.float16).save_pretrained(half)
    pipe = eager(half, [(path, 1.0)])  # in float32, from the half-precision weights
    checkpoint = fused(half, [(path, 1.0)])
    for name, want in pipe.unet.named_parameters():
        assert torch.equal(checkpoint.tensors("unet").read(name), want.detach().half()), name


def test_a_transformer_without_a_lora_pipeline(tmp_path: Path) -> None:
    """PixArt: diffusers has no LoRA loader for the pipeline, its network has one."""
    torch.manual_seed(3)
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=6,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    transformer.save_pretrained(tmp_path / "transformer")
    index = {"_class_name": "PixArtAlphaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    settings = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"])
    peft.inject_adapter_in_model(settings, transformer)
    for key, parameter in transformer.named_parameters():
        if "lora_" in key:
            parameter.data.normal_()
    tensors = peft_tensors(transformer)
    save_file({f"transformer.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "a.safetensors")
    save_file({f"base_model.model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "b.safetensors")
    wanted = {}
    for name, layer in transformer.named_modules():
        if hasattr(layer, "lora_A"):
            wanted[f"{name}.weight"] = layer.base_layer.weight + 0.25 * layer.get_delta_weight("default")
    assert len(wanted) == 8
    for file in ("a", "b"):
        lora = Lora.parse(f"{tmp_path / file}.safetensors:0.25")
        checkpoint = fuse_loras(DirectoryCheckpoint(tmp_path), [lora], build, components=["transformer"])
        for name, want in wanted.items():
            torch.testing.assert_close(checkpoint.tensors("transformer").read(name), want, rtol=0, atol=1e-6)
        bias = "proj_out.bias"
        assert torch.equal(checkpoint.tensors("transformer").read(bias), transformer.get_parameter(bias))
    save_file({"text_encoder.layer.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "c.safetensors")
    with pytest.raises(ExportError, match="LoRAs of this model change transformer"):
        fuse_loras(DirectoryCheckpoint(tmp_path), [Lora(tmp_path / "c.safetensors")], build, components=["transformer"])


def test_everything_else_is_as_it_was(directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain = DirectoryCheckpoint(directory)
    path = write_kohya(directory, tmp_path / "a.safetensors", ("unet", "text_encoder"), mixed=True)
    state = torch.random.get_rng_state()
    capfd.readouterr()
    checkpoint = fused(directory, [(path, 1.0), (path, 1.0)])
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert checkpoint.where == plain.where
    assert checkpoint.model_index == plain.model_index
    assert checkpoint.config("unet") == plain.config("unet")
    assert checkpoint.scheduler_config() == plain.scheduler_config()
    assert checkpoint.tokenizer("tokenizer") == plain.tokenizer("tokenizer")
    assert checkpoint.token_limit("tokenizer") == plain.token_limit("tokenizer")
    assert checkpoint.licence() == plain.licence()
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    first = checkpoint.tensors("unet").read(name)
    first.zero_()
    assert checkpoint.tensors("unet").read(name).abs().sum() > 0
    checkpoint.tensors("unet").close()


def test_no_loras_change_nothing(directory: Path) -> None:
    plain = DirectoryCheckpoint(directory)
    assert fuse_loras(plain, [], build, components=ALL) is plain


def test_components_that_are_not_exported_are_left_alone(directory: Path, tmp_path: Path) -> None:
    path = write_lora(directory, tmp_path, ("unet", "text_encoder"))
    assert fused(directory, [(path, 1.0)], ("unet", "vae")).fused == ("unet",)
    with pytest.raises(ExportError, match="changes unet, text_encoder alone, and only vae will be exported"):
        fused(directory, [(path, 1.0)], ("vae",))


@pytest.mark.parametrize(
    ("text", "path", "scale"),
    [
        ("a.safetensors", "a.safetensors", 1.0),
        ("a.safetensors:0.5", "a.safetensors", 0.5),
        ("/x:y/a.safetensors", "/x:y/a.safetensors", 1.0),
        ("x:a.safetensors", "x:a.safetensors", 1.0),
        ("x:a.safetensors:-1", "x:a.safetensors", -1.0),
    ],
)
def test_file_and_scale(text: str, path: str, scale: float) -> None:
    assert Lora.parse(text) == Lora(Path(path), scale)


@pytest.mark.parametrize("text", ["a.safetensors:much", "a.safetensors:", "a.safetensors:nan", "a.safetensors:inf"])
def test_a_scale_that_is_no_number(text: str) -> None:
    with pytest.raises(ExportError, match=r"is no number; give FILE or FILE:SCALE|must be a finite number"):
        Lora.parse(text)


def resized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros(t.shape[0], 7) if key.endswith("to_q.lora_A.weight") else t for key, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda d: {"unet.conv_in.weight": torch.zeros(2)}, "holds no LoRA (its first tensor", id="none"),
        pytest.param(
            lambda d: {k.replace("down_blocks.0", "down_blocks.7"): t for k, t in d.items()},
            "is for another architecture: it changes unet.down_blocks.7.attentions.0",
            id="a layer",
        ),
        pytest.param(resized, "with 7 inputs, and this model's has", id="a shape"),
        pytest.param(
            lambda d: {k.replace("unet.", "transformer."): t for k, t in d.items()},
            "LoRAs of this model change unet, text_encoder, text_encoder_2",
            id="a component",
        ),
        pytest.param(
            lambda d: {k: t for k, t in d.items() if "to_q.lora_B" not in k}, "has half of a change of unet", id="half"
        ),
        pytest.param(
            lambda d: {k: t[0] if "to_q.lora_A" in k else t for k, t in d.items()}, "has half of a change", id="a row"
        ),
        pytest.param(
            lambda d: {k.replace("resnets.0.conv1", "resnets.0.norm1"): t for k, t in d.items()},
            "resnets.0.norm1, which this model has not",
            id="a norm",
        ),
        pytest.param(
            lambda d: {**d, "unet.conv_in.dora_scale": torch.zeros(1)}, "is a DoRA; only a plain LoRA", id="DoRA"
        ),
        pytest.param(lambda d: {"lora_unet_conv_in.hada_w1_a": torch.zeros(1)}, "is a LyCORIS network", id="LyCORIS"),
        pytest.param(
            lambda d: {"lora_unet_conv_in.lora_down.weight": torch.zeros(1)},
            "is in no format that diffusers reads (KeyError",
            id="kohya's, incomplete",
        ),
        pytest.param(
            lambda d: {**d, "unet.conv_in.lora_mid.weight": torch.zeros(1)}, "which is no part of a LoRA", id="a tensor"
        ),
    ],
)
def test_files_that_are_refused(
    directory: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({key: t.clone() for key, t in change(load_file(write_lora(directory, tmp_path))).items()}, bad)
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        fused(directory, [(bad, 1.0)])
    assert str(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scale_too_large_for_half_precision(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_checkpoint("half_on_disk")
    checkpoint = fused(directory, [(write_lora(directory, tmp_path), 1e9)])
    with pytest.raises(ExportError, match=r"does not fit into torch\.float16; choose a smaller LoRA scale"):
        checkpoint.tensors("unet").read("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight")


def test_no_such_file_and_no_safetensors_file(directory: Path, tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    with pytest.raises(ExportError, match=r"does not exist; --lora wants a \.safetensors file"):
        fused(directory, [(path, 1.0)])
    path.write_bytes(b"nothing")
    with pytest.raises(ExportError, match="is not a whole safetensors file"):
        fused(directory, [(path, 1.0)])


def test_peft_is_asked_for(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExportError, match=r"needs the package peft.*tgate-engine\[export\]"):
        fused(directory, [(tmp_path / "lora.safetensors", 1.0)])
