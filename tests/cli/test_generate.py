"""``tgate generate``, on the toy bundle: what it draws, from what, and where that goes."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cli.running import PROMPT, Run, fails
from tests.toy_bundle import edit_manifest
from tests.toy_model import LATENTS
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_runtime.generators import noise
from tgate_runtime.pipeline import Pipeline


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The files of the graphs that commands have loaded when they draw."""
    files: set[str] = set()
    draw = Pipeline.__call__

    def drawing(self: Pipeline, *arguments: Any, **options: Any) -> Any:
        for spec in (spec for shape in self.session.manifest.shapes for spec in shape.graphs.values()):
            with contextlib.suppress(EngineError):
                self.session.executable(spec)
                files.add(spec.file)
        return draw(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "__call__", drawing)
    return files


# --- pictures -----------------------------------------------------------------------------------


def test_generate_equals_the_pipeline(run: Run, good: Path, tmp_path: Path) -> None:
    picture, latents = tmp_path / "out.png", tmp_path / "y.npy"
    status, out, err = run(
        *("generate", good, PROMPT, "--seed", 0, "--negative-prompt", "blue", "--guidance-scale", 4.5),
        *("--save-latents", latents, "--output", picture, "--threads", 1, "--quiet"),
    )
    assert (status, out, err) == (0, f"{picture}\n", "")
    with Pipeline.open(good, threads=1) as pipe:
        drawn = pipe(PROMPT, seed=0, negative_prompt="blue", guidance_scale=4.5)
    np.testing.assert_array_equal(np.load(latents), drawn.latents)
    with Image.open(picture) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), np.asarray(drawn.images[0]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "y.npy"]


