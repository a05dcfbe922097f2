"""``tgate generate``, on the toy bundle: what it draws, from what, and where that goes."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo
from safetensors.numpy import save_file

from tests import toy_model
from tests.cli.running import PROMPT, Run, fails
from tests.toy_bundle import Toy, build, edit_manifest
from tests.toy_model import LATENTS
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_export.plans import add_plan
from tgate_runtime import files
from tgate_runtime.generators import noise
from tgate_runtime.mini import place_of
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


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


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
    drawn = [pixels(tmp_path / f"{i}.png") for i in range(3)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_pictures_and_given_latents(run: Run, good: Path, tmp_path: Path) -> None:
    start = np.stack([noise(9 + j, LATENTS) for j in range(2)])
    np.save(tmp_path / "x.npy", start)
    start_at = ("--initial-latents", tmp_path / "x.npy")
    status, out, _ = run("generate", good, PROMPT, "--num-images", 2, *start_at, "--output", tmp_path / "a.png")
    assert status == 0
    assert out.splitlines() == [str(tmp_path / "a-0.png"), str(tmp_path / "a-1.png")]
    run("generate", good, PROMPT, "--num-images", 2, "--seed", 9, "--output", tmp_path / "b.png")
    for j in range(2):
        assert pixels(tmp_path / f"a-{j}.png") == pixels(tmp_path / f"b-{j}.png")


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


# --- several prompts ----------------------------------------------------------------------------

PROMPTS = ("a red circle", "a blue square", "a large circle", "small", "a circle above a square")


def test_prompts_of_every_kind_come_in_their_order(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeff# two\r\n\r\n  a large circle \r\nsmall\n\n#small\n".encode())
    lines = io.TextIOWrapper(io.BytesIO(b"a large circle\nsmall\n"))
    ways: dict[str, tuple[object, ...]] = {
        "a": (PROMPTS[0], "--prompt", PROMPTS[1], "--prompts-file", tmp_path / "p.txt"),
        "b": ("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--prompt", PROMPTS[2], "--prompt", PROMPTS[3]),
        "c": ("--prompts-file", "-", "--prompt", PROMPTS[1], "--seed", 3, PROMPTS[0]),
    }
    monkeypatch.setattr(sys, "stdin", lines)
    for name, way in ways.items():
        status, out, _ = run("generate", good, *way, "--seed", 3, "--output", tmp_path / f"{name}.png")
        assert (status, out.splitlines()) == (0, [str(tmp_path / f"{name}-{j}.png") for j in range(4)])
    with Pipeline.open(good, threads=1) as pipe:
        for j, image in enumerate(pipe(PROMPTS[:4], seed=3).images):
            for name in ways:
                assert pixels(tmp_path / f"{name}-{j}.png") == image.tobytes()


def test_images_of_several_prompts_are_numbered_prompt_by_prompt(run: Run, good: Path, tmp_path: Path) -> None:
    """In calls of at most 4 images, however many a prompt has, and with latents and the rest of them joined."""
    given = [word for text in PROMPTS for word in ("--prompt", text)]
    options = ["--seed", 5, "--num-images", 3, "--save-latents", tmp_path / "y.npy", "--json", "--quiet"]
    status, out, err = run("generate", good, *given, *options, "--output", tmp_path / "a.png")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert told["seeds"] == [*range(5, 20)]
    assert told["outputs"] == [str(tmp_path / f"a-{j}.png") for j in range(15)]
    assert [record["prompt"] for record in told["records"]] == [text for text in PROMPTS for _ in range(3)]
    with Pipeline.open(good, threads=1) as pipe:
        result = pipe(PROMPTS, seed=5, num_images=3)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), result.latents)
    assert [pixels(tmp_path / f"a-{j}.png") for j in range(15)] == [image.tobytes() for image in result.images]


def test_what_is_drawn_is_kept_when_a_later_prompt_fails(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw = Pipeline.__call__

    def drawing(self: Pipeline, prompt: Any, **options: Any) -> Any:
        if "a circle above a square" in prompt:
            raise EngineError("out of order")
        return draw(self, prompt, **options)

    monkeypatch.setattr(Pipeline, "__call__", drawing)
    fails(run("generate", good, *[w for text in PROMPTS for w in ("--prompt", text)]), "out of order")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"toy-000{j}.png" for j in range(1, 5)]
    assert [len(pixels(path)) for path in tmp_path.iterdir()] == [48] * 4


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "p.txt holds no prompts: one a line"),
        (b"# only\n \n", "p.txt holds no prompts"),
        (b"a\xff", "p.txt is no text in UTF-8 (invalid start byte at byte 1)"),
        (b"a\n" * 10_001, "got 10001 prompts, at most 10000"),
        (b"a" * (2**24 + 1), "at most 16777216 are read"),
    ],
)
def test_files_that_hold_no_prompts(run: Run, good: Path, tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    fails(run("generate", good, "--prompts-file", tmp_path / "p.txt", "--output", tmp_path / "x.png"), says)


def test_a_prompt_without_quotation_marks(run: Run, good: Path) -> None:
    fails(run("generate", good, "a", "large", "circle"), "put the prompt in quotation marks", status=2)


# --- standard output ----------------------------------------------------------------------------


def test_one_picture_goes_to_standard_output(good: Path, tmp_path: Path) -> None:
    words = ["generate", str(good), PROMPT, "--quiet", "--output"]

    def tgate(*more: str) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "tgate_cli", *words, *more]
        return subprocess.run(command, capture_output=True, timeout=60, check=True)

    done = tgate("-")
    seed = re.fullmatch(rb"seed (\d+)\n", done.stderr)
    assert seed is not None
    tgate(str(tmp_path / "a.png"), "--seed", seed[1].decode())
    assert done.stdout == (tmp_path / "a.png").read_bytes()


def test_what_standard_output_is_not_for(run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    to = ("generate", good, PROMPT, "--output", "-")
    fails(run(*to, "--num-images", 2), "--output - writes one result to standard output, asked for are 2; name a file")
    fails(run(*to, "--json"), "--json and --output - both write to standard output", status=2)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fails(run(*to), "which is a terminal; redirect it")
    assert list(tmp_path.iterdir()) == []


# --- drawn again --------------------------------------------------------------------------------


def test_a_picture_of_mini_is_drawn_again_from_itself(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The second of two; its file, and so its record, is the same to the byte."""
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    add_plan(place_of("mini"), name="short", m=2, steps=3, force=True)
    options = ("--seed", 3, "--plan", "short", "--negative-prompt", "blue", "--guidance-scale", 3.3, "--num-images", 2)
    assert run("generate", "mini", "a green\nstar", *options, "--output", tmp_path / "a.png")[0] == 0
    status, out, err = run("generate", "--from", tmp_path / "a-1.png", "--output", tmp_path / "b.png", "--quiet")
    assert (status, out, err) == (0, f"{tmp_path / 'b.png'}\n", "")
    first, second, again = ((tmp_path / f"{name}.png").read_bytes() for name in ("a-0", "a-1", "b"))
    assert again == second != first


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif", ".PNG"])
def test_a_picture_of_every_format_is_drawn_again_from_itself(
    run: Run, good: Path, tmp_path: Path, suffix: str
) -> None:
    first, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    assert run("generate", good, PROMPT, "--output", first)[0] == 0
    assert run("generate", good, "--from", first, "--output", again)[0] == 0
    assert again.read_bytes() == first.read_bytes()


