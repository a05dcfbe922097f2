"""What ``benchmarks.adapters`` compares does the same, and leaves the bundle as it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.adapters import measured
from tests.tiny_families import load_tiny


def test_copies_and_branches_do_the_same(family_bundle: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    checkpoint, shared = family_bundle("sd15_a")
    bundle = shutil.copytree(shared, tmp_path / "bundle")
    before = {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()}
    found = measured(bundle, rank=2, repeats=1, memory="shared", threads=1)
    assert found["apart"] < 1e-4, "weights changed in copies, and a branch beside each layer"
    assert found["changed"] > 1e-3, "the change is seen"
    linear = [
        name
        for name, module in load_tiny(checkpoint, "sd15_a").unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".transformer_blocks." in name
    ]
    assert found["layers"] == len(linear)
    assert set(found["ways"]) == {"plain", "copies", "branch"}
    assert {file: file.read_bytes() for file in bundle.rglob("*") if file.is_file()} == before
