"""Pictures that begin from one, whole and through a mask, against diffusers' own pipelines, ungated and gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.oracle_pictures import Gate, latents_from
from tests.tiny_models import CONSISTENCY_VARIANT, tiny_model
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.plans import add_plan
from tgate_runtime.generators import noise
from tgate_runtime.pipeline import Pipeline

TOLERANCE = 1e-4
PROMPT, NEGATIVE, SEED = "a red circle", "blue", 3
GATE = Gate(m=6, k=3, f=2)
PIPELINES: dict[str, tuple[str, str, float]] = {
    "sd": ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", 7.5),
    "sdxl": ("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline", 5.0),
}

SDXL = "conv_projection"

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keep_in_fp32.*"),
]


def draws(draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What diffusers draws, in its order, is what a seed has as its draws."""
    return torch.from_numpy(noise(SEED, shape[1:], draw=draw))[None]


def picture(size: tuple[int, int]) -> Image.Image:
    rough = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int]) -> Image.Image:
    values = np.zeros((size[1], size[0]), np.uint8)
    values[size[1] // 5 : size[1] * 4 // 5, size[0] // 3 : size[0] * 3 // 4] = 255
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def models(
    family_bundle: Callable[..., tuple[Path, Path]],
    tiny_checkpoint: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
) -> Callable[[str], tuple[Path, Path]]:
    """(checkpoint, bundle) by family."""

    def get(family: str) -> tuple[Path, Path]:
        return family_bundle("sd15_a") if family == "sd" else (tiny_checkpoint(SDXL), tiny_bundle(SDXL))

    return functools.cache(get)


def plans(bundle: Path, sampler: str, steps: int) -> tuple[Plan, Plan]:
    """Without the gate, and with it."""
    made = add_plan(
        bundle, name="x", m=GATE.m, k=GATE.k, fidelity_interval=GATE.f, steps=steps, sampler=sampler, save=False
    )
    there = {**Bundle.open(bundle, check_digests=False).manifest.plans, **made}
    return there[made["x"].baselines[0]], made["x"]


def error(
    models: tuple[Path, Path],
    family: str,
    sampler: str,
    strength: float,
    *,
    gated: bool,
    masked: bool = False,
    engine: str = "ort-cpu",
) -> float:
    checkpoint, bundle = models
    whole, inpaint, scale = PIPELINES[family]
    plan = plans(bundle, sampler, 25)[gated]
    options: dict[str, Any] = {"precision": "f32"} if engine == "openvino" else {}
    with Pipeline.open(bundle, engine=engine, plans=[plan], threads=1, **options) as pipe:
        shape = pipe.session.shapes()[0]
        size = shape.width, shape.height
        own: dict[str, Any] = {"mask": mask(size)} if masked else {}
        drawn = pipe(
            PROMPT, negative_prompt=NEGATIVE, image=picture(size), strength=strength, seed=SEED, plan=plan, **own
        )
    more: dict[str, Any] = {"mask_image": mask(size), "width": size[0], "height": size[1]} if masked else {}
    wanted = latents_from(
        checkpoint,
        inpaint if masked else whole,
        sampler=sampler,
        steps=25,
        strength=strength,
        image=picture(size),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=scale,
        draws=draws,
        gate=GATE if gated else None,
        **more,
    ).numpy()
    return float(np.abs(drawn.latents - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize(
    ("family", "sampler", "strength"),
    [
        ("sd", "dpmpp_2m", 0.3),
        ("sd", "euler", 0.6),
        ("sd", "ddim", 0.59),
        ("sd", "pndm", 0.6),
        ("sdxl", "dpmpp_2m", 0.6),
        ("sdxl", "euler", 1.0),
    ],
)
def test_from_a_picture(
    models: Callable[[str], tuple[Path, Path]], family: str, sampler: str, strength: float, gated: bool
) -> None:
    assert error(models(family), family, sampler, strength, gated=gated) < TOLERANCE


@pytest.mark.parametrize("sampler", ["unipc", "lms", "deis", "dpmpp_3m", "dpmpp_2m_karras", "lcm", "euler_a"])
def test_with_other_samplers(models: Callable[[str], tuple[Path, Path]], sampler: str) -> None:
    """LCM and the ancestral one draw noise in their steps, after that of the beginning."""
    assert error(models("sd"), "sd", sampler, 0.6, gated=True) < TOLERANCE


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize(
    ("family", "sampler", "strength"), [("sd", "euler", 1.0), ("sd", "lcm", 0.6), ("sdxl", "dpmpp_2m", 0.6)]
)
def test_through_a_mask(
    models: Callable[[str], tuple[Path, Path]], family: str, sampler: str, strength: float, gated: bool
) -> None:
    assert error(models(family), family, sampler, strength, gated=gated, masked=True) < TOLERANCE


@pytest.mark.parametrize(("family", "masked"), [("sd", True), ("sdxl", False)])
def test_on_openvino(models: Callable[[str], tuple[Path, Path]], family: str, masked: bool) -> None:
    pytest.importorskip("openvino")
    own = error(models(family), family, "dpmpp_2m", 0.6, gated=True, masked=masked, engine="openvino")
    assert own < TOLERANCE


def test_the_oracle_sees_the_gate(models: Callable[[str], tuple[Path, Path]]) -> None:
    """What the method changes is far beyond the tolerance, so a wrong one could not hide."""
    checkpoint, bundle = models("sd")
    ungated, gated = (reference(checkpoint, bundle, gate) for gate in (None, GATE))
    assert np.abs(ungated - gated).max() / np.abs(ungated).max() > 100 * TOLERANCE


def reference(checkpoint: Path, bundle: Path, gate: Gate | None) -> Any:
    shape = Bundle.open(bundle, check_digests=False).manifest.shapes[0]
    return latents_from(
        checkpoint,
        PIPELINES["sd"][0],
        sampler="dpmpp_2m",
        steps=25,
        strength=0.6,
        image=picture((shape.width, shape.height)),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=7.5,
        draws=draws,
        gate=gate,
    ).numpy()


def test_a_consistency_model(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """LCM-SDXL's kind: guidance is an input, there is one half, and every step but the last draws noise."""
    checkpoint, tiny = tiny_checkpoint(CONSISTENCY_VARIANT), tiny_model(CONSISTENCY_VARIANT)
    height, width = (side * tiny.vae_factor for side in tiny.latent_size)
    bundle = export(
        ExportSettings(
            model="lcm-sdxl",
            checkpoint=str(checkpoint),
            sizes=[(width, height)],
            steps=6,
            m=2,
            k=2,
            output=tmp_path / "bundle",
        ),
        Silent(),
    )
    image, (whole, inpaint, _) = picture((width, height)), PIPELINES["sdxl"]
    with Pipeline.open(bundle, threads=1) as pipe:
        for name, gate in (("ungated", None), ("default", Gate(m=2, k=2, w=0))):
            for strength, masked in ((0.7, False), (0.7, True), (1.0, False)):
                own: dict[str, Any] = {"mask": mask((width, height))} if masked else {}
                drawn = pipe(PROMPT, image=image, strength=strength, seed=SEED, plan=name, **own)
                wanted = latents_from(
                    checkpoint,
                    inpaint if masked else whole,
                    sampler="lcm",
                    steps=6,
                    strength=strength,
                    image=image,
                    prompt=PROMPT,
                    negative_prompt=None,
                    guidance_scale=8.0,
                    draws=draws,
                    gate=gate,
                    **({"mask_image": own["mask"], "width": width, "height": height} if masked else {}),
                ).numpy()
                assert np.abs(drawn.latents - wanted).max() / np.abs(wanted).max() < TOLERANCE, (name, strength)
