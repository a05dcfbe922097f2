"""The commands of export: what reaches it, what is left of it, and what is said where a library is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.running import Run, beside, fails
from tests.toy_bundle import edit_manifest
from tgate_cli.main import export_main
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.plan import Plan

# --- tgate-export -------------------------------------------------------------------------------


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Callable[[Path], None] | None]]:
    """Each export that was asked for, in place of it: its settings, and what is to verify it."""
    from tgate_export import build

    asked: list[tuple[Any, Callable[[Path], None] | None]] = []

    def export(settings: Any, report: Any, verify: Any = None) -> Path:
        asked.append((settings, verify))
        return settings.output or Path("there")

    monkeypatch.setattr(build, "export", export)
    return asked


def test_export_arguments_reach_the_exporter(run: Run, exports: list[Any], tmp_path: Path) -> None:
    from tgate_export.build import ExportSettings
    from tgate_export.lora import Lora

    out, loras = tmp_path / "b", [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    for lora in loras:
        lora.touch()
    arguments = (
        *("--model", "opensora", "--method", "tgate+guidance_delta", "--m", 10, "--k", 5, "--steps", 20),
        *("--warm-up", 0, "--fidelity-interval", 2),
        *("--sampler", "ddim", "--guidance-scale", 4, "--checkpoint", "c", "--size", "128x64", "--size", "64x128"),
        *("--batch", 1, "--batch", "2:4", "--dtype", "bf16", "--output", out, "--force", "--no-verify", "--frames", 3),
        *("--components", "denoiser,decoder", "--lora", f"{loras[0]}:0.5", "--lora", loras[1], "--json"),
    )
    status, told, err = run(*arguments, "--quiet", main=export_main)
    assert (status, err) == (0, "")
    assert json.loads(told) == {"bundle": str(out), "model": "opensora", "goldens": {}}
    settings = ExportSettings(
        model="opensora",
        method="tgate+guidance_delta",
        m=10,
        k=5,
        steps=20,
        warm_up=0,
        fidelity_interval=2,
        sampler="ddim",
        guidance_scale=4.0,
        checkpoint="c",
        components=["denoiser", "decoder"],
        loras=(Lora(loras[0], 0.5), Lora(loras[1])),
        sizes=[(128, 64), (64, 128)],
        frames=3,
        batches=[(1, 1), (2, 4)],
        dtype="bf16",
        output=out,
        force=True,
        verify=False,
    )
    assert exports == [(settings, None)]


def test_what_is_left_out_is_left_to_the_model(run: Run, exports: list[Any]) -> None:
    from tgate_export.build import ExportSettings

    assert run("--model", "sdxl", main=export_main)[0] == 0
    assert run("--model", "sdxl", "--height", 64, "--width", 128, main=export_main)[0] == 0
    plain, sized = (settings for settings, _ in exports)
    assert plain == ExportSettings(model="sdxl")
    assert run("--model", "wan22-t2v-a14b", "--guidance-scale-2", 2.5, main=export_main)[0] == 0
    assert exports[-1][0] == ExportSettings(model="wan22-t2v-a14b", guidance_scale_2=2.5)
    assert sized == ExportSettings(model="sdxl", height=64, width=128)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "other"], "unknown method 'other'; choose one of tgate, guidance_delta, tgate+guidance_delta"),
        (["--method", "guidance_delta", "--k", "5"], "--k 5 would change nothing"),
        (["--method", "deepcache", "--m", "5"], "--m 5 would change nothing: method deepcache has no gate"),
        (
            ["--guidance-scale-2", "3"],
            "--guidance-scale-2 3 would change nothing: mini-sdxl has one network; leave it out",
        ),
        (["--cache-branch", "1"], "--cache-branch 1 would change nothing: method tgate makes no shallow call"),
        (
            ["--merge-ratio", "0.5"],
            "--merge-ratio 0.5 would change nothing: method tgate merges no tokens; leave it out",
        ),
        (["--method", "tome", "--merge-ratio", "0.9"], "the merge ratio must be above 0 and at most 0.75"),
        (["--size", "128x128", "--height", "128"], "give --size, or --height and --width, not both"),
        (["--size", "128x128", "--size", "128x128"], "--size names 128x128 more than once"),
        (["--size", "128x100"], "the height must be a multiple of 8 pixels"),
        (["--batch", "4:1"], "--batch takes N or LEAST:MOST with 1 <= LEAST <= MOST <= 1024, got 4:1"),
    ],
)
def test_an_export_that_cannot_be(run: Run, tmp_path: Path, arguments: list[str], says: str) -> None:
    fails(run("--model", "mini-sdxl", "--output", tmp_path / "b", *arguments, main=export_main), says)
    assert list(tmp_path.iterdir()) == []


def test_each_golden_that_is_replayed_is_a_line(
    run: Run, good: Path, exports: list[Any], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--model", "mini-sdxl", main=export_main)[0] == 0
    ((_, verify),) = exports
    verify(good)
    err = capfd.readouterr().err
    assert [line.partition(" error ")[0] for line in err.splitlines() if line.startswith("golden ")] == [
        f"golden {name}: worst relative" for name in Bundle.open(good).manifest.goldens
    ]


def test_a_golden_that_differs_fails_the_export(
    run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch, exports: list[Any]
) -> None:
    from tgate_export import build

    edit_manifest(toy, lambda d: d["goldens"]["trajectory"].update(tolerance=1e-12, oracle="the oracle"))
    monkeypatch.setattr(build, "export", lambda settings, report, verify: verify(toy))
    result = run("--model", "mini-sdxl", main=export_main)
    fails(result, "golden trajectory has a relative error of ", "do not compute what the oracle makes", "--no-verify")


def test_an_engine_that_is_missing_is_told_before_the_work(
    run: Run, monkeypatch: pytest.MonkeyPatch, exports: list[Any]
) -> None:
    from tgate_runtime import engines

    def missing(name: str, **_: object) -> None:
        raise EngineError(f"engine {name} needs onnxruntime, which is not installed")

    monkeypatch.setattr(engines, "open_engine", missing)
    fails(run("--model", "mini-sdxl", main=export_main), "needs onnxruntime, which is not installed", "--no-verify")
    assert exports == []
    for without in (["--no-verify"], ["--weights", "none"], ["--weights", "random"]):
        assert run("--model", "mini-sdxl", *without, main=export_main)[0] == 0
    assert [verify for _, verify in exports] == [None] * 3


def test_export_without_its_extra_names_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("tgate_export")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(run("--model", "mini-sdxl", main=export_main), "export needs torch", "pip install 'tgate-engine[export]'")


# --- tgate plan ---------------------------------------------------------------------------------


def test_a_plan_comes_with_its_baselines(run: Run, toy: Path) -> None:
    status, out, _ = run("plan", toy, "--name", "fast", "--m", 3, "--steps", 6)
    assert status == 0
    assert out.splitlines() == [
        f"{toy}: plan fast, 6 steps over full, reuse_cross",
        f"{toy}: plan fast.ungated, a baseline of fast",
        f"{toy}: plan fast.guidance_stopped, a baseline of fast",
    ]
    plans = Bundle.open(toy).manifest.plans
    assert set(plans) == {"default", "ungated", "guidance_stopped", "fast", "fast.ungated", "fast.guidance_stopped"}
    assert plans["fast"].settings == {"method": "tgate", "n": 6, "m": 3, "k": 1, "w": 2, "f": 1}
    assert [step.graph for step in plans["fast"].steps] == ["full"] * 3 + ["reuse_cross"] * 3
    assert plans["fast"].baselines == ("fast.ungated", "fast.guidance_stopped")
    assert beside(toy) == []


def test_every_setting_of_a_plan(run: Run, toy: Path) -> None:
    settings = ("--m", 6, "--k", 2, "--steps", 9, "--warm-up", 0, "--fidelity-interval", 2, "--guidance-scale", 4)
    assert run("plan", toy, "--name", "x", *settings)[0] == 0
    plan = Bundle.open(toy).manifest.plan("x")
    assert plan.settings == {"method": "tgate", "n": 9, "m": 6, "k": 2, "w": 0, "f": 2}
    assert plan.guidance_scale == 4.0


def test_a_plan_is_replaced_when_asked(run: Run, toy: Path) -> None:
    add = ("plan", toy, "--name", "x", "--m")
    assert run(*add, 4)[0] == 0
    fails(run(*add, 3), "already has a plan 'x'; use another --name, or --force")
    assert Bundle.open(toy).manifest.plan("x").settings["m"] == 4
    assert run(*add, 3, "--force")[0] == 0
    assert Bundle.open(toy).manifest.plan("x").settings["m"] == 3


def test_a_plan_in_a_file_leaves_the_bundle_alone(run: Run, toy: Path, tmp_path: Path) -> None:
    """It is the plan that the bundle would have, but for baselines that are stored nowhere."""
    before, file = (toy / MANIFEST_FILE).read_bytes(), tmp_path / "p.json"
    for steps, baselines in ((8, ("ungated",)), (6, ())):
        settings = ("plan", toy, "--name", f"of-{steps}", "--m", 3, "--steps", steps)
        shown = (0, f"{file}: plan of-{steps}, {steps} steps over full, reuse_cross\n", "")
        assert run(*settings, "--output", file, "--force", "--quiet") == shown
        assert (toy / MANIFEST_FILE).read_bytes() == before
        plan = Plan.load(file)
        assert plan.baselines == baselines
        assert run(*settings)[0] == 0
        stored = Bundle.open(toy).manifest.plan(f"of-{steps}")
        assert stored.same_program(plan)
        assert stored.settings == plan.settings
        (toy / MANIFEST_FILE).write_bytes(before)
    assert beside(toy) == ["p.json"]


def test_a_plan_file_is_whole_or_as_it_was(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "p.json"
    file.write_text("before")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        fails(run("plan", good, "--name", "x", "--m", 3, "--output", file, "--force"), f"no space left in {tmp_path}")
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert run("plan", good, "--name", "x", "--m", 3, "--output", file, "--force")[0] == 0
    assert json.loads(file.read_text())["name"] == "x"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "method tgate wants the step at which its gate closes; give --m"),
        (
            ["--m", 3, "--cache-interval", 2],
            "--cache-interval 2 would change nothing: method tgate makes no shallow call",
        ),
        (["--m", 9], "between 1 and the number of steps n = 8, got m = 9"),
        (["--m", 3, "--steps", 2], "between 1 and the number of steps n = 2, got m = 3"),
        (["--m", 3, "--guidance-scale", 1], "does not fit a bundle exported with guidance"),
        (["--m", 3, "--steps", 8, "--sampler", "nope"], "there is no sampler 'nope'"),
        (["--m", 3, "--output", "deep/p.json"], "deep/p.json: there is no directory deep"),
        (["--m", 3, "--output", "is.json"], "is.json is a directory"),
    ],
)
def test_a_plan_that_cannot_be(
    run: Run, toy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[Any], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("is.json").mkdir()
    before = (toy / MANIFEST_FILE).read_bytes()
    fails(run("plan", toy, "--name", "x", *arguments), says)
    assert (toy / MANIFEST_FILE).read_bytes() == before
    assert beside(toy) == ["is.json"]


WITHOUT_EXPORT = """
import sys

