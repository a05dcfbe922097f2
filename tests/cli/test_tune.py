"""``tgate tune``: a plan and its report in the bundle, and what is said where there can be none."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.running import Run, fails
from tests.tiny_alexnet import alexnet
from tests.tiny_clip import save_clip
from tests.tiny_reward import TINY, save_reward
from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.plan_report import report_of
from tgate_runtime.mini import MODELS
from tgate_runtime.tuning.lpips import lpips
from tgate_runtime.tuning.reward import reward
from training.grammar import held_out_scenes

QUICK = ("--images", 4, "--threads", 1, "--quiet")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory, where mini is then made."""
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("# mine\na large red circle\n\na small blue square\n")
    return file


def test_the_plan_is_added_with_its_report_and_inspect_shows_it(run: Run, toy: Path, prompts: Path) -> None:
    asked = ("--budget", "psnr=22", "--prompts", prompts, *QUICK)
    status, out, _ = run("tune", toy, *asked, "--json")  # a busy machine is warned of
    assert status == 0
    told = json.loads(out)
    assert told["plan"] == "tuned"
    assert told["report"]["quality"]["low"] >= 22
    assert told["report"]["prompts"] == 2
    bundle = Bundle.open(toy)
    plan = bundle.manifest.plan("tuned")
    assert dict(plan.settings) == told["report"]["settings"]
    assert plan.baselines[0] == "ungated"
    report = report_of(bundle, plan)
    assert report is not None
    assert report.to_json() == told["report"]
    assert (toy / told["report_file"]).is_file()

    shown = json.loads(run("inspect", toy, "--json")[1])["plans"]
    assert shown["tuned"]["report"] == told["report"]
    assert shown["ungated"]["report"] is None
    status, out, _ = run("inspect", toy)
    assert status == 0
    blocks = {block.split(":")[0].split()[-1]: block for block in out.split("\n\n")}
    assert f"quality: psnr {report.quality.told('psnr')} to the ungated pictures" in blocks["tuned"]
    assert "4 pictures of 2 prompts" in blocks["tuned"]
    assert "quality not measured" not in blocks["tuned"]
    assert "quality not measured" in blocks["ungated"]

    # Another plan leaves the report where it is; the plan's own name is its, whatever it does.
    assert run("plan", toy, "--name", "other", "--m", 2)[0] == 0
    assert json.loads(run("inspect", toy, "--json")[1])["plans"]["tuned"]["report"] == told["report"]
    assert run("plan", toy, "--name", "tuned", "--m", 8, "--k", 5, "--force")[0] == 0
    assert json.loads(run("inspect", toy, "--json")[1])["plans"]["tuned"]["report"] is None


def test_for_people(run: Run, toy: Path, prompts: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    asked = ("--budget", "psnr=22", "--prompts", prompts, "--images", 4, "--threads", 1, "--state", state)
    status, out, err = run("tune", toy, *asked)
    assert status == 0
    lines = out.splitlines()
    assert lines[1].split() == ["plan", "picture", "ms", "faster", "psnr", "(95", "%)"]
    assert sum(line.startswith("→") for line in lines) == 1
    assert lines[-2].startswith("predicted over measured: plan ")
    assert lines[-1].startswith(f"{toy}: plan tuned, ")
    assert "drawing with" in err
    drawn = state.read_text()
    fails(run("tune", toy, *asked), "already has a plan 'tuned'", "--force")
    status, again, _ = run("tune", toy, *asked, "--force", "--quiet")
    assert (status, again) == (0, out)  # nothing is measured twice
    assert state.read_text() == drawn


def test_mini_from_end_to_end(run: Run, tmp_path: Path, cached: Path) -> None:
    """The bundle that ships, its own prompts, the best plan of a speed; and what it draws is what was promised."""
    status, out, _ = run("tune", "mini", "--speedup", 1.2, "--steps", 4, "--name", "quick", *QUICK, "--json")
    assert status == 0
    told = json.loads(out)
    best = next(point for point in told["front"] if point["plan"] == told["chosen"])
    assert best["faster"] >= 1.2
    assert best["quality"]["mean"] == max(point["quality"]["mean"] for point in told["front"])
    assert told["report"]["quality"]["mean"] > told["report"]["unrelated"]["mean"]
    assert told["added"][0] == "quick.ungated"
    assert json.loads(run("inspect", "mini", "--json")[1])["plans"]["quick"]["report"] == told["report"]
    assert run("generate", "mini", "a red circle", "--plan", "quick", "--output", tmp_path / "x.png", "--quiet")[0] == 0


def test_the_prompts_of_the_embedded_models_are_what_training_never_saw() -> None:
    lines = (MODELS / "prompts.txt").read_text("utf-8").splitlines()
    captions = [line for line in lines if not line.startswith("#")]
    assert captions == [caption for caption, _ in held_out_scenes(500, 1)]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ((), "one of the arguments --budget --speedup is required"),
        (("--budget", "psnr=30", "--speedup", "2"), "not allowed with argument"),
        (("--budget", "beauty=3"), "expected psnr=NUMBER, in dB, ssim=NUMBER, up to 1, accuracy=-NUMBER or clip"),
        (("--budget", "psnr"), "expected psnr=NUMBER"),
        (("--budget", "psnr=high"), "expected a finite number, got 'high'"),
        (("--budget", "ssim=95"), "expected ssim above 0 and at most 1, got '95'"),
        (("--budget", "psnr=0"), "expected psnr above 0"),
        (("--speedup", "1"), "expected a number above 1"),
        (("--speedup", "2", "--images", "3"), "expected a whole number from 4"),
    ],
)
def test_a_command_line_that_is_wrong(run: Run, asked: tuple[str, ...], says: str) -> None:
    fails(run("tune", "b", *asked), says, status=2)


