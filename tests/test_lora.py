"""LoRAs: what is fused tensor by tensor is what diffusers fuses into a whole pipeline."""

from __future__ import annotations

import json
import re
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
            lambda d: {k: t[0] if "to_q.lora_A" in k else t for k, t in d.items()}, "have no rank in common", id="a row"
        ),
        pytest.param(
            lambda d: {k.replace("resnets.0.conv1", "resnets.0.norm1"): t for k, t in d.items()},
            "resnets.0.norm1, which is a GroupNorm in this model",
            id="a norm",
        ),
        pytest.param(
            lambda d: {**d, "unet.conv_in.dora_scale": torch.zeros(1)}, "is a DoRA; only a plain LoRA", id="DoRA"
        ),
        pytest.param(lambda d: {"lora_unet_conv_in.hada_w1_a": torch.zeros(1)}, "is a LyCORIS network", id="LyCORIS"),
        pytest.param(
            lambda d: {"lora_unet_conv_in.lora_down.weight": torch.zeros(1)},
            "has half of a change of unet.conv_in ('lora_unet_conv_in.lora_down.weight')",
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


# What follows knows no loader: files are written key by key, and W + scale * alpha / rank * up @ down is computed here.

ENCODERS = ("text_encoder", "text_encoder_2")
OLD = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
NAMINGS = ("kohya", "old diffusers", "diffusers", "peft", "each its own")
SUBSETS = {
    "all": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "text_projection"),
    "without out": ("q_proj", "k_proj", "v_proj"),
    "q and fc1": ("q_proj", "fc1"),
    "out": ("out_proj",),
    "mlp": ("fc1", "fc2"),
    "projection": ("q_proj", "text_projection"),
    "last layer": ("layers.1.self_attn.v_proj",),
}


def text_keys(naming: str, component: str, layer: str) -> tuple[str, str, str]:
    """A layer's keys: down, up, and what kohya's scripts call its strength."""
    layer = layer if layer == "text_projection" else f"text_model.{layer.removeprefix('text_model.')}"
    stem = ("lora_te1_" if component == "text_encoder" else "lora_te2_") + layer.replace(".", "_")
    parent, _, leaf = f"{component}.{layer}".rpartition(".")
    if naming == "kohya":
        sides = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
    elif naming == "peft":
        sides = f"{parent}.{leaf}.lora_A.weight", f"{parent}.{leaf}.lora_B.weight"
    elif leaf == "text_projection":
        sides = f"{parent}.{leaf}.lora.down.weight", f"{parent}.{leaf}.lora.up.weight"
    else:
        spelled = (
            OLD.get(leaf, f"{leaf}.lora_linear_layer") if naming == "old diffusers" else f"{leaf}.lora_linear_layer"
        )
        sides = f"{parent}.{spelled}.down.weight", f"{parent}.{spelled}.up.weight"
    return *sides, f"{stem}.alpha"


def layers_of(plain: Checkpoint, component: str, leaves: tuple[str, ...]) -> dict[str, nn.Linear]:
    with torch.device("meta"):
        module = build(plain, component)
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and f".{n}".endswith(leaves)}


def product(up: Tensor, down: Tensor, shape: torch.Size, factor: float) -> Tensor:
    return factor * torch.einsum("or,ri->oi", up.double().flatten(1), down.double().flatten(1)).reshape(shape)


