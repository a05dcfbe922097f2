"""Which kind of checkpoint a place is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.hub import hub
from tgate_engine.errors import ExportError
from tgate_export.checkpoints import open_checkpoint
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.checkpoints.published import PublishedCheckpoint
from tgate_export.families import find_model, location

__all__ = ["hub"]  # a fixture


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


@pytest.mark.parametrize(
    "place",
    [
        *("", "-", "--", ".", "..", "a\nb", "a/b\n", "\0", "a/\0", "~nobody-of-that-name", "\x1b[2J/x", "a/b/c", "/"),
        *("x" * 10**5, "a/" + "x" * 10**5, "/" + "x/" * 10**4, "a/..", "../..", "owner/na me", "https://x/y", "é/é"),
        *("/dev/null", "/dev/zero", "x" * 300 + ".safetensors", "\n.safetensors"),
    ],
    ids=lambda place: repr(place)[:30],
)
def test_a_place_of_any_text_ends_in_one_line(place: str, hub: Path) -> None:
    with pytest.raises(ExportError) as caught:
        opened("sd15", place)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


def test_a_hub_id_is_asked_for(hub: Path) -> None:
    with pytest.raises(ExportError, match="could not be fetched from the hub"):
        opened("sd15", "owner/name")


def test_a_single_file_that_is_none(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(ExportError, match="is a FIFO"):
        opened("sd15", str(tmp_path / "a.safetensors"))
