"""LoRAs kept in a bundle: what a request draws with them is what diffusers and the paper's package draw."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import tgate_export.adapt
from tests.export.loras import directory, eager, text_keys, write_kohya, write_lora
from tests.oracle import plain_latents, tgate_latents
from tests.runtime.engines.ways import WAYS
from tests.whole.cases import NAME, TOLERANCE, UNGATED, plans_of, relative
from tgate_engine.bundle import Bundle, digests_of
from tgate_engine.errors import BundleError, ExportError, RequestError, TgateError
from tgate_engine.manifest_json import bundle_digest, dump_manifest
from tgate_export.adapt import adapt
from tgate_export.sampling import make_scheduler
from tgate_runtime.pipeline import Pipeline

__all__ = ["directory"]  # a fixture
VARIANT = "conv_projection"
PROMPT = "a large red circle above a small blue square"
SETTINGS: dict[str, Any] = {"n": 6, "m": 3, "k": 2, "f": 1, "w": 2}
SCALES = {"style": 0.8, "face": -0.5}


@pytest.fixture
def place(tiny_bundle: Callable[..., Path], tmp_path: Path) -> Path:
    """A bundle of the tiny SDXL, to be changed."""
    return shutil.copytree(tiny_bundle(VARIANT), tmp_path / "bundle")


@pytest.fixture
def loras(directory: Path, tmp_path: Path) -> dict[str, Path]:
    """Of the U-Net and both text encoders, in the forms of diffusers and of kohya."""
    face = tmp_path / "face.safetensors"
    return {
        "style": write_lora(directory, tmp_path / "style", ("unet", "text_encoder"), header=True),
        "face": write_kohya(directory, face, ("unet", "text_encoder", "text_encoder_2"), mixed=False),
    }


@pytest.mark.parametrize("engine", ["ort-cpu", "openvino", "ort-cuda shared, on the CPU", "ort-cuda fast, on the CPU"])
def test_a_request_draws_what_diffusers_draws(
    place: Path, loras: dict[str, Path], directory: Path, engine: str
) -> None:
    for name, lora in loras.items():
        adapt(place, lora, name=name)
    pipe = eager(directory, [(loras[name], scale) for name, scale in SCALES.items()])
    bundle = Bundle.open(place)
    plans = plans_of(bundle, **SETTINGS, sampler="dpmpp_2m", guidance_scale=5.0)
    noise = np.random.default_rng(5).standard_normal((1, *bundle.manifest.shapes[0].latents), dtype=np.float32)
    asked: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": None,
        "steps": SETTINGS["n"],
        "guidance_scale": 5.0,
        "latents": torch.from_numpy(noise),
        "scheduler": make_scheduler("dpmpp_2m", dict(bundle.manifest.scheduler)),
    }
    gate = {name: SETTINGS[name] for name in ("m", "k", "f", "w")}
    wanted = {UNGATED: plain_latents(pipe, **asked), NAME: tgate_latents(pipe, **asked, **gate)}
    with Pipeline.open(bundle, engine=(WAYS.get(engine) or WAYS[f"{engine} fast"])(), plans=[*plans.values()]) as own:
        for plan, want in wanted.items():
            before = own(PROMPT, plan=plans[plan], initial_latents=noise).latents
            found = own(PROMPT, plan=plans[plan], initial_latents=noise, loras=SCALES).latents
            assert relative(found, want) < TOLERANCE
            assert relative(before, want) > 100 * TOLERANCE
            assert np.array_equal(own(PROMPT, plan=plans[plan], initial_latents=noise).latents, before)


@pytest.mark.slow
def test_names_of_the_original_code(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """kohya's, which diffusers maps by how many blocks a level has."""
    variant, kept = "sdxl_like", {}
    checkpoint, place = tiny_checkpoint(variant), shutil.copytree(tiny_bundle(variant), tmp_path / "bundle")
    for original in (False, True):
        path = write_kohya(checkpoint, tmp_path / f"{original}.safetensors", ("unet",), mixed=False, original=original)
        kept[original] = adapt(place, path, name=f"a{original}").adapter
    bundle = Bundle.open(place)
    first, second = (load_file(bundle.file(adapter.file)) for adapter in kept.values())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert kept[False].layers == kept[True].layers


def test_what_is_kept_and_told(place: Path, loras: dict[str, Path]) -> None:
    before = Bundle.open(place)
    kept = adapt(place, loras["style"], name="style")
    bundle = Bundle.open(place)
    assert bundle.manifest.adapters == {"style": kept.adapter}
    assert sum(kept.layers.values()) == kept.adapter.layers
    assert kept.unread["text_encoder"] > 0, "SDXL leaves out the last layer"
    assert kept.adapter.rank == 3
    assert kept.left == ()
    assert bundle_digest(bundle.manifest) == bundle_digest(before.manifest), "it stays the bundle that it was"
    assert digests_of(place) == dict(bundle.manifest.files)
    file = bundle.file(kept.adapter.file)
    assert file.stat().st_size == kept.bytes
    with pytest.raises(BundleError, match="already has an adapter 'style'; use another --name, or --force"):
        adapt(place, loras["face"], name="style")
    replaced = adapt(place, loras["face"], name="style", force=True)
    bundle = Bundle.open(place)
    assert bundle.manifest.adapters == {"style": replaced.adapter}
    assert not file.exists()
    with pytest.raises(BundleError, match="has no adapter 'other'; it has style"):
        bundle.remove_adapters(["other"])
    left = bundle.remove_adapters(["style"])
    assert left == before
    assert Bundle.open(place).manifest == before.manifest
    assert not (place / replaced.adapter.file).exists()


