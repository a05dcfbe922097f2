"""LoRAs: what is fused tensor by tensor is what diffusers fuses into a whole pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.export.loras import (
    ALL,
    UNET_LAYERS,
    Held,
    adapters,
    assert_refused,
    assert_values,
    build,
    directory,
    eager,
    fused,
    layers_of,
    one_layer,
    peft_tensors,
    product,
    text_keys,
    write_kohya,
    write_lora,
)
from tests.tiny_models import load_tiny_sdxl
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.lora import Lora, fuse_loras
from tgate_export.storage import cast

__all__ = ["directory"]  # a fixture


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
        torch.testing.assert_close(checkpoint.tensors("unet").read(name).float(), want.detach(), rtol=0, atol=1e-6)


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


def test_a_scale_too_large_for_half_precision(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    directory = tiny_checkpoint("half_on_disk")
    checkpoint = fused(directory, [(write_lora(directory, tmp_path), 1e9)])
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    fused_weight = checkpoint.tensors("unet").read(name)
    assert fused_weight.dtype == torch.float32
    with pytest.raises(ExportError, match=r"beyond the 65504 of float16; export with --dtype fp32 or bf16"):
        cast(checkpoint, "unet", name, fused_weight, torch.float16)


def test_the_text_encoder_computes_what_the_lora_adds_to_its_layers(directory: Path, tmp_path: Path) -> None:
    """Layer by layer as it runs, with nothing fused: y + scale * alpha / rank * up(down(x))."""
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    encoder = load_tiny_sdxl(directory).text_encoder.eval()
    other = load_tiny_sdxl(directory).text_encoder.eval()
    torch.manual_seed(12)
    tensors: dict[str, Tensor] = {}

    def hook(up: Tensor, down: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        return lambda _, given, result: result + 0.75 * 1.5 / 2 * (given[0] @ down.T @ up.T)

    for name in layers_of(plain, "text_encoder", ("q_proj", "fc1")):
        layer = encoder.get_submodule(name)
        down, up = torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)
        down_key, up_key, alpha_key = text_keys("kohya", "text_encoder", name)
        tensors |= {down_key: down, up_key: up, alpha_key: torch.tensor(1.5)}
        layer.register_forward_hook(hook(up, down))
    save_file(tensors, path)
    checkpoint = fused(directory, [(path, 0.75)])
    ids = torch.arange(6)[None]
    with torch.no_grad():
        unchanged = other(ids).last_hidden_state
        for name, parameter in other.named_parameters():
            parameter.copy_(checkpoint.tensors("text_encoder").read(name))
        want, found = encoder(ids).last_hidden_state, other(ids).last_hidden_state
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    assert (want - unchanged).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.to(torch.int8), "is stored as torch.int8, and a LoRA is added to floating-point numbers alone"),
        (lambda t: t * torch.nan, "holds NaN or infinity without a LoRA"),
        (lambda t: t[:4], "has shape [4, 16], which is not the model's"),
    ],
)
def test_weights_that_nothing_can_be_added_to(
    directory: Path, tmp_path: Path, change: Callable[[Tensor], Tensor], message: str
) -> None:
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, _, up, down = one_layer(plain)
    keys = text_keys("kohya", "text_encoder", name)
    save_file({keys[0]: down, keys[1]: up}, path)
    held: Any = Held(plain, f"{name}.weight", change(plain.tensors("text_encoder").read(f"{name}.weight")))
    checkpoint = fuse_loras(held, [Lora(path)], build, components=["text_encoder"])
    with pytest.raises(ExportError, match=re.escape(f"{name}.weight' {message}")):
        checkpoint.tensors("text_encoder").read(f"{name}.weight")


def test_weights_of_eight_bits_keep_all_of_the_lora(directory: Path, tmp_path: Path) -> None:
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    keys = text_keys("kohya", "text_encoder", name)
    save_file({keys[0]: down * 0.01, keys[1]: up}, path)
    weight = plain.tensors("text_encoder").read(f"{name}.weight").to(torch.float8_e4m3fn)
    held: Any = Held(plain, f"{name}.weight", weight)
    checkpoint = fuse_loras(held, [Lora(path)], build, components=["text_encoder"])
    want = weight.double() + product(up, down * 0.01, layer.weight.shape, 1.0)
    found = checkpoint.tensors("text_encoder").read(f"{name}.weight")
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)


def test_what_is_stored_is_the_checkpoints(directory: Path, tmp_path: Path) -> None:
    plain, path = DirectoryCheckpoint(directory), write_lora(directory, tmp_path, ("text_encoder",))
    checkpoint = fused(directory, [(path, 1.0)])
    found, held = checkpoint.tensors("text_encoder"), plain.tensors("text_encoder")
    assert dict(found.stored()) == dict(held.stored())
    assert len(found.stored()) > 10
    key = next(iter(layers_of(plain, "text_encoder", ("k_proj",)))) + ".weight"
    assert found.find(key) == held.find(key)
    with pytest.raises(ExportError):
        found.find("no.such.weight")
    file = "tokenizer/tokenizer_config.json"
    assert checkpoint.further(file) == plain.further(file) is not None
    assert checkpoint.directory("vae") == plain.directory("vae") is not None
    assert checkpoint.directory("text_encoder") is None, "its weights there are without the LoRA"


def test_biases(directory: Path, tmp_path: Path) -> None:
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    bias = torch.randn(layer.out_features)
    stem = f"text_encoder.{name}"
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.lora_B.bias": bias}
    save_file(tensors, path)
    wanted = {f"{name}.weight": product(up, down, layer.weight.shape, 0.5), f"{name}.bias": 0.5 * bias.double()}
    assert_values(fused(directory, [(path, 0.5)]), plain, "text_encoder", wanted)
    save_file({**tensors, f"{stem}.lora_B.bias": torch.randn(3)}, path)
    assert_refused(directory, path, "with a bias [3], and this model's is [16]")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a.safetensors:nan", "finite"),
        ("a.safetensors:inf", "finite"),
        ("a.safetensors:1e400", "finite"),
        ("a.safetensors:1e38", "at most"),
        ("a.safetensors:", "is no number"),
        ("a.safetensors:1\n2", "is no number"),
        ("a.safetensors:" + "x" * 10**5, "is no number"),
        ("x" * 10**5, "the name of no file"),
        ("a\n.safetensors", "the name of no file"),
        ("a\0.safetensors", "the name of no file"),
        ("~nobody-of-that-name/a.safetensors", "the name of no file"),
    ],
    ids=lambda text: repr(text)[:30],
)
def test_what_is_typed_after_lora_ends_in_one_line(text: str, why: str) -> None:
    with pytest.raises(ExportError, match=why) as caught:
        Lora.parse(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
