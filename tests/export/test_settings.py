"""What is asked of an export, checked without a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tgate_engine.errors import ExportError, TgateError
from tgate_export.families import MODELS
from tgate_export.settings import ExportSettings, Lora, check_settings, check_text


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_out_is_the_models_own(name: str) -> None:
    model, asked = MODELS[name], check_settings(ExportSettings(model=name))
    settings = asked.method_settings
    assert (settings.steps, settings.gate, settings.self_interval) == (model.steps, model.gate, model.self_interval)
    assert asked.guidance_scale_2 == (model.guidance_scale_2 or model.guidance_scale)
    assert (asked.sampler, asked.guidance_scale, asked.batches) == (model.sampler, model.guidance_scale, (model.batch,))
    sources = [source for source in model.facts.sources if source != "text" or model.facts.text_graph]
    encoder = ("encoder",) if model.facts.from_pictures else ()
    assert asked.components == (*sources, "denoiser", "decoder", *encoder)
    assert asked.method.name == (model.tuned[0] if model.tuned else model.method)
    assert asked.plan_settings == (model.tuned[1] if model.tuned else settings)
    assert ExportSettings(model=name).target == Path("bundles") / name


@pytest.mark.parametrize(
    "named",
    [{"m": 15}, {"method": "tgate"}, {"steps": 30}, {"sampler": "ddim"}, {"guidance_scale": 1.0}, {"k": 2}],
    ids=str,
)
def test_who_names_a_part_of_a_plan_has_the_papers_for_the_rest(named: dict[str, Any]) -> None:
    model, asked = MODELS["mini-pixart"], check_settings(ExportSettings(model="mini-pixart", **named))
    assert model.tuned is not None
    assert asked.method.name == "tgate"
    assert asked.plan_settings == asked.method_settings
    assert (asked.method_settings.gate, asked.method_settings.refresh_interval) == (named.get("m", model.gate), 0)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_known_of_a_family_is_what_its_code_says(name: str) -> None:
    facts, family = MODELS[name].facts, MODELS[name].family
    assert family.facts is facts
    assert ("image" in facts.sources) == bool(family.image_components)
    assert ("text" in facts.sources) == bool(family.text_components)
    assert facts.video == (family.frames_axis is not None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"m": 30}, "number of steps n = 25, got m = 30"),
        ({"steps": 10**6}, "steps \\(n\\) must be from 1 to 1000"),
        ({"sampler": "heun"}, "calls the network twice"),
        ({"dtype": "int4"}, "unknown dtype 'int4'"),
        ({"weights": "some"}, "unknown weights 'some'"),
        ({"weights": "none", "checkpoint": "x"}, "reads no checkpoint"),
        ({"frames": 3}, "--frames is for video models"),
        ({"sizes": [(8, 8)], "height": 8}, "not both"),
        ({"batches": [(1, 2), (2, 4)]}, "may not overlap"),
        ({"guidance_rescale": 1.5}, "from 0 to 1"),
        ({"guidance_scale": float("nan")}, "finite number"),
        ({"loras": [Lora(Path("/nowhere/x"))]}, "LoRA /nowhere/x does not exist"),
        ({"checkpoint": "/nowhere/x"}, "checkpoint /nowhere/x does not exist"),
        ({"checkpoint": "~nobody-of-that-name/x"}, "checkpoint ~nobody-of-that-name/x does not exist"),
        ({"checkpoint": "/" + "x" * 10**5}, "does not exist"),
        ({"checkpoint": "/" + "x/" * 10**4}, "does not exist"),
        ({"checkpoint": "/a\0b\n"}, "does not exist"),
        ({"components": ["text"]}, "the denoiser among them"),
    ],
)
def test_what_no_checkpoint_could_mend(options: dict[str, Any], says: str) -> None:
    with pytest.raises(TgateError, match=says) as caught:
        check_settings(ExportSettings(model="sdxl", **options))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("model", "options", "says"),
    [
        ("svd", {}, "svd is conditioned by an image"),
        ("sdx", {}, "did you mean 'sdxl'"),
        ("sdxl", {"checkpoint": "/nowhere/x"}, "checkpoint /nowhere/x does not exist; --checkpoint wants"),
        ("sdxl", {"clip_skip": 257}, "--clip-skip must be at most 256, got 257"),
        ("opensora", {"clip_skip": 1}, "--clip-skip is for models with CLIP text encoders; opensora has none"),
    ],
)
def test_embeddings_that_no_checkpoint_could_give(model: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ExportError, match=says):
        check_text(model, **{"checkpoint": None, "clip_skip": 0, **options})


def test_embeddings_that_some_checkpoint_may_give(tmp_path: Path) -> None:
    check_text("sdxl", checkpoint=str(tmp_path), clip_skip=256)
    check_text("opensora", checkpoint="some/body", clip_skip=0)


def test_options_that_a_model_does_not_have() -> None:
    for options in ({"clip_skip": 1}, {"guidance_rescale": 0.5}):
        with pytest.raises(ExportError, match="pixart-alpha"):
            check_settings(ExportSettings(model="pixart-alpha", **options))
