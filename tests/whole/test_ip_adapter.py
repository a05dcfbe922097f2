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

from tests.oracle_pictures import Gate
from tests.oracle_pictures import gated as gates
from tests.tiny_ip_adapter import ENCODER, FILE
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
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

USUAL = [("sdxl", True, "ort-cpu"), ("sdxl", True, "openvino")]
"""All on one bundle; the other families and kinds take an export each."""
ALL = [(family, plus, engine) for family in PIPELINES for plus in (False, True) for engine in ("ort-cpu", "openvino")]


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


@pytest.mark.parametrize(
    ("family", "plus", "engine"),
    [pytest.param(*case, marks=[] if case in USUAL else pytest.mark.slow) for case in ALL],
)
def test_as_diffusers(ip_adapter_bundle: Made, family: str, plus: bool, engine: str) -> None:
    checkpoint, adapter, bundle = ip_adapter_bundle(family, plus)
    both = plans(bundle)
    options: dict[str, Any] = {"precision": "f32"} if engine == "openvino" else {}
    scale, references = 0.6, list[np.ndarray]()
    with Pipeline.open(bundle, engine=engine, plans=both, threads=1, **options) as pipe:
        start = noise(SEED, pipe.session.shapes()[0].latents)[None]
        sampler = both[0].sampler.name
        for gated, plan in zip((False, True), both, strict=True):
            ask = functools.partial(pipe, PROMPT, negative_prompt=NEGATIVE, seed=SEED, plan=plan)
            drawn = ask(ip_adapter_image=picture(), ip_adapter_scale=scale).latents
            reference = wanted(checkpoint, adapter, family, sampler, scale, gated=gated, start=start)
            assert off(drawn, reference) < TOLERANCE
            assert off(ask().latents, reference) > 0.02  # or it would prove nothing
            references.append(reference)
    assert off(*references) > 1e-3


@pytest.mark.parametrize("gated", [False, True])
def test_without_a_picture_it_is_the_model_without_an_adapter(ip_adapter_bundle: Made, gated: bool) -> None:
    checkpoint, _, bundle = ip_adapter_bundle("sdxl", True)
    plan = plans(bundle)[gated]
    with Pipeline.open(bundle, plans=[plan], threads=1) as pipe:
        start = noise(SEED, pipe.session.shapes()[0].latents)[None]
        drawn = pipe(PROMPT, negative_prompt=NEGATIVE, seed=SEED, plan=plan).latents
    reference = wanted(checkpoint, None, "sdxl", plan.sampler.name, 0, gated=gated, start=start)
    assert off(drawn, reference) < TOLERANCE


def test_two_prompts_see_one_picture(ip_adapter_bundle: Made) -> None:
    """Each as alone; and another picture is another image."""
    _, _, bundle = ip_adapter_bundle("sdxl", True)
    plan = plans(bundle)[1]
    with Pipeline.open(bundle, plans=[plan], threads=1) as pipe:
        own: dict[str, Any] = {"plan": plan, "ip_adapter_image": picture()}
        both = pipe([PROMPT, "a photo"], seed=1, **own).latents
        np.testing.assert_array_equal(both[1:], pipe("a photo", seed=2, **own).latents)
        turned = pipe("a photo", seed=2, plan=plan, ip_adapter_image=picture().rotate(180)).latents
        assert off(turned, both[1:]) > 1e-3