def test_a_budget_of_points_is_met_on_as_many_captions_as_can_tell(run: Run, tmp_path: Path, cached: Path) -> None:
    state, asked = tmp_path / "state.json", ("--steps", 4, "--threads", 1, "--quiet", "--json")
    goal = ("--budget", "accuracy=-60", "--images", 8, "--state", state)
    status, out, _ = run("tune", "mini", *goal, *asked)
    assert status == 0
    told = json.loads(out)
    report = told["report"]
    assert told["goal"] == {"metric": "accuracy", "budget": -60}
    assert report["quality"]["low"] >= -60
    assert report["judge"] == hashlib.sha256((MODELS / "judge.safetensors").read_bytes()).hexdigest()
    assert set(report["beside"]) == {"first_object", "right", "ungated_right", "psnr"}
    right, ungated = (report["beside"][name]["mean"] for name in ("right", "ungated_right"))
    assert right - ungated == pytest.approx(report["quality"]["mean"])
    assert report["beside"]["psnr"]["mean"] > 10
    _, text, _ = run("inspect", "mini")
    assert "beside the ungated pictures of the same seeds" in text
    assert "(first object " in text

    # Ranked by it, and the pictures are those that are known.
    status, out, _ = run("tune", "mini", "--speedup", 1.2, "--metric", "accuracy", *goal[2:], *asked, "--force")
    assert status == 0
    fast = json.loads(out)
    assert fast["goal"] == {"metric": "accuracy", "speedup": 1.2}
    best = next(point for point in fast["front"] if point["plan"] == fast["chosen"])
    assert best["faster"] >= 1.2
    assert best["quality"]["mean"] == max(point["quality"]["mean"] for point in fast["front"])


