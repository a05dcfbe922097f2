"""``tgate generate --ip-adapter-image`` and ``tgate-export --ip-adapter``, on a toy: what is drawn and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.running import PROMPT, Run, fails
from tests.toy_bundle import Toy, build
from tgate_cli import main as cli
from tgate_runtime.control import Control
from tgate_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def refers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("refers") / "toy", Toy(refers=True, controls=("edges",)))


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    path = tmp_path / "seen.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 6, 3), np.uint8)).save(path)
    return path


def test_it_draws_what_the_pipeline_draws_and_draws_it_again(
    run: Run, refers: Path, seen: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    options = ("--ip-adapter-image", seen, "--ip-adapter-scale", "0.5", "--seed", "3", "--quiet")
    assert run("generate", refers, PROMPT, *options, "--output", out)[0] == 0
    with Pipeline.open(refers, threads=1) as pipe, Image.open(seen) as image:
        drawn = pipe(PROMPT, seed=3, ip_adapter_image=image, ip_adapter_scale=0.5).images[0]
    with Image.open(out) as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(drawn))
    fails(run("generate", refers, "--from", out, "--output", again, "--quiet"), "was drawn from --ip-adapter-image")
    status, _, err = run("generate", refers, "--from", out, "--ip-adapter-image", seen, "--output", again)
    assert (status, again.read_bytes()) == (0, out.read_bytes())
    assert "this is not how" not in err
    other = tmp_path / "other.png"
    Image.new("RGB", (9, 6), "red").save(other)
    status, _, err = run("generate", refers, "--from", out, "--ip-adapter-image", other, "--output", again)
    assert status == 0
    assert "ip adapter image" in err


def test_beside_a_control_picture(run: Run, refers: Path, seen: Path, tmp_path: Path) -> None:
    edges, out, again = tmp_path / "edges.png", tmp_path / "out.png", tmp_path / "again.png"
    Image.fromarray(np.random.default_rng(2).integers(0, 256, (4, 4, 3), np.uint8)).save(edges)
    pictures = ("--ip-adapter-image", seen, "--control", f"edges={edges}")
    options = (*pictures, "--ip-adapter-scale", "0.5", "--control-scale", "edges=0.7", "--seed", "3", "--quiet")
    assert run("generate", refers, PROMPT, *options, "--output", out)[0] == 0
    with Pipeline.open(refers, threads=1) as pipe, Image.open(seen) as image, Image.open(edges) as looked:
        asked: dict[str, Any] = {"ip_adapter_image": image, "ip_adapter_scale": 0.5}
        control = {"edges": Control(image=looked, scale=0.7)}
        drawn = pipe(PROMPT, seed=3, controls=control, **asked).images[0]
        for less in ({"controls": control}, asked):
            assert pipe(PROMPT, seed=3, **less).images[0] != drawn
    with Image.open(out) as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(drawn))
    assert run("generate", refers, "--from", out, *pictures, "--output", again, "--quiet")[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_refused(run: Run, refers: Path, good: Path, seen: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out.png", "--quiet")
    no_adapter = run("generate", good, PROMPT, "--ip-adapter-image", seen, *out)
    fails(no_adapter, "the bundle has no IP-Adapter, and takes no ip_adapter_image; export it again with --ip-adapter")
    fails(run("generate", refers, PROMPT, "--ip-adapter-scale", "0.5", *out), "ip_adapter_scale would change nothing")
    scaled = run("generate", refers, PROMPT, "--ip-adapter-image", seen, "--ip-adapter-scale", "0", *out)
    fails(scaled, "from 0.001 to 10, got 0")
    seen.write_bytes(b"x")
    fails(run("generate", refers, PROMPT, "--ip-adapter-image", seen, *out), "is not a picture that can be read")
    assert not (tmp_path / "out.png").exists()


def test_export_refuses_before_pytorch_is_loaded(run: Run, tmp_path: Path) -> None:
    adapter, out = tmp_path / "a.safetensors", tmp_path / "b"

    def refused(says: str, *options: object, model: str = "sd15") -> None:
        fails(run("--model", model, "--output", out, "--quiet", *options, main=cli.export_main), says)
        assert not out.exists()

    refused("IP-Adapter", "--ip-adapter", adapter)
    adapter.touch()
    refused("image_encoder is no directory; --image-encoder wants", "--ip-adapter", adapter)
    refused("--image-encoder would change nothing", "--image-encoder", tmp_path)
    refused("--ip-adapter is for Stable Diffusion and SDXL", "--ip-adapter", adapter, model="pixart-alpha")
    both = ("--ip-adapter", adapter, "--image-encoder", tmp_path)
    refused("--weights random reads no checkpoint; leave out --ip-adapter", *both, "--weights", "random")
    refused("--ip-adapter would change nothing without reference", *both, "--components", "text,denoiser,decoder")
    refused("ControlNet edges: ./nowhere is no directory", *both, "--controlnet", "edges=./nowhere")
    refused("got denoiser, reference", "--components", "denoiser,reference")
