"""What an export is asked to do, and a checkpoint's odd files, end in one line before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import family_settings
from tests.tiny_families import make_tiny
from tgate_engine.errors import ExportError
from tgate_export.job import prepare

VARIANT = "sd15_a"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("whole") / "checkpoint", VARIANT)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refusal(root: Path, **more: Any) -> str:
    with pytest.raises(ExportError) as caught:
        prepare(family_settings(VARIANT, root, root.parent / "bundle", **more))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": ""}, "no sampler ''"),
        ({"components": ("denoiser", "denoiser")}, "each once"),
        ({"components": ()}, "got none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(whole: Path, settings: dict[str, Any], said: str) -> None:
    assert said in refusal(whole, **settings)


@pytest.mark.parametrize("size", [0, -8])
def test_a_size_of_nothing_is_refused(whole: Path, tmp_path: Path, size: int) -> None:
    settings = family_settings(VARIANT, whole, tmp_path / "bundle")
    with pytest.raises(ExportError, match=r"--width must be a multiple of 8"):
        prepare(type(settings)(model="sd15", checkpoint=str(whole), width=size))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"scheduler": ["diffusers", "Foo"]}, "scheduler is Foo"),
        ("model_index.json", {"scheduler": ["diffusers", 5]}, "a library and a class are wanted"),
        ("model_index.json", {"scheduler": "EulerDiscreteScheduler"}, "a library and a class are wanted"),
        ("model_index.json", {"unet": [None, None]}, "there is no unet"),
        ("model_index.json", {"scheduler": [None, None]}, "there is no scheduler"),
        ("vae/config.json", {"shift_factor": "x"}, "shift_factor"),
        ("vae/config.json", {"latents_mean": "abc", "latents_std": "abc"}, "latents_mean"),
        ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ("unet/config.json", {"sample_size": [8]}, ""),
        ("unet/config.json", {"quantization_config": "int8"}, "int8"),
        ("unet/config.json", {"block_out_channels": "text"}, "unet is no UNet2DConditionModel"),
        ("text_encoder/config.json", {"is_causal": False}, "is_causal"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type"),
    ],
)
def test_files_that_say_something_odd_are_refused(copied: Path, file: str, changes: dict[str, Any], said: str) -> None:
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    if changes == {"sample_size": [8]}:  # which only matters where no size is asked for
        with pytest.raises(ExportError, match="--height and --width"):
            prepare(type(family_settings(VARIANT, copied, copied))(model="sd15", checkpoint=str(copied)))
        return
    assert said in refusal(copied)


def test_weights_twice_over_are_refused(copied: Path) -> None:
    """diffusers reads the shards, transformers the single file: what is left over from an earlier save is not told."""
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert "remove what is left over" in refusal(copied)
