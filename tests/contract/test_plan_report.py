"""A plan's report: there again as it was written, of one program on one bundle, and read distrustfully."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_engine.manifest_json import bundle_digest
from tgate_engine.plan_report import (
    DIFFERENCES,
    NEARNESS,
    Estimate,
    PlanReport,
    files_of,
    program_digest,
    report_of,
    save_report,
    told,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(build(tmp_path / "toy", goldens=False))


def report(bundle: Bundle, name: str = "default") -> PlanReport:
    plan = bundle.manifest.plan(name)
    return PlanReport(
        bundle=bundle_digest(bundle.manifest),
        program=program_digest(plan),
        settings=dict(plan.settings),
        files=files_of(bundle.manifest, plan, "4x4"),
        metric="psnr",
        quality=Estimate(mean=31.2, low=30.1, high=32.3),
        unrelated=Estimate(mean=12.0, low=11.0, high=13.0),
        beside={"first_object": Estimate(mean=-0.5, low=-1.0, high=0.0)},
        judge="a" * 64,
        elsewhere={"openvino 2026.4.1": Estimate(mean=51.0, low=50.0, high=52.0)},
        images=8,
        prompts=4,
        prompts_sha256="0" * 64,
        seed=7,
        size="4x4",
        predicted_ms=10.0,
        measured_ms=10.5,
        ungated_ms=20.0,
        macs=100,
        ungated_macs=200,
        engine="ort-cpu",
        engine_version="1.31",
        precision="f32",
        threads=1,
        machine="a processor",
        version="0.1.0",
    )


def test_it_is_there_again_and_the_bundle_stays_what_it_is(bundle: Bundle) -> None:
    plan = bundle.manifest.plan("default")
    assert report_of(bundle, plan) is None
    before = (bundle.path / "manifest.json").read_bytes()
    name = save_report(bundle, report(bundle))
    assert (bundle.path / name).is_file()
    assert (bundle.path / "manifest.json").read_bytes() == before
    again = Bundle.open(bundle.path)
    assert report_of(again, again.manifest.plan("default")) == report(bundle)
    assert report_of(again, again.manifest.plan("ungated")) is None


def test_it_belongs_to_what_a_plan_does_and_not_to_its_name(bundle: Bundle) -> None:
    save_report(bundle, report(bundle))
    plan = bundle.manifest.plan("default")
    assert report_of(bundle, replace(plan, name="another", settings={}, baselines=())) is not None
    assert report_of(bundle, replace(plan, guidance_scale=4.0)) is None
    bundle.save_plans({"same": replace(plan, name="same")})
    again = Bundle.open(bundle.path)
    assert report_of(again, again.manifest.plan("same")) == report(bundle)


def test_it_is_of_the_files_that_draw_in_whatever_bundle(bundle: Bundle) -> None:
    """Another decoder or tokenizer is another picture; another licence, and a graph that the plan does not run, are
    not."""
    drawing = {*report(bundle).files}
    assert {"weights.safetensors", "text.onnx", "decoder.onnx", "full.onnx"} <= drawing
    assert any("token" in name for name in drawing)
    save_report(bundle, report(bundle))
    edit_manifest(bundle.path, lambda data: data.update(licence="another"))
    again = Bundle.open(bundle.path)
    assert bundle_digest(again.manifest) != bundle_digest(bundle.manifest)
    assert report_of(again, again.manifest.plan("default")) == report(bundle)
    for name, digest in bundle.manifest.files.items():
        files = {**bundle.manifest.files, name: replace(digest, sha256="f" * 64)}
        other = replace(bundle, manifest=replace(bundle.manifest, files=files))
        assert (report_of(other, other.manifest.plan("default")) is None) == (name in drawing), name


def test_a_size_that_the_bundle_has_not_is_not_what_was_measured(bundle: Bundle) -> None:
    save_report(bundle, replace(report(bundle), size="8x8"))
    assert report_of(bundle, bundle.manifest.plan("default")) is None


@pytest.mark.parametrize(
    "edit",
    [
        {"form": 2},
        {"metric": "beauty"},
        {"quality": {"mean": 1.0, "low": 0.5}},
        {"images": 0},
        {"measured_ms": "fast"},
        {"prompts_sha256": "xyz"},
        {"colour": "red"},
        {"files": {"a": 1}},
        {"judge": "me"},
        {"beside": {"psnr": 3}},
        {"elsewhere": {str(i): {"mean": 1.0, "low": 1.0, "high": 1.0} for i in range(17)}},
    ],
    ids=str,
)
def test_a_file_that_is_no_report_is_refused(bundle: Bundle, edit: dict[str, Any]) -> None:
    name = save_report(bundle, report(bundle))
    file = bundle.path / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
    with pytest.raises(BundleError) as refused:
        report_of(bundle, bundle.manifest.plan("default"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("metric", [*NEARNESS, *DIFFERENCES])
def test_a_report_by_any_metric_is_read_again(bundle: Bundle, metric: str) -> None:
    save_report(bundle, replace(report(bundle), metric=metric))
    found = report_of(bundle, bundle.manifest.plan("default"))
    assert found is not None
    assert found.metric == metric


def test_a_link_or_half_a_file_is_refused(bundle: Bundle) -> None:
    file = bundle.path / save_report(bundle, report(bundle))
    content = file.read_text()
    file.write_text(content[: len(content) // 2])
    with pytest.raises(BundleError, match="holds no report"):
        report_of(bundle, bundle.manifest.plan("default"))
    file.rename(bundle.path / "elsewhere")
    file.symlink_to(bundle.path / "elsewhere")
    with pytest.raises(BundleError, match="holds no report"):
        report_of(bundle, bundle.manifest.plan("default"))


def test_a_place_that_cannot_be_written_is_one_line(bundle: Bundle) -> None:
    (bundle.path / "reports").write_text("in the way")
    with pytest.raises(BundleError, match="cannot be written"):
        save_report(bundle, report(bundle))


def test_for_a_reader() -> None:
    assert Estimate(mean=31.204, low=30.1, high=32.3).told("psnr") == "31.20 dB (30.10 to 32.30)"
    assert Estimate(mean=0.95123, low=0.94, high=0.96).told("ssim") == "0.9512 (0.9400 to 0.9600)"
    assert Estimate(mean=-0.84, low=-2.1, high=0.4).told("accuracy") == "-0.8 points (-2.1 to +0.4)"
    assert told("clip", 0.125) == "+0.12 points"
    assert told("reward", 0.125) == "+0.125"
    assert told("lpips", -0.125) == "-0.1250"
    assert told("unheard of", 0.125) == "0.1250"