def test_a_clip_model_of_yours_judges(run: Run, toy: Path, prompts: Path, tmp_path: Path) -> None:
    model = save_clip(tmp_path)
    goal = ("--budget", "clip=-50", "--clip-model", model)
    status, out, err = run("tune", toy, *goal, "--prompts", prompts, *QUICK, "--json")
    assert status == 0, err
    report = json.loads(out)["report"]
    assert report["metric"] == "clip"
    assert report["judge"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert -50 < report["quality"]["low"] <= report["quality"]["mean"]
    assert report["quality"]["mean"] != 0


def test_an_imagereward_of_yours_judges(run: Run, toy: Path, prompts: Path, tmp_path: Path) -> None:
    model = save_reward(tmp_path / "model", TINY["one"])
    goal = ("--budget", "reward=-50", "--reward-model", model)
    status, out, err = run("tune", toy, *goal, "--prompts", prompts, *QUICK, "--json")
    assert status == 0, err
    report = json.loads(out)["report"]
    assert report["metric"] == "reward"
    assert report["judge"] == reward(model).judge
    assert -50 < report["quality"]["low"] <= report["quality"]["mean"]
    assert report["quality"]["mean"] != 0
    assert set(report["beside"]) == {"ungated_reward", "psnr"}


@pytest.mark.slow
def test_distances_that_a_network_sees_are_kept_to(run: Run, cached: Path, toy: Path, tmp_path: Path) -> None:
    pytest.importorskip("lpips", reason="[lpips] brings torchvision, which is built for one torch alone")
    file = tmp_path / "alexnet.pth"
    torch.save(alexnet(), file)
    goal = ("--budget", "lpips=-50", "--lpips-model", file)
    status, out, err = run("tune", "mini", *goal, *QUICK, "--json")
    assert status == 0, err
    report = json.loads(out)["report"]
    assert report["metric"] == "lpips"
    assert report["judge"] == lpips(file).judge
    assert -50 < report["quality"]["low"] <= report["quality"]["mean"] < 0
    fails(run("tune", toy, *goal, *QUICK, "--prompts", MODELS / "prompts.txt"), "these have 4x4; take psnr")


def test_a_speed_is_looked_for_by_the_metric_that_is_named(run: Run, toy: Path, prompts: Path) -> None:
    asked = ("--speedup", 1.05, "--prompts", prompts, *QUICK, "--json", "--force")
    told = json.loads(run("tune", toy, *asked, "--metric", "psnr")[1])
    assert told["report"]["metric"] == told["goal"]["metric"] == "psnr"
    fails(run("tune", toy, *asked, "--metric", "ssim"), "the pictures have 4x4")
    fails(run("tune", toy, *asked, "--metric", "accuracy"), "the bundle is of toy; take psnr, ssim or clip")


def test_what_a_judge_needs_is_told_before_anything_is_drawn(
    run: Run, good: Path, prompts: Path, tmp_path: Path, cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mini = ("tune", "mini", "--quiet", "--budget")
    fails(run(*mini, "accuracy=-1", "--images", 300), "accuracy=-1 takes at least 368 pictures, got --images 300")
    fails(run(*mini, "accuracy=-0.01"), "takes at least 36887 pictures, and at most 10000 are drawn")
    castle = tmp_path / "castle.txt"
    castle.write_text("a castle\n")
    fails(run(*mini, "accuracy=-1", "--prompts", castle), 'a prompt names none: "a castle"')
    clip = ("tune", good, "--prompts", prompts, "--budget", "clip=-0.3", "--quiet")
    fails(run(*clip), "--clip-model DIR", status=2)
    fails(run(*clip, "--clip-model", tmp_path / "none"), "there is no directory")
    fails(run(*clip, "--clip-model", tmp_path), "holds no CLIP model")
    fails(run("tune", good, "--prompts", prompts, "--budget", "psnr=22", "--floor-engine", "none"), "no engine 'none'")
    looks = ("tune", good, "--prompts", prompts, "--budget", "lpips=-0.1", "--lpips-model", tmp_path / "none")
    with monkeypatch.context() as absent:
        absent.setitem(sys.modules, "lpips", None)
        fails(run(*looks, "--quiet"), "lpips needs lpips", "pip install 'tgate-engine[lpips]'")
    people = ("tune", good, "--prompts", prompts, "--budget", "reward=-0.1", "--quiet", "--reward-model", tmp_path)
    fails(run(*people), "holds no ImageReward")
    monkeypatch.setitem(sys.modules, "transformers", None)
    fails(run(*people), "reward needs transformers", "pip install 'tgate-engine[reward]'")
    fails(run(*clip, "--clip-model", tmp_path), "clip needs transformers", "pip install 'tgate-engine[clip]'")


def test_what_cannot_be_tuned_is_told_in_one_line(run: Run, good: Path, prompts: Path, tmp_path: Path) -> None:
    goal = ("--budget", "psnr=22", "--quiet")
    before = (good / MANIFEST_FILE).read_bytes()
    fails(run("tune", tmp_path / "none", *goal), "there is no such directory")
    fails(run("tune", good, *goal), "name a file of your prompts, one a line, with --prompts FILE")
    fails(run("tune", good, *goal, "--prompts", tmp_path / "none.txt"), "none.txt")
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    fails(run("tune", good, *goal, "--prompts", empty), "holds no prompts")
    mine = (*goal, "--prompts", prompts)
    fails(run("tune", good, *mine, "--name", "ungated"), "is what default is measured against")
    fails(run("tune", good, *mine, "--name", "default"), "already has a plan 'default'")
    fails(run("tune", good, *mine, "--size", "9x9"), "no size 9x9")
    fails(run("tune", good, *mine, "--steps", 1), "no plan of 1 steps reuses anything")
    fails(run("tune", good, *mine, "--engine", "none"), "none")
    state = tmp_path / "state.json"
    state.write_text("{}")
    fails(run("tune", good, *mine, "--state", state), "holds no measurements")
    fails(run("tune", good, *mine, *QUICK, "--budget", "psnr=58.5"), "no plan is known to keep psnr 58.5")
    fails(run("tune", good, "--speedup", 900, "--prompts", prompts, *QUICK), "no plan over the bundle's graphs is 900")
    assert (good / MANIFEST_FILE).read_bytes() == before
    assert not (good / "reports").exists()


def test_a_state_of_another_bundle_is_refused(run: Run, toy: Path, prompts: Path, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    asked = ("--budget", "psnr=22", "--prompts", prompts, *QUICK, "--state", state)
    assert run("tune", toy, *asked)[0] == 0
    edit_manifest(toy, lambda data: data.update(licence="another"))
    fails(run("tune", toy, *asked, "--force"), "holds other measurements, whose bundle is")


def test_a_bundle_that_draws_no_pictures_from_prompts(run: Run, prompts: Path, tmp_path: Path) -> None:
    bare = build(tmp_path / "bare", goldens=False)
    edit_manifest(bare, lambda data: data["shapes"][0]["graphs"].pop("decoder"))
    fails(run("tune", bare, "--budget", "psnr=22", "--prompts", prompts), "the bundle has no decoder")
    pictured = build(tmp_path / "pictured", Toy(pictured=True), goldens=False)
    fails(run("tune", pictured, "--budget", "psnr=22", "--prompts", prompts), "the bundle has no text encoder")


def test_ssim_says_what_brings_it(run: Run, good: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage", None)
    result = run("tune", good, "--budget", "ssim=0.9", "--prompts", prompts)
    fails(result, "ssim needs skimage", "pip install 'tgate-engine[tune]'")
