"""Files of LoRAs as training scripts write them, and what fusing them must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
from diffusers.utils import convert_state_dict_to_diffusers
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.export.checkpoints.ldm import unet_key
from tests.tiny_models import load_tiny_sdxl
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.lora import FusedCheckpoint, Lora, fuse_loras

VARIANT = "conv_projection"
UNET_LAYERS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "conv1"]
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]
ALL = ("unet", "vae", "text_encoder", "text_encoder_2")
OLD = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}


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


def one_layer(
    plain: Checkpoint, component: str = "text_encoder", rank: int = 2
) -> tuple[str, nn.Linear, Tensor, Tensor]:
    torch.manual_seed(15)
    name, layer = next(iter(layers_of(plain, component, ("k_proj",)).items()))
    return name, layer, torch.randn(layer.out_features, rank), torch.randn(rank, layer.in_features)


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


def assert_refused(directory: Path, path: Path, *parts: str) -> None:
    with pytest.raises(ExportError) as caught:
        fused(directory, [(path, 1.0)])
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


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