@pytest.fixture
def drawn(run: Run, good: Path, tmp_path: Path) -> Path:
    """A picture of the toy bundle."""
    path = tmp_path / "drawn.png"
    options = ("--seed", 4, "--guidance-scale", 2.5, "--negative-prompt", "small")
    assert run("generate", good, PROMPT, *options, "--output", path)[0] == 0
    return path


def test_options_come_in_place_of_what_the_record_says(run: Run, good: Path, drawn: Path, tmp_path: Path) -> None:
    base: dict[str, Any] = {
        "prompt": PROMPT,
        "seed": 4,
        "guidance_scale": 2.5,
        "negative_prompt": "small",
        "plan": "default",
    }
    ways: list[tuple[tuple[object, ...], dict[str, Any]]] = [
        ((), {}),
        (("--seed", 5), {"seed": 5}),
        (("--prompt", "a blue square"), {"prompt": "a blue square"}),
        (("a blue square",), {"prompt": "a blue square"}),
        (("--guidance-scale", 4), {"guidance_scale": 4.0}),
        (("--negative-prompt", ""), {"negative_prompt": ""}),
        (("--plan", "ungated"), {"plan": "ungated"}),
        (("--generator", "torch-cuda"), {"generator": "torch-cuda"}),
        (("--num-images", 3), {"num_images": 3}),
    ]
    with Pipeline.open(good, threads=1) as pipe:
        for i, (options, instead) in enumerate(ways):
            out = tmp_path / f"{i}.png"
            assert run("generate", good, "--from", drawn, *options, "--output", out)[0] == 0
            images = pipe(**(base | instead)).images
            paths = [out] if len(images) == 1 else [tmp_path / f"{i}-{j}.png" for j in range(3)]
            assert [pixels(path) for path in paths] == [image.tobytes() for image in images]


