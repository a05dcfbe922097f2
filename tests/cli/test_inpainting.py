"""``tgate generate --image --mask`` with an inpainting model, on a toy: what is drawn and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.running import PROMPT, Run, fails
from tests.toy_bundle import Toy, build
from tgate_runtime import files
from tgate_runtime.pipeline import Pipeline


@pytest.fixture(scope="module")
def inpaints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("inpaints") / "toy", Toy(begins=True, inpaints=True))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)).save(tmp_path / "in.png")
    return tmp_path / "in.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    Image.fromarray(np.asarray([[0, 0, 255, 255]] * 4, np.uint8)).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def test_it_draws_what_the_pipeline_draws_and_draws_it_again(
    run: Run, inpaints: Path, image: Path, mask: Path, tmp_path: Path
) -> None:
    out, again = tmp_path / "out.png", tmp_path / "again.png"
    pictures = ("--image", image, "--mask", mask)
    assert run("generate", inpaints, PROMPT, *pictures, "--seed", "3", "--output", out, "--quiet")[0] == 0
    with Pipeline.open(inpaints, threads=1) as pipe:
        given: dict[str, Any] = {"image": files.load_picture(image), "mask": files.load_mask(mask)}
        drawn = pipe(PROMPT, seed=3, **given)
        part = pipe(PROMPT, seed=3, strength=0.5, **given)
    with Image.open(out) as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(drawn.images[0]))
    fails(run("generate", inpaints, "--from", out, "--output", again, "--quiet"), "was drawn from --")
    status, _, err = run("generate", inpaints, "--from", out, *pictures, "--output", again)
    assert (status, again.read_bytes()) == (0, out.read_bytes())
    assert "this is not how" not in err
    options = ("--strength", "0.5", "--seed", "3", "--output", out, "--quiet")
    assert run("generate", inpaints, PROMPT, *pictures, *options)[0] == 0
    with Image.open(out) as written:
        np.testing.assert_array_equal(np.asarray(written), np.asarray(part.images[0]))


def test_refused(run: Run, inpaints: Path, image: Path, mask: Path, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out.png", "--quiet")
    fails(run("generate", inpaints, PROMPT, *out), "a request has no image and no mask: give an image and a mask")
    fails(run("generate", inpaints, PROMPT, "--image", image, *out), "a request has no mask")
    fails(run("generate", inpaints, PROMPT, "--mask", mask, *out), "a request has no image")
    given = ("--image", image, "--mask", mask)
    fails(run("generate", inpaints, PROMPT, *given, "--strength", "0.1", *out), "leaves none of 8 steps")
    assert not (tmp_path / "out.png").exists()


def test_it_is_measured_as_any_other(run: Run, inpaints: Path) -> None:
    assert run("bench", inpaints, "--repeats", "1", "--quiet")[0] == 0
