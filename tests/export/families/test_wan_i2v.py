"""Wan from a picture: what the networks are told of it, how it is prepared, and what is refused."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from safetensors.torch import load_file, save_file

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import MODELS, find_model
from tgate_export.families.base import Size
from tgate_export.families.wan import TOKENS, _Attention
from tgate_export.job import ExportSettings, check_checkpoint, directories, prepare


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda variant: make_tiny_flow(tmp_path_factory.mktemp(variant), variant))


@pytest.fixture
def copy_of(made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A tiny checkpoint to change."""
    return lambda variant: Path(shutil.copytree(made(variant), tmp_path / "checkpoint"))


def test_what_the_networks_are_told_as_published() -> None:
    """Wan 2.1's of CLIP's 257 tokens too, Wan 2.2's not; both of 4 channels of what is known, and 16 of latents."""
    shapes = {}
    for name in ("wan21-i2v-14b", "wan22-i2v-a14b"):
        model, checkpoint = published(name)
        family = model.family
        family.check(checkpoint)
        inputs = family.conditioning(checkpoint, family.default_size(checkpoint))
        shapes[name] = {c.conditioning.name: (c.shape, c.attended, c.conditioning.negative) for c in inputs}
    text = {"prompt_embeds": ((512, 4096), True, "own")}
    latents = {"image_latents": ((20, 21, 60, 104), False, "same")}
    assert shapes["wan21-i2v-14b"] == {**text, "image_embeds": ((257, 1280), True, "same"), **latents}
    assert shapes["wan22-i2v-a14b"] == {**text, **latents}
    assert (model.family.late(checkpoint), model.family.image_parts(checkpoint)) == (900.0, ("vae",))


def test_attention_to_text_and_picture_is_diffusers() -> None:
    torch.manual_seed(3)
    own = {"cross_attention_dim_head": 12, "added_kv_proj_dim": 24, "processor": WanAttnProcessor()}
    module = WanAttention(dim=24, heads=2, dim_head=12, **own).eval()
    hidden, attended = torch.randn(2, 10, 24), torch.randn(2, 5 + TOKENS, 24)
    with torch.no_grad():
        want = module(hidden, attended, None, None)
        module.processor = _Attention()
        got = module(hidden, attended, None, None)
        without = module(hidden, attended.index_fill(1, torch.arange(5), 0.0), None, None)
    assert torch.allclose(got, want, atol=1e-6)
    assert (got - without).abs().max() > 0.01, "the picture counts"


@pytest.mark.parametrize(
    ("variant", "file", "changes", "said"),
    [
        (
            "wan_i2v_a",
            "model_index.json",
            {"_class_name": "WanPipeline"},
            "holds a WanPipeline; wanted is a WanImageTo",
        ),
        ("wan_i2v_a", "model_index.json", {"expand_timesteps": True}, "as Wan 2.2 of 5 billion"),
        ("wan_i2v_a", "model_index.json", {"image_encoder": ["transformers", "SiglipModel"]}, "is a SiglipModel in"),
        ("wan_i2v_a", "transformer/config.json", {"pos_embed_seq_len": 514}, r"between a first and a last .*FLF2V"),
        ("wan_i2v_a", "transformer/config.json", {"added_kv_proj_dim": None}, "added_kv_proj_dim = None; Wan 2.1 has"),
        ("wan_i2v_a", "transformer/config.json", {"in_channels": 4}, "takes 4 channels; image to video takes .*: 12;"),
        ("wan_i2v_a", "transformer/config.json", {"out_channels": 12}, "gives 12 channels, its latents have 4"),
        ("wan_i2v_a", "transformer/config.json", {"image_dim": 8}, "image_dim = 8, the image_encoder has hidden_size"),
        ("wan_i2v_a", "image_encoder/config.json", {"image_size": 32}, r"size = .* is shown pictures of 32 pixels"),
        (
            "wan_i2v_a",
            "image_processor/preprocessor_config.json",
            {"resample": 2},
            "resample = 2, and the image_encoder",
        ),
        ("wan_i2v_a", "image_processor/preprocessor_config.json", {"image_std": [1, 0, 1]}, "three finite numbers"),
        (
            "wan22_i2v_a",
            "vae/config.json",
            {"temperal_downsample": [False, False, True], "scale_factor_temporal": 2},
            "packs 2 frames .temperal_downsample.; pictures are encoded 4 frames at a time",
        ),
        ("wan22_i2v_a", "transformer_2/config.json", {"in_channels": 36}, "both networks must be of one structure"),
    ],
)
def test_other_models_of_the_kind_are_refused(
    copy_of: Callable[[str], Path], variant: str, file: str, changes: dict[str, Any], said: str
) -> None:
    root = copy_of(variant)
    if file == "image_processor/preprocessor_config.json":
        (root / "image_processor" / "processor_config.json").unlink(missing_ok=True)
    _change(root / file, changes)
    with pytest.raises(ExportError, match=said):
        _check(root)


