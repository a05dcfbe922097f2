"""What a checkpoint's tensors must be: there, floating point, finite, of the module's shape, and read by something."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from tests.conftest import family_settings
from tests.tiny_families import FAMILY_VARIANTS, make_tiny
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.job import prepare
from tgate_export.storage import cast, sound

VARIANT = "sd15_a"
WEIGHT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"

Edit = Callable[[str, Callable[[dict[str, Tensor]], Mapping[str, Tensor]]], Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("whole") / "checkpoint", VARIANT)


@pytest.fixture
def edited(whole: Path, tmp_path: Path) -> Edit:
    """A copy of the checkpoint whose component holds what a function makes of its tensors."""

    def edit(component: str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Path:
        root = tmp_path / "checkpoint"
        shutil.copytree(whole, root, dirs_exist_ok=True)
        file = next((root / component).glob("*.safetensors"))
        tensors = dict(change(safetensors.torch.load_file(file)))
        file.unlink()
        safetensors.torch.save_file(tensors, file, {"format": "pt"})
        return root

    return edit


def refusal(root: Path) -> str:
    """The one line with which an export is refused before any work."""
    with pytest.raises(ExportError) as caught:
        prepare(family_settings(VARIANT, root, root.parent / "bundle"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_untouched_checkpoint_is_accepted(whole: Path, tmp_path: Path) -> None:
    assert prepare(family_settings(VARIANT, whole, tmp_path / "bundle")).sites


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_integers_are_no_weights(edited: Edit, dtype: torch.dtype) -> None:
    said = refusal(edited("unet", lambda t: t | {WEIGHT: t[WEIGHT].to(dtype)}))
    assert WEIGHT in said
    assert "quantised" in said


@pytest.mark.parametrize("name", ["SCB", "weight_scale", "scale_weight", "absmax", "quant_map"])
def test_scales_beside_weights_are_not_ignored(edited: Edit, name: str) -> None:
    """Weights as floats of eight bits, or of any kind, with scales that the module does not know."""
    scale = WEIGHT.removesuffix("weight") + name
    said = refusal(edited("unet", lambda t: t | {WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn), scale: torch.ones(1)}))
    assert scale in said


def test_plain_floats_of_eight_bits_are_read_as_the_numbers_they_are(edited: Edit) -> None:
    root = edited("unet", lambda t: {name: value.to(torch.float8_e4m3fn) for name, value in t.items()})
    job = prepare(family_settings(VARIANT, root, root.parent / "bundle"))
    module = job.family.skeleton(job.checkpoint, "unet")
    held = safetensors.torch.load_file(root / "unet" / "diffusion_pytorch_model.safetensors")
    read = sound(job.checkpoint, "unet", WEIGHT, tuple(module.get_parameter(WEIGHT).shape))
    assert torch.equal(read.float(), held[WEIGHT].float())


@pytest.mark.parametrize(("number", "named"), [("nan", "NaN"), ("inf", "infinity"), ("-inf", "infinity")])
@pytest.mark.parametrize(
    ("component", "key"),
    [("vae", "decoder.conv_in.weight"), ("unet", WEIGHT), ("text_encoder", "final_layer_norm.bias")],
)
def test_numbers_that_are_not_finite_are_named(edited: Edit, component: str, key: str, number: str, named: str) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        name = next(name for name in tensors if name.endswith(key))
        tensors[name].view(-1)[1] = float(number)
        return tensors

    root = edited(component, spoil)
    job = prepare(family_settings(VARIANT, root, root.parent / "bundle"))
    name = next(
        name for name, _ in job.family.skeleton(job.checkpoint, component).named_parameters() if name.endswith(key)
    )
    shape = tuple(job.family.skeleton(job.checkpoint, component).get_parameter(name).shape)
    with pytest.raises(ExportError, match=rf"{component} tensor '.*{key}' holds (an )?{named}"):
        sound(job.checkpoint, component, name, shape)


def test_a_missing_tensor_is_named(edited: Edit) -> None:
    assert WEIGHT in refusal(edited("unet", lambda t: {name: v for name, v in t.items() if name != WEIGHT}))


def test_a_tensor_that_nothing_reads_is_named(edited: Edit) -> None:
    """As where config.json leaves a part of the network out."""
    assert "class_embedding.weight" in refusal(
        edited("unet", lambda t: t | {"class_embedding.weight": torch.ones(3, 3)})
    )


def test_buffers_of_old_text_encoders_are_no_weights(edited: Edit, tmp_path: Path) -> None:
    root = edited(
        "text_encoder",
        lambda t: t | {"text_model.embeddings.position_ids": torch.arange(24)[None], "logit_scale": torch.ones(())},
    )
    assert prepare(family_settings(VARIANT, root, tmp_path / "bundle")).sites


def test_as_many_numbers_in_another_shape_are_another_tensor(edited: Edit) -> None:
    key = "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2.weight"
    said = refusal(edited("unet", lambda t: t | {key: t[key].t().contiguous()}))
    assert key in said
    assert "shape" in said


def test_casting_keeps_numbers_that_fit(whole: Path) -> None:
    checkpoint, values = DirectoryCheckpoint(whole), torch.tensor([65504.0, -1.5, 0.0])
    assert torch.equal(cast(checkpoint, "unet", "x", values, torch.float16).float(), values)
    assert torch.isfinite(cast(checkpoint, "unet", "x", values * 2, torch.bfloat16)).all()
    with pytest.raises(ExportError, match="131008"):
        cast(checkpoint, "unet", "x", values * 2, torch.float16)


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_quantised_component_is_refused_by_its_config(whole: Path, tmp_path: Path, component: str) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(whole, root)
    file = root / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    assert f"{component} is quantised" in (said := refusal(root))
    assert "gguf" in said


def test_a_table_in_the_file_must_be_the_one_that_the_config_makes(tmp_path: Path) -> None:
    """Latte's places are no weights: diffusers computes them, and a file may hold them all the same."""
    root = make_tiny(tmp_path / "checkpoint", "latte_a")
    family = find_model(FAMILY_VARIANTS["latte_a"].model).family
    module = family.skeleton(DirectoryCheckpoint(root), "transformer")
    persistent = [name for name, _ in module.named_buffers() if name in module.state_dict()]
    file = root / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in persistent:
        safetensors.torch.save_file(tensors | {name: tensors[name] + 1}, file, {"format": "pt"})
        with pytest.raises(ExportError, match=name):
            prepare(family_settings("latte_a", root, tmp_path / "bundle"))
    other = next((n for n, _ in module.named_buffers() if n not in persistent), None)
    if other is not None:  # diffusers does not read it either
        safetensors.torch.save_file(tensors | {other: torch.zeros(1)}, file, {"format": "pt"})
        assert prepare(family_settings("latte_a", root, tmp_path / "bundle")).sites