FORBIDDEN = {"accelerate", "diffusers", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "PIL", "scipy", "sympy",
             "tokenizers", "torch", "transformers"}

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Forbid())
from tgate_cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def without_export(*arguments: object) -> tuple[int, str, str]:
    """``tgate`` where nothing is installed but what the contract needs."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXPORT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_a_plan_needs_no_torch(toy: Path, tmp_path: Path, run: Run) -> None:
    """Where the bundle has a table of the sampler for those steps, and the plan is the one that is made with torch."""
    settings = ("--name", "fast", "--m", 7, "--k", 3, "--steps", 12)
    status, out, err = without_export("plan", toy, *settings, "--quiet")
    assert (status, err) == (0, "")
    assert out.splitlines()[0] == f"{toy}: plan fast, 12 steps over full, reuse_self, reuse_cross"
    assert run("plan", toy, *settings, "--output", tmp_path / "p.json")[0] == 0
    plans = Bundle.open(toy).manifest.plans
    assert plans["fast"].same_program(Plan.load(tmp_path / "p.json"))
    assert set(plans["fast"].baselines) == {"fast.ungated", "fast.guidance_stopped"} <= set(plans)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", 13], "no table of sampler 'toy' for 13 steps (it has toy for 1 to 12 steps)"),
        (["--sampler", "ddim"], "no table of sampler 'ddim' for 8 steps (it has toy)"),
    ],
)
def test_outside_the_tables_the_extra_is_named(toy: Path, arguments: list[Any], says: str) -> None:
    result = without_export("plan", toy, "--name", "x", "--m", 3, *arguments)
    fails(result, says, "compiling one needs torch: pip install 'tgate-engine[export]'")
    assert set(Bundle.open(toy).manifest.plans) == {"default", "ungated", "guidance_stopped"}


def test_plans_are_taken_out(run: Run, toy: Path) -> None:
    before = (toy / MANIFEST_FILE).read_bytes()
    assert run("plan", toy, "--name", "fast", "--m", 3, "--steps", 6)[0] == 0
    remove = ("plan", toy, "--quiet", "--remove")
    fails(run(*remove, "fast.ungated"), "plan 'fast.ungated' is what 'fast' is measured against, and stays")
    fails(run(*remove, "default"), "plan 'default' is taken by every request that names none; it stays")
    fails(run(*remove, "slow"), "the bundle has no plan 'slow'; it has default, fast, ")
    status, out, err = run(*remove, "fast")
    left = "default, ungated, guidance_stopped, fast.ungated, fast.guidance_stopped"
    assert (status, out, err) == (0, f"{toy}: plan fast removed; left are {left}\n", "")
    status, out, err = run(*remove, "fast.ungated", "--remove", "fast.guidance_stopped", "--json")
    assert (status, err) == (0, "")
    names = ["fast.ungated", "fast.guidance_stopped"]
    assert json.loads(out) == {
        "written": str(toy),
        "removed": names,
        "plans": ["default", "ungated", "guidance_stopped"],
    }
    assert (toy / MANIFEST_FILE).read_bytes() == before
    assert beside(toy) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--remove", "x", "--m", 3], "--remove takes plans out and adds none; leave out --m"),
        (["--remove", "x", "--name", "y", "--force", "--warm-up", 0], "leave out --name, --warm-up, --force"),
        (["--m", 3], "the following arguments are required: --name; or --remove NAME"),
        ([], "the following arguments are required: --name; or --remove NAME"),
        (["--remove", "x", "--cache-interval", 2], "leave out --cache-interval"),
    ],
)
def test_plans_are_added_or_taken_out(run: Run, arguments: list[Any], says: str) -> None:
    fails(run("plan", "b", *arguments), says, status=2)


# --- tgate embed --------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "says"), [("deep/e.safetensors", "there is no directory"), (".", "is a directory")])
def test_a_place_for_embeddings_that_cannot_be(run: Run, tmp_path: Path, output: str, says: str) -> None:
    place = tmp_path / output
    fails(run("embed", "a circle", "--model", "mini-sdxl", "--output", place), str(place), says)


def test_a_plan_as_data(run: Run, toy: Path) -> None:
    before = set(Bundle.open(toy).manifest.plans)
    arguments = ["plan", toy, "--name", "fast", "--m", 3, "--steps", 6, "--quiet", "--json"]
    status, out, err = run(*arguments)
    assert (status, err) == (0, "")
    told = json.loads(out)
    plan = Bundle.open(toy).manifest.plan("fast")
    assert (told["written"], told["name"], told["steps"]) == (str(toy), "fast", 6)
    assert told["settings"] == dict(plan.settings)
    assert tuple(told["baselines"]) == plan.baselines
    assert {"fast", *told["added"]} == Bundle.open(toy).manifest.plans.keys() - before


def test_a_plan_that_reuses_nothing_is_told(run: Run, toy: Path) -> None:
    status, _, err = run("plan", toy, "--name", "idle", "--m", 5, "--k", 3, "--warm-up", 2, "--steps", 8, "--quiet")
    assert status == 0
    assert err.startswith("tgate: warning: plan idle: k = 3 reuses nothing at n = 8, m = 5, w = 2")
    assert run("plan", toy, "--name", "busy", "--m", 5, "--k", 2, "--warm-up", 0, "--steps", 8, "--quiet")[2] == ""


def test_a_plan_file_replaces_nothing_unasked_and_no_file_of_a_bundle(run: Run, toy: Path, tmp_path: Path) -> None:
    there = tmp_path / "there.json"
    there.write_text("{}")
    plan = ("plan", toy, "--name", "x", "--m", 2, "--output")
    fails(run(*plan, there), "exists already; choose another --output, or --force to replace it")
    assert there.read_text() == "{}"
    before = (toy / "manifest.json").read_bytes()
    fails(run(*plan, toy / "manifest.json", "--force"), "lies in a bundle, whose files are its own")
    assert (toy / "manifest.json").read_bytes() == before
    assert run(*plan, there, "--force")[0] == 0


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mx", "x" * 201, "\udcff"], ids=repr)
def test_names_that_no_reader_takes(run: Run, toy: Path, name: str) -> None:
    fails(run("plan", toy, "--name", name, "--m", 2), "a plan's name is at most 200 characters", status=2)
