"""Requests with control pictures, whole, against diffusers' own ControlNet pipelines, ungated and gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import once
from tests.oracle_control import Steered, latents_with
from tests.oracle_pictures import Gate, _drawn, _loaded
from tests.tiny_control import control_picture, make_control
from tests.tiny_families import FAMILY_VARIANTS
from tests.tiny_models import tiny_model
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.plans import add_plan
from tgate_export.sampling import make_scheduler
from tgate_export.settings import ControlNet
from tgate_runtime.control import Control
from tgate_runtime.generators import noise
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

TOLERANCE = 1e-4
PROMPT, NEGATIVE, SEED, STEPS = "a red circle", "blue", 3, 10
GATE = Gate(m=6, k=3, f=1)
PIPELINES = {"sd": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keep_in_fp32.*"),
]

Models = Callable[[str], tuple[Path, dict[str, Path], Path]]


def draws(draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    """What diffusers draws, in its order, is what a seed has as its draws."""
    return torch.from_numpy(noise(SEED, shape[1:], draw=draw))[None]


@pytest.fixture(scope="module")
def models(
    family_bundle: Callable[..., tuple[Path, Path]],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Models:
    """(checkpoint, ControlNets by name, bundle) by family."""

    def get(family: str) -> tuple[Path, dict[str, Path], Path]:
        if family == "sd":
            tiny = FAMILY_VARIANTS["sd15_a"]
            checkpoint, pixels, (height, width) = family_bundle("sd15_a")[0], tiny.vae_factor, tiny.latents[-2:]
        else:
            own = tiny_model("sdxl_like")
            checkpoint, pixels, (height, width) = tiny_checkpoint("sdxl_like"), own.vae_factor, own.latent_size

        def make(folder: Path) -> None:
            nets = [
                ControlNet(name, str(make_control(checkpoint, folder / name, pixels=pixels, seed=seed)))
                for seed, name in enumerate(("edges", "depth"))
            ]
            settings = ExportSettings(
                model="sd15" if family == "sd" else "sdxl",
                checkpoint=str(checkpoint),
                controlnets=nets,
                sizes=[(width * pixels, height * pixels)],
                batches=[(1, 1)],
                components=["text", "denoiser"] if family == "sd" else None,
                output=folder / "bundle",
                verify=False,
            )
            export(settings, Silent())

        folder = once(tmp_path_factory, f"controlled-{family}", make)
        return checkpoint, {name: folder / name for name in ("edges", "depth")}, folder / "bundle"

    return functools.cache(get)


def plans(bundle: Path, sampler: str) -> tuple[Plan, Plan]:
    """Without the gate, and with it."""
    made = add_plan(bundle, name="x", m=GATE.m, k=GATE.k, steps=STEPS, sampler=sampler, save=False)
    there = {**Bundle.open(bundle, check_digests=False).manifest.plans, **made}
    return there[made["x"].baselines[0]], made["x"]


def drawn(bundle: Path, plan: Plan, controls: dict[str, Control] | None, engine: str = "ort-cpu", **more: Any) -> Any:
    options: dict[str, Any] = {"precision": "f32"} if engine == "openvino" else {}
    with Pipeline.open(bundle, engine=engine, plans=[plan], threads=1, **options) as pipe:
        return pipe(PROMPT, negative_prompt=NEGATIVE, seed=SEED, plan=plan, controls=controls, **more)


def apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def size_of(bundle: Path) -> tuple[int, int]:
    shape = Bundle.open(bundle, check_digests=False).manifest.shapes[0]
    return shape.width, shape.height


def error(
    models: tuple[Path, dict[str, Path], Path],
    family: str,
    sampler: str,
    asked: dict[str, dict[str, Any]],
    *,
    gated: bool,
    engine: str = "ort-cpu",
) -> float:
    checkpoint, nets, bundle = models
    plan, size = plans(bundle, sampler)[gated], size_of(bundle)
    pictures = {name: control_picture(size, seed) for seed, name in enumerate(nets)}
    own = {name: Control(image=pictures[name], **more) for name, more in asked.items()}
    steered = [
        Steered(
            net=nets[name],
            picture=pictures[name],
            **{
                **{key: value for key, value in more.items() if key != "until_gate"},
                # the steps before the gate, in diffusers' words
                **({"end": GATE.m / STEPS} if more.get("until_gate") else {}),
            },
        )
        for name, more in asked.items()
    ]
    result = drawn(bundle, plan, own, engine)
    wanted = latents_with(
        checkpoint,
        PIPELINES[family],
        steered,
        sampler=sampler,
        steps=STEPS,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=plan.guidance_scale,
        draws=draws,
        gate=GATE if gated else None,
    )
    return apart(result.latents, wanted.numpy())


ONE: dict[str, dict[str, Any]] = {"edges": {}}
PART: dict[str, dict[str, Any]] = {"depth": {"scale": 0.7, "start": 0.15, "end": 0.75}}
TWO: dict[str, dict[str, Any]] = {"edges": {"scale": 0.8, "end": 0.85}, "depth": {"scale": -0.5, "start": 0.2}}


SLOW = pytest.mark.slow  # two ControlNets and a family are exported in half a minute


@pytest.mark.parametrize(
    ("family", "sampler", "asked", "gated"),
    [
        pytest.param("sd", "euler", PART, False, id="sd-part-ungated"),
        pytest.param("sd", "pndm", TWO, True, id="sd-two-gated"),
        pytest.param("sd", "dpmpp_2m", ONE, True, id="sd-one-gated", marks=SLOW),
        pytest.param("sd", "euler", PART, True, id="sd-part-gated", marks=SLOW),
        pytest.param("sd", "pndm", TWO, False, id="sd-two-ungated", marks=SLOW),
        pytest.param("sdxl", "euler", ONE, False, id="sdxl-one-ungated", marks=SLOW),
        pytest.param("sdxl", "euler", PART, True, id="sdxl-part-gated", marks=SLOW),
        pytest.param("sdxl", "dpmpp_2m", TWO, False, id="sdxl-two-ungated", marks=SLOW),
        pytest.param("sdxl", "dpmpp_2m", TWO, True, id="sdxl-two-gated", marks=SLOW),
    ],
)
def test_with_control_pictures(
    models: Models, family: str, sampler: str, asked: dict[str, dict[str, Any]], gated: bool
) -> None:
    assert error(models(family), family, sampler, asked, gated=gated) < TOLERANCE


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=SLOW)])
def test_that_stop_at_the_gate(models: Models, family: str) -> None:
    """One of two goes on."""
    asked: dict[str, dict[str, Any]] = {"edges": {"until_gate": True}, "depth": {"scale": 0.6}}
    assert error(models(family), family, "dpmpp_2m", asked, gated=True) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "gated"),
    [
        pytest.param("sd", True, id="sd-gated"),
        pytest.param("sd", False, id="sd-ungated", marks=SLOW),
        pytest.param("sdxl", False, id="sdxl-ungated", marks=SLOW),
        pytest.param("sdxl", True, id="sdxl-gated", marks=SLOW),
    ],
)
def test_on_openvino(models: Models, family: str, gated: bool) -> None:
    pytest.importorskip("openvino")
    assert error(models(family), family, "dpmpp_2m", TWO, gated=gated, engine="openvino") < TOLERANCE


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=SLOW)])
def test_without_one_a_bundle_draws_what_it_would_without_controlnets(models: Models, family: str) -> None:
    """The same latents as diffusers' plain pipeline; and a picture moves them far beyond the tolerance, so that a wrong
    scale, step or half could not hide."""
    checkpoint, _, bundle = models(family)
    plan = plans(bundle, "dpmpp_2m")[0]
    plain = drawn(bundle, plan, None).latents

    pipe, config = _loaded(checkpoint, PIPELINES[family].replace("ControlNet", ""))
    pipe.scheduler = make_scheduler("dpmpp_2m", config)
    with _drawn(pipe, draws), torch.no_grad():
        wanted = pipe(
            PROMPT,
            negative_prompt=NEGATIVE,
            num_inference_steps=STEPS,
            guidance_scale=plan.guidance_scale,
            output_type="latent",
            height=size_of(bundle)[1],
            width=size_of(bundle)[0],
        ).images
    assert apart(plain, wanted.numpy()) < TOLERANCE
    size = size_of(bundle)
    whole = drawn(bundle, plan, {"edges": Control(image=control_picture(size))}).latents
    for other in (
        Control(image=control_picture(size, 1)),
        Control(image=control_picture(size), scale=0.9),
        Control(image=control_picture(size), start=0.1),
        Control(image=control_picture(size), end=0.9),
    ):
        assert apart(drawn(bundle, plan, {"edges": other}).latents, whole) > 20 * TOLERANCE
    assert apart(plain, whole) > 20 * TOLERANCE


@SLOW
@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
def test_from_a_picture(models: Models, gated: bool) -> None:
    """With an encoder: the steps that are left are those that the parts of the way are counted in."""
    checkpoint, nets, bundle = models("sdxl")
    plan, size = plans(bundle, "dpmpp_2m")[gated], size_of(bundle)
    begun = control_picture(size, 5)
    asked = {"edges": Control(image=control_picture(size), scale=0.8, end=0.75)}
    result = drawn(bundle, plan, asked, image=begun, strength=0.8)
    wanted = latents_with(
        checkpoint,
        "StableDiffusionXLControlNetImg2ImgPipeline",
        [Steered(net=nets["edges"], picture=control_picture(size), scale=0.8, end=0.75)],
        sampler="dpmpp_2m",
        steps=STEPS,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=plan.guidance_scale,
        draws=draws,
        gate=GATE if gated else None,
        image=begun,
        strength=0.8,
    )
    assert apart(result.latents, wanted.numpy()) < TOLERANCE


@SLOW
def test_goldens_prove_a_controlnets_graph(models: Models, tmp_path: Path) -> None:
    """On whatever calls take: here two images at least."""
    checkpoint, nets, _ = models("sd")
    settings = ExportSettings(
        model="sd15",
        checkpoint=str(checkpoint),
        controlnets=[ControlNet("edges", str(nets["edges"]))],
        sizes=[(96, 64)],
        batches=[(2, 3)],
        components=["text", "denoiser"],
        output=tmp_path / "bundle",
    )
    bundle = Bundle.open(export(settings, Silent(), lambda _: None))
    checked = {each.name: each for each in verify(bundle)}
    assert "diffusers" in bundle.manifest.goldens["control-edges"].oracle
    assert all(each.ok for each in checked.values())
    assert {"control-edges", "ungated", "gated"} <= checked.keys()
