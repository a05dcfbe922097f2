"""``tgate-run`` as a user meets it: the same pictures as ``tgate generate``, and one clear line for everything else."""

from __future__ import annotations

import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cpp.library import onnxruntime_library
from tests.toy_bundle import build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_runtime import Pipeline
from tgate_runtime.mini import place_of

PROMPT = "a large red circle above a small blue square"


class Runner:
    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self.folder = folder

    def __call__(self, *words: object, library: str | None = None, fails: int = 0) -> str:
        """Standard output, or with ``fails`` the one line of an end with that status."""
        environment = {**os.environ, "TGATE_ONNXRUNTIME": library or str(onnxruntime_library())}
        done = subprocess.run(
            [self.program, *map(str, words)],
            text=True,
            capture_output=True,
            check=False,
            cwd=self.folder,
            env=environment,
            timeout=120,
        )
        assert done.returncode == fails, done.stderr
        if not fails:
            return done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith("tgate-run: ")
        return line


@pytest.fixture
def run(cpp_build: Path, tmp_path: Path) -> Runner:
    return Runner(cpp_build / "tools/tgate-run", tmp_path)


@pytest.fixture(scope="module")
def bundle() -> Path:
    return place_of("mini")


def test_pictures_and_latents_of_a_prompt(run: Runner, bundle: Path, tmp_path: Path) -> None:
    with Pipeline.open(bundle, plans=["default"]) as pipe:
        wanted = pipe(PROMPT, negative_prompt="a star", seed=7, num_images=2, guidance_scale=6.0)
    words = ["--prompt", PROMPT, "--negative-prompt", "a star", "--seed=7", "--num-images", 2, "--guidance-scale", "6"]
    run(bundle, *words, "--output", "out.png", "--save-latents", "out.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-0.png", "out-1.png", "out.npy"]
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), wanted.latents)
    for image in range(2):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out-{image}.png")), wanted.images[image])


def test_latents_and_ids_in_place_of_seed_and_prompt(run: Runner, bundle: Path, tmp_path: Path) -> None:
    with Pipeline.open(bundle, plans=["default"]) as pipe:
        start = np.random.default_rng(1).standard_normal((1, *pipe.session.shapes()[0].latents), np.float32)
        wanted = pipe(PROMPT, initial_latents=start)
        tokenizer = pipe._encoder._text._tokenizers[0]  # type: ignore[union-attr]
        ids, none = (",".join(map(str, tokenizer.encode(text).ids)) for text in (PROMPT, ""))
    np.save(tmp_path / "start.npy", start)
    words = ["--token-ids", ids, "--negative-token-ids", none, "--initial-latents", "start.npy"]
    run(bundle, *words, "--output", "out.png", "--quiet")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), wanted.images[0])


