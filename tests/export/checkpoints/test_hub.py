"""Hub ids, offline: what lies in the hub's cache is found there, and what does not is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hub import cached, hub
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint, locate

__all__ = ["hub"]  # a fixture


def test_a_cached_repository_is_found_offline(hub: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    directory = tiny_checkpoint("conv_projection")
    snapshot = cached(hub, "owner/name", directory)
    found = locate("owner/name", ["unet", "vae"])
    assert found == snapshot
    read, want = DirectoryCheckpoint(found), DirectoryCheckpoint(directory)
    assert read.config("unet") == want.config("unet")
    assert read.tensors("unet").read("conv_in.weight").equal(want.tensors("unet").read("conv_in.weight"))


def test_a_repository_of_one_component_is_found_offline(hub: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    """As LCM-SDXL's U-Net lies in a repository of its own, in no folder."""
    directory = tiny_checkpoint("conv_projection")
    cached(hub, "owner/base", directory)
    alone = cached(hub, "owner/unet", directory / "unet")
    assert locate("owner/unet", [""]) == alone
    checkpoint = DirectoryCheckpoint(locate("owner/base", ["unet", "vae"]), elsewhere={"unet": alone})
    assert checkpoint.tensors("unet").directory == alone
    assert checkpoint.config("unet") == DirectoryCheckpoint(directory).config("unet")


def test_a_repository_that_is_not_cached_is_one_line(hub: Path) -> None:
    with pytest.raises(
        ExportError, match=r"'owner/missing' .*could not be fetched from the hub .*--checkpoint"
    ) as caught:
        locate("owner/missing", ["unet", "vae"])
    assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist_is_no_hub_id(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"does not exist; --checkpoint wants"):
        locate(str(tmp_path / "nowhere"), ["unet"])
    with pytest.raises(ExportError, match=r"does not exist; --checkpoint wants"):
        locate("./nowhere", ["unet"])


def test_a_file_is_no_directory(hub: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"")
    with pytest.raises(ExportError, match=r"is neither a directory nor a \.safetensors file"):
        locate(str(file), ["unet"])
