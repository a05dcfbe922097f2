"""Sana-Sprint as published: one half, time as an angle, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.export.families.published import published
from tests.tiny_flow import load_tiny_flow, make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.embed import embed
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.sampling import compile_sampler
from tgate_export.schedulers import make_scheduler


@pytest.mark.parametrize("name", ["sana-sprint-1.6b", "sana-sprint-0.6b"])
def test_two_steps_of_angles_and_guidance_as_an_input(name: str) -> None:
    model, checkpoint = published(name)
    size = model.family.default_size(checkpoint)
    assert size == Size(height=1024, width=1024)
    assert model.family.latents(checkpoint, size) == (32, 32, 32)
    assert [model.family.guidance(checkpoint, scale) for scale in (0.0, 4.5)] == ["embedded", "embedded"]
    sampler = compile_sampler(model.sampler, model.family.scheduler_config(checkpoint, size), model.steps)
    assert [call.timestep for call in sampler.calls] == pytest.approx([1.5708, 1.3])
    assert (model.method, model.steps, model.gate) == ("tgate", 2, 1)


def test_diffusers_pipeline_is_asked_for_its_own_angles(tmp_path: Path) -> None:
    pipe = load_tiny_flow(make_tiny_flow(tmp_path / "checkpoint", "sprint_a"), "sprint_a")
    pipe.scheduler = make_scheduler("scm", {"_class_name": "SCMScheduler"})
    family = find_model("sana-sprint-1.6b").family
    asked = family.call(pipe, {"prompt_embeds.positive": None, "prompt_mask.positive": None}, 4.5, 0.0)
    assert asked["intermediate_timesteps"] is None
    for steps, angles in ((1, [1.5708, 0.0]), (2, [1.5708, 1.3, 0.0]), (4, [1.5708, 1.1781, 0.7854, 0.3927, 0.0])):
        pipe.scheduler.set_timesteps(steps, device="cpu", max_timesteps=1.5708, intermediate_timesteps=None)
        assert pipe.scheduler.timesteps.tolist() == pytest.approx(angles)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"guidance_embeds": False}, "guidance_embeds = false.*exported by --model sana-1.6b"),
        ({"out_channels": 16}, "takes 8 channels and gives 16; SanaSprintPipeline wants as many"),
        ({"in_channels": 12, "out_channels": 12}, "takes 12 channels, its latents have 8"),
        ({"cross_attention_dim": None}, "cross_attention_dim = null"),
    ],
)
def test_what_the_pipeline_would_not_do_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "sprint_a")
    file = root / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    checkpoint = DirectoryCheckpoint(root)
    with pytest.raises(ExportError, match=said):
        find_model("sana-sprint-1.6b").family.check(checkpoint)


def test_a_checkpoint_of_sana_and_a_negative_prompt_are_refused(tmp_path: Path) -> None:
    family = find_model("sana-sprint-1.6b").family
    with pytest.raises(ExportError, match="holds a SanaPipeline; wanted is a SanaSprintPipeline"):
        family.check_pipeline(DirectoryCheckpoint(make_tiny_flow(tmp_path / "sana", "sana_a")))
    root, file = make_tiny_flow(tmp_path / "sprint", "sprint_a"), tmp_path / "prompt.safetensors"
    with pytest.raises(ExportError, match="no negative half of guidance; leave out the negative prompt"):
        embed("sana-sprint-1.6b", ["a"], file, checkpoint=str(root), negative_prompt="b")
    assert not file.exists()
