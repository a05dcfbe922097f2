"""Pictures beside the prompt against diffusers' own pipelines with the same IP-Adapter, ungated and gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import once
from tests.oracle_pictures import Gate
from tests.oracle_pictures import gated as gates
from tests.tiny_ip_adapter import ENCODER, FILE, save_ip_adapter
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.plans import add_plan
from tgate_export.sampling import make_scheduler
from tgate_runtime.generators import noise
from tgate_runtime.pipeline import Pipeline

TOLERANCE = 1e-4
PROMPT, NEGATIVE, SEED, STEPS = "a red circle", "blue", 3, 10
GATE = Gate(m=6, k=3, f=2)
PIPELINES = {"sd": ("StableDiffusionPipeline", 7.5), "sdxl": ("StableDiffusionXLPipeline", 5.0)}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keep_in_fp32.*"),
]


def picture() -> Image.Image:
    """Neither square nor of any encoder's size."""
    rough = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    return Image.fromarray(rough).resize((61, 97), Image.Resampling.BICUBIC)


Made = Callable[[str, bool], tuple[Path, Path, Path]]


@pytest.fixture(scope="module")
def made(
    family_bundle: Callable[..., tuple[Path, Path]],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Made:
    """(checkpoint, adapter's file, bundle) by family and whether the adapter is a Plus one."""

    def get(family: str, plus: bool) -> tuple[Path, Path, Path]:
        checkpoint = family_bundle("sd15_a")[0] if family == "sd" else tiny_checkpoint("conv_projection")

        def make(folder: Path) -> None:
            adapter = save_ip_adapter(checkpoint, folder / "adapter", plus=plus, side=224 if plus else 32)
            export(
                ExportSettings(
                    model="sd15" if family == "sd" else "sdxl",
                    checkpoint=str(checkpoint),
                    ip_adapter=adapter,
                    fidelity_interval=2,
                    batches=[(1, 1)],
                    output=folder / "bundle",
                ),
                Silent(),
            )

        folder = once(tmp_path_factory, f"ip-adapter-{family}-{'plus' if plus else 'plain'}", make)
        return checkpoint, folder / "adapter" / FILE, folder / "bundle"

    return functools.cache(get)


def plans(bundle: Path) -> tuple[Plan, Plan]:
    """Without the gate, and with it."""
    made = add_plan(bundle, name="x", m=GATE.m, k=GATE.k, fidelity_interval=GATE.f, steps=STEPS, save=False)
    there = {**Bundle.open(bundle, check_digests=False).manifest.plans, **made}
    return there[made["x"].baselines[0]], made["x"]


@functools.lru_cache(maxsize=1)
def _loaded(checkpoint: Path, adapter: Path | None, family: str) -> Any:
    pipe: Any = getattr(diffusers, PIPELINES[family][0]).from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=FILE, image_encoder_folder=ENCODER)
    return pipe


def wanted(
    checkpoint: Path, adapter: Path | None, family: str, sampler: str, scale: float, *, gated: bool, start: np.ndarray
) -> np.ndarray:
    """diffusers' latents, with the method written out around its U-Net where they are gated."""
    pipe = _loaded(checkpoint, adapter, family)
    own: dict[str, Any] = {}
    if adapter is not None:
        pipe.set_ip_adapter_scale(scale)
        own["ip_adapter_image"] = picture()
    config = {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
    pipe.scheduler = make_scheduler(sampler, config)
    with torch.no_grad(), gates(pipe.unet, GATE, first=0, guided=True) if gated else nullcontext():
        result = pipe(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=STEPS,
            guidance_scale=PIPELINES[family][1],
            latents=torch.from_numpy(start).clone(),
            height=8 * start.shape[2],
            width=8 * start.shape[3],
            output_type="latent",
            **own,
        )
    latents: np.ndarray = result.images.numpy()
    return latents


def off(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


@pytest.mark.parametrize("engine", ["ort-cpu", "openvino"])
@pytest.mark.parametrize("plus", [False, True], ids=["plain", "plus"])
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_as_diffusers(made: Made, family: str, plus: bool, engine: str) -> None:
    checkpoint, adapter, bundle = made(family, plus)
    both = plans(bundle)
    options: dict[str, Any] = {"precision": "f32"} if engine == "openvino" else {}
    scale = 0.6
    with Pipeline.open(bundle, engine=engine, plans=both, threads=1, **options) as pipe:
        start = noise(SEED, pipe.session.shapes()[0].latents)[None]
        sampler = both[0].sampler.name
        for gated, plan in zip((False, True), both, strict=True):
            ask = functools.partial(pipe, PROMPT, negative_prompt=NEGATIVE, seed=SEED, plan=plan)
            drawn = ask(ip_adapter_image=picture(), ip_adapter_scale=scale).latents
            reference = wanted(checkpoint, adapter, family, sampler, scale, gated=gated, start=start)
            assert off(drawn, reference) < TOLERANCE
            assert off(ask().latents, reference) > 0.02  # or it would prove nothing