def assert_values(checkpoint: Checkpoint, plain: Checkpoint, component: str, changes: Mapping[str, Tensor]) -> None:
    """Of all parameters: those of ``changes`` have them added, no other differs."""
    with torch.device("meta"):
        names = [name for name, _ in build(plain, component).named_parameters()]
    assert set(changes) <= set(names)
    for name in names:
        found, before = checkpoint.tensors(component).read(name), plain.tensors(component).read(name)
        if name in changes:
            torch.testing.assert_close(found.double(), before.double() + changes[name], rtol=1e-6, atol=1e-6)
            assert changes[name].abs().max() > 1e-3
        else:
            assert torch.equal(found, before), name


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("naming", NAMINGS)
def test_any_layers_of_text_encoders_in_any_naming(directory: Path, tmp_path: Path, naming: str, subset: str) -> None:
    """Ranks differ from layer to layer, as do kohya's strengths, which some layers lack: theirs is their rank."""
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    torch.manual_seed(11)
    tensors: dict[str, Tensor] = {}
    wanted: dict[str, dict[str, Tensor]] = {name: {} for name in ENCODERS}
    for component in ENCODERS:
        for number, (name, layer) in enumerate(layers_of(plain, component, SUBSETS[subset]).items()):
            rank = number % 3 + 1
            used = NAMINGS[number % 4] if naming == "each its own" else naming
            down_key, up_key, alpha_key = text_keys(used, component, name)
            tensors[down_key], tensors[up_key] = (
                torch.randn(rank, layer.in_features),
                torch.randn(layer.out_features, rank),
            )
            factor = 0.5
            if used == "kohya" and number % 2:
                tensors[alpha_key] = torch.tensor(number + 0.5)
                factor = 0.5 * (number + 0.5) / rank
            weight = f"{name}.weight"
            wanted[component][weight] = product(tensors[up_key], tensors[down_key], layer.weight.shape, factor)
    assert all(wanted.values())
    assert ("text_projection.weight" in wanted["text_encoder_2"]) == (subset in ("all", "projection"))
    save_file(tensors, path)
    checkpoint = fused(directory, [(path, 0.5)], ENCODERS)
    for component in ENCODERS:
        assert_values(checkpoint, plain, component, wanted[component])


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


def unet_layers(plain: Checkpoint) -> dict[str, nn.Module]:
    with torch.device("meta"):
        module = build(plain, "unet")
    ends = ("to_k", "to_out.0", "ff.net.2", "proj_out", "conv2", "linear_1", "conv_in", "time_emb_proj")
    return {n: m for n, m in module.named_modules() if n.endswith(ends)}


@pytest.mark.parametrize("naming", ["kohya", "old diffusers", "peft", "bare peft", "each its own"])
def test_any_layers_of_the_unet_in_any_naming(directory: Path, tmp_path: Path, naming: str) -> None:
    """Kohya's keys beside diffusers' too. Ranks differ, and strengths where there are any."""
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    torch.manual_seed(13)
    tensors: dict[str, Tensor] = {}
    wanted = {}
    for number, (name, layer) in enumerate(unet_layers(plain).items()):
        shape: Any = layer.weight.shape
        rank, factor = number % 4 + 1, 0.25
        down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1 for _ in shape[2:]])
        used = ("kohya", "old diffusers", "peft")[number % 3] if naming == "each its own" else naming
        stem = f"lora_unet_{name.replace('.', '_')}"
        if used == "kohya":
            keys = f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"
            if number % 2:
                tensors[f"{stem}.alpha"], factor = torch.tensor(float(number)), 0.25 * number / rank
        elif used == "old diffusers":
            parent, _, leaf = name.replace("attn1.", "attn1.processor.").removesuffix(".0").rpartition(".")
            old = f"unet.{parent}.{leaf}_lora" if leaf in ("to_k", "to_out") else f"unet.{name}.lora"
            keys = f"{old}.down.weight", f"{old}.up.weight"
        else:
            root = "base_model.model." if used == "bare peft" else "unet."
            keys = f"{root}{name}.lora_A.weight", f"{root}{name}.lora_B.weight"
        tensors[keys[0]], tensors[keys[1]] = down, up
        wanted[f"{name}.weight"] = product(up, down, shape, factor)
    save_file(tensors, path)
    assert_values(fused(directory, [(path, 0.25)]), plain, "unet", wanted)


