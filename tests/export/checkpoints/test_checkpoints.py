"""Which kind of checkpoint a place is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import open_checkpoint
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.checkpoints.published import PublishedCheckpoint
from tgate_export.families import find_model, location


def opened(model: str, place: str, weights: str = "checkpoint") -> Any:
    family = find_model(model).family
    return open_checkpoint(
        model,
        place,
        weights=weights,
        components=(family.denoiser,),
        build=family.build,
        elsewhere={},
        prefer_half=False,
    )


def test_a_directory_or_the_published_configurations() -> None:
    assert isinstance(opened("mini-pixart", location("mini-pixart")), DirectoryCheckpoint)
    assert isinstance(opened("sd15", "", weights="none"), PublishedCheckpoint)


@pytest.mark.parametrize("name", ["nothing-here", "nothing.safetensors"])
def test_a_place_that_holds_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ExportError, match="nothing"):
        opened("sd15", str(tmp_path / name))
