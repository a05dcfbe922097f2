"""CLIP scores of a small random model, against what the model itself says of texts and pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from tests.tiny_clip import save_clip
from tgate_engine.errors import RequestError
from tgate_runtime.tuning.clip import clip
from tgate_runtime.tuning.quality import psnr

PROMPTS = ["a large red circle", "a small blue square " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return save_clip(tmp_path_factory.mktemp("clip"))


def pictures(count: int, *, seed: int, side: int = 48) -> list[Any]:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), np.uint8)
    return list(np.kron(coarse, np.ones((1, side // 6, side // 6, 1), np.uint8)))


def cosines(folder: Path, given: list[Any]) -> Any:
    """What the model's own forward pass says, [pictures, texts]."""
    model, processor = CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=given, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        return (model(**inputs).logits_per_image / model.logit_scale.exp()).numpy()


def test_a_score_is_a_hundred_cosines_less_those_of_the_ungated_picture(folder: Path) -> None:
    ours, theirs = pictures(2, seed=1), pictures(2, seed=2)
    metric = clip(folder)
    told = metric.compare(ours, theirs, PROMPTS)
    expected = 100 * np.diag(cosines(folder, ours) - cosines(folder, theirs))
    np.testing.assert_allclose(told["clip"], expected, atol=1e-3)
    assert np.ptp(expected) > 0.5
    assert list(told["psnr"]) == [psnr(*pair) for pair in zip(ours, theirs, strict=True)]
    assert set(told) == {metric.name, *metric.beside}
    assert metric.compare(ours, ours, PROMPTS)["clip"] == pytest.approx([0, 0])


def test_a_video_is_worth_what_its_frames_are_in_the_mean(folder: Path) -> None:
    frames, still = pictures(20, seed=3), pictures(1, seed=4)[0]
    told = clip(folder).compare([np.stack(frames)], [np.stack([still] * 20)], PROMPTS[:1])
    expected = 100 * (cosines(folder, frames)[:, 0].mean() - cosines(folder, [still])[0, 0])
    assert told["clip"] == pytest.approx([expected], abs=1e-3)


def test_another_model_is_another_judge(folder: Path, tmp_path: Path) -> None:
    other = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        other.logit_scale.add_(1)
    other.save_pretrained(tmp_path)
    CLIPProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    assert clip(folder).judge == clip(folder).judge != clip(tmp_path).judge


def test_what_is_no_model_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    def refused(place: Path) -> str:
        with pytest.raises(RequestError) as error:
            clip(place)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no directory" in refused(tmp_path / "none")
    assert "it has no file of weights" in refused(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    assert "no CLIP model that can be read" in refused(tmp_path)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert clip(tmp_path).judge
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "its weights lack vision_model.encoder.layers.2" in refused(tmp_path)


def test_without_pytorch_the_library_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError) as missing:
        clip(folder)
    assert missing.value.name == "torch"
