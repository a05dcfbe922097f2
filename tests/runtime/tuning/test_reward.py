"""Rewards by small random models, against what ImageReward's own package said of them (tests/oracle_reward.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_reward import PROMPTS, SEEDS, TINY, VOCABULARY, pictures, save_reward, weights
from tgate_engine.errors import RequestError
from tgate_runtime.tuning.quality import psnr
from tgate_runtime.tuning.reward import reward, seen

GOLDEN = json.loads((Path(__file__).parents[2] / "data" / "image_reward.json").read_text())["scores"]
ONE = TINY["one"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return save_reward(tmp_path_factory.mktemp("reward"), ONE)


@pytest.mark.parametrize("name", TINY)
def test_a_reward_is_the_authors_less_that_of_the_ungated_picture(name: str, tmp_path: Path) -> None:
    ours, theirs = (pictures(seed) for seed in SEEDS)
    metric = reward(save_reward(tmp_path, TINY[name]))
    told = metric.compare(ours, theirs, PROMPTS)
    own, ungated = np.array(GOLDEN[name])
    np.testing.assert_allclose(told["ungated_reward"], ungated, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(told["reward"], own - ungated, rtol=1e-4, atol=1e-4)
    assert np.ptp(own - ungated) > 0.1
    assert list(told["psnr"]) == [psnr(*pair) for pair in zip(ours, theirs, strict=True)]
    assert set(told) == {metric.name, *metric.beside}
    assert metric.compare(ours, ours, PROMPTS)["reward"] == [0] * len(PROMPTS)


def test_a_video_is_worth_what_its_frames_are_in_the_mean(folder: Path) -> None:
    frames = np.random.default_rng(3).integers(0, 256, (11, 40, 57, 3), np.uint8)
    metric, prompt = reward(folder), PROMPTS[:1]
    each = [metric.compare([frame], [frames[0]], prompt)["reward"][0] for frame in frames]
    told = metric.compare([frames], [np.stack([frames[0]] * 11)], prompt)
    assert told["reward"] == pytest.approx([np.mean(each)], abs=1e-4)
    assert np.ptp(each) > 0.01


def test_the_middle_of_a_picture_is_looked_at() -> None:
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    assert seen(wide, 32).shape == (3, 32, 32)
    assert np.ptp(seen(wide, 32)[0]) == 0
    assert (seen(wide, 32) > 0).all()
    assert (seen(wide.transpose(1, 0, 2), 32) > 0).all()


def test_another_model_is_another_judge_whatever_its_file(folder: Path, tmp_path: Path) -> None:
    place = save_reward(tmp_path / "same", ONE)
    (place / "ImageReward.pt").unlink()
    save_file(weights(ONE), place / "ImageReward.safetensors")
    judge = reward(folder).judge
    assert reward(place).judge == judge
    text = place / "med_config.json"
    text.write_text(json.dumps(ONE.med_config | {"num_attention_heads": 2}))
    assert reward(place).judge != judge
    text.write_text(json.dumps(ONE.med_config))
    (place / "vocab.txt").write_text("\n".join(sorted(VOCABULARY)) + "\n")
    assert reward(place).judge != judge
    save_reward(place, ONE)
    (place / "ImageReward.safetensors").unlink()
    torch.save(weights(ONE) | {"mlp.layers.7.bias": torch.ones(1)}, place / "ImageReward.pt")
    assert reward(place).judge != judge


def test_what_is_no_imagereward_is_refused_in_one_line(tmp_path: Path) -> None:
    place = tmp_path / "model"

    def refused() -> str:
        with pytest.raises(RequestError) as error:
            reward(place)
        assert "\n" not in str(error.value)
        return str(error.value)

    def with_weights(changed: dict[str, Any]) -> str:
        save_reward(place, ONE)
        torch.save({name: each for name, each in (weights(ONE) | changed).items() if each is not None}, file)
        return refused()

    def with_config(changed: dict[str, Any]) -> str:
        save_reward(place, ONE)
        data = {name: each for name, each in (ONE.med_config | changed).items() if each is not None}
        (place / "med_config.json").write_text(json.dumps(data))
        return refused()

    file = place / "ImageReward.pt"
    assert "there is no directory" in refused()
    place.mkdir()
    assert "it has no ImageReward.pt or ImageReward.safetensors" in refused()
    file.write_bytes(b"nothing")
    assert "med_config.json holds no configuration (" in refused()
    (place / "med_config.json").write_text("{")
    assert "med_config.json holds no configuration (" in refused()
    (place / "med_config.json").write_text(json.dumps(ONE.med_config))
    assert "it has no vocab.txt or tokenizer.json" in refused()
    (place / "tokenizer.json").write_text("{")
    assert "holds no tokenizer that can be read" in refused()
    (place / "tokenizer.json").unlink()
    (place / "vocab.txt").write_text("\n".join(VOCABULARY[:-1]) + "\n")
    assert f"it has {len(VOCABULARY) + 1} words, its network {len(VOCABULARY) + 2};" in refused()
    (place / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    assert "holds no weights that can be read" in refused()

    assert "it lacks blip.visual_encoder.pos_embed" in with_weights({"blip.visual_encoder.pos_embed": None})
    lost = "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
    assert f"it lacks {lost}" in with_weights({lost: None})
    assert f"its {lost} is (24, 24), not (24, 64)" in with_weights({lost: torch.zeros(24, 24)})
    assert "it lacks mlp.layers.6.weight" in with_weights({"mlp.layers.6.weight": None})
    assert "mlp.layers.0.weight is (1024, 25), not (1024, 24)" in with_weights(
        {"mlp.layers.0.weight": torch.zeros(1024, 25)}
    )
    patches = {"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(96, 3, 8, 8)}
    assert "its vision is 96 wide, no multiple of 64, in patches of 8" in with_weights(patches)
    patches = {"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(96, 3)}
    assert "patch_embed.proj.weight is (96, 3), not" in with_weights(patches)

    assert "med_config.json: 'fusion_layer' is not known here" in with_config({"fusion_layer": 6})
    assert "'hidden_size' is missing" in with_config({"hidden_size": None})
    assert "hidden_act: expected one of gelu, got 'relu'" in with_config({"hidden_act": "relu"})
    assert "add_cross_attention: expected true, got false" in with_config({"add_cross_attention": False})
    assert "hidden_size is 24, no multiple of num_attention_heads, 5" in with_config({"num_attention_heads": 5})
    assert "at least 35, got 34" in with_config({"max_position_embeddings": 34})
    assert "encoder.layer.2" in with_config({"num_hidden_layers": 3})


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_what_is_not_installed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError) as missing:
        reward(folder)
    assert missing.value.name == name
