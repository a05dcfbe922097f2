"""Adapters in libtgate: what a session with them draws is what Python draws, and the session that it came from stays as
it was."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.cpp.library import BUNDLE, REQUEST, Bundle, Failure, Library, Request, Session, onnxruntime_library
from tests.cpp.twins import Twins, same
from tests.export.loras import write_kohya, write_lora
from tests.toy_bundle import edit_manifest
from tests.whole.cases import relative
from tgate_engine.bundle import Bundle as Facts
from tgate_engine.bundle import digests_of
from tgate_export.adapt import adapt
from tgate_runtime.mini import place_of

PROMPT = "a large red circle above a small blue square"
NEAR = 1e-5
"""Python multiplies the factors in another order of sums."""


@pytest.fixture(scope="module")
def place(
    tiny_bundle: Callable[..., Path], tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A tiny SDXL's bundle with two adapters, of the U-Net and of all three networks. Read only."""
    folder, directory = tmp_path_factory.mktemp("adapters"), tiny_checkpoint("conv_projection")
    place = Path(shutil.copytree(tiny_bundle("conv_projection"), folder / "bundle"))
    face = folder / "face.safetensors"
    adapt(place, write_lora(directory, folder / "style", ("unet", "text_encoder"), header=True), name="style")
    components = ("unet", "text_encoder", "text_encoder_2")
    adapt(place, write_kohya(directory, face, components, mixed=False), name="face")
    return place


@pytest.mark.parametrize("memory", ["fast", "shared"])
def test_a_session_with_adapters_draws_what_python_draws(library: Library, place: Path, memory: str) -> None:
    twins = Twins(library, place, memory=memory)
    assert twins.bundle.names("adapter") == ["face", "style"]
    before = twins.draw(PROMPT, seed=3)
    for scales in ({"style": 0.8}, {"face": -0.5, "style": 1.3}):
        adapted = twins.session.adapted(scales)
        for plan in twins.bundle.names("plan"):
            own = Request(adapted, prompt=PROMPT, plan=plan, images=2, seed=3).run().latents()
            wanted = twins.wanted(PROMPT, plan=plan, images=2, seed=3, loras=scales).latents
            assert relative(own, wanted) < NEAR
            assert relative(own[:1], twins.draw(PROMPT, plan=plan, seed=3)) > 1000 * NEAR
    same(twins.draw(PROMPT, seed=3), before)


def test_it_outlives_the_session_that_it_came_from(library: Library, place: Path) -> None:
    bundle = Bundle(library, place)
    plain = Session(bundle, threads=1)
    adapted = plain.adapted({"style": 1.0})
    wanted = Request(adapted, prompt=PROMPT, seed=1).run().latents()
    plain.close()
    bundle.close()
    same(Request(adapted, prompt=PROMPT, seed=1).run().latents(), wanted)


@pytest.mark.parametrize(
    ("scales", "says"),
    [
        ({"other": 1.0}, "the bundle has no adapter 'other'; it has face, style"),
        ({"style": 0.0}, "the scale of adapter 'style' is 0.0; a number other than 0"),
        ({"style": float("nan")}, "the scale of adapter 'style' is nan; a number other than 0"),
        ({"style": -10001.0}, "and of at most 10000 is wanted"),
        ({"style": 1e-46}, "with style:1e-46, no weight changes in float32; take larger scales"),
    ],
)
def test_what_cannot_be_added_is_refused(library: Library, place: Path, scales: Mapping[str, float], says: str) -> None:
    session = Session(Bundle(library, place), threads=1)
    with pytest.raises(Failure, match=says) as failure:
        session.adapted(scales)
    assert failure.value.code == REQUEST
    Request(session, prompt=PROMPT).run()