def test_what_no_request_could_read_is_not_kept(
    place: Path, loras: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Bundle.open(place).manifest
    monkeypatch.setattr(tgate_export.adapt, "MOST_BYTES", 1000)
    with pytest.raises(ExportError, match=r"would take \d+ bytes in the bundle, and 1000 are the most of an adapter"):
        adapt(place, loras["style"], name="style")
    assert Bundle.open(place).manifest == before


def test_two_names_of_one_file_share_it(place: Path, loras: dict[str, Path]) -> None:
    for name in ("a", "b"):
        adapt(place, loras["style"], name=name)
    bundle = Bundle.open(place).remove_adapters(["a"])
    assert bundle.file(bundle.manifest.adapters["b"].file).exists()
    assert Bundle.open(place).manifest == bundle.manifest


def refused(place: Path, tensors: dict[str, torch.Tensor], tmp_path: Path) -> str:
    """The line that says why; nothing is written."""
    before = digests_of(place), (place / "manifest.json").read_bytes()
    path = tmp_path / "odd.safetensors"
    save_file(tensors, path)
    with pytest.raises(TgateError) as caught:
        adapt(place, path, name="odd")
    assert "\n" not in str(caught.value)
    assert (digests_of(place), (place / "manifest.json").read_bytes()) == before
    return str(caught.value)


def pair(layer: str, outputs: int, inputs: int, rank: int = 2) -> dict[str, torch.Tensor]:
    down, up = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
    return {down: torch.ones(rank, inputs), up: torch.ones(outputs, rank)}


def test_what_does_not_fit_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    weights = load_file(place / "weights.safetensors")
    name = next(name for name in weights if name.endswith("attn1.to_q.weight^T"))
    inputs, outputs = weights[name].shape
    block = name.partition(".attn1")[0]
    assert "which this model has not" in refused(place, pair(f"{block}.attn9.to_q", 4, 4), tmp_path)
    line = refused(place, pair(f"{block}.attn1.to_q", outputs + 1, inputs), tmp_path)
    assert f"with {outputs + 1} outputs, and this model's has {outputs}" in line
    line = refused(place, pair(f"{block}.attn1.to_q", outputs, inputs + 1), tmp_path)
    assert f"with {inputs + 1} inputs" in line
    token = text_keys("peft", "text_encoder", "embeddings.token_embedding")
    line = refused(place, {token[0]: torch.ones(2, 9), token[1]: torch.ones(9, 2)}, tmp_path)
    assert "which is a Gather in this model" in line
    norm = pair(f"{block}.norm1", inputs, inputs)
    assert "give a LoRA of this model" in refused(place, norm, tmp_path)
    assert "transformer" in refused(place, pair("transformer.blocks.0.attn1.to_q", 4, 4), tmp_path)
    assert "holds no LoRA" in refused(place, {"a": torch.ones(2)}, tmp_path)
    behind = text_keys("peft", "text_encoder", "encoder.layers.7.mlp.fc1")
    assert "with 9 inputs" in refused(place, {behind[0]: torch.ones(2, 9), behind[1]: torch.ones(9, 2)}, tmp_path)


def test_files_and_names_that_are_none(place: Path, tmp_path: Path, loras: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match="does not exist"):
        adapt(place, tmp_path / "none.safetensors", name="a")
    with pytest.raises(RequestError, match="an adapter's name is 1 to 64 letters"):
        adapt(place, loras["style"], name="a b")
    with pytest.raises(BundleError, match="is not a bundle"):
        adapt(tmp_path / "nothing", loras["style"], name="a")


def test_a_bundle_without_weights_is_told(tmp_path: Path, place: Path, loras: dict[str, Path]) -> None:
    bundle = Bundle.open(place)
    files = {name: digest for name, digest in bundle.manifest.files.items() if name != bundle.manifest.weights}
    manifest = replace(bundle.manifest, weights="", files=files)
    (place / "manifest.json").write_text(dump_manifest(manifest))
    with pytest.raises(ExportError, match="was exported with --weights none, and a LoRA changes weights"):
        adapt(place, loras["style"], name="a")


def test_layers_that_share_a_tensor_are_refused(place: Path, tmp_path: Path) -> None:
    """Tensors of one content are kept once; what changes one layer would change the other."""
    bundle = Bundle.open(place)
    file = place / "full.onnx"
    model = onnx.load_model(file, load_external_data=False)
    names = [i.name for i in model.graph.initializer if i.name.endswith("attn1.to_q.weight^T")]
    same = [i.name for i in model.graph.initializer if i.name == names[0].replace("to_q", "to_k")]
    for node in model.graph.node:
        node.input[:] = [names[0] if name == same[0] else name for name in node.input]
    file.write_bytes(model.SerializeToString())
    manifest = replace(bundle.manifest, files=digests_of(place))
    (place / "manifest.json").write_text(dump_manifest(manifest))
    layer = names[0].removesuffix(".weight^T")
    shape = next(i.dims for i in model.graph.initializer if i.name == names[0])
    line = refused(place, pair(layer, shape[1], shape[0]), tmp_path)
    assert "other layers of the bundle share; fuse the LoRA at export (--lora)" in line