def test_a_video_from_a_picture(run: Runner, family_bundle: object, tmp_path: Path) -> None:
    path = family_bundle("svd_a")[1]  # type: ignore[operator]
    with Pipeline.open(path, plans=["default"]) as pipe:
        width, height = map(int, pipe.session.sizes[0].split("x"))
        picture = Image.fromarray(np.random.default_rng(2).integers(0, 255, (height, width, 3), np.uint8))
        frames = pipe(image=picture, seed=1).videos[0]
    picture.save(tmp_path / "in.png")
    run(path, "--image", "in.png", "--seed", 1, "--output", "out.png")
    for number, frame in enumerate(frames):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out-0-{number:03}.png")), frame)
    line = run(path, "--image", "out-0-000.png", "--size", "64x8", "--output", "x.png", fails=1)
    assert "are wanted; resize it first" in line


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([], 2, "a bundle, and one of --prompt, --token-ids and --image are wanted"),
        (["B"], 2, "one of --prompt"),
        (["B", "--prompt", "a"], 2, "nothing would be kept"),
        (["B", "--prompt", "a", "--token-ids", "1", "--output", "x.png"], 2, "one of --prompt"),
        (["B", "--prompt", "a", "--output", "x.jpg"], 2, "ends in .png"),
        (["B", "--prompt", "a", "--output", "nowhere/x.png"], 2, "there is no folder nowhere/"),
        (["B", "a red circle", "--output", "x.png"], 2, "a prompt goes with --prompt"),
        (["B", "--prompt"], 2, "--prompt takes a value"),
        (["B", "--promt", "a"], 2, "there is no option --promt"),
        (["B", "--prompt", "a", "--seed", "-1"], 2, "--seed takes a whole number from 0"),
        (["B", "--prompt", "a", "--seed", "9223372036854775808"], 2, "--seed takes a whole number from 0"),
        (["B", "--prompt", "a", "--seed", "1e3"], 2, "--seed takes a whole number from 0"),
        (["B", "--prompt", "a", "--guidance-scale", "much"], 2, "--guidance-scale takes a number"),
        (
            ["B", "--prompt", "a", "--guidance-scale", "0"],
            2,
            "a number other than 0, got '0'; leave it out",
        ),
        (["B", "--prompt", "a", "--guidance-scale", "0x3"], 2, "a number other than 0, got '0x3'"),
        (["B", "--token-ids", "1,,2", "--output", "x.png"], 2, "--token-ids takes a whole number"),
        (["B", "--token-ids", "1", "--token-ids", "2", "--output", "x.png"], 1, "has 1 tokenizers, got ids of 2"),
        (["nowhere", "--prompt", "a", "--output", "x.png"], 1, "there is no such directory"),
        (["B", "--prompt", "a", "--output", "x.png", "--plan", "fast"], 1, "no plan 'fast'"),
        (["B", "--prompt", "a", "--output", "x.png", "--size", "1x1"], 1, "no size 1x1"),
        (["B", "--prompt", "a", "--output", "x.png", "--engine", "tpu"], 1, "use ort-cpu or ort-cuda"),
        (["B", "--prompt", "a", "--output", "x.png", "--initial-latents", "none.npy"], 1, "none.npy cannot be read"),
        (["B", "--prompt", "a", "--output", "x.png", "--generator", "dice"], 1, "numpy"),
        (["B", "--image", "none.png", "--output", "x.png"], 1, "none.png cannot be read"),
    ],
)
def test_bad_input(run: Runner, bundle: Path, tmp_path: Path, words: list[str], status: int, says: str) -> None:
    line = run(*(bundle if word == "B" else word for word in words), fails=status)
    assert says in line
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_arrays(run: Runner, bundle: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.npy"
    np.save(good, np.zeros((1, 2, 3), np.float32))
    content = good.read_bytes()
    bad = {
        "empty": b"",
        "short": content[:60],
        "cut": content[:-1],
        "long": content + b"\0",
        "text": b"\x93NUMPY" + b"x" * 200,
        "double": content.replace(b"<f4", b"<f8"),
        "huge": content.replace(b"(1, 2, 3)", b"(9999999,99999999999)"[:9].ljust(9)),
        "order": content.replace(b"False", b"True "),
    }
    for name, data in bad.items():
        path = tmp_path / f"{name}.npy"
        path.write_bytes(data)
        assert "is no NumPy file" in run(
            bundle, "--prompt", "a", "--output", "x.png", "--initial-latents", path, fails=1
        )
    line = run(bundle, "--prompt", "a", "--output", "x.png", "--initial-latents", good, fails=1)
    assert "initial latents must be" in line
    flat = np.zeros((1, math.prod(Bundle.open(bundle).manifest.shapes[0].latents)), np.float32)
    np.save(tmp_path / "flat.npy", flat)  # as many numbers, and Python takes no such array either
    line = run(bundle, "--prompt", "a", "--output", "x.png", "--initial-latents", "flat.npy", fails=1)
    assert f"flat.npy has the shape {[*flat.shape]}, and [1, " in line
    os.mkfifo(tmp_path / "pipe.npy")
    # A pipe would keep the reader waiting; it is told before.
    assert "pipe.npy" in run(bundle, "--prompt", "a", "--output", "x.png", "--initial-latents", "pipe.npy", fails=1)


def test_a_picture_of_a_bundle_without_a_decoder(run: Runner, tmp_path: Path) -> None:
    """Is refused before anything is drawn; the latents are there to be had."""
    toy = build(tmp_path / "toy", goldens=False)
    edit_manifest(toy, lambda d: d["shapes"][0]["graphs"].pop("decoder"))
    line = run(toy, "--prompt", "a", "--output", "x.png", "--save-latents", "x.npy", fails=1)
    assert "has no decoder (--components), so there is no picture; give --save-latents" in line
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    run(toy, "--prompt", "a", "--save-latents", "x.npy")


def test_without_onnxruntime(run: Runner, bundle: Path) -> None:
    line = run(bundle, "--prompt", "a", "--output", "x.png", library="/nowhere/libonnxruntime.so", fails=1)
    assert "ONNX Runtime cannot be loaded" in line
    assert "$TGATE_ONNXRUNTIME" in line


def test_help_and_version(run: Runner) -> None:
    assert run("--version") == "tgate-run 0.1.0\n"
    assert run("--help").startswith("usage: tgate-run BUNDLE")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([run.program, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "standard output" in done.stderr