def test_of_a_session_that_has_some_or_a_bundle_without(library: Library, place: Path) -> None:
    adapted = Session(Bundle(library, place), threads=1).adapted({"style": 1.0})
    with pytest.raises(Failure, match="the session has adapters already; ask the one that it came from"):
        adapted.adapted({"face": 1.0})
    with pytest.raises(Failure, match="the bundle has no adapter 'style'; it has none; `tgate adapt` adds one"):
        Session(Bundle(library, place_of("mini")), threads=1).adapted({"style": 1.0})
    with pytest.raises(Failure, match="no adapter is named"):
        Session(Bundle(library, place), threads=1).adapted({})


HARMS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of another shape": (lambda t: t.update({_first(t, "#up"): t[_first(t, "#up")][:1]}), "its change #down"),
    "a factor alone": (lambda t: t.pop(_first(t, "#up")), "has not both factors"),
    "not finite": (lambda t: t[_first(t, "#down")].fill(np.nan), "numbers that are not finite"),
    "integers": (lambda t: t.update({_first(t, "#up"): np.ones((1, 1), np.int64)}), "has int64"),
    "of no weight": (lambda t: t.update({"w#bias": np.ones(2, np.float32)}), "weight 'w' is not there"),
    "without a mark": (lambda t: t.update({"w": np.ones(2, np.float32)}), "it has a tensor 'w'"),
    "ranks that differ": (lambda t: t.update({_first(t, "#up"): t[_first(t, "#up")][:, :1]}), "its change #down"),
}


def _first(tensors: Mapping[str, Any], mark: str) -> str:
    return min(key for key in tensors if key.endswith(mark))


@pytest.mark.parametrize("harm", HARMS)
def test_a_strangers_file_is_refused(library: Library, place: Path, tmp_path: Path, harm: str) -> None:
    """Listed with a digest that fits; the session goes on."""
    place = Path(shutil.copytree(place, tmp_path / "bundle"))
    facts = Facts.open(place)
    file = place / facts.manifest.adapters["style"].file
    tensors, (change, says) = {key: array.copy() for key, array in load_file(file).items()}, HARMS[harm]
    change(tensors)
    save_file({key: np.ascontiguousarray(array) for key, array in tensors.items()}, file)
    _list_anew(place, file)
    session = Session(Bundle(library, place), threads=1)
    with pytest.raises(Failure, match="adapter 'style' does not fit the bundle's weights: ") as failure:
        session.adapted({"style": 1.0})
    assert says in str(failure.value)
    assert failure.value.code == BUNDLE
    Request(session.adapted({"face": 1.0}), prompt=PROMPT).run()


def _list_anew(place: Path, file: Path) -> None:
    """Have the manifest say what a file is now."""
    name = file.relative_to(place).as_posix()
    edit_manifest(place, lambda manifest: manifest["files"].update({name: asdict(digests_of(place)[name])}))


def test_the_command_line_draws_with_them(library: Library, place: Path, cpp_build: Path, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        options = ["--save-latents", str(tmp_path / "l.npy"), "--library", str(onnxruntime_library()), "--threads", "1"]
        command = [str(cpp_build / "tools/tgate-run"), str(place), "--prompt", PROMPT, "--quiet", *options, *words]
        return subprocess.run(command, text=True, capture_output=True, check=False, timeout=120)

    assert run("--lora", "style:0.8", "--lora=face").returncode == 0
    adapted = Session(Bundle(library, place), threads=1).adapted({"style": 0.8, "face": 1.0})
    same(np.load(tmp_path / "l.npy"), Request(adapted, prompt=PROMPT).run().latents())
    for words, says, code in (
        (("--lora", "style:x"), "--lora takes an adapter's name, or NAME:SCALE, got 'style:x'", 2),
        (("--lora", ":1"), "--lora takes an adapter's name, or NAME:SCALE, got ':1'", 2),
        (("--lora", "style", "--lora", "style:2"), "--lora names 'style' twice", 2),
        (("--lora", "other"), "the bundle has no adapter 'other'; it has face, style", 1),
    ):
        done = run(*words)
        assert (done.returncode, done.stderr) == (code, f"tgate-run: {says}\n")