def test_a_drawn_seed_is_reported_and_draws_the_same_again(run: Run, good: Path, tmp_path: Path) -> None:
    _, _, err = run("generate", good, PROMPT, "--output", tmp_path / "a.png")
    seed = next(line.split()[1] for line in err.splitlines() if line.startswith("seed "))
    run("generate", good, PROMPT, "--output", tmp_path / "b.png", "--seed", seed)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_without_output_the_next_free_numbers_are_taken(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy-0002.png").write_text("mine")
    for count, names in ((1, ["toy-0001.png"]), (2, ["toy-0003.png", "toy-0004.png"])):
        status, out, _ = run("generate", good, PROMPT, "--seed", 3, "--num-images", count)
        assert (status, out.splitlines()) == (0, names)
    assert Path("toy-0001.png").read_bytes() == Path("toy-0003.png").read_bytes() != Path("toy-0004.png").read_bytes()
    assert Path("toy-0002.png").read_text() == "mine"


def test_every_image_is_reported_with_its_seed(run: Run, good: Path, tmp_path: Path) -> None:
    """Image j of seed s is the one image of seed s + j."""
    _, _, err = run("generate", good, PROMPT, "--num-images", 3, "--output", tmp_path / "a.png")
    ((first, last),) = ((int(w[1]), int(w[3])) for w in map(str.split, err.splitlines()) if w[0] == "seeds")
    assert last == first + 2
    assert f"seeds {first} to {last}" in err.splitlines()
    run("generate", good, PROMPT, "--output", tmp_path / "b.png", "--seed", last)
    assert (tmp_path / "a-2.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    _, _, err = run("generate", good, PROMPT, "--num-images", 2, "--seed", 1, "--output", tmp_path / "c.png")
    assert "seed" not in err


def test_a_size_and_a_plan_are_all_that_is_loaded(run: Run, sizes: Path, tmp_path: Path, loaded: set[str]) -> None:
    drawn = ("generate", sizes, PROMPT, "--seed", 5, "--threads", 1)
    assert run(*drawn, "--size", "8x2", "--plan", "early", "--output", tmp_path / "a.png")[0] == 0
    assert loaded == {"text.onnx", "decoder-8x2.onnx", "full-8x2.onnx", "reuse_cross-8x2.onnx"}
    with Image.open(tmp_path / "a.png") as image, Pipeline.open(sizes, threads=1) as pipe:
        assert image.size == (8, 2)
        np.testing.assert_array_equal(
            np.asarray(image), np.asarray(pipe(PROMPT, seed=5, size="8x2", plan="early").images[0])
        )
    loaded.clear()
    assert run(*drawn, "--output", tmp_path / "b.png")[0] == 0
    assert loaded == {"text.onnx", "decoder.onnx", "full.onnx", "reuse_self.onnx", "reuse_cross.onnx"}
    with Image.open(tmp_path / "b.png") as image:
        assert image.size == (4, 4)


def test_a_plan_of_a_file(run: Run, sizes: Path, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(Bundle.open(sizes).manifest.plan("early").to_json()))
    for plan, output in (("early", "a.png"), (tmp_path / "p.json", "b.png"), ("default", "c.png")):
        assert run("generate", sizes, PROMPT, "--seed", 2, "--plan", plan, "--output", tmp_path / output)[0] == 0
    pictures = [(tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_plan_of_the_bundle_comes_before_a_file_of_its_name(
    run: Run, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_manifest(toy, lambda d: d["plans"].update({"p.json": {**d["plans"]["ungated"], "name": "p.json"}}))
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text("not a plan")
    assert run("generate", toy, PROMPT, "--plan", "p.json", "--output", "x.png")[0] == 0


def test_the_noise_of_another_generator(run: Run, good: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", noise(4, LATENTS, generator="torch-cuda")[None])
    ways: tuple[tuple[object, ...], ...] = (
        ("--generator", "torch-cuda"),
        ("--initial-latents", tmp_path / "x.npy"),
        ("--generator", "numpy"),
    )
    for i, way in enumerate(ways):
        assert run("generate", good, PROMPT, "--seed", 4, *way, "--output", tmp_path / f"{i}.png")[0] == 0
    pictures = [(tmp_path / f"{i}.png").read_bytes() for i in range(3)]
    assert pictures[0] == pictures[1] != pictures[2]


def test_several_pictures_and_given_latents(run: Run, good: Path, tmp_path: Path) -> None:
    start = np.stack([noise(9 + j, LATENTS) for j in range(2)])
    np.save(tmp_path / "x.npy", start)
    start_at = ("--initial-latents", tmp_path / "x.npy")
    status, out, _ = run("generate", good, PROMPT, "--num-images", 2, *start_at, "--output", tmp_path / "a.png")
    assert status == 0
    assert out.splitlines() == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    run("generate", good, PROMPT, "--num-images", 2, "--seed", 9, "--output", tmp_path / "b.png")
    for j in range(2):
        assert (tmp_path / f"a-{j}.png").read_bytes() == (tmp_path / f"b-{j}.png").read_bytes()


@pytest.mark.parametrize(("suffix", "kind"), [("png", "PNG"), ("JPG", "JPEG"), ("webp", "WEBP"), ("bmp", "BMP")])
def test_the_suffix_chooses_the_format(run: Run, good: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    assert run("generate", good, PROMPT, "--output", tmp_path / f"x.{suffix}")[0] == 0
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.format == kind


def test_an_empty_prompt_works(run: Run, good: Path, tmp_path: Path) -> None:
    assert run("generate", good, "", "--output", tmp_path / "x.png")[0] == 0


def test_a_long_prompt_warns_even_when_quiet(run: Run, good: Path, tmp_path: Path) -> None:
    prompt = "a large red circle above a Small  blue square"
    status, _, err = run("generate", good, prompt, "--seed", 1, "--output", tmp_path / "x.png", "--quiet")
    assert status == 0
    (line,) = err.splitlines()
    assert line.startswith("tgate: warning: ")
    assert line.endswith('left out: "Small blue square"')


# --- requests that are bad ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--output", "x.xyz"], "the suffix '.xyz' is no picture format; use one of .png"),
        (["--output", "noext"], "the suffix '' is no picture format"),
        (["--output", "deep/x.png"], "there is no directory deep"),
        (["--output", "is.png"], "is.png is a directory"),
        (["--output", "/proc/x.png"], "/proc/x.png cannot be written ("),
        (["--output", "x.png", "--save-latents", "/proc/y.npy"], "/proc/y.npy cannot be written ("),
        (["--output", "x.png", "--save-latents", "deep/y.npy"], "there is no directory deep"),
        (["--output", "x.png", "--plan", "other"], "has no plan 'other'; it has default"),
        (["--output", "x.png", "--plan", "none.json"], "none.json: there is no such plan file"),
        (["--output", "x.png", "--plan", "text.json"], "text.json is not a plan file"),
        (["--output", "x.png", "--plan", "list.json"], "list.json holds list, not a plan"),
        (["--output", "x.png", "--plan", "empty.json"], "empty.json: a plan is malformed"),
        (["--output", "x.png", "--plan", "other.json"], "runs graph 'elsewhere'; the bundle has full"),
        (["--output", "x.png", "--generator", "other"], "no generator 'other'; use one of numpy, torch-cuda"),
        (["--output", "x.png", "--guidance-scale", "1"], "export with --guidance-scale 1"),
        (["--output", "x.png", "--initial-latents", "none.npy"], "none.npy: there is no such file"),
        (["--output", "x.png", "--initial-latents", "text.npy"], "text.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "empty.npy"], "empty.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "pickle.npy"], "pickle.npy is not an array"),
        (["--output", "x.png", "--initial-latents", "many.npz"], "many.npz holds several arrays"),
        (["--output", "x.png", "--initial-latents", "shape.npy"], "float32 of shape [2, 2, 4]"),
        (["--output", "x.png", "--initial-latents", "double.npy"], "got float64"),
        (["--output", "x.png", "--initial-latents", "nan.npy"], "not finite"),
    ],
)
def test_a_request_that_cannot_be_served(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("is.png").mkdir()
    Path("text.npy").write_text("not an array")
    Path("empty.npy").write_bytes(b"")
    np.save("pickle.npy", np.array([{}], object), allow_pickle=True)
    np.savez("many.npz", a=np.zeros(1), b=np.zeros(1))
    np.save("shape.npy", np.zeros((2, 2, 4), np.float32))
    np.save("double.npy", np.zeros((1, *LATENTS)))
    np.save("nan.npy", np.full((1, *LATENTS), np.nan, np.float32))
    Path("text.json").write_text("not a plan")
    Path("list.json").write_text("[]")
    Path("empty.json").write_text("{}")
    plan = json.dumps(Bundle.open(good).manifest.plan("ungated").to_json())
    Path("other.json").write_text(plan.replace('"full"', '"elsewhere"'))
    before = sorted(p.name for p in tmp_path.iterdir())
    fails(run("generate", good, PROMPT, *arguments), says)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