def test_what_differs_is_told_in_one_line_even_when_quiet(
    run: Run, good: Path, toy: Path, drawn: Path, tmp_path: Path
) -> None:
    again = ("--from", drawn, "--output", tmp_path / "x.png", "--quiet")
    assert run("generate", good, *again)[2] == ""
    assert run("generate", toy, *again)[2] == ""  # a copy
    assert run("plan", toy, "--name", "other", "--m", 3)[0] == 0
    assert run("generate", toy, *again)[2] == ""  # the same bundle, with one more plan
    edit_manifest(toy, lambda d: d.update(model="changed"))
    _, _, err = run("generate", toy, *again)
    assert re.fullmatch(
        r"tgate: warning: this is not how .*drawn\.png was drawn: model changed instead of toy; "
        r"bundle [0-9a-f]{16}… instead of [0-9a-f]{16}…\n",
        err,
    )


def test_a_bundle_that_is_left_out_is_mini(
    run: Run, drawn: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    fails(run("generate", "--from", drawn), "was drawn by another bundle than mini, of toy: tgate generate --from ")


def test_a_plan_that_the_bundle_has_not_is_told_with_what_adds_it(run: Run, sizes: Path, drawn: Path) -> None:
    other = ("generate", sizes, "--from", drawn, "--plan", "early", "--seed", 1, "--output", drawn.parent / "e.png")
    assert run(*other)[0] == 0
    early = drawn.parent / "e.png"
    bundle = shutil.copytree(sizes, drawn.parent / "toy")
    edit_manifest(bundle, lambda d: [d["plans"].pop(name) for name in list(d["plans"]) if name.startswith("early")])
    options = "--steps 8 --m 2 --k 1 --warm-up 2 --fidelity-interval 1 --sampler toy"
    fails(
        run("generate", bundle, "--from", early),
        "was drawn by plan 'early' (tgate, n=8, m=2, k=1, w=2, f=1, toy), and the bundle has none like it: "
        f"`tgate plan BUNDLE --name early {options}` adds it",
    )
    assert run("plan", bundle, "--name", "early", *options.split())[0] == 0
    assert run("generate", bundle, "--from", early, "--output", drawn.parent / "f.png")[0] == 0
    assert early.read_bytes() == (drawn.parent / "f.png").read_bytes()


def test_latents_are_taken_again_if_they_are_the_same(run: Run, good: Path, tmp_path: Path) -> None:
    """The row of the picture, of a file for several; another file is told."""
    latents, other = tmp_path / "x.npy", tmp_path / "z.npy"
    np.save(latents, np.stack([noise(9 + j, LATENTS) for j in range(2)]))
    np.save(other, noise(1, LATENTS)[None])
    given = ("--seed", 0, "--num-images", 2, "--initial-latents", latents, "--output", tmp_path / "a.png")
    assert run("generate", good, PROMPT, *given)[0] == 0
    again = ("generate", good, "--from", tmp_path / "a-1.png", "--output", tmp_path / "b.png", "--quiet")
    fails(run(*again), "a-1.png was drawn from --initial-latents, of which its record holds the SHA-256 alone (")
    assert run(*again, "--initial-latents", latents)[2] == ""
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a-1.png").read_bytes()
    _, _, err = run(*again, "--initial-latents", other)
    assert re.search("this is not how .*: initial latents [0-9a-f]{16}… instead of [0-9a-f]{16}…\n", err)
    assert run(*again, "--seed", 10)[2].endswith("instead of " + err.rpartition("instead of ")[2])
    assert pixels(tmp_path / "b.png") == pixels(tmp_path / "a-1.png")  # noise 10 is what the file's row was


def test_embeddings_and_images_are_taken_again(run: Run, good: Path, tmp_path: Path) -> None:
    w = toy_model.weights()
    rng = np.random.default_rng(0)
    tensors = {
        f"{name}.{half}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("text", (2, toy_model.LENGTH, toy_model.WIDTH)), ("pooled", (2, w["embed.1"].shape[1])))
        for half in ("positive", "negative")
    }
    save_file(tensors, tmp_path / "e.safetensors")
    embeds = ("--prompt-embeds", tmp_path / "e.safetensors")
    assert run("generate", good, *embeds, "--seed", 2, "--output", tmp_path / "a.png")[0] == 0
    again = ("generate", good, "--from", tmp_path / "a-1.png", "--output", tmp_path / "b.png", "--quiet")
    fails(run(*again), "was drawn from --prompt-embeds, of which")
    assert run(*again, *embeds)[2] == ""
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "a-1.png").read_bytes()
    assert "prompt embeds none instead of" in run(*again, PROMPT)[2]

    pictured = build(tmp_path / "pictured", Toy(pictured=True), goldens=False)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "in.png")
    image = ("--image", tmp_path / "in.png")
    assert run("generate", pictured, *image, "--seed", 2, "--output", tmp_path / "p.png")[0] == 0
    again = ("generate", pictured, "--from", tmp_path / "p.png", "--output", tmp_path / "q.png", "--quiet")
    fails(run(*again), "was drawn from --image, of which")
    assert run(*again, *image)[2] == ""
    assert (tmp_path / "q.png").read_bytes() == (tmp_path / "p.png").read_bytes()


