"""Inpainting models, whose U-Nets take 9 channels, against diffusers' own pipelines, ungated and gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import once
from tests.oracle_control import Steered, latents_with
from tests.oracle_pictures import Gate, latents_from
from tests.tiny_control import control_picture, make_control
from tests.tiny_families import FAMILY_VARIANTS
from tests.tiny_inpainting import save_inpainting
from tests.tiny_ip_adapter import save_ip_adapter
from tests.tiny_models import tiny_model
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.plan import Plan
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.plans import add_plan
from tgate_export.settings import ControlNet
from tgate_runtime.control import Control
from tgate_runtime.generators import noise
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

TOLERANCE = 1e-4
PROMPT, NEGATIVE, SEED, STEPS = "a red circle", "blue", 3, 10
GATE = Gate(m=6, k=3, f=1)
PIPELINES = {"sd": "StableDiffusionInpaintPipeline", "sdxl": "StableDiffusionXLInpaintPipeline"}
SLOW = pytest.mark.slow

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keep_in_fp32.*"),
]

Made = tuple[Path, Path]
"""Checkpoint, bundle."""


def draws(draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What diffusers draws, in its order, is what a seed has as its draws."""
    return torch.from_numpy(noise(SEED, shape[1:], draw=draw))[None]


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    return Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int]) -> Image.Image:
    """Grey as well, and not along the latents' pixels."""
    values = np.zeros((size[1], size[0]), np.uint8)
    values[size[1] // 5 : size[1] * 4 // 5, size[0] // 3 : size[0] * 3 // 4] = 255
    values[: size[1] // 3, size[0] * 4 // 5 :] = 128
    values[: size[1] // 3, : size[0] // 4] = 127
    return Image.fromarray(values)


@pytest.fixture(scope="module")
def plain(
    family_bundle: Callable[..., tuple[Path, Path]], tiny_checkpoint: Callable[[str], Path]
) -> Callable[[str], Path]:
    """The checkpoints that they are made from."""
    return lambda family: family_bundle("sd15_a")[0] if family == "sd" else tiny_checkpoint("conv_projection")


@pytest.fixture(scope="module")
def made(plain: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    def get(family: str) -> Made:
        tiny, own = FAMILY_VARIANTS["sd15_a"], tiny_model("conv_projection")
        height, width = tiny.latents[-2:] if family == "sd" else own.latent_size
        pixels = tiny.vae_factor if family == "sd" else own.vae_factor

        def make(folder: Path) -> None:
            settings = ExportSettings(
                model="sd15" if family == "sd" else "sdxl",
                checkpoint=str(save_inpainting(plain(family), folder / "checkpoint")),
                sizes=[(width * pixels, height * pixels)],
                batches=[(1, 1)],
                components=["text", "denoiser", "encoder"],
                output=folder / "bundle",
            )
            export(settings, Silent())

        folder = once(tmp_path_factory, f"inpainting-{family}", make)
        return folder / "checkpoint", folder / "bundle"

    return functools.cache(get)


def plans(bundle: Path, sampler: str, steps: int = STEPS) -> tuple[Plan, Plan]:
    """Without the gate, and with it."""
    made = add_plan(bundle, name="x", m=GATE.m, k=GATE.k, steps=steps, sampler=sampler, save=False)
    there = {**Bundle.open(bundle, check_digests=False).manifest.plans, **made}
    return there[made["x"].baselines[0]], made["x"]


def size_of(bundle: Path) -> tuple[int, int]:
    shape = Bundle.open(bundle, check_digests=False).manifest.shapes[0]
    return shape.width, shape.height


def apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def wanted(checkpoint: Path, family: str, plan: Plan, size: tuple[int, int], strength: float, gate: Gate | None) -> Any:
    return latents_from(
        checkpoint,
        PIPELINES[family],
        sampler=plan.sampler.name,
        steps=plan.sampler.steps,
        strength=strength,
        image=picture(size),
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=plan.guidance_scale,
        draws=draws,
        gate=gate,
        mask_image=mask(size),
        width=size[0],
        height=size[1],
    ).numpy()


def error(
    made: Made, family: str, sampler: str, strength: float | None, *, gated: bool, engine: str = "ort-cpu", **more: Any
) -> float:
    checkpoint, bundle = made
    # with strength, as many steps as there is a start for
    plan = plans(bundle, sampler, STEPS if strength is None else 25)[gated]
    size = size_of(bundle)
    options: dict[str, Any] = {"precision": "f32"} if engine == "openvino" else {}
    own: dict[str, Any] = {} if strength is None else {"strength": strength}
    with Pipeline.open(bundle, engine=engine, plans=[plan], threads=1, **options) as pipe:
        asked: dict[str, Any] = {"image": picture(size), "mask": mask(size), **own, **more}
        drawn = pipe(PROMPT, negative_prompt=NEGATIVE, seed=SEED, plan=plan, **asked).latents
    gate = GATE if gated else None
    return apart(drawn, wanted(checkpoint, family, plan, size, 1.0 if strength is None else strength, gate))


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize(
    ("family", "sampler", "strength"),
    [
        ("sd", "dpmpp_2m", None),
        ("sd", "euler", 0.6),
        pytest.param("sd", "pndm", None, marks=SLOW),
        pytest.param("sd", "euler_a", 0.6, marks=SLOW),
        pytest.param("sd", "lcm", None, marks=SLOW),
        pytest.param("sdxl", "euler", None, marks=SLOW),
        pytest.param("sdxl", "dpmpp_2m", 0.6, marks=SLOW),
    ],
)
def test_as_diffusers(
    made: Callable[[str], Made], family: str, sampler: str, strength: float | None, gated: bool
) -> None:
    """Without a strength it is diffusers' own, 1; stochastic samplers draw after the masked picture's sample."""
    assert error(made(family), family, sampler, strength, gated=gated) < TOLERANCE


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=SLOW)])
def test_on_openvino(made: Callable[[str], Made], family: str) -> None:
    pytest.importorskip("openvino")
    assert error(made(family), family, "dpmpp_2m", None, gated=True, engine="openvino") < TOLERANCE
    assert error(made(family), family, "euler", 0.6, gated=True, engine="openvino") < TOLERANCE


@SLOW
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_with_a_control_picture_and_one_beside_the_prompt(
    made: Callable[[str], Made], plain: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    """All three, of one bundle: ControlNets are not told of the mask."""
    checkpoint, without = made(family)
    size = size_of(without)
    pixels = size[1] // Bundle.open(without, check_digests=False).manifest.shapes[0].latents[1]
    net = make_control(plain(family), tmp_path / "edges", pixels=pixels, seed=0)
    adapter = save_ip_adapter(checkpoint, tmp_path / "adapter", plus=False)
    settings = ExportSettings(
        model="sd15" if family == "sd" else "sdxl",
        checkpoint=str(checkpoint),
        controlnets=[ControlNet("edges", str(net))],
        ip_adapter=adapter,
        sizes=[size],
        batches=[(1, 1)],
        components=["text", "denoiser", "encoder", "reference"],
        output=tmp_path / "bundle",
    )
    bundle = export(settings, Silent())
    assert all(each.ok for each in verify(Bundle.open(bundle)))
    looked, both = control_picture(size), plans(bundle, "euler")
    with Pipeline.open(bundle, plans=both, threads=1) as pipe:
        for plan, gate in zip(both, (None, GATE), strict=True):
            drawn = pipe(
                PROMPT,
                negative_prompt=NEGATIVE,
                seed=SEED,
                plan=plan,
                image=picture(size),
                mask=mask(size),
                controls={"edges": Control(image=looked, scale=0.7)},
                ip_adapter_image=picture((41, 33), 2),
                ip_adapter_scale=0.6,
            )
            reference = latents_with(
                checkpoint,
                f"StableDiffusion{'XL' if family == 'sdxl' else ''}ControlNetInpaintPipeline",
                [Steered(net=net, picture=looked, scale=0.7)],
                sampler="euler",
                steps=STEPS,
                prompt=PROMPT,
                negative_prompt=NEGATIVE,
                guidance_scale=plan.guidance_scale,
                draws=draws,
                gate=gate,
                adapter=adapter,
                adapter_scale=0.6,
                image=picture(size),
                mask_image=mask(size),
                strength=1.0,
                width=size[0],
                height=size[1],
                ip_adapter_image=picture((41, 33), 2),
            )
            assert apart(drawn.latents, reference) < TOLERANCE


def test_everything_that_is_given_matters(made: Callable[[str], Made]) -> None:
    """Beyond the tolerance by far, so that a wrong one could not hide."""
    _, bundle = made("sd")
    (ungated, plan), size = plans(bundle, "dpmpp_2m"), size_of(bundle)
    with Pipeline.open(bundle, plans=[ungated, plan], threads=1) as pipe:
        ask = functools.partial(pipe, PROMPT, seed=SEED, plan=plan)
        usual: dict[str, Any] = {"image": picture(size), "mask": mask(size)}
        whole = ask(**usual).latents
        assert apart(ask(**{**usual, "plan": ungated}).latents, whole) > 20 * TOLERANCE
        inverted = mask(size).point([255 - value for value in range(256)])
        for other in ({"image": picture(size, 1)}, {"mask": inverted}, {"strength": 0.7}):
            assert apart(ask(**{**usual, **other}).latents, whole) > 20 * TOLERANCE
        both = pipe([PROMPT, PROMPT], seed=SEED - 1, plan=plan, **usual).latents
        np.testing.assert_array_equal(both[1:], whole)
        given = noise(SEED, whole.shape[1:])[None]
        np.testing.assert_array_equal(ask(initial_latents=given, **usual).latents, whole)
        for lacking, says in (
            ({}, "has no image and no mask: give an image and a mask beside the prompt"),
            ({"image": usual["image"]}, "has no mask"),
            ({"mask": usual["mask"]}, "has no image"),
            ({**usual, "mask": Image.new("L", size)}, "the mask leaves everything as it is"),
            ({**usual, "strength": 0.01}, "leaves none of 10 steps"),
        ):
            with pytest.raises(RequestError, match=says):
                ask(**lacking)


def test_goldens_prove_the_graphs(made: Callable[[str], Made]) -> None:
    """The encoder's with what the mask leaves, the denoiser's with what lies around it; from diffusers' pipeline."""
    bundle = Bundle.open(made("sd")[1])
    checked = {each.name: each.ok for each in verify(bundle)}
    assert checked.keys() >= {"latents", "text", "ungated", "gated"}
    assert all(checked.values())
    assert "StableDiffusionInpaintPipeline of diffusers" in bundle.manifest.goldens["ungated"].oracle
