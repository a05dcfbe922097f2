"""The embedded model, from the command line to pictures: the main path of the product, on real weights."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from benchmarks.quality import draw
from tgate_cli.main import main
from tgate_engine.bundle import Bundle
from tgate_export.families import location
from tgate_runtime.pipeline import Pipeline
from training.evaluate import evaluation_captions, score_pictures

PROMPT = "a large red circle above a small blue square"


@pytest.mark.parametrize("model", ["mini-sdxl", "mini-pixart"])
def test_the_checkpoint_is_small_and_whole(model: str) -> None:
    """At most 12 MiB of float16 safetensors, and nothing pickled."""
    root = Path(location(model))
    files = list(root.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 12 * 2**20
    for path in files:
        with safe_open(path, framework="numpy") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}, path  # noqa: SIM118
    assert not [path for path in root.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]


def test_generate_draws_the_same_picture_for_the_same_seed(mini_bundle: Path, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "c")]
    for path, seed in zip(paths, ("0", "0", "1"), strict=True):
        assert main(["generate", str(mini_bundle), PROMPT, "--seed", seed, "--output", str(path), "--quiet"]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes() != paths[2].read_bytes()
    with Image.open(paths[0]) as image:
        assert image.size == (128, 128)
        assert image.mode == "RGB"


def test_eight_requests_at_once_equal_eight_in_turn(mini_bundle: Path) -> None:
    """Bit for bit, over plans and seeds, on one session."""
    requests = [(PROMPT if i % 2 else "a green star", i, ("default", "ungated")[i % 2]) for i in range(8)]
    with Pipeline.open(mini_bundle) as pipe:

        def request(arguments: tuple[str, int, str]) -> bytes:
            prompt, seed, plan = arguments
            return pipe(prompt, seed=seed, plan=plan).latents.tobytes()

        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(request, requests))
        assert together == [request(one) for one in requests]
    assert len(set(together)) == 8


def test_an_added_plan_needs_no_new_graph(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(mini_bundle, bundle)
    graphs = {path.name: path.read_bytes() for path in bundle.glob("*.onnx")}
    add = [
        "plan",
        str(bundle),
        "--name",
        "fast",
        "--m",
        "5",
        "--k",
        "3",
        "--steps",
        "20",
        "--sampler",
        "ddim",
        "--quiet",
    ]
    assert main(add) == 0
    plan = Bundle.open(bundle).manifest.plan("fast")
    assert (len(plan.steps), plan.settings["m"], plan.sampler.name) == (20, 5, "ddim")
    assert plan.baselines == ("fast.ungated", "fast.guidance_stopped")
    assert {path.name: path.read_bytes() for path in bundle.glob("*.onnx")} == graphs
    output = tmp_path / "out.png"
    assert (
        main(["generate", str(bundle), PROMPT, "--plan", "fast", "--seed", "3", "--output", str(output), "--quiet"])
        == 0
    )


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--name", "default", "--m", "5"], "already has a plan"),
        (["--name", "x", "--m", "30"], "m = 30"),
        (["--name", "x", "--m", "5", "--sampler", "heun"], "heun"),
        (["--name", "x", "--m", "5", "--guidance-scale", "1"], "guidance"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_and_the_manifest_stays(
    mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], words: str
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(mini_bundle, bundle)
    before = (bundle / "manifest.json").read_bytes()
    assert main(["plan", str(bundle), *extra, "--quiet"]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert (bundle / "manifest.json").read_bytes() == before


def test_inspect_describes_the_plan_that_runs(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(mini_bundle), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    steps = data["plans"]["default"]["steps"]
    assert [step["graph"] for step in steps] == [
        *["full"] * 3, *["reuse_self"] * 2, "full", *["reuse_self"] * 3, "full", *["reuse_cross"] * 15,
    ]  # fmt: skip
    assert all(step["reads"] == steps[9]["writes"] for step in steps[10:])
    for kind in ("paper", "all"):
        assert data["plans"]["default"]["macs"][kind] == sum(step["macs"][kind] for step in steps)
        assert data["plans"]["default"]["macs"][kind] < data["plans"]["guidance_stopped"]["macs"][kind]
        assert data["plans"]["guidance_stopped"]["macs"][kind] < data["plans"]["ungated"]["macs"][kind]


def test_verify_replays_every_golden(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(mini_bundle), "--quiet"]) == 0
    shown = capsys.readouterr().out
    for name in ("text", "gated", "guidance_stopped", "image"):
        assert f"golden {name}: worst relative error" in shown


def test_bench_measures_every_graph_and_plan(mini_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(mini_bundle), "--json", "--repeats", "1", "--quiet"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert all(data["graphs"][name]["ms"] > 0 for name in ("full", "reuse_self", "reuse_cross", "unguided"))
    ms = {name: data["plans"][name]["ms"] for name in ("default", "guidance_stopped", "ungated")}
    for name in ("guidance_stopped", "ungated"):
        assert data["plans"][name]["speedup"] == pytest.approx(ms[name] / ms["default"], rel=1e-2)
    assert 1 < data["plans"]["guidance_stopped"]["mac_ratio"] < data["plans"]["ungated"]["mac_ratio"] < 3


def test_every_damaged_file_is_found(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit flipped in the middle of each file in turn: one line that names it, and nothing is drawn."""
    bundle, output = tmp_path / "bundle", tmp_path / "out.png"
    shutil.copytree(mini_bundle, bundle)
    for path in sorted(p for p in bundle.rglob("*") if p.is_file()):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 4
        path.write_bytes(damaged)
        assert main(["generate", str(bundle), PROMPT, "--output", str(output), "--quiet"]) == 1
        error = capsys.readouterr().err
        assert path.name in error
        assert len(error.strip().splitlines()) == 1
        assert not output.exists()
        path.write_bytes(whole)


