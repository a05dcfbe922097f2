"""libtgate replays what export recorded: from a golden's latents and conditioning, along the golden's own plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cpp.library import Bundle, Library, Request, Session
from tests.cpp.twins import Twins, same
from tests.tiny_flow import make_tiny_flow
from tgate_engine.bundle import Bundle as Facts
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_runtime.mini import place_of
from tgate_runtime.verify import relative_error

Family = Callable[..., tuple[Path, Path]]


def replay(library: Library, path: Path, folder: Path) -> dict[str, float]:
    """The worst error of every golden that walks a plan without noise of its own, beside its tolerance."""
    manifest, left = Facts.open(path).manifest, {}
    for name, golden in manifest.goldens.items():
        if golden.plan is None or golden.plan.sampler.stochastic:
            continue
        file = folder / f"{name}.json"
        file.write_text(json.dumps(golden.plan.to_json()))
        bundle = Bundle(library, path)
        session = Session(bundle, plans=[str(file)], sizes=[golden.size], threads=1)
        recorded = load_file(path / golden.file)
        taken = {f"conditioning.{tensor}" for tensor in bundle.tensors(golden.size)}
        asked: dict[str, Any] = {
            "plan": str(file),
            "tensors": {tensor.removeprefix("conditioning."): recorded[tensor] for tensor in taken},
            "initial_latents": recorded["latents.0"],
            "guidance_scale": float(recorded["guidance_scale"].reshape(-1)[0]),
        }
        request = Request(session, **asked)
        errors = []
        for step in range(len(golden.plan.steps)):
            request.step()
            errors.append(relative_error(request.latents(), recorded[f"latents.{step + 1}"]))
        left[name] = max(errors) / golden.tolerance
    return left


def test_goldens_of_the_bundle_that_ships(library: Library, tmp_path: Path) -> None:
    errors = replay(library, place_of("mini"), tmp_path)
    assert {"gated", "ungated"} <= {*errors}
    assert max(errors.values()) <= 1


@pytest.mark.parametrize(
    "variant", ["sd15_a", "pixart_alpha_1024", "latte_a", pytest.param("svd_a", marks=pytest.mark.slow)]
)
def test_goldens_of_other_families(library: Library, family_bundle: Family, tmp_path: Path, variant: str) -> None:
    errors = replay(library, family_bundle(variant)[1], tmp_path)
    assert errors
    assert max(errors.values()) <= 1


@pytest.mark.slow
def test_goldens_of_two_networks(library: Library, tmp_path: Path) -> None:
    """Wan 2.2's, and a plan that passes from one to the other: it is the plan that knows, not the host."""
    checkpoint, path = make_tiny_flow(tmp_path / "checkpoint", "wan22_a"), tmp_path / "bundle"
    settings: dict[str, Any] = {
        "steps": 6,
        "m": 3,
        "warm_up": 0,
        "height": 16,
        "width": 32,
        "frames": 5,
        "components": ("denoiser",),
    }
    export(ExportSettings(model="wan22-t2v-a14b", checkpoint=str(checkpoint), output=path, **settings), Silent())
    errors = replay(library, path, tmp_path)
    assert {"ungated", "gated", "late_gated", "late_guidance_stopped"} <= {*errors}
    assert max(errors.values()) <= 1
    plan = Facts.open(path).manifest.plan("default")
    assert plan.graphs() == ("full", "late_full", "late_reuse_cross")
    twins, rng = Twins(library, path), np.random.default_rng(1)
    tensors = {name: rng.standard_normal((1, 512, 24)).astype(np.float32) for name in twins.bundle.tensors()}
    same(twins.draw(tensors=tensors, seed=3), twins.wanted(tensors=tensors, seed=3).latents)


def test_a_golden_that_is_another_s_is_told(library: Library, tmp_path: Path) -> None:
    """The comparison sees a wrong guidance scale."""
    path = place_of("mini")
    golden = Facts.open(path).manifest.goldens["gated"]
    recorded = load_file(path / golden.file)
    bundle = Bundle(library, path)
    tensors = {name: recorded[f"conditioning.{name}"] for name in bundle.tensors()}
    request = Request(
        Session(bundle, threads=1), tensors=tensors, initial_latents=recorded["latents.0"], guidance_scale=9.0
    )
    request.step()
    assert relative_error(request.latents(), recorded["latents.1"]) > 10 * golden.tolerance
    assert np.isfinite(request.latents()).all()
