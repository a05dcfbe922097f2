"""The command line opens the engine before any work, and says in one line what is wrong with it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.cli.running import PROMPT, Run, fails
from tests.toy_bundle import edit_manifest
from tgate_engine.bundle import Bundle
from tgate_runtime.engines import ENGINES, EngineEntry, open_engine


def tgate(*arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    """``tgate`` where the modules in ``path`` come before those that are installed."""
    return subprocess.run(
        [sys.executable, "-m", "tgate_cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_engine_that_is_broken_is_one_line(good: Path, tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')")
    done = tgate("bench", good, "--engine", "openvino", "--quiet", path=tmp_path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith("tgate: error: engine openvino ")
    assert "libtbb.so.12" in line


@pytest.mark.parametrize(("engine", "extra"), [("ort-cuda", "cuda"), ("ort-cpu", "cpu"), ("openvino", "openvino")])
def test_what_is_missing_beside_the_engine_comes_with_its_extra(
    good: Path, tmp_path: Path, engine: str, extra: str
) -> None:
    """A bare machine has no tokenizers either; [cpu] would bring the wrong ONNX Runtime for a GPU."""
    for name in ("tokenizers", "onnxruntime", "openvino"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    for command in ("bench", "verify", "build"):
        done = tgate(command, good, "--engine", engine, "--quiet", path=tmp_path)
        assert f"pip install 'tgate-engine[{extra}]'" in done.stderr, command
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "options", "says"),
    [
        (command, options, says)
        for command in ("generate", "bench", "verify", "build")
        for options, says in (
            (["--engine", "abacus"], "there is no engine 'abacus'"),
            (["--engine", "ort-cuda"], "has no CUDAExecutionProvider"),
            (["--threads", "10000"], "threads must be a whole number"),
        )
        if (command, "ort-cuda" in options) != ("build", True)  # which it does where it cannot run
    ],
)
def test_the_engine_is_settled_before_the_bundle_is_read(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: list[str], says: str
) -> None:
    monkeypatch.setattr(Bundle, "checked", lambda *_: pytest.fail("the bundle was read"))
    drawing = ["a cat", "--output", str(tmp_path / "x.png")] if command == "generate" else []
    fails(run(command, good, *drawing, *options, "--quiet"), says)


def test_what_cannot_run_here_is_built_for_all_the_same(run: Run, good: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(good, tmp_path / "bundle"))
    status, out, err = run("build", bundle, "--engine", "ort-cuda", "--quiet")
    assert (status, err) == (0, "")
    graphs = {spec.file for shape in Bundle.open(bundle).manifest.shapes for spec in shape.graphs.values()}
    assert set() < {line.partition(": ")[0] for line in out.splitlines()} <= graphs
    assert (bundle / "engines" / "ort-cuda" / "lowered.json").is_file()
    assert run("verify", bundle, "--quiet")[0] == 0


def test_an_engine_without_compilation_has_nothing_to_build(run: Run, good: Path) -> None:
    status, out, err = run("build", good, "--engine", "openvino", "--quiet")
    assert (status, err) == (0, "")
    assert "compiles nothing ahead of time" in out


def test_every_engine_is_listed(run: Run) -> None:
    status, out, _ = run("engines")
    assert status == 0
    assert all(name in out for name in ENGINES)


def test_the_help_names_the_default_of_memory(run: Run) -> None:
    shown = " ".join(run("bench", "--help")[1].split())
    fast, shared = re.search(r"if left out fast on (.*?), shared on (.*?)(?: --|$)", shown).groups()  # type: ignore[union-attr]
    for name in ("ort-cpu", "openvino", "aoti"):
        default = open_engine(name).options.memory
        assert (name in fast, name in shared) == (default == "fast", default == "shared"), name
    assert all(name.lower() in f"{fast} {shared}".lower() for name in ENGINES)


# --- all else before it -------------------------------------------------------------------------


@pytest.fixture
def nothing_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an engine nor a digest is asked for."""
    monkeypatch.setattr(EngineEntry, "open", lambda *_: pytest.fail("the engine was loaded"))
    monkeypatch.setattr(Bundle, "_hashed", lambda *_: pytest.fail("a file was hashed"))