def test_a_prompt_and_a_picture_together(run: Run, tmp_path: Path) -> None:
    """As models that start from a picture and a prompt are asked; a record wants the picture again."""
    both = build(tmp_path / "both", Toy(sees=True), goldens=False)
    Image.new("RGB", (4, 4), "red").save(tmp_path / "in.png")
    image, drawn = ("--image", tmp_path / "in.png"), ("--seed", 2, "--output", tmp_path / "p.png")
    fails(run("generate", both, PROMPTS[0], *drawn), "conditioned by a prompt and an image: give image", "got prompt")
    fails(run("generate", both, *image, *drawn), "give image, and prompt or prompt_embeds beside it; got image")
    assert not (tmp_path / "p.png").exists()
    assert run("generate", both, PROMPTS[0], *image, *drawn)[0] == 0
    again = ("generate", both, "--from", tmp_path / "p.png", "--output", tmp_path / "q.png", "--quiet")
    fails(run(*again), "was drawn from --image, of which")
    assert run(*again, *image)[2] == ""
    assert (tmp_path / "q.png").read_bytes() == (tmp_path / "p.png").read_bytes()


def test_a_picture_without_a_record(run: Run, good: Path, tmp_path: Path, drawn: Path) -> None:
    plain = tmp_path / "plain.png"
    options = ("--seed", 4, "--no-metadata", "--output", plain)
    assert run("generate", good, "a secret circle", *options)[0] == 0
    assert b"circle" not in plain.read_bytes()
    assert b"circle" in drawn.read_bytes()
    fails(run("generate", good, "--from", plain), "plain.png holds no record of what it was drawn from")
    fails(run("generate", good, "--from", tmp_path / "none.png"), "there is no such file")
    _, _, err = run("generate", good, PROMPT, "--output", tmp_path / "x.bmp", "--seed", 1)
    assert ".bmp holds no record of what it was drawn from; --json prints it" in err.splitlines()


# --- previews -----------------------------------------------------------------------------------


def test_previews_are_written_as_steps_go(
    run: Run, sizes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[int, int], bytes]] = []
    save = files.save_picture

    def saving(image: Image.Image, path: Path, *record: Any) -> None:
        save(image, path, *record)
        seen.append((image.size, path.read_bytes()))

    monkeypatch.setattr(files, "save_picture", saving)
    draw = ("generate", sizes, PROMPT, "--seed", 1, "--size", "8x2", "--num-images", 2, "--output", tmp_path / "a.png")
    plain = run(*draw)
    assert run(*draw, "--preview", tmp_path / "p.png", "--preview-every", 3)[:2] == plain[:2]
    assert [size for size, _ in seen] == [(16, 2)] * 2  # of 8 steps, two pictures side by side
    assert seen[0][1] != seen[1][1] == (tmp_path / "p.png").read_bytes()
    with Image.open(tmp_path / "p.png") as image:
        assert (image.format, image.info.keys() & {"parameters", "tgate"}) == ("PNG", set())


