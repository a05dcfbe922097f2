"""``benchmarks.pipelines``: the vocabulary and OpenVINO's files against transformers and diffusers, our own pictures
against the library's, and what the page says of results that can be followed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from benchmarks import pipelines
from benchmarks.performance_page import pipelines as section
from benchmarks.pipeline_files import vocabulary, write_openvino
from tests.shrunken import write_shrunken
from tgate_runtime.mini import place_of
from tgate_runtime.pipeline import Pipeline


def test_the_vocabulary_is_clips() -> None:
    tokens, merges = vocabulary('"version"\nr e\nre d</w>\nb l\n', merges=2)
    assert merges == [("r", "e"), ("re", "d</w>")]
    assert (len(tokens), tokens["!"], tokens["!</w>"], tokens["red</w>"]) == (2 * 256 + 2 + 2, 0, 256, 513)
    ids = CLIPTokenizer(vocab=tokens, merges=merges)("Red re").input_ids
    assert ids == [514, 513, tokens["r"], tokens["e</w>"], 515]
    with pytest.raises(ValueError, match="holds 1 merges, 2 are wanted"):
        vocabulary('"version"\nr e\n', merges=2)


@pytest.mark.slow
def test_openvinos_files_compute_what_diffusers_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, folder = write_shrunken(tmp_path / "checkpoint", "sd15"), tmp_path / "openvino"

    class Tokenizers:  # it is not among what tests install; GenAI reads what it makes
        @staticmethod
        def convert_tokenizer(_: object) -> ov.Model:
            given = ov.opset13.parameter([1])
            return ov.Model([given], [given])

    monkeypatch.setitem(__import__("sys").modules, "openvino_tokenizers", Tokenizers)
    write_openvino(folder, checkpoint, 64)
    core, exact = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32"}

    def given(part: str, inputs: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
        model = core.compile_model(folder / part / "openvino_model.xml", "CPU", exact)
        result: np.ndarray[Any, Any] = model({name: tensor.numpy() for name, tensor in inputs.items()})[0]
        return result

    draw = torch.Generator().manual_seed(0)
    text = CLIPTextModel.from_pretrained(checkpoint / "text_encoder").eval()
    ids = torch.randint(text.config.vocab_size, (2, 77), generator=draw)
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet").eval()
    vae = AutoencoderKL.from_pretrained(checkpoint / "vae").eval()
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    with torch.no_grad():
        states = text(ids).last_hidden_state
        wanted = unet(latents, torch.tensor([321]), states, return_dict=False)[0]
        pixels = vae.decode(latents, return_dict=False)[0]
    np.testing.assert_allclose(given("text_encoder", {"input_ids": ids}), states, atol=1e-4)
    call = {"sample": latents, "timestep": torch.tensor([321]), "encoder_hidden_states": states}
    np.testing.assert_allclose(given("unet", call), wanted, atol=1e-4)
    np.testing.assert_allclose(given("vae_decoder", {"latent_sample": latents}), pixels, atol=1e-4)
    assert json.loads((folder / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_ours_are_the_librarys_pictures(tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(place_of("mini"))
    with Pipeline.open(place_of("mini"), threads=1) as pipe:
        steps = len(pipe.session.plan("default").steps)
        asked: dict[str, Any] = {
            "negative_prompt": pipelines.NEGATIVE,
            "guidance_scale": pipelines.GUIDANCE,
            "seed": pipelines.SEED,
        }
        wanted = pipe(pipelines.PROMPT, plan="ungated", generator=pipelines.GENERATOR, **asked).images[0]
    draw = pipelines.ours(tmp_path, {"engine": "ort-cpu"}, 1, print)
    ungated, gated = (draw(steps, pipelines.OURS[way]) for way in ("ungated", "gated"))
    assert pipelines.apart(ungated, np.asarray(wanted)) == 0
    assert pipelines.apart(gated, ungated) > 0


def test_pictures_are_judged() -> None:
    flat = np.full((pipelines.PIXELS, pipelines.PIXELS, 3), 7, np.uint8)
    other = flat.copy()
    other[: pipelines.PIXELS // 2] = 17
    assert pipelines.judged(flat, {"plain": other}) == {"spread": 0.0}
    assert pipelines.judged(other, {"plain": other, "b": flat}) == {"spread": 5.0, "same_as": ["plain"]}
    assert pipelines.apart(flat, other) == round(float(np.sqrt(50)), 3)
    with pytest.raises(ValueError, match="wanted uint8"):
        pipelines.judged(flat[:64], {})


def results() -> dict[str, Any]:
    """Two rounds, made up: GenAI is slower than ours gated in the first round and faster in the second."""
    processes = {
        "tgate openvino f32": {"kind": "ours", "precision": "f32", "ways": {"gated": {}, "ungated": {}}},
        "OpenVINO GenAI f32": {"kind": "genai", "precision": "f32", "ways": {"plain": {}, "TaylorSeer": {}}},
        "stable-diffusion.cpp f32": {"kind": "sdcpp", "precision": "f32", "ways": {"plain": {}}},
    }
    took = {"others_cpu_s": 5.0, "wall_s": 50.0, "file_bytes": 2**30}

    def turn(gated: float, genai: float) -> dict[str, Any]:
        ways = {"gated": {"s": gated}, "ungated": {"s": 30.0}}
        ours = {**took, "open_s": 9.0, "anonymous_bytes": 8 * 2**30, "ways": ways}
        same = {"s": genai, "apart": 0.5, "same_as": ["plain"]}
        other = {"plain": {"s": genai, "apart": 0.5}, "TaylorSeer": same}
        theirs = {**took, "open_s": 12.0, "anonymous_bytes": 4 * 2**30, "ways": other}
        last = {**took, "anonymous_bytes": 2**30, "failed": "some lines\nout of memory"}
        return dict(zip(processes, (ours, theirs, last), strict=True))

    settings: dict[str, Any] = dict.fromkeys(pipelines.PACKAGES, "1.0") | {"processes": processes, "isa": ["avx2"]}
    settings |= {"pixels": 512, "steps": 25, "sampler": "euler", "guidance_scale": 7.5, "m": 10, "k": 1}
    settings |= {"cores": 2, "cpu": "a processor", "threads": 2}
    return {"settings": settings, "rounds": [turn(20.0, 25.0), turn(22.0, 21.0)]}


def test_the_page_says_where_others_are_ahead() -> None:
    told = "\n".join(section(results()))
    assert "other work took at most 0.10 of a core" in told
    assert "| f32 | tgate openvino f32 | gated | 21.0 | 1.00× (1.00 to 1.00) | 9.0 | 8.0 / 9.0 | - |" in told
    assert "| f32 | OpenVINO GenAI f32 | plain | 23.0 | 1.10× (0.95 to 1.25) | 12.0 | 4.0 / 5.0 | 0.5 |" in told
    assert "faster than tgate openvino f32 gated is none" in told
    ahead = "OpenVINO GenAI f32 plain (1.30×), OpenVINO GenAI f32 TaylorSeer (1.30×)"
    assert f"faster than tgate openvino f32 ungated are {ahead}; opened sooner is none" in told
    assert "with less memory of their own is OpenVINO GenAI f32 (4.0 GiB beside 8.0)." in told
    assert "OpenVINO GenAI f32 TaylorSeer draws the picture of plain to the bit: it does nothing here." in told
    assert "stable-diffusion.cpp f32 failed: out of memory" in told