def test_both_namings_of_kohyas_unet_in_one_file(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """diffusers drops the original code's keys where others are beside them."""
    directory = tiny_checkpoint("sdxl_like")
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    torch.manual_seed(14)
    with torch.device("meta"):
        module = build(plain, "unet")
    tensors: dict[str, Tensor] = {}
    wanted = {}
    for number, (name, layer) in enumerate(module.named_modules()):
        if name.endswith(("attn1.to_q", "attn2.to_out.0", "conv1")):
            spelled = unet_key(f"{name}.weight", frozenset()).removesuffix(".weight") if number % 2 else name
            stem, shape = "lora_unet_" + spelled.replace(".", "_"), layer.weight.shape
            down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2, *[1 for _ in shape[2:]])
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
            wanted[f"{name}.weight"] = product(up, down, shape, 0.5)
    assert any("_blocks_" in key and "attentions" in key for key in tensors)
    assert any("input_blocks_" in key for key in tensors)
    save_file(tensors, path)
    assert_values(fused(directory, [(path, 1.0)]), plain, "unet", wanted)


def one_layer(
    plain: Checkpoint, component: str = "text_encoder", rank: int = 2
) -> tuple[str, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(15)
    name, layer = next(iter(layers_of(plain, component, ("k_proj",)).items()))
    return name, layer, torch.randn(layer.out_features, rank), torch.randn(rank, layer.in_features)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        pytest.param({"r": 2, "lora_alpha": 6}, 3.0, id="alpha"),
        pytest.param({"r": 4, "rank_pattern": {"k_proj": 2}, "lora_alpha": 6}, 3.0, id="a rank's pattern"),
        pytest.param({"r": 2, "lora_alpha": 6, "alpha_pattern": {"k_proj": 1, "self_attn.k_proj": 9}}, 0.5, id="first"),
        pytest.param({"r": 2, "lora_alpha": 6, "alpha_pattern": {"proj": 1}}, 3.0, id="no whole name"),
        pytest.param(
            {"r": 2, "lora_alpha": 6, "alpha_pattern": {"^text_model.encoder.layers.0.self_attn.k_proj": 1}},
            0.5,
            id="all",
        ),
        pytest.param({"r": 2, "lora_alpha": 6, "use_rslora": True}, 6 / 2**0.5, id="rslora"),
        pytest.param({"r": 2}, 4.0, id="peft's standard"),
        pytest.param({}, 1.0, id="none"),
    ],
)
def test_strength_in_settings(directory: Path, tmp_path: Path, settings: dict[str, Any], factor: float) -> None:
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    keys = text_keys("peft", "text_encoder", name)
    header = {"lora_adapter_metadata": json.dumps({f"text_encoder.{key}": value for key, value in settings.items()})}
    save_file({keys[0]: down, keys[1]: up}, path, header)
    wanted = {f"{name}.weight": product(up, down, layer.weight.shape, factor)}
    assert_values(fused(directory, [(path, 1.0)]), plain, "text_encoder", wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 4, "lora_alpha": 6}, "the rank 4, and its tensors have 2; they belong to another file"),
        ({"r": 2, "lora_alpha": "much"}, "its settings for the text_encoder are damaged"),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": {"(": 1}}, "its settings for the text_encoder are damaged"),
        ({"r": 2, "lora_alpha": 2, "alpha_pattern": [1]}, "its settings for the text_encoder are damaged"),
        ({"r": 2, "lora_alpha": float("inf")}, "the strength inf; it must be a finite number"),
        ({"r": 2, "lora_alpha": 2, "use_dora": True}, "was trained with use_dora=True, and only a plain LoRA"),
        (
            {"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa_niter_4"},
            "trained with init_lora_weights='pissa_niter_4'",
        ),
    ],
)
def test_settings_that_are_refused(directory: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.safetensors"
    name, _, up, down = one_layer(DirectoryCheckpoint(directory))
    keys = text_keys("peft", "text_encoder", name)
    header = {"lora_adapter_metadata": json.dumps({f"text_encoder.{key}": value for key, value in settings.items()})}
    save_file({keys[0]: down, keys[1]: up}, path, header)
    assert_refused(directory, path, message)


def assert_refused(directory: Path, path: Path, *parts: str) -> None:
    with pytest.raises(ExportError) as caught:
        fused(directory, [(path, 1.0)])
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


STEM = "lora_te1_text_model_encoder_layers_0_self_attn_k_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"lora_up": lambda t: t / 0}, f"'{STEM}.lora_up.weight' holds NaN or infinity", id="infinity"),
        pytest.param({"lora_down": lambda t: t * torch.nan}, f"'{STEM}.lora_down.weight' holds NaN", id="NaN"),
        pytest.param(
            {"lora_up": lambda t: t.to(torch.int8)},
            f"'{STEM}.lora_up.weight' is stored as torch.int8, and a LoRA must be stored as floating-point",
            id="integers",
        ),
        pytest.param({"lora_down": lambda t: t > 0}, f"'{STEM}.lora_down.weight' is stored as torch.bool", id="truths"),
        pytest.param(
            {"lora_up": lambda t: torch.cat([t, t], 1)},
            f"'{STEM}.lora_up.weight' [16, 4] and '{STEM}.lora_down.weight' [2, 16] have no rank in common",
            id="two ranks",
        ),
        pytest.param(
            {"lora_up": lambda t: t[:, :0], "lora_down": lambda t: t[:0]}, "have no rank in common", id="none"
        ),
        pytest.param({"lora_up": lambda t: t[:5]}, "k_proj with 5 outputs, and this model's has 16", id="outputs"),
        pytest.param(
            {"lora_down": lambda t: t[..., None, None].expand(-1, -1, 3, 3)},
            "k_proj with 9 elements of kernel, and this model's has 1",
            id="kernel",
        ),
        pytest.param({"alpha": lambda t: t * torch.nan}, f"'{STEM}.alpha' is not one finite number", id="alpha NaN"),
        pytest.param({"alpha": lambda t: t.expand(2)}, f"'{STEM}.alpha' is not one finite number", id="alphas"),
        pytest.param({"lora_up": None}, "has half of a change of text_encoder.text_model_encoder_layers_0", id="half"),
        pytest.param({"lora_up": None, "lora_down": None}, f"('{STEM}.alpha'); download it again", id="alpha alone"),
    ],
)
def test_damaged_tensors_are_named(
    directory: Path, tmp_path: Path, change: dict[str, Callable[[Tensor], Tensor] | None], message: str
) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    tensors |= {f"{STEM}.alpha": torch.tensor(1.0), "lora_te2_text_projection.lora_down.weight": torch.ones(1, 8)}
    tensors["lora_te2_text_projection.lora_up.weight"] = torch.ones(8, 1)
    for part, changed in change.items():
        key = next(key for key in tensors if key.startswith(f"{STEM}.{part}"))
        tensor = tensors.pop(key)
        if changed is not None:
            tensors[key] = changed(tensor).contiguous()
    save_file(tensors, path)
    assert_refused(directory, path, message)


