"""Control pictures on the command line: ``tgate generate`` and ``tgate inspect``, on the toy bundle."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.cli.running import Run, beside, fails
from tests.toy_bundle import Toy, build
from tgate_runtime.control import Control
from tgate_runtime.pipeline import Pipeline

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("controls") / "toy", Toy(controls=("edges", "depth"), begins=True))


@pytest.fixture
def edges(tmp_path: Path) -> Path:
    return picture(tmp_path / "edges.png", 0)


@pytest.fixture
def depth(tmp_path: Path) -> Path:
    return picture(tmp_path / "depth.png", 1)


def picture(path: Path, seed: int) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    return path


def draw(run: Run, bundle: Path, out: Path, *more: object) -> NDArray[np.float32]:
    latents = out.with_suffix(".npy")
    status, _, err = run(
        "generate", bundle, PROMPT, "--seed", 1, "--output", out, "--save-latents", latents, "--quiet", *more
    )
    assert (status, err) == (0, "")
    array: NDArray[np.float32] = np.load(latents)
    return array


def test_it_draws_what_a_pipeline_draws(run: Run, bundle: Path, edges: Path, depth: Path, tmp_path: Path) -> None:
    options = ["--control", f"edges={edges}", "--control", f"depth={depth}"]
    options += ["--control-scale", "depth=-0.5", "--control-span", "depth=0.25:0.9", "--control-until-gate", "edges"]
    drawn = draw(run, bundle, tmp_path / "a.png", *options)
    with Pipeline.open(bundle, threads=1) as pipe, Image.open(edges) as one, Image.open(depth) as two:
        controls = {
            "edges": Control(image=one, until_gate=True),
            "depth": Control(image=two, scale=-0.5, start=0.25, end=0.9),
        }
        np.testing.assert_array_equal(drawn, pipe(PROMPT, seed=1, controls=controls).latents)
        assert np.abs(drawn - pipe(PROMPT, seed=1).latents).max() > 1e-3


def test_a_record_draws_it_again(run: Run, bundle: Path, edges: Path, depth: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.png"
    options = ["--control", f"edges={edges}", "--control-scale", "edges=0.7", "--control-until-gate", "edges"]
    drawn = draw(run, bundle, out, *options)
    again = ["generate", bundle, "--from", out, "--output", tmp_path / "b.png", "--save-latents", tmp_path / "b.npy"]
    fails(run(*again), "was drawn with --control edges, of whose picture its record holds the SHA-256 alone")
    status, _, err = run(*again, "--control", f"edges={edges}")
    assert status == 0
    assert "this is not how" not in err
    np.testing.assert_array_equal(np.load(tmp_path / "b.npy"), drawn)
    status, _, err = run(*again, "--control", f"edges={depth}", "--control-scale", "edges=0.5")
    assert status == 0
    assert "this is not how" in err
    assert "ControlNet edges 0.5 of " in err


def test_with_a_picture_to_begin_from(run: Run, bundle: Path, edges: Path, depth: Path, tmp_path: Path) -> None:
    begun = ["--image", depth, "--strength", 0.9]
    steered = draw(run, bundle, tmp_path / "a.png", *begun, "--control", f"edges={edges}")
    assert np.abs(steered - draw(run, bundle, tmp_path / "b.png", *begun)).max() > 1e-3


def test_inspect_tells_them(run: Run, bundle: Path) -> None:
    status, out, _ = run("inspect", bundle)
    assert status == 0
    assert "ControlNet edges: control-edges-negative-positive 100 MACs, control-edges-negative 100 MACs" in out
    data = json.loads(run("inspect", bundle, "--json")[1])
    assert [*data["controls"]] == ["edges", "depth"]
    assert data["controls"]["depth"]["control-depth-negative"] == {"paper": 100, "all": 100}


@pytest.mark.parametrize(
    ("options", "told", "status"),
    [
        (["--control", "canny={edges}"], "the bundle has no ControlNet 'canny'; it has edges, depth", 1),
        (["--control", "edges=/nowhere/x.png"], "/nowhere/x.png", 1),
        (["--control", "edges={text}"], "text.png", 1),
        (["--control", "edges={edges}", "--control-scale", "edges=0"], "the scale of ControlNet 'edges' is 0", 1),
        (["--control", "edges={edges}", "--control-span", "edges=0.9:0.1"], "runs from 0.9 to 0.1 of the way", 1),
        (["--control", "edges={edges}", "--control-span", "edges=0.51:0.55"], "at none of the 8 network calls", 1),
        (
            ["--control", "edges={edges}", "--control-until-gate", "edges", "--plan", "ungated"],
            "plan 'ungated' has no gate",
            1,
        ),
        (["--control", "edges"], "expected NAME=FILE, got 'edges'", 2),
        (["--control", "a.b=x"], "a ControlNet's name is 1 to 64 letters", 2),
        (["--control-scale", "edges=1"], "--control-scale names edges, which no --control gives a picture", 2),
        (["--control", "edges={edges}", "--control-scale", "edges=x"], "expected a finite number, got 'x'", 2),
        (["--control", "edges={edges}", "--control-span", "edges=1"], "expected NAME=START:END", 2),
        (["--control", "edges={edges}", "--control", "edges={edges}"], "--control names edges 2 times", 2),
        (["--control-until-gate", "edges"], "--control-until-gate names edges, which no --control gives", 2),
    ],
)
def test_what_is_refused_writes_nothing(
    run: Run, bundle: Path, edges: Path, tmp_path: Path, options: list[str], told: str, status: int
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no picture")
    out, before = tmp_path / "a.png", {*tmp_path.iterdir()}
    given = [option.format(edges=edges, text=text) for option in options]
    fails(run("generate", bundle, PROMPT, "--seed", 1, "--output", out, *given), told, status=status)
    assert {*tmp_path.iterdir()} == before
    assert beside(bundle) == []
