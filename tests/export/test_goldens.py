"""Goldens are diffusers' own, so an export does not survive what it misreads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file

from tests.conftest import family_settings
from tests.plain import export_plain
from tests.tiny_families import FAMILY_VARIANTS, load_tiny, make_tiny
from tgate_engine.bundle import Bundle
from tgate_engine.graph import DENOISE, GraphSpec, Macs
from tgate_engine.plan import Call
from tgate_engine.plan_build import build_plan
from tgate_export import goldens, oracle
from tgate_export.families.base import Family, Scaling
from tgate_export.families.t5 import T5Text
from tgate_export.job import ExportSettings, Job, prepare
from tgate_export.methods.base import FULL, Variant
from tgate_runtime.verify import verify

VARIANT = "pixart_alpha_1024"


def replayed(bundle: Path) -> Mapping[str, bool]:
    """Whether ONNX Runtime reproduces each golden."""
    return {golden.name: golden.ok for golden in verify(Bundle.open(bundle), threads=1)}


def test_a_misread_checkpoint_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three misreadings at once, one of each part that diffusers records; the method's own walk shares them."""
    root = make_tiny(tmp_path / "checkpoint", "pixart_alpha_a")
    forward, read = T5Text.forward, Family.scheduler_config

    def unmasked(self: T5Text, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = forward(self, ids)[1]
        return self.text_encoder(ids).last_hidden_state, torch.ones_like(mask)

    monkeypatch.setattr(T5Text, "forward", unmasked)
    monkeypatch.setattr(Family, "scaling", lambda *_: Scaling(scale=0.2))
    monkeypatch.setattr(Family, "scheduler_config", lambda *a: {**read(*a), "timestep_spacing": "trailing"})
    settings = ExportSettings(
        model="pixart-alpha",
        checkpoint=str(root),
        guidance_scale=1.0,
        height=64,
        width=64,
        output=tmp_path / "bundle",
    )
    assert replayed(export_plain(settings)) == {"text": False, "image": False, "ungated": False, "gated": True}


def test_goldens_say_who_recorded_them(family_bundle: Callable[[str], tuple[Path, Path]]) -> None:
    _, bundle = family_bundle(VARIANT)
    recorded = Bundle.open(bundle).manifest.goldens
    for name in ("text", "ungated", "image"):
        assert recorded[name].oracle == f"PixArtAlphaPipeline of diffusers {diffusers.__version__}"
    assert "the method in tgate-engine" in recorded["gated"].oracle
    assert all(replayed(bundle).values())


def test_the_decoders_golden_holds_numbers_not_bytes(family_bundle: Callable[[str], tuple[Path, Path]]) -> None:
    checkpoint, bundle = family_bundle(VARIANT)
    recorded = load_file(bundle / "golden" / "image.safetensors")
    assert recorded["output.decoded"].dtype == np.float32
    vae = load_tiny(checkpoint, VARIANT).vae
    latents = torch.from_numpy(recorded["input.latents"]) / vae.config.scaling_factor
    with torch.no_grad():
        want = vae.decode(latents).sample
    torch.testing.assert_close(torch.from_numpy(recorded["output.decoded"]), want, rtol=0, atol=1e-5)


def test_goldens_run_every_graph_in_few_steps(family_bundle: Callable[[str], tuple[Path, Path]]) -> None:
    manifest = Bundle.open(family_bundle(VARIANT)[1]).manifest
    plans = [golden.plan for golden in manifest.goldens.values() if golden.plan is not None]
    single = {golden.graph for golden in manifest.goldens.values() if golden.plan is None}
    assert {graph for plan in plans for graph in plan.graphs()} | single == manifest.shapes[0].graphs.keys()
    assert sum(len(plan.steps) for plan in plans) <= 16


def test_what_does_not_fit_into_memory_is_not_recorded_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_tiny(tmp_path / "checkpoint", "sd15_a")
    job = prepare(family_settings("sd15_a", root, tmp_path / "bundle"))
    monkeypatch.setattr(oracle, "available_bytes", lambda: 1000)
    assert goldens.record(job, tmp_path, [], {}, {}) == {}
    assert "no goldens are recorded" in caplog.text


# --- the walk ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    root = make_tiny(tmp_path_factory.mktemp("walk") / "checkpoint", "sd15_a")
    return prepare(family_settings("sd15_a", root, root.parent / "bundle", steps=3, m=2, sampler="euler"))


def test_a_walk_is_the_samplers_recurrence_over_the_network(job: Job) -> None:
    """Against the numbers of the plan, written out: Euler adds a multiple of each output to the latents."""
    denoiser = job.family.skeleton(job.checkpoint, "unet")
    calls: list[float] = []

    def network(_module: object, x: torch.Tensor, t: torch.Tensor, *_: object) -> torch.Tensor:
        calls.append(float(t[0]))
        return torch.stack([0.1 * row if i % 2 else 0.3 * row for i, row in enumerate(x)])  # negative: 0.3

    noise = torch.randn(2, *FAMILY_VARIANTS["sd15_a"].latents, generator=torch.Generator().manual_seed(1))
    rows = {f"prompt_embeds.{half}": torch.zeros(2, 24, 24) for half in ("negative", "positive")}
    graphs = {FULL: GraphSpec(file="", role=DENOISE, batch=(1, 2), inputs=(), outputs=(), macs=Macs(paper=0, all=0))}
    plan = build_plan(
        "x", [Call("p", FULL)] * 3, sampler=job.sampler, guidance_scale=7.5, graphs=graphs, carries={}, settings={}
    )
    family = SimpleNamespace(denoise=network, lengths=job.family.lengths, guidance_beyond=job.family.guidance_beyond)
    stub: Any = SimpleNamespace(family=family, settings=job.settings, guidance_scale=7.5, ramp=job.ramp)
    got = goldens.walk(stub, plan, denoiser, {FULL: Variant(name=FULL, halves="both")}, noise, rows)
    want = [noise * job.sampler.initial_scale]
    for call in job.sampler.calls:
        output = (0.3 + 7.5 * (0.1 - 0.3)) * want[-1] * call.input_scale
        want.append(call.latents[0] * want[-1] + call.outputs[0] * output)
    assert calls == [call.timestep for call in job.sampler.calls]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_both_halves_are_those_of_the_contract(job: Job) -> None:
    positive, negative = ({"prompt_embeds": torch.full((1, 2), value)} for value in (1.0, -1.0))
    rows = goldens.both_halves(job, positive, negative)
    assert {name: float(value[0, 0]) for name, value in rows.items()} == {
        "prompt_embeds.positive": 1.0,
        "prompt_embeds.negative": -1.0,
    }


def test_a_golden_file_is_inputs_and_outputs_by_name(job: Job, tmp_path: Path) -> None:
    one, two = torch.zeros(1), torch.ones(2)
    golden = goldens._record_graph(job, tmp_path / "golden" / "x.safetensors", "g", {"a": one}, {"b": two}, 0.5, "me")
    assert (golden.file, golden.graph, golden.tolerance, golden.oracle) == ("golden/x.safetensors", "g", 0.5, "me")
    assert golden.size == str(job.size)
    held = safetensors.torch.load_file(tmp_path / "golden" / "x.safetensors")
    assert torch.equal(held["input.a"], one)
    assert torch.equal(held["output.b"], two)