@pytest.mark.parametrize(
    "key",
    [
        f"{STEM}.scale_weight",
        f"{STEM}.diff",
        f"{STEM}.lora_mid.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.lora_A.scale",
        "text_encoder.text_model.encoder.layers.0.self_attn.k_proj.alpha",
        "text_encoder.text_model.embeddings.token_embedding.lora_embedding_A",
        "text_encoder_2.logit_scale",
    ],
)
def test_tensors_that_are_no_part_of_a_lora_are_named(directory: Path, tmp_path: Path, key: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    save_file({**tensors, key: torch.ones(1)}, path)
    assert_refused(directory, path, f"has a tensor {key!r}, which is no part of a LoRA")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "lora_te1_text_model_encoder_layers_9_mlp_fc1",
            "text_encoder.text_model_encoder_layers_9_mlp_fc1, which this",
        ),
        ("lora_te1_text_projection", "text_encoder.text_projection, which this model has not"),
        ("lora_te1_text_model_final_layer_norm", "final_layer_norm, which is a LayerNorm in this model"),
        ("lora_unet_down_blocks_9_resnets_0_conv1", "unet.down_blocks.9.resnets.0.conv1, which this model has not"),
        ("lora_te3_encoder_block_0", "'lora_te3_encoder_block_0"),
    ],
)
def test_layers_that_the_model_has_not_are_named(directory: Path, tmp_path: Path, key: str, message: str) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    save_file(
        {**tensors, f"{key}.lora_down.weight": torch.ones(2, 16), f"{key}.lora_up.weight": torch.ones(16, 2)}, path
    )
    assert_refused(directory, path, message)


