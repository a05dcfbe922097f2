"""LTX-Video as published: frames, sizes, noise levels, places in time, its decoder, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.export.families.published import published
from tests.tiny_flow import flow_noise, load_tiny_flow, make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.job import ExportSettings, prepare
from tgate_export.modules import Decoder, fake_module, real_module
from tgate_export.sampling import compile_sampler

FAMILY = find_model("ltx-video").family


def test_a_latent_frame_is_one_frame_and_then_eight() -> None:
    model, checkpoint = published("ltx-video")
    family, size = model.family, model.family.default_size(checkpoint)
    assert (size, family.default_frames(checkpoint)) == (Size(height=480, width=704, frames=161), 161)
    assert family.latents(checkpoint, size) == (128, 21, 15, 22)
    assert family.latents(checkpoint, Size(height=32, width=64)) == (128, 1, 1, 2)
    text, mask = family.conditioning(checkpoint, size)
    assert (text.shape, text.attended, mask.shape, mask.attended) == ((128, 4096), True, (128,), True)
    assert mask.conditioning.negative == "own"


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (Size(height=480, width=704, frames=160), "1 more than a multiple of 8 for this model, .* 153 and 161"),
        (Size(height=480, width=720, frames=161), "the width must be a multiple of 32 pixels"),
    ],
)
def test_sizes_that_it_does_not_make(size: Size, said: str) -> None:
    _, checkpoint = published("ltx-video")
    with pytest.raises(ExportError, match=said):
        FAMILY.check_size(checkpoint, size)


def test_noise_levels_are_shifted_by_the_length_and_end_where_the_scheduler_says() -> None:
    """The pipeline's formula in double precision: 0.95 at 1024 places, 2.05 at 4096, and the last level 0.1."""
    _, checkpoint = published("ltx-video")
    for size in (FAMILY.default_size(checkpoint), Size(height=512, width=512, frames=33)):
        places = math.prod(FAMILY.latents(checkpoint, size)[1:])
        mu = 0.95 + (2.05 - 0.95) * (places - 1024) / (4096 - 1024)
        config = FAMILY.scheduler_config(checkpoint, size)
        assert config["mu"] == pytest.approx(mu)
        levels = np.linspace(1.0, 1 / 20, 20)
        shifted = np.exp(mu) / (np.exp(mu) + 1 / levels - 1)
        wanted = 1 - (1 - shifted) * 0.9 / (1 - shifted[-1])
        timesteps = [call.timestep for call in compile_sampler("euler", config, 20).calls]
        assert timesteps == pytest.approx(1000 * wanted, rel=1e-4)
    with pytest.raises(ExportError, match="1 steps"):  # where the last level is the first as well
        compile_sampler("euler", config, 1)
    with pytest.raises(ExportError, match=r"hands them to FlowMatchEulerDiscreteScheduler alone; .* Choose euler"):
        compile_sampler("dpmpp_2m", config, 20)


def test_several_sizes_have_noise_levels_of_their_own(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "ltx_a")
    settings = ExportSettings(
        model="ltx-video", checkpoint=str(root), sizes=[(64, 64), (96, 64)], frames=9, components=("denoiser",)
    )
    with pytest.raises(ExportError, match="noise levels depend on the size"):
        prepare(settings)


def test_one_call_is_the_pipelines(tmp_path: Path) -> None:
    """Places lie apart by frames of a 25th of a second and by pixels, as the pipeline tells the network."""
    pipe = load_tiny_flow(make_tiny_flow(tmp_path / "checkpoint", "ltx_a"), "ltx_a")
    noise = torch.cat([flow_noise("ltx_a", seed) for seed in (1, 2)])
    text, mask = torch.randn(2, 7, 24), torch.tensor([[1.0] * 7, [1.0] * 3 + [0.0] * 4])
    times = torch.tensor([999.0, 120.5])
    _, _, frames, height, width = noise.shape

    def called(rate: float) -> torch.Tensor:
        packed = pipe.transformer(
            hidden_states=pipe._pack_latents(noise),
            encoder_hidden_states=text,
            timestep=times,
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(8 / rate, 32, 32),
            return_dict=False,
        )[0]
        return pipe._unpack_latents(packed, frames, height, width)

    with torch.no_grad():
        conditioning = {"prompt_embeds": text, "prompt_mask": mask}
        got = FAMILY.denoise(pipe.transformer, noise, times, torch.ones(2), conditioning)
        assert torch.allclose(got, called(25), atol=1e-5)
        assert not torch.allclose(got, called(12), atol=1e-3)


