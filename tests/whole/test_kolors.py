"""What Kolors has beside the paper's method, as SDXL: DeepCache, forecasts, and requests that begin from a picture.

Against diffusers' own pipelines, in which the methods are written out (``tests/oracle_flow`` has the paper's).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from tests.oracle_flow import gated_run, plain_run
from tests.oracle_pictures import Gate, latents_from
from tests.tiny_flow import flow_noise, load_tiny_flow, make_tiny_flow
from tests.whole.cases import NAME, TOLERANCE, relative
from tests.whole.test_forecast import SCALE, extrapolating
from tests.whole.test_pictures import SEED, draws, picture
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_export.embed import embed
from tgate_export.job import ExportSettings
from tgate_export.methods import find_method
from tgate_export.plans import make_plans
from tgate_export.sampling import compile_sampler, make_scheduler
from tgate_runtime.pipeline import Pipeline

PROMPT, NEGATIVE = "A large red circle above a small blue square", "a photo of a green circle"
VARIANT, PIXELS, STEPS, M = "kolors_a", 8, 8, 4

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Subject:
    """A tiny checkpoint, diffusers' pipeline of it, its bundle and two prompts of it, encoded."""

    checkpoint: Path
    eager: Any
    bundle: Path
    embeds: Mapping[str, NDArray[Any]]

    def plan(self, method: str, sampler: str, n: int, m: int | None, **named: int) -> Plan:
        """A plan of a method whose graphs the bundle has."""
        manifest, made = Bundle.open(self.bundle).manifest, find_method(method)
        return make_plans(
            NAME,
            made,
            made.settings(steps=n, gate=m, defaults={}, **named),
            sampler=compile_sampler(sampler, manifest.scheduler, n),
            guidance_scale=SCALE,
            guided=True,
            graphs=manifest.shapes[0].graphs,
            carries=manifest.carries,
        )[NAME]

    def engine(self, plan: Plan, **more: Any) -> NDArray[np.float32]:
        with Pipeline.open(Bundle.open(self.bundle), threads=1, plans=[plan]) as pipe:
            latents: NDArray[np.float32] = pipe(prompt_embeds=self.embeds, plan=plan, **more).latents
        return latents

    def options(self, sampler: str) -> dict[str, Any]:
        """How diffusers' pipeline is asked."""
        self.eager.scheduler = make_scheduler(sampler, Bundle.open(self.bundle).manifest.scheduler)
        height, width = (side * PIXELS for side in flow_noise(VARIANT).shape[-2:])
        options = {"num_inference_steps": STEPS, "guidance_scale": SCALE, "latents": flow_noise(VARIANT)}
        return {**options, "height": height, "width": width}


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    root = tmp_path_factory.mktemp("kolors")
    checkpoint = make_tiny_flow(root / "checkpoint", VARIANT)
    height, width = (side * PIXELS for side in flow_noise(VARIANT).shape[-2:])
    settings = ExportSettings(
        model="kolors",
        checkpoint=str(checkpoint),
        output=root / "bundle",
        method="tgate+deepcache",
        steps=STEPS,
        m=M,
        height=height,
        width=width,
        components=("denoiser", "encoder"),
    )
    bundle = export(settings, Silent())
    embed("kolors", [PROMPT], root / "e.safetensors", checkpoint=str(checkpoint), negative_prompt=NEGATIVE)
    return Subject(checkpoint, load_tiny_flow(checkpoint, VARIANT), bundle, load_file(root / "e.safetensors"))


@contextmanager
def shallow(unet: Any, c: int) -> Iterator[None]:
    """Where the step is no multiple of c, the last residual block has from below what the last such step gave it."""
    skip, step = unet.conv_in.out_channels, -1
    kept: list[Tensor] = []

    def count(_module: Any, _inputs: Any) -> None:
        nonlocal step
        step += 1

    def replace(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        entrance, beside = inputs[0][:, :-skip], inputs[0][:, -skip:]
        if step % c == 0:
            kept[:] = [entrance]
        return (torch.cat([kept[0], beside], dim=1), *inputs[1:])

    hooks = [unet.register_forward_pre_hook(count)]
    hooks.append(unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(replace))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize("c", [2, 3])
def test_deepcache_is_the_rule_written_out(subject: Subject, sampler: str, c: int) -> None:
    plan = subject.plan("deepcache", sampler, STEPS, None, c=c)
    assert len({step.graph for step in plan.steps}) > 1
    options = subject.options(sampler)
    with shallow(subject.eager.unet, c):
        want = plain_run(subject.eager, PROMPT, NEGATIVE, **options)
    got = subject.engine(plan, initial_latents=flow_noise(VARIANT).numpy())
    assert relative(got, want) < TOLERANCE
    assert relative(got, plain_run(subject.eager, PROMPT, NEGATIVE, **options)) > 10 * TOLERANCE


@pytest.mark.parametrize("r", [2, 3])
def test_forecasts_are_a_pipeline_that_extrapolates(subject: Subject, r: int) -> None:
    plan = subject.plan("tgate", "euler", STEPS, M, r=r, w=0)
    options = subject.options("euler")
    left_out = tuple(i for i in range(M, STEPS) if (i - M) % r)
    assert len(plan.steps) == STEPS - len(left_out)
    with extrapolating(subject.eager.unet, left_out):
        want = gated_run(subject.eager, PROMPT, NEGATIVE, M, 1, 1, 0, **options)
    got = subject.engine(plan, initial_latents=flow_noise(VARIANT).numpy())
    assert relative(got, want) < TOLERANCE
    assert relative(got, gated_run(subject.eager, PROMPT, NEGATIVE, M, 1, 1, 0, **options)) > 10 * TOLERANCE


@pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])
@pytest.mark.parametrize(("sampler", "strength"), [("euler", 0.6), ("dpmpp_2m", 0.5)])
def test_from_a_picture(subject: Subject, sampler: str, strength: float, gated: bool) -> None:
    steps, m = 25, 6
    plan = subject.plan("tgate", sampler, steps, m if gated else steps, w=0)
    shape = Bundle.open(subject.bundle).manifest.shapes[0]
    image = picture((shape.width, shape.height))
    got = subject.engine(plan, image=image, strength=strength, seed=SEED)
    want = latents_from(
        subject.checkpoint,
        "KolorsImg2ImgPipeline",
        sampler=sampler,
        steps=steps,
        strength=strength,
        image=image,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        guidance_scale=SCALE,
        draws=draws,
        gate=Gate(m=m, w=0) if gated else None,
        height=shape.height,  # which this pipeline would otherwise say is the network's own
        width=shape.width,
    )
    assert relative(got, want) < TOLERANCE