def test_previews_that_cannot_be(run: Run, toy: Path, tmp_path: Path) -> None:
    draw = ("generate", toy, PROMPT, "--output", tmp_path / "x.png")
    fails(run(*draw, "--preview", tmp_path / "p.txt"), "the suffix '.txt' is no picture format")
    fails(run(*draw, "--preview", tmp_path / "no" / "p.png"), "there is no directory")
    edit_manifest(toy, lambda d: (d["shapes"][0]["graphs"].pop("decoder"), d["goldens"].clear()))
    draw = ("generate", toy, PROMPT, "--output", tmp_path / "x.npy")
    fails(run(*draw, "--preview", tmp_path / "p.png"), "the bundle has no decoder (--components), which previews")


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
        (["--output", "x.png", "--plan", "empty.json"], "empty.json: 'steps' is missing; make the plan again"),
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


# --- another program's notes ---------------------------------------------------------------------

NOTED = """a large
red circle
Negative prompt: small,
blue
Steps: 20, Sampler: DPM++ 2M, CFG scale: 4.5, Seed: 7, Size: 4x4, Model: "v1, 5", Clip skip: 2, Version: v1.10.1"""


def noted(path: Path, text: str) -> Path:
    if path.suffix == ".png":
        info = PngInfo()
        info.add_text("parameters", text)
        Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    else:
        exif = Image.Exif()
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"UNICODE\0" + text.encode("utf-16-be")
        Image.new("RGB", (4, 4)).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_what_another_program_noted_is_taken_and_told(run: Run, good: Path, tmp_path: Path, suffix: str) -> None:
    source = noted(tmp_path / f"a{suffix}", NOTED)
    status, _, err = run("generate", good, "--from", source, "--output", tmp_path / "x.png", "--quiet")
    assert (status, err) == (
        0,
        f"tgate: warning: {source} was drawn by another program, and this is another picture of its prompt, "
        "negative prompt, seed, guidance scale, size; the seed draws other noise; not taken: Steps: 20, "
        "Sampler: DPM++ 2M, Model: v1, 5, Clip skip: 2, Version: v1.10.1\n",
    )
    with Pipeline.open(good, threads=1) as pipe:
        want = pipe("a large\nred circle", negative_prompt="small,\nblue", seed=7, guidance_scale=4.5)
    assert pixels(tmp_path / "x.png") == want.images[0].tobytes()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("Seed: 7", "Seed: -1", "have Seed: -1, expected a whole number from 0"),
        ("Seed: 7", f"Seed: {2**63}", "expected a whole number from 0"),
        ("CFG scale: 4.5", "CFG scale: nan", "have CFG scale: nan, expected a number"),
        ("Size: 4x4", "Size: big", "have Size: big, expected WIDTHxHEIGHT"),
        ("Size: 4x4", "Size: 512x512", "the bundle has no size 512x512; it has 4x4"),
        ("Clip skip: 2", "Denoising strength: 0.5", "with Denoising strength: 0.5, which no bundle does"),
        ("Clip skip: 2", "Seed: 8", "holds no record of what it was drawn from"),
        ("Steps: 20", "Stops: 20", "holds no record of what it was drawn from"),
        ("Steps: 20", "nothing, Steps: 20", "holds no record of what it was drawn from"),
    ],
)
def test_what_cannot_be_taken_is_refused(run: Run, good: Path, tmp_path: Path, old: str, new: str, says: str) -> None:
    source = noted(tmp_path / "a.png", NOTED.replace(old, new))
    fails(run("generate", good, "--from", source, "--output", tmp_path / "x.png"), says)


def test_another_programs_picture_needs_a_bundle(run: Run, tmp_path: Path) -> None:
    source = noted(tmp_path / "a.png", NOTED)
    fails(run("generate", "--from", source), "was drawn by another program, whose model is no bundle: tgate generate")


# --- a small decoder ----------------------------------------------------------------------------