@pytest.mark.parametrize("variant", ["ltx_a", "ltx_b"])
def test_latents_are_scaled_by_the_checkpoints_own_tensors(tmp_path: Path, variant: str) -> None:
    """As the pipeline does it before its decoder, which has timestep 0 where it has one; in half precision too, they
    stay float32."""
    root = make_tiny_flow(tmp_path / "checkpoint", variant)
    checkpoint, latents = DirectoryCheckpoint(root), flow_noise(variant)
    vae = diffusers.AutoencoderKLLTXVideo.from_pretrained(root / "vae").eval()
    decoder = Decoder(
        real_module(FAMILY, checkpoint, "vae"), FAMILY.scaling(checkpoint), torch.float32, frames_axis=2, together=True
    )
    mean, std = (numbers.view(1, -1, 1, 1, 1) for numbers in (vae.latents_mean, vae.latents_std))
    scaled = latents * std / vae.config.scaling_factor + mean
    with torch.no_grad():
        want = vae.decode(scaled, torch.zeros(1) if variant == "ltx_b" else None).sample
        pictures, got = decoder(latents)
    assert torch.allclose(got, want.squeeze(0).movedim(1, 0), atol=1e-5)
    assert pictures.shape == (1, len(got), *got.shape[2:], 3)
    halved = fake_module(torch._subclasses.FakeTensorMode(), FAMILY, checkpoint, "vae", torch.float16)
    kept = {name for name, parameter in halved.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"latents_mean", "latents_std"}


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "LTXConditionPipeline"}, "LTXConditionPipeline; wanted is a LTXPipeline"),
        ("transformer/config.json", {"patch_size": 2}, "the transformer has patch_size = 2; LTX-Video has 1"),
        ("transformer/config.json", {"patch_size_t": 2}, "the transformer has patch_size_t = 2; LTX-Video has 1"),
        ("transformer/config.json", {"out_channels": 6}, "takes 8 channels and gives 6"),
        ("transformer/config.json", {"in_channels": 6}, "takes 6 channels, its latents have 8"),
        ("transformer/config.json", {"cross_attention_dim": 24}, "cross_attention_dim = 24, .* to 20 channels"),
        ("transformer/config.json", {"caption_channels": 16}, r"caption_channels = 16, .* gives 24 \(d_model\)"),
        ("transformer/config.json", {"qk_norm": "layer_norm"}, "transformer is no LTXVideoTransformer3DModel"),
        ("vae/config.json", {"out_channels": 4}, "out_channels = 4, LTX-Video has 3"),
        ("vae/config.json", {"patch_size_t": 2}, "patch_size_t = 2, LTX-Video has 1"),
        ("vae/config.json", {"decoder_inject_noise": [False] * 4 + [True]}, "as LTX-Video 0.9.1 has: its decoder"),
        ("vae/config.json", {"upsample_factor": [1] * 5}, "5 upsample_factor and 4 decoder_block_out_channels; 4 are"),
        ("vae/config.json", {"decoder_layers_per_block": [1] * 6}, "6 decoder_layers_per_block .* 5 are wanted"),
        ("vae/config.json", {"patch_size": 2}, "makes 16 pixels and 8 frames .* its decoder 16 and 8 of it"),
        ("vae/config.json", {"decoder_spatio_temporal_scaling": [True] * 4}, "its decoder 64 and 16 of it"),
        ("vae/config.json", {"spatial_compression_ratio": 16}, "makes 16 pixels and 8 frames"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor = 0"),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}, "the scheduler is UniPC"),
    ],
)
def test_other_models_of_the_kind_are_refused(tmp_path: Path, file: str, changes: dict[str, Any], said: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "ltx_a")
    path = root / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    if file.startswith("scheduler"):
        index = root / "model_index.json"
        named = {"scheduler": ["diffusers", changes["_class_name"]]}
        index.write_text(json.dumps(json.loads(index.read_text("utf-8")) | named), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def _check(root: Path) -> None:
    checkpoint = DirectoryCheckpoint(root)
    FAMILY.check_pipeline(checkpoint)
    FAMILY.check(checkpoint)
    FAMILY.scaling(checkpoint)