def test_an_encoder_that_is_not_there_is_told(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("wan_i2v_a")
    shutil.rmtree(root / "image_encoder")
    with pytest.raises(ExportError, match=r"image_encoder/config.json is missing; the checkpoint is incomplete"):
        _check(root)


def test_an_encoder_with_a_projection_is_one_too(copy_of: Callable[[str], Path]) -> None:
    """As some checkpoints name it; nothing of a projection is read."""
    root = copy_of("wan_i2v_a")
    _change(root / "model_index.json", {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]})
    _change(root / "image_encoder" / "config.json", {"architectures": ["CLIPVisionModelWithProjection"]})
    (file,) = (root / "image_encoder").glob("*.safetensors")
    save_file({**load_file(file), "visual_projection.weight": torch.ones(512, 16)}, file, {"format": "pt"})
    checkpoint, family = _check(root)
    check_checkpoint(family, checkpoint, directories(family, ("image", "denoiser", "decoder"), checkpoint))


@pytest.mark.parametrize(("model", "variant"), [("wan21-t2v-14b", "wan_i2v_a"), ("wan21-i2v-14b", "wan_a")])
def test_one_is_not_taken_for_the_other(
    copy_of: Callable[[str], Path], tmp_path: Path, model: str, variant: str
) -> None:
    root = copy_of(variant)
    with pytest.raises(ExportError, match=r"holds a Wan\w*Pipeline; wanted is a Wan\w*Pipeline"):
        prepare(_settings(model, root, tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


def test_its_text_is_encoded_ahead_and_its_picture_is_not() -> None:
    facts = MODELS["wan21-i2v-14b"].facts
    assert (facts.sources, facts.text_graph) == (("text", "image"), False)


@pytest.mark.parametrize("components", [("text", "denoiser"), ("encoder", "denoiser")])
def test_components_that_it_has_not(
    copy_of: Callable[[str], Path], tmp_path: Path, components: tuple[str, ...]
) -> None:
    root = copy_of("wan_i2v_a")
    with pytest.raises(ExportError, match=r"encode prompts with tgate embed|are some of image, denoiser, decoder"):
        prepare(_settings("wan21-i2v-14b", root, tmp_path / "bundle", components=components))


def test_frames_come_in_fours_and_one(copy_of: Callable[[str], Path]) -> None:
    root = copy_of("wan22_i2v_a")
    checkpoint, family = _check(root)
    with pytest.raises(ExportError, match="1 more than a multiple of 4 for this model, got 8; the nearest are 5 and 9"):
        family.check_size(checkpoint, Size(height=32, width=64, frames=8))


def _settings(model: str, root: Path, output: Path, **options: Any) -> ExportSettings:
    named = {"steps": 6, "m": 3, "k": 2, "height": 32, "width": 64, "frames": 5, "components": ("denoiser",)}
    return ExportSettings(**{"model": model, "checkpoint": str(root), "output": output, **named, **options})


def _change(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def _check(root: Path) -> tuple[DirectoryCheckpoint, Any]:
    checkpoint, family = DirectoryCheckpoint(root), find_model("wan21-i2v-14b").family
    family.check_pipeline(checkpoint)
    family.check(checkpoint)
    return checkpoint, family