def test_the_small_decoder_draws_and_its_record_says_so(run: Run, toy: Path, tmp_path: Path) -> None:
    """And with --from the same picture again, or the one of the model's own decoder."""
    small = build(tmp_path / "small", Toy(small=True), goldens=False)
    named = {name: tmp_path / f"{name}.png" for name in ("full", "quick", "again", "finished")}
    assert run("generate", small, PROMPT, "--seed", 3, "--output", named["full"])[0] == 0
    assert run("generate", small, PROMPT, "--seed", 3, "--decoder", "preview", "--output", named["quick"])[0] == 0
    assert run("generate", small, "--from", named["quick"], "--output", named["again"])[0] == 0
    finished = ("generate", small, "--from", named["quick"], "--decoder", "full", "--output", named["finished"])
    assert run(*finished)[0] == 0
    assert pixels(named["again"]) == pixels(named["quick"]) != pixels(named["full"])
    assert pixels(named["finished"]) == pixels(named["full"])
    draw = ("generate", toy, PROMPT, "--output", tmp_path / "none.png")
    fails(run(*draw, "--decoder", "preview"), "the bundle has no small decoder (--preview-decoder); export it again")
    fails(run("generate", toy, "--from", named["quick"], "--output", tmp_path / "none.png"), "or take decoder full")
    assert not (tmp_path / "none.png").exists()


# --- from a picture -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an encoder. Read only."""
    return build(tmp_path_factory.mktemp("begins") / "toy", Toy(begins=True), goldens=False)


@pytest.fixture
def drawn_from(tmp_path: Path) -> tuple[Path, Path]:
    """A picture and a mask, as files."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(tmp_path / "in.png")
    Image.fromarray(np.asarray([[0, 0, 255, 255]] * 4, np.uint8)).save(tmp_path / "mask.png")
    return tmp_path / "in.png", tmp_path / "mask.png"


@pytest.mark.parametrize("masked", [False, True])
def test_from_a_picture_as_the_pipeline_draws(
    run: Run, begins: Path, drawn_from: tuple[Path, Path], tmp_path: Path, masked: bool
) -> None:
    image, mask = drawn_from
    options = ["--image", image, "--strength", 0.75, "--seed", 4, *(["--mask", mask] if masked else [])]
    status, _, err = run("generate", begins, PROMPT, *options, "--output", tmp_path / "a.png", "--quiet")
    assert (status, err) == (0, "")
    own: dict[str, Any] = {"mask": files.load_mask(mask)} if masked else {}
    with Pipeline.open(begins, threads=1) as pipe:
        expected = pipe(PROMPT, image=files.load_picture(image), strength=0.75, seed=4, **own)
    assert pixels(tmp_path / "a.png") == expected.images[0].tobytes()
    again = ["--from", tmp_path / "a.png", "--output", tmp_path / "b.png"]
    status, _, err = run("generate", begins, *again, "--image", image, *(["--mask", mask] if masked else []))
    assert (status, "this is not how" in err) == (0, False)
    assert pixels(tmp_path / "b.png") == pixels(tmp_path / "a.png")


def test_what_a_picture_began_from_is_wanted_again(
    run: Run, begins: Path, drawn_from: tuple[Path, Path], tmp_path: Path
) -> None:
    """A prompt in place of the record's does not do without it."""
    run("generate", begins, PROMPT, "--image", drawn_from[0], "--output", tmp_path / "a.png", "--seed", 1)
    again = run("generate", begins, "a blue square", "--from", tmp_path / "a.png", "--output", tmp_path / "b.png")
    fails(again, "was drawn from --image, of which its record holds the SHA-256 alone")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--strength", 0.5], "strength would change nothing"),
        (["--mask", "mask.png"], "mask would change nothing"),
        (["--image", "in.png", "--strength", 0], "above 0 and at most 1, got 0"),
        (["--image", "in.png", "--strength", 0.1], "strength 0.1 leaves none of 8 steps"),
        (["--image", "none.png"], "none.png"),
        (["--image", "in.png", "--mask", "in.txt"], "in.txt is not a picture that can be read"),
    ],
)
def test_what_cannot_begin_leaves_nothing_behind(
    run: Run, begins: Path, drawn_from: tuple[Path, Path], tmp_path: Path, options: list[object], says: str
) -> None:
    (tmp_path / "in.txt").write_text("no picture")
    before = {path.name for path in tmp_path.iterdir()}
    named = [tmp_path / o if isinstance(o, str) and "." in o else o for o in options]
    fails(run("generate", begins, PROMPT, *named, "--output", tmp_path / "a.png"), says)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_bundle_without_an_encoder_says_how_to_get_one(run: Run, good: Path, drawn_from: tuple[Path, Path]) -> None:
    fails(run("generate", good, PROMPT, "--image", drawn_from[0]), "has no encoder", "export it again")
