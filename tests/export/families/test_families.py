"""The table of models: names, where weights are, settings that make sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgate_engine.errors import ExportError
from tgate_export.families import EMBEDDED, MODELS, find_model, location
from tgate_export.methods.base import Settings


@pytest.mark.parametrize("name", MODELS)
def test_a_models_settings_make_a_trajectory(name: str) -> None:
    model = MODELS[name]
    Settings(steps=model.steps, gate=model.gate, self_interval=model.self_interval, warm_up=model.warm_up)
    least, most = model.batch
    assert 1 <= least <= most
    assert model.licence


def test_embedded_models_lie_in_the_package_and_are_exported_for_batches() -> None:
    embedded = [name for name, model in MODELS.items() if model.checkpoint == EMBEDDED]
    assert embedded == ["mini-sdxl", "mini-pixart"]
    for name in embedded:
        assert (Path(location(name)) / "model_index.json").is_file()
        assert MODELS[name].batch == (1, 4)


def test_a_name_that_is_nearly_right() -> None:
    assert find_model("sdxl") is MODELS["sdxl"]
    with pytest.raises(ExportError, match=r"unknown model 'sdlx'; did you mean 'sdxl'\?"):
        find_model("sdlx")
