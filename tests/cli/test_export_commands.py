"""The commands that need export: what reaches it, and what is said where it is missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import Run, fails
from tgate_cli.main import export_main


def test_export_arguments_reach_the_exporter(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    from tgate_export import build as exporter
    from tgate_export.lora import Lora

    seen: list[Any] = []

    def export(settings: Any, report: Any, verify: Any) -> Path:
        seen.append(settings)
        return Path(settings.output)

    monkeypatch.setattr(exporter, "export", export)
    out = tmp_path / "b"
    arguments = (
        *("--model", "mini-sdxl", "--m", 10, "--k", 5, "--steps", 20, "--warm-up", 0, "--fidelity-interval", 2),
        *("--sampler", "ddim", "--guidance-scale", 4, "--checkpoint", "c", "--height", 64, "--width", 128),
        *("--batch", "1:4", "--dtype", "bf16", "--output", out, "--force", "--no-verify", "--frames", 3),
        *("--components", "denoiser,decoder", "--lora", "a.safetensors:0.5", "--lora", "b.safetensors"),
    )
    assert run(*arguments, main=export_main) == (0, f"{out}\n", "")
    assert seen == [
        exporter.ExportSettings(
            model="mini-sdxl",
            m=10,
            k=5,
            steps=20,
            warm_up=0,
            fidelity_interval=2,
            sampler="ddim",
            guidance_scale=4.0,
            checkpoint="c",
            components=["denoiser", "decoder"],
            loras=(Lora(Path("a.safetensors"), 0.5), Lora(Path("b.safetensors"))),
            height=64,
            width=128,
            frames=3,
            batch=(1, 4),
            dtype="bf16",
            output=out,
            force=True,
            verify=False,
        )
    ]


def test_export_without_its_extra_names_it(run: Run, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tgate_export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(run("--model", "mini-sdxl", main=export_main), "pip install 'tgate-engine[export]'")
    plan = ("plan", good, "--name", "x", "--m", 3)
    fails(run(*plan), "compiling a sampler needs torch", "pip install 'tgate-engine[export]'")
