"""What users of the other families do: videos, prompts encoded ahead of time, parts of a model, no weights, LoRAs."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.conftest import family_settings
from tests.export.loras import write_lora
from tests.plain import export_plain, plain
from tests.tiny_models import tiny_model
from tgate_cli.main import export_main, main
from tgate_engine.bundle import Bundle
from tgate_export.build import ExportSettings
from tgate_export.checkpoints import published
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import MODELS, find_model
from tgate_export.lora import Lora

PROMPT = "a large red circle above a small blue square"
VIDEO, TEXT = "svd_a", "pixart_alpha_1024"
FamilyBundle = Callable[[str], tuple[Path, Path]]
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``tgate`` and give its stdout, or with ``fails=True`` the one line that it fails with."""

    def call(*arguments: object, fails: bool = False, entry: Callable[..., int] = main) -> str:
        capsys.readouterr()
        code = entry([*map(str, arguments), "--quiet"])
        seen = capsys.readouterr()
        assert (code == 1) is fails, seen.err
        if not fails:
            return seen.out
        lines = seen.err.strip().splitlines()
        assert len(lines) == 1, seen.err
        assert re.match("tgate(-export)?: error: ", lines[0])
        return lines[0]

    return call


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A photograph's stand-in, of another size than any bundle's."""
    path = tmp_path_factory.mktemp("pictures") / "in.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    return path


# --- videos -------------------------------------------------------------------------------------


def test_a_video_from_an_image(family_bundle: FamilyBundle, run: Run, picture: Path, tmp_path: Path) -> None:
    bundle = family_bundle(VIDEO)[1]
    manifest = Bundle.open(bundle).manifest
    (shape,) = manifest.shapes
    out = tmp_path / "out.mp4"
    run("generate", bundle, "--image", picture, "--seed", 3, "--output", out)
    reader = imageio_ffmpeg.read_frames(str(out))
    facts = next(reader)
    assert facts["size"] == (shape.width, shape.height)
    assert facts["fps"] == manifest.fps == 7
    assert facts["codec"] == "h264"
    assert len(list(reader)) == manifest.frames > 1
    gif = tmp_path / "out.gif"
    run("generate", bundle, "--image", picture, "--seed", 3, "--output", gif)
    with Image.open(gif) as image:
        assert (getattr(image, "n_frames", 0), image.size) == (manifest.frames, (shape.width, shape.height))
        assert image.info["duration"] == 140


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["PICTURE", "a prompt", "--output", "OUT.mp4"], "conditioned by an image: give image, or prompt_embeds"),
        (["a prompt", "--output", "OUT.mp4"], "conditioned by an image"),
        (["--output", "OUT.mp4"], "got neither"),
        (["PICTURE", "--negative-prompt", "x", "--output", "OUT.mp4"], "takes no negative prompt"),
        (["PICTURE", "--output", "OUT.png"], "is no video format; use one of .mp4, .gif"),
        (["--image", "nowhere.png", "--output", "OUT.mp4"], "nowhere.png: there is no such file"),
        (["--image", __file__, "--output", "OUT.mp4"], "is not a picture that can be read"),
    ],
)
def test_what_a_video_model_refuses(
    family_bundle: FamilyBundle, run: Run, picture: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    given: list[object] = []
    for argument in arguments:
        given += ["--image", picture] if argument == "PICTURE" else [argument.replace("OUT", str(tmp_path / "out"))]
    assert says in run("generate", family_bundle(VIDEO)[1], *given, fails=True)
    assert not list(tmp_path.glob("out*"))


# --- prompts encoded ahead of time, and parts of a model ----------------------------------------


@pytest.fixture(scope="module")
def embeddings(family_bundle: FamilyBundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("embeddings") / "prompt.safetensors"
    arguments = ["embed", PROMPT, "--model", "pixart-alpha", "--checkpoint", str(family_bundle(TEXT)[0])]
    assert main([*arguments, "--negative-prompt", "a photo", "--output", str(path), "--quiet"]) == 0
    return path


def test_embeddings_stand_for_the_prompt(
    family_bundle: FamilyBundle, run: Run, embeddings: Path, tmp_path: Path
) -> None:
    """The denoiser alone, given them, goes where the whole bundle goes from the prompt."""
    checkpoint, whole = family_bundle(TEXT)
    alone = export_plain(family_settings(TEXT, checkpoint, tmp_path / "alone", components=["denoiser"]))
    manifest = Bundle.open(alone).manifest
    assert ({g.role for g in manifest.shapes[0].graphs.values()}, manifest.tokenizers) == ({"denoise"}, ())
    assert main(["verify", str(alone), "--quiet"]) == 0
    prompt, embeds = tmp_path / "prompt.npy", tmp_path / "embeds.npy"
    how = ("--seed", 5, "--output")
    whole_way = (PROMPT, "--negative-prompt", "a photo", "--plan", "ungated", "--save-latents", prompt)
    run("generate", whole, *whole_way, *how, tmp_path / "a.png")
    run("generate", alone, "--prompt-embeds", embeddings, *how, embeds)
    np.testing.assert_allclose(np.load(embeds), np.load(prompt), rtol=0, atol=1e-4 * np.abs(np.load(prompt)).max())
    assert "has no text encoder" in run("generate", alone, PROMPT, *how, embeds, fails=True)
    assert "is no latents format" in run(
        "generate", alone, "--prompt-embeds", embeddings, *how, tmp_path / "b.png", fails=True
    )
    run("bench", alone, "--repeats", 1, "--warm-ups", 0, "--threads", 1)


def _without(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if not name.startswith("prompt_mask")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: {n: v[..., :-1] for n, v in t.items()}, "must have shape [N,"),
        (_without, "lack prompt_mask.negative, prompt_mask.positive"),
        (lambda _: {"x": np.zeros(1, np.float32)}, "they have x"),
        (lambda t: {**t, "prompt_mask.positive": np.repeat(t["prompt_mask.positive"], 2, 0)}, "as many images each"),
    ],
)
def test_embeddings_that_do_not_fit(
    family_bundle: FamilyBundle, run: Run, embeddings: Path, tmp_path: Path, change: Callable[[Any], Any], says: str
) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({name: np.ascontiguousarray(v) for name, v in change(load_file(embeddings)).items()}, bad)
    line = run("generate", family_bundle(TEXT)[1], "--prompt-embeds", bad, "--output", tmp_path / "x.png", fails=True)
    assert says in line


def test_what_a_text_model_refuses(family_bundle: FamilyBundle, run: Run, picture: Path, tmp_path: Path) -> None:
    bundle, out = family_bundle(TEXT)[1], tmp_path / "x.png"
    assert "is conditioned by a prompt" in run("generate", bundle, "--image", picture, "--output", out, fails=True)
    assert "the bundle has no encoder" in run(
        "generate", bundle, PROMPT, "--image", picture, "--output", out, fails=True
    )
    assert "no picture format" in run("generate", bundle, PROMPT, "--output", tmp_path / "x.mp4", fails=True)
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here")
    line = run("generate", bundle, "--prompt-embeds", text, "--output", out, fails=True)
    assert "is not a safetensors file" in line


def test_what_embed_refuses(family_bundle: FamilyBundle, run: Run, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "e.safetensors")
    checkpoint = ("--checkpoint", family_bundle(VIDEO)[0])
    assert "conditioned by an image" in run("embed", PROMPT, "--model", "svd", *checkpoint, *out, fails=True)
    assert "wanted is a PixArt" in run("embed", PROMPT, "--model", "pixart-alpha", *checkpoint, *out, fails=True)
    assert "there is no directory" in run(
        "embed", PROMPT, "--model", "pixart-alpha", "--output", tmp_path / "no" / "e.safetensors", fails=True
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "pixart-alpha", "--components", "decoder"], "the denoiser among them, each once; got decoder"),
        (["--model", "svd", "--components", "text,denoiser"], "some of image, denoiser, decoder"),
        (["--model", "sd15", "--weights", "none", "--components", "text,denoiser"], "has no vocabulary"),
        (["--model", "sd15", "--weights", "none", "--checkpoint", "x"], "reads no checkpoint"),
        (["--model", "sd15", "--weights", "random", "--lora", "x.safetensors"], "reads no checkpoint"),
        (["--model", "sd15", "--weights", "none", "--frames", "3"], "--frames is for video models"),
        (["--model", "svd", "--weights", "none", "--height", "100"], "a multiple of 64"),
        (["--model", "mini-sdxl", "--weights", "none"], "no published configuration of 'mini-sdxl'"),
        (["--model", "sd15", "--checkpoint", "nowhere/at/all"], "nowhere/at/all does not exist"),
        (["--model", "sd15", "--checkpoint", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--model", "mini-sdxl", "--lora", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--model", "mini-sdxl", "--lora", "a.safetensors:much"], "the scale 'much' is no number"),
    ],
)
def test_what_export_refuses(run: Run, tmp_path: Path, arguments: list[str], says: str) -> None:
    assert says in run(*arguments, "--output", tmp_path / "b", fails=True, entry=export_main)
    assert not (tmp_path / "b").exists()


# --- without weights ----------------------------------------------------------------------------


@pytest.fixture
def small_facts(family_bundle: FamilyBundle, monkeypatch: pytest.MonkeyPatch) -> ExportSettings:
    """``--model svd`` means a small network here, its configurations published as the real one's are."""
    checkpoint = DirectoryCheckpoint(family_bundle(VIDEO)[0])
    components: dict[str, Any] = {name: checkpoint.config(name) for name in find_model("svd").family.classes}
    components["scheduler"] = checkpoint.scheduler_config()
    facts = {"model_index": dict(checkpoint.model_index), "licence": "none", "components": components}
    monkeypatch.setattr(published, "facts", lambda model: copy.deepcopy(facts))
    settings = family_settings(VIDEO, Path(), Path())
    return ExportSettings(
        model="svd", height=settings.height, width=settings.width, frames=settings.frames, weights="random"
    )