DRAW = [PROMPT, "--output", "x.png"]
TOLD_EARLY: list[tuple[list[str], str]] = [
    (
        ["generate", "{}"],
        "toy is conditioned by a prompt: give prompt, or prompt_embeds, and nothing else; got neither",
    ),
    (["generate", "{}", PROMPT, "--image", "in.png"], "the bundle has no encoder"),
    (["generate", "{}", "--image", "none.png"], "toy is conditioned by a prompt"),
    (["generate", "{}", PROMPT, "--prompt-embeds", "e.safetensors"], "got prompt and prompt_embeds"),
    (["generate", "{}", "--prompt-embeds", "e.safetensors", "--negative-prompt", "a"], "hold the negative half"),
    (["generate", "{}", "--prompt-embeds", "e.safetensors"], "the embeddings lack text.negative"),
    (["generate", "{}", "a" * 32_769], "the prompt has 32769 characters, at most 32768 are read"),
    (["generate", "{}", PROMPT, "--negative-prompt", "a" * 32_769], "the prompt has 32769 characters"),
    (["generate", "{}", "\udcff"], "the prompt must be text in valid Unicode"),
    (["generate", "{}", *DRAW, "--plan", "other"], "has no plan 'other'; it has default"),
    (["generate", "{}", *DRAW, "--plan", "none.json"], "none.json: there is no such plan file"),
    (["generate", "{}", *DRAW, "--size", "8x8"], "the bundle has no size 8x8; it has 4x4"),
    (["generate", "{}", *DRAW, "--guidance-scale", "1"], "takes a scale above 1, got 1.0"),
    (["generate", "{}", *DRAW, "--generator", "other"], "there is no generator 'other'"),
    (["generate", "{}", *DRAW, "--initial-latents", "y.npy"], "initial latents must be float32 of shape [1, 2, 4, 4]"),
    (["generate", "{}", *DRAW, "--seed", str(2**63 - 1), "--num-images", "2"], "which must be below"),
    (["generate", "{}", PROMPT, "--output", "x.xyz"], "the suffix '.xyz' is no picture format"),
    (["generate", "{}", PROMPT, "--output", "no/x.png"], "no/x.png: there is no directory no; make it first"),
    (["generate", "{}", PROMPT, "--output", "fifo.png"], "fifo.png exists and is not a file; name another place"),
    (["generate", "{}", PROMPT, "--output", "dir.png"], "dir.png is a directory"),
    (["generate", "{}", PROMPT, "--output", "y.png", "--num-images", "2"], "y-1.png exists and is not a file"),
    (["generate", "{}", PROMPT, "--output", "/proc/x.png"], "/proc/x.png cannot be written ("),
    (["generate", "{}", PROMPT, "--output", "-", "--num-images", "2"], "writes one result to standard output"),
    (["generate", "{}", *DRAW, "--save-latents", "no/y.npy"], "no/y.npy: there is no directory no"),
    (["generate", "{}", *DRAW, "--save-latents", "fifo.png"], "fifo.png exists and is not a file"),
    (["generate", "{}", *DRAW, "--preview", "p.txt"], "the suffix '.txt' is no picture format"),
    (["generate", "{}", *DRAW, "--preview", "fifo.png"], "fifo.png exists and is not a file"),
    (["generate", "{bare}", *DRAW], "exported with --weights none: it can be inspected, not run"),
    (["inspect", "{}", "--size", "8x8"], "the bundle has no size 8x8; it has 4x4"),
    (["verify", "{bare}"], "exported with --weights none"),
    (["bench", "{}", "--plan", "other"], "has no plan 'other'"),
    (["bench", "{}", "--against", "other"], "has no plan 'other'"),
    (["bench", "{}", "--size", "8x8"], "the bundle has no size 8x8"),
    (["bench", "{}", "--batch", "9"], "the bundle takes 1 to 4 images at once, got 9"),
    (["bench", "{}", "--trace", "no/t.json"], "no/t.json: there is no directory no"),
    (["bench", "{}", "--trace", "fifo.png"], "fifo.png exists and is not a file"),
    (["bench", "{bare}"], "exported with --weights none"),
    (["build", "{}", "--plan", "other"], "has no plan 'other'"),
    (["build", "{}", "--size", "8x8"], "the bundle has no size 8x8"),
    (["build", "{bare}"], "exported with --weights none"),
    (["plan", "{}", "--name", "ungated", "--m", "3"], "plan 'ungated' is what default is measured against"),
    (["plan", "{}", "--name", "default", "--m", "3"], "already has a plan 'default'; use another --name, or --force"),
    (["plan", "{}", "--name", "x", "--m", "9"], "between 1 and the number of steps n = 8, got m = 9"),
    (
        ["plan", "{}", "--name", "x", "--m", "3", "--guidance-scale", "1"],
        "does not fit a bundle exported with guidance",
    ),
    (["plan", "{}", "--name", "x", "--m", "3", "--output", "fifo.json"], "fifo.json exists and is not a file"),
    (["plan", "{}", "--name", "x", "--m", "3", "--output", "/proc/p.json"], "/proc/p.json cannot be written ("),
    (["plan", "{}", "--remove", "other"], "the bundle has no plan 'other'"),
]


@pytest.mark.parametrize(("arguments", "says"), TOLD_EARLY, ids=range(len(TOLD_EARLY)))
@pytest.mark.usefixtures("nothing_loaded")
def test_what_the_arguments_and_the_manifest_tell_comes_first(
    run: Run, toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("fifo.png", "fifo.json", "y-1.png"):
        os.mkfifo(name)
    Path("dir.png").mkdir()
    np.save("y.npy", np.zeros((2, 4, 4), np.float32))
    save_file({"other": np.zeros(1, np.float32)}, "e.safetensors")
    if "{bare}" in arguments:
        edit_manifest(toy, lambda data: data.update(weights=""))
    before = sorted(os.listdir())
    fails(run(*(text.format(toy, bare=toy) if text[0] == "{" else text for text in arguments)), says)
    assert sorted(os.listdir()) == before
