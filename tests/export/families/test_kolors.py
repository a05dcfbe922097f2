"""Kolors as published: its text, its sampler, how prompts are encoded, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.export.families.published import published
from tests.tiny_flow import load_tiny_flow, make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.embed import embed
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.schedulers import make_scheduler

CODE: Mapping[str, Mapping[str, Any]] = {
    "text_encoder/config.json": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "tokenizer/tokenizer_config.json": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
}
"""As ChatGLM's own files name it."""


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_tiny_flow(tmp_path / "checkpoint", "kolors_a")


def test_the_pooled_text_and_the_size_are_not_attended_to() -> None:
    model, checkpoint = published("kolors")
    size = model.family.default_size(checkpoint)
    assert size == Size(height=1024, width=1024)
    text, pooled, ids = model.family.conditioning(checkpoint, size)
    assert (text.shape, pooled.shape, ids.shape) == ((256, 4096), (4096,), (6,))
    assert (text.attended, pooled.attended, ids.attended) == (True, False, False)
    assert ids.value == (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)
    model.family.check(checkpoint)


def test_its_sampler_walks_1100_levels_of_noise() -> None:
    _, checkpoint = published("kolors")
    scheduler = make_scheduler("euler", checkpoint.scheduler_config())
    scheduler.set_timesteps(50)
    assert [int(t) for t in scheduler.timesteps[[0, 1, -1]]] == [1079, 1057, 1]
    betas = np.linspace(0.00085**0.5, 0.014**0.5, 1100) ** 2
    alphas = np.cumprod(1 - betas)
    assert float(scheduler.sigmas[0]) == pytest.approx(((1 - alphas[1079]) / alphas[1079]) ** 0.5, rel=1e-4)


def test_fake_weights_take_no_memory() -> None:
    model, checkpoint = published("kolors")
    encoder = model.family.skeleton(checkpoint, "text_encoder")
    assert sum(p.numel() for p in encoder.parameters()) == 6_243_584_000
    assert all(p.is_meta for p in encoder.parameters())


@pytest.mark.parametrize("named", [False, True], ids=["as diffusers saves", "with the code that ChatGLM's files name"])
@pytest.mark.parametrize("negative", [None, "a photo of a green circle"], ids=["none", "negative"])
def test_prompts_are_encoded_as_diffusers_encodes_them(
    root: Path, tmp_path: Path, named: bool, negative: str | None
) -> None:
    """Longer ones too; without a negative prompt, the empty one is encoded."""
    pipe = load_tiny_flow(root, "kolors_a")
    prompts = ["A large red circle", "blue " * 300]
    for file, code in (CODE if named else {}).items():
        rewrite(root / file, auto_map=code)
    rewrite(root / "model_index.json", force_zeros_for_empty_prompt=True)  # the pipeline fails where it is none
    embed("kolors", prompts, tmp_path / "e.safetensors", checkpoint=str(root), negative_prompt=negative)
    got = load_file(tmp_path / "e.safetensors")
    with torch.no_grad():
        text, other, pooled, other_pooled = pipe.encode_prompt(prompts, "cpu", negative_prompt=[negative or ""] * 2)
    wanted = {"prompt_embeds.positive": text, "prompt_embeds.negative": other}
    wanted |= {"pooled.positive": pooled, "pooled.negative": other_pooled}
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert np.abs(got[name] - tensor.numpy()).max() < 1e-5 * float(tensor.abs().max()), name
    assert np.abs(got["pooled.positive"] - got["pooled.negative"]).max() > 0.1


def test_half_of_the_memory_is_what_diffusers_makes_of_it(root: Path, tmp_path: Path) -> None:
    embed("kolors", ["a red circle"], tmp_path / "e.safetensors", checkpoint=str(root), half=True)
    pipe = load_tiny_flow(root, "kolors_a").to(torch.bfloat16)
    with torch.no_grad():
        text, _, pooled, _ = pipe.encode_prompt("a red circle", "cpu", negative_prompt="")
    got = load_file(tmp_path / "e.safetensors")
    for name, tensor in (("prompt_embeds", text), ("pooled", pooled)):
        assert np.abs(got[f"{name}.positive"] - tensor.float().numpy()).max() < 1e-5 * float(tensor.abs().max())


@pytest.mark.parametrize("file", CODE)
def test_code_of_the_checkpoints_own_is_refused(root: Path, tmp_path: Path, file: str) -> None:
    rewrite(root / file, auto_map={**CODE[file], "AutoModel": "evil.ChatGLMModel"})
    with pytest.raises(ExportError, match=r"has auto_map = .* code of the checkpoint's own, which is never run"):
        embed("kolors", ["a"], tmp_path / "e.safetensors", checkpoint=str(root))


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("unet", {"encoder_hid_dim": 48}, r"encoder_hid_dim = 48, and attends to .* hidden_size = 32"),
        ("unet", {"encoder_hid_dim_type": None, "encoder_hid_dim": None}, r"cross_attention_dim = 24, and attends to"),
        ("unet", {"encoder_hid_dim_type": "image_proj"}, "wants an image beside the prompt"),
        ("unet", {"projection_class_embeddings_input_dim": 96}, "= 96, and is given 80 numbers: 6 sizes of"),
        ("unet", {"addition_embed_type": None}, r"addition_embed_type = None, KolorsPipeline has 'text_time'"),
        ("unet", {"in_channels": 9}, "takes 9 channels, its latents have 4"),
        ("vae", {"shift_factor": 0.1}, "shift_factor = 0.1, which KolorsPipeline ignores"),
        ("vae", {"latents_mean": [1.0] * 4}, r"latents_mean = .* which KolorsPipeline ignores"),
        ("text_encoder", {"model_type": "clip_text_model"}, "has model_type = 'clip_text_model', ChatGlm has"),
        ("text_encoder", {"quantization_config": {"quant_method": "int4"}}, r"quantised .* method 'int4'"),
    ],
)
def test_what_the_pipeline_would_not_do_is_refused(root: Path, part: str, changes: dict[str, Any], said: str) -> None:
    rewrite(root / part / "config.json", **changes)
    with pytest.raises(ExportError, match=said):
        _check(root)


def test_a_vocabulary_is_wanted(root: Path, tmp_path: Path) -> None:
    (root / "tokenizer" / "tokenizer.model").rename(root / "tokenizer" / "spiece.model")
    with pytest.raises(ExportError, match=r"holds no vocabulary \(one of tokenizer.model\)"):
        embed("kolors", ["a"], tmp_path / "e.safetensors", checkpoint=str(root))


def _check(root: Path) -> None:
    checkpoint, family = DirectoryCheckpoint(root), find_model("kolors").family
    family.check(checkpoint)
    family.scaling(checkpoint)
