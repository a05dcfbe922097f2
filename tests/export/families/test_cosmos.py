"""Cosmos-Predict2 as published: its noise levels, its network, its negative prompt, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.pipelines.cosmos.pipeline_cosmos2_text2image import DEFAULT_NEGATIVE_PROMPT
from safetensors.numpy import load_file

from tests.draw import draw
from tests.export.families.published import published
from tests.tiny_flow import FLOW_VARIANTS, load_tiny_flow, make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.embed import embed
from tgate_export.families import cosmos, find_model
from tgate_export.families.base import Size
from tgate_export.families.cosmos import LEVELS, _Attention, _Frame, _Places, _run
from tgate_export.sampling import compile_sampler

SIZE = Size(height=64, width=96)


def test_one_frame_of_wans_latents() -> None:
    model, checkpoint = published("cosmos-predict2-2b")
    size = model.family.default_size(checkpoint)
    assert size == Size(height=768, width=1360)
    assert model.family.latents(checkpoint, size) == (16, 96, 170)
    (text,) = model.family.conditioning(checkpoint, size)
    assert (text.shape, text.attended) == ((512, 1024), True)
    latents = torch.randn(2, 16, 8, 8)
    assert model.family.as_pipeline(latents).shape == (2, 16, 1, 8, 8)
    assert torch.equal(model.family.from_pipeline(model.family.as_pipeline(latents), latents.shape), latents)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_steps_row_is_what_the_pipeline_computes(steps: int) -> None:
    """Its preconditioning and Euler's step written out, on a network that is no straight line."""
    model, checkpoint = published("cosmos-predict2-2b")
    sampler = compile_sampler("euler", model.family.scheduler_config(checkpoint, SIZE), steps)
    ramp = np.linspace(0, 1, steps)
    levels = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = np.append(levels, levels[-1])
    assert sampler.initial_scale == pytest.approx(80.0)
    latents = own = 80.0 * np.random.default_rng(3).standard_normal(50)
    for i, call in enumerate(sampler.calls):
        level = levels[i]
        time = level / (level + 1)
        assert [call.timestep, call.input_scale] == pytest.approx([time, 1 - time], abs=1e-6)
        given = np.tanh(latents * (1 - time) + time)
        denoised = (1 - time) * latents - time * given
        wanted = latents + (levels[i + 1] - level) * (latents - denoised) / level
        own = call.latents[0] * own + call.outputs[0] * np.tanh(own * call.input_scale + call.timestep)
        assert np.abs(own - wanted).max() < 1e-4 * np.abs(wanted).max()
        assert not any((*call.latents[1:], *call.outputs[1:], call.noise))
        latents = wanted


@pytest.mark.parametrize("variant", ["cosmos_a", "cosmos_b"])
def test_the_network_is_diffusers(variant: str) -> None:
    """With the channel that tells of padding, and without."""
    tiny = FLOW_VARIANTS[variant]
    network = diffusers.CosmosTransformer3DModel(**tiny.network, text_embed_dim=tiny.text_width)
    draw(network.eval(), variant)
    torch.manual_seed(1)
    latents, text = torch.randn(2, 4, 1, 8, 12), torch.randn(2, 6, tiny.text_width)
    times, padded = torch.tensor([0.3, 0.9]), network.config["concat_padding_mask"]
    with torch.no_grad():
        got = [_run(network, latents, times, text)]
        network.rope.__class__ = _Places
        for block in network.transformer_blocks:
            block.attn1.processor = block.attn2.processor = _Attention()
        got.append(_run(network, latents, times, text))
        network.register_to_config(concat_padding_mask=False)
        want = network(latents, times, text, condition_mask=torch.zeros_like(latents[:, :1]) if padded else None)[0]
    for each in got:
        assert torch.allclose(each, want, atol=1e-5)
    assert want.std() > 0.1


def test_a_convolution_of_one_frame_is_the_causal_one() -> None:
    torch.manual_seed(1)
    convolution, frame = WanCausalConv3d(3, 5, 3, padding=1), torch.randn(1, 3, 1, 6, 4)
    with torch.no_grad():
        want = convolution(frame)
        convolution.__class__ = _Frame
        assert torch.allclose(convolution(frame), want, atol=1e-6)


