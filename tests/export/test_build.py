"""From settings to a bundle: its files, its shapes, and its name, which it gets last. What an export refuses is in
tests/whole/test_export.py."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests import toy_bundle
from tests.plain import export_plain
from tests.tiny_families import make_tiny
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.graph import DECODE, DENOISE, TEXT
from tgate_engine.report import Silent
from tgate_engine.sampler_tables import load_tables
from tgate_export import build
from tgate_export.build import ExportSettings, _file, _plain, export
from tgate_export.families import MODELS
from tgate_export.families.base import Size
from tgate_export.sampling import OTHER_STEPS, OWN_STEPS
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

FIRST, OTHER = Size(width=1024, height=1024), Size(width=832, height=1216)


@pytest.mark.parametrize(
    ("role", "name", "size", "file"),
    [
        (DENOISE, "full", FIRST, "full.onnx"),
        (DENOISE, "full", OTHER, "full-832x1216.onnx"),
        (TEXT, "text_encoder", OTHER, "text_encoder.onnx"),
        (DECODE, "vae_decoder", OTHER, "vae_decoder-832x1216.onnx"),
    ],
)
def test_a_graph_of_a_further_size_is_called_so(role: str, name: str, size: Size, file: str) -> None:
    job: Any = SimpleNamespace(sizes=(FIRST, OTHER), batches=((1, 4),))
    assert _file(job, SimpleNamespace(name=name, role=role), size, (1, 4)) == file  # type: ignore[arg-type]


def test_ranges_of_batches_have_denoising_graphs_of_their_own() -> None:
    job: Any = SimpleNamespace(sizes=(FIRST,), batches=((1, 1), (2, 4)))
    graph, decoder = SimpleNamespace(name="full", role=DENOISE), SimpleNamespace(name="vae_decoder", role=DECODE)
    assert _file(job, graph, FIRST, (2, 4)) == "full-batch-2-4.onnx"  # type: ignore[arg-type]
    assert _file(job, decoder, FIRST, (2, 4)) == "vae_decoder.onnx"  # type: ignore[arg-type]


def test_of_a_schedulers_private_notes_those_are_kept_that_samplers_go_by() -> None:
    kept = {"_class_name": "DDIMScheduler", "_use_default_values": ["clip_sample"], "a": 1}
    assert _plain({**kept, "_diffusers_version": "0.1"}) == kept


# --- a name, last ---------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An export makes a copy of the toy bundle, which is given."""
    made = toy_bundle.build(tmp_path / "toy")

    def copied(_job: object, stage: Path, _report: object) -> Any:
        shutil.copytree(made, stage, dirs_exist_ok=True)
        return Bundle.open(made).manifest

    monkeypatch.setattr(build, "prepare", lambda settings: SimpleNamespace(settings=settings, model=MODELS["sdxl"]))
    monkeypatch.setattr(build, "_build", copied)
    return made


def test_a_bundle_is_verified_before_it_has_its_name(toy: Path, tmp_path: Path) -> None:
    target, seen = tmp_path / "bundle", list[Path]()

    def check(stage: Path) -> None:
        seen.append(stage)
        assert not target.exists()
        assert Bundle.open(stage).manifest.goldens

    assert export(ExportSettings(model="sd15", output=target), Silent(), check) == target
    assert len(seen) == 1
    assert (target / "manifest.json").read_bytes() == (toy / "manifest.json").read_bytes()
    assert export(ExportSettings(model="sd15", output=target, force=True, verify=False), Silent(), check) == target
    assert len(seen) == 1


def test_what_the_check_raises_fails_the_export(toy: Path, tmp_path: Path) -> None:
    def check(_stage: Path) -> None:
        raise ExportError("it differs")

    with pytest.raises(ExportError, match="it differs"):
        export(ExportSettings(model="sd15", output=tmp_path / "bundle"), Silent(), check)
    assert [path.name for path in tmp_path.iterdir()] == [toy.name]


# --- sizes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A denoiser at two sizes, and the checkpoint beside it."""
    folder = tmp_path_factory.mktemp("sizes")
    root = make_tiny(folder / "checkpoint", "sd15_a")
    return export_plain(
        ExportSettings(
            model="sd15",
            checkpoint=str(root),
            components=("denoiser",),
            steps=4,
            sizes=[(64, 96), (96, 64)],
            batches=[(1, 2)],
            output=folder / "bundle",
        )
    )


def test_each_size_has_graphs_and_goldens(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert manifest.sizes == ("64x96", "96x64")
    assert [shape.latents for shape in manifest.shapes] == [(4, 12, 8), (4, 8, 12)]
    assert [shape.graphs["full"].file for shape in manifest.shapes] == ["full.onnx", "full-96x64.onnx"]
    assert len(list(bundle.glob("*.onnx"))) == 2
    names = {"ungated", "gated"}
    assert manifest.goldens.keys() == names | {f"{name}-96x64" for name in names}
    assert {golden.size for golden in manifest.goldens.values()} == {"64x96", "96x64"}
    assert all(golden.ok for golden in verify(Bundle.open(bundle), threads=1))
    embeds = {f"prompt_embeds.{half}": np.ones((2, 24, 24), np.float32) for half in ("negative", "positive")}
    with Pipeline.open(bundle, threads=1) as pipe:
        drawn = [pipe(prompt_embeds=embeds, seed=1, size=size).latents.shape for size in (None, "96x64")]
    assert drawn == [(2, 4, 12, 8), (2, 4, 8, 12)]


def test_all_sizes_share_one_copy_of_the_weights(bundle: Path) -> None:
    stored = load_file(bundle / "weights.safetensors")
    own = load_file(bundle.parent / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
    np.testing.assert_array_equal(stored["unet.conv_in.weight"], own["conv_in.weight"])
    assert all(name.startswith("unet.") for name in stored), "of what is exported alone"
    assert (bundle / "weights.safetensors").stat().st_size < 1.2 * sum(tensor.nbytes for tensor in own.values())


def test_tables_of_every_sampler_lie_beside_it(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    tables = load_tables(opened.file(opened.manifest.samplers))
    assert {steps for name, steps in tables if name == "dpmpp_2m"} == set(OWN_STEPS)
    assert {steps for name, steps in tables if name == "euler"} == set(OTHER_STEPS)


def test_facts_of_the_checkpoint_are_in_the_manifest(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    assert (manifest.model, manifest.family) == ("sd15", "sd")
    assert (manifest.guidance, manifest.guidance_scale) == ("classifier-free", 7.5)
    assert manifest.scheduler["_class_name"] == "DPMSolverMultistepScheduler"
    assert manifest.tools.keys() >= {"tgate-engine", "torch", "diffusers"}
    assert manifest.plan("default").settings["n"] == 4