def test_random_weights_run_and_no_weights_count(
    small_facts: ExportSettings, family_bundle: FamilyBundle, run: Run, tmp_path: Path
) -> None:
    size = ("--height", small_facts.height, "--width", small_facts.width, "--frames", small_facts.frames)
    for weights in ("random", "none"):
        arguments = ("--model", "svd", "--method", "plain", "--weights", weights, *size)
        with plain():
            run(*arguments, "--output", tmp_path / weights, entry=export_main)
    paths = [tmp_path / "random", tmp_path / "none", family_bundle(VIDEO)[1]]
    random, none, whole = (
        {name: graph.macs for name, graph in Bundle.open(path).manifest.shapes[0].graphs.items()} for path in paths
    )
    assert random == none
    assert none.items() <= whole.items()
    assert json.loads(run("inspect", tmp_path / "none", "--json"))["bytes"]["weights"] == 0
    assert "inspected, not run" in run("bench", tmp_path / "none", fails=True)
    measured = json.loads(run("bench", tmp_path / "random", "--repeats", 1, "--warm-ups", 0, "--threads", 1, "--json"))
    assert measured["plans"]["default"]["ms"] > 0
    for weights in ("random", "none"):
        assert "goldens: none to replay" in run("verify", tmp_path / weights)


def test_the_list_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        export_main(["--list-models"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name, model in MODELS.items():
        line = next(line for line in lines if line.startswith(f"{name} "))
        assert model.checkpoint in line
        assert model.licence in line


# --- where weights come from --------------------------------------------------------------------


def test_a_lora_changes_weights_and_no_graph(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    variant = "conv_projection"
    checkpoint, model = tiny_checkpoint(variant), tiny_model(variant)
    lora = write_lora(checkpoint, tmp_path / "lora", ("unet", "text_encoder"))
    height, width = (size * model.vae_factor for size in model.latent_size)
    settings = ExportSettings(
        model="sdxl",
        checkpoint=str(checkpoint),
        components=("text", "denoiser"),
        height=height,
        width=width,
        output=tmp_path / "plain",
    )
    plain = export_plain(settings)
    fused = export_plain(replace(settings, loras=(Lora(lora, 0.5),), output=tmp_path / "fused"))
    names = sorted(path.name for path in plain.glob("*.onnx"))
    assert names == ["full.onnx", "text_encoder.onnx"]
    assert names == sorted(path.name for path in fused.glob("*.onnx"))
    for name in names:
        assert (plain / name).read_bytes() == (fused / name).read_bytes(), name
    before, after = (load_file(path / "weights.safetensors") for path in (plain, fused))
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert any(name.startswith("unet.") for name in changed)
    assert any(name.startswith("text_encoder.") for name in changed)
    assert not any(name.startswith("text_encoder_2.") for name in changed)
    assert len(changed) < len(before) / 2


def test_a_lora_for_another_model(family_bundle: FamilyBundle, tiny_checkpoint: Callable[[str], Path], run: Run,
                                  tmp_path: Path) -> None:  # fmt: skip
    lora = write_lora(tiny_checkpoint("conv_projection"), tmp_path / "lora")
    checkpoint = family_bundle(TEXT)[0]
    line = run(
        *("--model", "pixart-alpha", "--checkpoint", checkpoint, "--lora", lora, "--output", tmp_path / "b"),
        fails=True,
        entry=export_main,
    )
    assert str(lora) in line
    assert not (tmp_path / "b").exists()
