"""What export refuses, and that whatever happens nothing on disk is lost or half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.plain import plain
from tests.toy_bundle import build
from tgate_cli.main import export_main
from tgate_engine.bundle import Bundle
from tgate_export import weights

Run = Callable[..., str]
ONE_GRAPH = ("--method", "plain", "--components", "denoiser", "--size", "64x64")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run ``tgate-export`` with arguments it must refuse; gives its one line. Nothing may be left below ``out``."""

    def run(*arguments: str) -> str:
        output = tmp_path / "out" / "bundle"
        before = sorted(tmp_path.rglob("out/**"))
        capsys.readouterr()  # what fixtures printed
        code = export_main([*arguments, "--output", str(output), "--quiet"])
        error = capsys.readouterr().err
        assert code != 0
        assert "Traceback" not in error
        lines = [line for line in error.splitlines() if line.strip()]
        assert len(lines) == 1, error
        assert [p for p in sorted(tmp_path.rglob("out/**")) if p not in before and p.name != "out"] == []
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "mini-sdlx"], ["mini-sdlx", "did you mean 'mini-sdxl'"]),
        (["--model", "mini-sdxl", "--m", "26"], ["m = 26", "between 1 and", "25"]),
        (["--model", "mini-sdxl", "--m", "5", "--steps", "4"], ["m = 5", "n = 4"]),
        (["--model", "mini-sdxl", "--height", "100"], ["height", "multiple of 8", "100", "96 and 104"]),
        (["--model", "mini-sdxl", "--sampler", "dpmpp_2n"], ["dpmpp_2n", "dpmpp_2m"]),
        (["--model", "mini-sdxl", "--batch", "4:1"], ["4:1"]),
        (["--model", "mini-sdxl", "--checkpoint", "./nowhere"], ["./nowhere", "does not exist"]),
    ],
    ids=lambda value: "-".join(value[2:] or value[1:]) if isinstance(value, list) and value[0] == "--model" else "",
)
def test_bad_settings_are_one_line(refused: Run, arguments: list[str], words: list[str]) -> None:
    line = refused(*arguments)
    for word in words:
        assert word in line


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint of the test's own, to damage."""
    return Path(shutil.copytree(tiny_checkpoint("conv_projection"), tmp_path / "checkpoint"))


def _unet(checkpoint: Path) -> Path:
    return checkpoint / "unet" / "diffusion_pytorch_model.safetensors"


def test_a_truncated_checkpoint(refused: Run, checkpoint: Path) -> None:
    data = _unet(checkpoint).read_bytes()
    _unet(checkpoint).write_bytes(data[: len(data) // 2])
    line = refused("--model", "sdxl", "--checkpoint", str(checkpoint))
    assert "diffusion_pytorch_model.safetensors" in line
    assert "download" in line


def test_a_checkpoint_with_a_corrupt_header(refused: Run, checkpoint: Path) -> None:
    data = bytearray(_unet(checkpoint).read_bytes())
    data[8:40] = b"\xff" * 32
    _unet(checkpoint).write_bytes(data)
    assert "not a whole safetensors file" in refused("--model", "sdxl", "--checkpoint", str(checkpoint))


def test_a_checkpoint_without_weights(refused: Run, checkpoint: Path) -> None:
    _unet(checkpoint).unlink()
    assert "has no safetensors weights" in refused("--model", "sdxl", "--checkpoint", str(checkpoint))


def test_a_checkpoint_of_another_pipeline(refused: Run, checkpoint: Path) -> None:
    index = json.loads((checkpoint / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (checkpoint / "model_index.json").write_text(json.dumps(index))
    line = refused("--model", "sdxl", "--checkpoint", str(checkpoint))
    assert "StableDiffusionPipeline" in line
    assert "StableDiffusionXLPipeline" in line


def test_a_checkpoint_whose_denoiser_is_another_architecture(refused: Run, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "unet" / "config.json").read_text())
    config["addition_embed_type"] = None
    (checkpoint / "unet" / "config.json").write_text(json.dumps(config))
    assert "another architecture" in refused("--model", "sdxl", "--checkpoint", str(checkpoint))


def test_a_directory_that_is_no_checkpoint(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refused("--model", "sdxl", "--checkpoint", str(tmp_path / "empty"))


def test_a_file_in_place_of_a_checkpoint(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "is neither a directory nor" in refused("--model", "sdxl", "--checkpoint", str(tmp_path / "file"))


def test_weights_of_another_shape(refused: Run, checkpoint: Path) -> None:
    config = json.loads((checkpoint / "text_encoder" / "config.json").read_text())
    config["intermediate_size"] *= 2
    (checkpoint / "text_encoder" / "config.json").write_text(json.dumps(config))
    line = refused("--model", "sdxl", "--checkpoint", str(checkpoint), "--size", "64x64")
    assert "has shape" in line
    assert "text_encoder" in line


def test_an_output_that_exists(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    target.mkdir()
    (target / "precious.txt").write_text("keep me")
    for extra in ([], ["--force"]):
        assert export_main(["--model", "mini-sdxl", "--output", str(target), "--quiet", *extra]) != 0
        assert str(target) in capsys.readouterr().err
        assert (target / "precious.txt").read_text() == "keep me"


def test_a_full_disk(refused: Run, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    """The disk fills up while the weights are written, after tracing: one line, nothing left."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "_bytes_of", full)
    with plain():
        line = refused("--model", "sdxl", "--checkpoint", str(checkpoint), *ONE_GRAPH)
    assert "no space left" in line.lower()


@pytest.mark.parametrize("seconds", [3.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_a_killed_export_leaves_the_old_bundle(tmp_path: Path, seconds: float) -> None:
    """SIGKILL, which nothing can clean up after, this long after the export has begun to write."""
    target = build(tmp_path / "bundle")
    before = (target / "manifest.json").read_bytes()
    command = [
        sys.executable,
        "-c",
        "import sys; from tgate_cli.main import export_main; sys.exit(export_main())",
        *("--model", "mini-sdxl", "--force", "--output", str(target)),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob(".bundle.staging-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(seconds)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    Bundle.open(target)
    assert (target / "manifest.json").read_bytes() == before
