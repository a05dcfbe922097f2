"""Qwen-Image as published: places and lengths as diffusers has them, prompts of any length, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from safetensors.numpy import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.export.families.published import published
from tests.shrunken import write_qwen
from tests.tiny_flow import load_tiny_flow, make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.embed import embed
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.families.qwen import _Frame, _Places
from tgate_export.job import ExportSettings, prepare
from tgate_export.modules import fake_module, real_module

FAMILY: Any = find_model("qwen-image").family
PROMPTS = ("A large red circle above a small blue square", "green")


def test_what_it_is_exported_as_where_nothing_is_said() -> None:
    model, checkpoint = published("qwen-image")
    size = FAMILY.default_size(checkpoint)
    text, mask = FAMILY.conditioning(checkpoint, size)
    assert (model.steps, model.guidance_scale, model.method) == (50, 4.0, "guidance_delta")
    assert (text.shape, mask.shape, mask.mask) == ((512, 3584), (512,), True)
    assert (str(size), FAMILY.latents(checkpoint, size)) == ("1328x1328", (16, 166, 166))
    scaling = FAMILY.scaling(checkpoint)
    assert (scaling.scale, len(scaling.mean), scaling.std[0]) == (1.0, 16, 2.8184)
    with pytest.raises(ExportError, match="the width must be a multiple of 16 pixels for this model, got 1000"):
        FAMILY.check_size(checkpoint, Size(height=1328, width=1000))


def test_attention_is_joint_and_the_papers_method_refused(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "qwen_b")
    settings = ExportSettings(model="qwen-image", checkpoint=str(root), components=("denoiser",), sizes=[(24, 40)])
    job = prepare(settings)
    assert [site.kind for site in job.sites] == ["joint"] * 3
    assert job.method.name == "guidance_delta"
    with pytest.raises(ExportError, match="noise levels depend on the size"):
        prepare(replace(settings, sizes=[(24, 40), (24, 24)]))
    with pytest.raises(ExportError, match="method tgate reuses cross-attention, and qwen-image has none of its own"):
        prepare(ExportSettings(model="qwen-image", method="tgate", weights="none", components=("denoiser",)))


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3), (1, 8)])
def test_places_are_diffusers(height: int, width: int) -> None:
    rope = QwenEmbedRope(theta=10000, axes_dim=[4, 8, 6], scale_rope=True)
    shapes = [[(1, height, width)]]
    pairs = zip(_Places(rope)(shapes, 11), rope(shapes, max_txt_seq_len=11), strict=True)
    for (cos, sin), want in pairs:
        assert torch.equal(cos, want.real)
        assert torch.equal(sin, want.imag)


def test_outputs_are_measured_as_the_pipeline_does() -> None:
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    packed = diffusers.QwenImagePipeline._pack_latents(latents, *latents.shape)
    places = packed.norm(dim=-1, keepdim=True).expand_as(packed)
    assert torch.allclose(FAMILY.lengths(latents).expand_as(latents), FAMILY.from_pipeline(places, latents.shape))


def test_a_frame_of_a_convolution_over_time() -> None:
    torch.manual_seed(0)
    for kernel, padding in ((3, 1), (1, 0)):
        convolution, x = QwenImageCausalConv3d(3, 5, kernel, padding=padding), torch.randn(2, 3, 1, 6, 4)
        with torch.no_grad():
            want = convolution(x)
            convolution.__class__ = _Frame
            assert torch.allclose(convolution(x), want, atol=1e-6)


def test_prompts_of_any_length_are_filled_up_and_masked(tmp_path: Path) -> None:
    """What the network makes of them is what diffusers' makes of them as long as they are, its own code and numbers."""
    root = make_tiny_flow(tmp_path / "checkpoint", "qwen_b")
    pipe = load_tiny_flow(root, "qwen_b")
    own = real_module(FAMILY, DirectoryCheckpoint(root), "transformer")
    latents = torch.randn(1, 4, 10, 6, generator=torch.Generator().manual_seed(0))
    outputs = []
    for prompt in PROMPTS:
        filled, _ = FAMILY.encode_with(pipe, prompt, "", 0)
        with torch.no_grad():
            states, mask = pipe.encode_prompt(prompt, max_sequence_length=512)
            assert mask is None
            assert filled["prompt_mask"].sum() == states.shape[1] < 512
            want = pipe.transformer(
                hidden_states=pipe._pack_latents(latents, *latents.shape),
                timestep=torch.tensor([0.7]),
                encoder_hidden_states=states,
                img_shapes=[[(1, 5, 3)]],
                return_dict=False,
            )[0]
            got = FAMILY.denoise(own, latents, torch.tensor([700.0]), torch.ones(1), filled)
        outputs.append(FAMILY.as_pipeline(got))
        assert (outputs[-1] - want).abs().max() < 1e-5 * want.abs().max()
    assert (outputs[0] - outputs[1]).abs().max() > 1e-2


def test_places_stay_in_float32_in_a_network_that_does_not(tmp_path: Path) -> None:
    checkpoint = DirectoryCheckpoint(make_tiny_flow(tmp_path / "checkpoint", "qwen_a"))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = fake_module(mode, FAMILY, checkpoint, "transformer", torch.float16)
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}


def test_a_vocabulary_as_published_reads_the_same(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "qwen_a")
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    embed("qwen-image", PROMPTS, files[0], checkpoint=str(root))
    shutil.rmtree(root / "tokenizer")
    (root / "tokenizer").mkdir()
    write_qwen(root / "tokenizer", 1024)
    embed("qwen-image", PROMPTS, files[1], checkpoint=str(root))
    first, second = map(load_file, files)
    assert (
        first.keys()
        == second.keys()
        == {f"{name}.{half}" for name in ("prompt_embeds", "prompt_mask") for half in ("positive", "negative")}
    )
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "QwenImageEditPipeline"}, "holds a QwenImageEditPipeline"),
        ("transformer/config.json", {"guidance_embeds": True}, "the transformer has guidance_embeds = true"),
        ("transformer/config.json", {"zero_cond_t": True}, "the transformer has zero_cond_t = true"),
        ("transformer/config.json", {"use_additional_t_cond": True}, "has use_additional_t_cond = true"),
        ("transformer/config.json", {"use_layer3d_rope": True}, "has use_layer3d_rope = true"),
        ("transformer/config.json", {"patch_size": 1}, "takes 16 channels and gives 4; .* 16 both times"),
        ("transformer/config.json", {"out_channels": None}, "takes 16 channels and gives 64"),
        ("transformer/config.json", {"joint_attention_dim": 20}, "joint_attention_dim = 20, the text_encoder gives 16"),
        ("vae/config.json", {"input_channels": 4}, "input_channels = 4; pictures have 3"),
        ("vae/config.json", {"temperal_downsample": [True] * 4}, "4 dim_mult and 4 temperal_downsample; one less"),
        ("vae/config.json", {"latents_std": [1.0]}, "4 latents_mean and 1 latents_std for 4 channels"),
        ("text_encoder/config.json", {"text_config": {"hidden_size": "16"}}, "hidden_size = '16'"),
        ("text_encoder/config.json", {"vision_config": {"depth": 1000}}, "depth = 1000"),
    ],
)
def test_other_models_of_the_kind_are_refused(tmp_path: Path, file: str, changes: dict[str, Any], said: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "qwen_a")
    path = root / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def _check(root: Path) -> None:
    checkpoint = DirectoryCheckpoint(root)
    FAMILY.check_pipeline(checkpoint)
    FAMILY.check(checkpoint)
    FAMILY.scaling(checkpoint)