@pytest.mark.parametrize("naming", ["old diffusers", "diffusers", "peft"])
def test_a_layer_that_is_changed_twice_is_named(directory: Path, tmp_path: Path, naming: str) -> None:
    """Of two changes under two namings, the last one would be taken alone."""
    path = tmp_path / "a.safetensors"
    name = "encoder.layers.0.self_attn.k_proj"
    down, up, _ = text_keys(naming, "text_encoder", name)
    tensors = {f"{STEM}.lora_down.weight": torch.ones(2, 16), f"{STEM}.lora_up.weight": torch.ones(16, 2)}
    save_file({**tensors, down: torch.ones(2, 16), up: torch.ones(16, 2)}, path)
    assert_refused(directory, path, f"changes text_encoder.{name} twice")
    first, second, _ = text_keys("peft" if naming != "peft" else "diffusers", "text_encoder", name)
    tensors = {down: torch.ones(2, 16), up: torch.ones(16, 2), first: torch.ones(2, 16), second: torch.ones(16, 2)}
    save_file(tensors, path)
    assert_refused(directory, path, "changes one layer twice, in ", repr(down), repr(first))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_stored_precisions(directory: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    up, down = up.to(dtype), down.to(dtype)
    keys = text_keys("kohya", "text_encoder", name)
    save_file({keys[0]: down, keys[1]: up, keys[2]: torch.tensor(3)}, path)
    wanted = {f"{name}.weight": product(up, down, layer.weight.shape, 1.5)}
    assert_values(fused(directory, [(path, 1.0)]), plain, "text_encoder", wanted)


class Held:
    """Tensors of a checkpoint, one of them replaced."""

    def __init__(self, checkpoint: Checkpoint, key: str, tensor: Tensor) -> None:
        self.checkpoint, self.key, self.tensor = checkpoint, key, tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.checkpoint, name)

    def tensors(self, component: str) -> Any:
        return Held(self.checkpoint.tensors(component), self.key, self.tensor)  # type: ignore[arg-type]

    def read(self, key: str) -> Tensor:
        return self.tensor.clone() if key == self.key else self.checkpoint.read(key)  # type: ignore[attr-defined]


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


def test_bare_names_of_a_text_encoder(directory: Path, tmp_path: Path) -> None:
    """As peft saves one. Where there are two, the file does not say which it means."""
    plain, path = DirectoryCheckpoint(directory), tmp_path / "a.safetensors"
    name, layer, up, down = one_layer(plain)
    stem = f"base_model.model.text_model.{name.removeprefix('text_model.')}"
    save_file({f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, path)
    assert_refused(directory, path, "does not say which; put the component's name before its keys", "text_encoder_2.")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 5}))
    held: Any = Held(plain, "", torch.zeros(0))
    held.model_index = {k: v for k, v in plain.model_index.items() if k != "text_encoder_2"}
    held.model_index["_class_name"] = "StableDiffusionPipeline"
    checkpoint = fuse_loras(held, [Lora(path)], build, components=["text_encoder"])
    wanted = {f"{name}.weight": product(up, down, layer.weight.shape, 2.5)}
    assert_values(checkpoint, plain, "text_encoder", wanted)


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