def test_without_a_negative_prompt_the_pipelines_own_is_encoded(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "cosmos_a")
    files = {name: tmp_path / f"{name}.safetensors" for name in ("none", "own", "empty")}
    for name, negative in (("none", None), ("own", DEFAULT_NEGATIVE_PROMPT), ("empty", "")):
        embed("cosmos-predict2-2b", ["a red star"], files[name], checkpoint=str(root), negative_prompt=negative)
    none, own, empty = (load_file(files[name])["prompt_embeds.negative"] for name in files)
    np.testing.assert_array_equal(none, own)
    assert np.abs(none - empty).max() > 0.1


def test_goldens_want_torchvision_where_there_is_none(tmp_path: Path) -> None:
    pipe = load_tiny_flow(make_tiny_flow(tmp_path / "checkpoint", "cosmos_a"), "cosmos_a")
    family, text = find_model("cosmos-predict2-2b").family, {"prompt_embeds.positive": torch.zeros(1)}
    with (
        mock.patch.object(cosmos, "is_torchvision_available", return_value=False),
        pytest.raises(ExportError, match=r"by torchvision, which is not here: pip install torchvision, .*--no-verify"),
    ):
        family.call(pipe, text, 7.0, 0.0)
    pipe.transformer.register_to_config(concat_padding_mask=False)
    assert family.call(pipe, text, 7.0, 0.0)["guidance_scale"] == 7.0


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"extra_pos_embed_type": "learnable"}, "extra_pos_embed_type = learnable, as Cosmos 1.0 has"),
        ("transformer", {"use_crossattn_projection": True}, "use_crossattn_projection = True, as those of Cosmos 2.5"),
        ("transformer", {"controlnet_block_every_n": 7}, "controlnet_block_every_n = 7, as those of Cosmos 2.5"),
        ("transformer", {"img_context_dim_in": 8}, "img_context_dim_in = 8, as those of Cosmos 2.5"),
        ("transformer", {"in_channels": 5}, "takes 5 channels, its latents have 4"),
        ("transformer", {"out_channels": 5}, "takes 4 channels and gives 5; samplers want as many"),
        ("transformer", {"patch_size": [2, 2, 2]}, r"patch_size = \[2, 2, 2\]; three numbers are wanted, the first"),
        ("vae", {"latents_mean": [0.0]}, "1 latents_mean and 4 latents_std for 4 channels"),
        ("vae", {"scale_factor_spatial": 16}, "scale_factor_spatial = 16"),
        ("scheduler", {"use_karras_sigmas": False}, "use_karras_sigmas = False; without it .* from no noise to noise"),
        ("scheduler", {"shift_terminal": 0.1}, "shift_terminal = 0.1, and Cosmos2TextToImagePipeline spaces noise"),
        ("scheduler", {"stochastic_sampling": True}, "stochastic_sampling = True"),
    ],
)
def test_what_the_pipeline_would_not_do_is_refused(
    tmp_path: Path, part: str, changes: dict[str, Any], said: str
) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "cosmos_a")
    file = root / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def test_another_scheduler_and_another_sampler_are_refused(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "cosmos_a")
    index = root / "model_index.json"
    known = json.loads(index.read_text("utf-8"))
    config = _check(root)
    assert {key: config[key] for key in LEVELS} == LEVELS
    with pytest.raises(ExportError, match=r"sampler 'dpmpp_2m' would take others\. Choose euler"):
        compile_sampler("dpmpp_2m", config, 4)
    index.write_text(json.dumps(known | {"scheduler": ["diffusers", "EDMEulerScheduler"]}), "utf-8")
    with pytest.raises(ExportError, match=r"EDMEulerScheduler; .* hands noise levels of its own"):
        _check(root)


def test_sizes_that_the_network_does_not_know_are_refused(tmp_path: Path) -> None:
    model, checkpoint = published("cosmos-predict2-2b")
    model.family.check_size(checkpoint, Size(height=2048, width=2048))
    for size, said in ((Size(height=2064, width=64), "128 places a side.*larger"), (Size(height=72, width=64), "16")):
        with pytest.raises(ExportError, match=said):
            model.family.check_size(checkpoint, size)


def _check(root: Path) -> Any:
    checkpoint, family = DirectoryCheckpoint(root), find_model("cosmos-predict2-2b").family
    family.check(checkpoint)
    family.scaling(checkpoint)
    return family.scheduler_config(checkpoint, SIZE)