def test_pictures_show_what_was_asked_for(mini_bundle: Path) -> None:
    """A sample of the model card's claim: 85 % of first objects right of 500. Far below it on 24 is a fault."""
    captions = evaluation_captions(24)
    with Pipeline.open(mini_bundle, threads=1) as pipe:
        plan = pipe.session.manifest.plan("default")
        score = score_pictures(captions, draw(pipe, plan, captions, seed=1000, workers=2))
    assert score.first_object >= 0.7


def test_a_plan_takes_what_is_not_said_from_the_default_plan(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(mini_bundle, bundle)
    assert main(["plan", str(bundle), "--name", "later", "--m", "12", "--quiet"]) == 0
    plans = Bundle.open(bundle).manifest.plans
    default, later = plans["default"], plans["later"]
    assert later.settings == {**default.settings, "m": 12, "k": 1}
    assert later.baselines == ("ungated", "later.guidance_stopped")
    assert later.sampler == default.sampler


def test_four_images_are_one_batch_each_with_a_seed_of_its_own(shipped_bundle: Path) -> None:
    with Pipeline.open(shipped_bundle, threads=1, plans=["default"]) as pipe:
        calls: list[range] = []
        four = pipe(PROMPT, seed=5, num_images=4, on_step=lambda progress: calls.append(progress.step.rows))
        assert calls == [range(4)] * 25
        assert four.seeds == (5, 6, 7, 8)
        alone = pipe(PROMPT, seed=7)
    assert np.abs(four.latents[2] - alone.latents[0]).max() < 1e-3 * np.abs(alone.latents).max()
    assert np.abs(four.latents[2] - four.latents[1]).max() > 0.1 * np.abs(alone.latents).max()


def test_changing_f_takes_the_graph_that_is_there(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(mini_bundle, bundle)
    assert main(["plan", str(bundle), "--name", "f", "--m", "10", "--fidelity-interval", "2", "--quiet"]) == 0
    plan = Bundle.open(bundle).manifest.plan("f")
    assert [step.graph for step in plan.steps[10:14]] == ["reuse_cross", "reuse_both", "reuse_cross", "reuse_both"]
