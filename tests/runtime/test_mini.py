"""The bundle that ships: its name, how it is made whole, and that it draws what diffusers draws."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, EngineError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.manifest_json import parse_manifest
from tgate_engine.plan_report import report_of
from tgate_export.build import _take_reports
from tgate_export.plans import add_plan
from tgate_runtime import mini
from tgate_runtime.engines import open_engine
from tgate_runtime.mini import HEAD_FILE, MINI, MODELS, assemble, is_embedded, place_of
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache directory; the working directory is an empty one beside it."""
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "cache"


def test_models_that_ship_are_known_by_their_names() -> None:
    assert is_embedded(parse_manifest((MODELS / MINI / MANIFEST_FILE).read_bytes()).model)
    assert is_embedded("mini-sdxl")
    for other in ("sdxl", "prompts.txt", "..", "", "mini-sdxl/unet"):
        assert not is_embedded(other)


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --- the bundle ---------------------------------------------------------------------------------


def test_it_replays_what_diffusers_drew_and_draws_what_is_asked_for(cache: Path) -> None:
    engine = open_engine("ort-cpu", threads=1)
    bundle = Bundle.open(place_of(MINI))
    checked = {golden.name: golden for golden in verify(bundle, engine=engine)}
    assert set(checked) == {"text", "ungated", "gated", "guidance_stopped", "image"}
    assert [golden.name for golden in checked.values() if not golden.ok] == []
    assert "PixArtAlphaPipeline of diffusers" in bundle.manifest.goldens["ungated"].oracle
    with Pipeline.open(MINI, engine=engine, plans=["default"]) as pipe:
        (image,) = pipe("a large red circle above a small blue square", seed=7).images
    red, green, blue = np.moveaxis(np.asarray(image).astype(int), -1, 0)
    circle, square = (
        np.argwhere(own - np.maximum(a, b) > 80) for own, a, b in ((red, green, blue), (blue, red, green))
    )
    assert len(circle) > len(square) > 50
    assert circle[:, 0].mean() < square[:, 0].mean()  # rows count downwards


def test_what_was_measured_of_its_default_plan_ships(cache: Path, tmp_path: Path) -> None:
    """With the bundle, and with the checkpoint, from which an export that comes out the same takes it."""
    bundle = Bundle.open(place_of(MINI))
    plan = bundle.manifest.plan("default")
    found = report_of(bundle, plan)
    assert found is not None
    assert found.quality.low >= -1.5
    assert found.ungated_ms > 1.3 * found.measured_ms
    assert report_of(bundle, plan, MODELS / "mini-pixart") == found
    again = Bundle.open(shutil.copytree(bundle.path, tmp_path / "again", ignore=shutil.ignore_patterns("reports")))
    assert report_of(again, plan) is None
    _take_reports(again, MODELS / "mini-pixart")
    assert report_of(again, plan) == found


def test_what_ships_is_small_and_comes_out_of_its_own_bundle_again(cache: Path, tmp_path: Path) -> None:
    shipped = contents(MODELS / MINI)
    assert sum(map(len, shipped.values())) < 2 * 2**20
    ship = runpy.run_path(str(ROOT / "scripts" / "ship_mini.py"))["main"]
    ship(place_of(MINI), tmp_path / "shipped")
    assert contents(tmp_path / "shipped") == shipped


# --- the name -----------------------------------------------------------------------------------


def test_only_the_bare_text_is_the_name(cache: Path) -> None:
    for source in ("./mini", Path("mini"), "bundles/mini", "mini/", "Mini"):
        assert place_of(source) == Path(source)
    assert not cache.exists()
    assert place_of("mini").parent == cache


def test_a_bundle_of_that_name_comes_first_and_is_told(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("mini").mkdir()
    assert place_of("mini").parent == cache  # any other directory is no bundle
    assert caplog.messages == []
    Path("mini", MANIFEST_FILE).touch()
    assert place_of("mini") == Path("mini")
    (message,) = caplog.messages
    assert "./mini" in message


# --- making it ----------------------------------------------------------------------------------

ASK = """
import sys
from tgate_engine.bundle import Bundle
from tgate_runtime.mini import place_of
sys.stdin.readline()
print(Bundle.open(place_of("mini")).path)
"""


def test_processes_that_ask_at_once_get_one_whole_bundle(cache: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    asking = [subprocess.Popen([sys.executable, "-c", ASK], text=True, **pipes) for _ in range(4)]  # type: ignore[call-overload]
    for process in asking:  # all have imported, or will soon
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=60) for process in asking]
    assert {err for _, err in told} == {""}
    (place,) = {out.strip() for out, _ in told}
    assert [str(path) for path in cache.iterdir()] == [place]


@pytest.mark.parametrize("moment", ["staging", "assemble"])
def test_who_is_slower_takes_what_is_there(cache: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """Somebody else is faster, and has a plan in the bundle already, which is not lost."""
    real = getattr(mini, moment)

    def meanwhile(*arguments: Any) -> Any:
        (cache / place).mkdir(parents=True)
        assemble(MODELS / MINI, cache / place)
        add_plan(cache / place, name="mine", m=5)
        return real(*arguments)

    place = place_of(MINI).name
    shutil.rmtree(cache)
    monkeypatch.setattr(mini, moment, meanwhile)
    assert "mine" in Bundle.open(place_of(MINI)).manifest.plans
    assert [path.name for path in cache.iterdir()] == [place]


def test_plans_that_were_added_stay(cache: Path) -> None:
    before = contents(MODELS / MINI)
    add_plan(place_of(MINI), name="mine", m=5)
    assert "mine" in Bundle.open(place_of(MINI)).manifest.plans
    assert contents(MODELS / MINI) == before


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").touch()
    with pytest.raises(
        BundleError, match=r"`mini` cannot be made in .*file/cache \(.*Not a directory.*\); .*TGATE_CACHE"
    ):
        place_of(MINI)


@pytest.mark.parametrize("harm", ["a name", "a number", "a graph", "a cut"])
def test_damaged_files_of_the_package_are_told_and_nothing_is_left(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    models = tmp_path / "models"
    shutil.copytree(MODELS / MINI, models / MINI)
    head, graph = models / MINI / HEAD_FILE, models / MINI / "full.onnx"
    match harm:
        case "a name":
            head.write_bytes(head.read_bytes().replace(b"transformer.proj_out.bias", b"transformer.proj_out.bios"))
        case "a number":
            head.write_bytes(head.read_bytes().replace(b'"shape":[148,128]', b'"shape":[148,129]'))
        case "a graph":
            graph.write_bytes(graph.read_bytes()[::-1])
        case "a cut":
            head.write_bytes(head.read_bytes()[:1000])
    monkeypatch.setattr(mini, "MODELS", models)
    with pytest.raises(BundleError, match=r"install tgate-engine again"):
        place_of(MINI)
    assert list(cache.iterdir()) == []


def test_a_cache_that_others_can_write_to_is_not_read(cache: Path) -> None:
    place_of(MINI)
    cache.chmod(0o777)
    with pytest.raises(EngineError, match="others may write to"):
        place_of(MINI)
