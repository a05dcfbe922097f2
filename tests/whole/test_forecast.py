"""Forecast through the whole product, against diffusers and the paper's package with networks that extrapolate.

The reference's network is called at every step; at those that are left out it gives, instead of computing, the line
through its last two guided outputs.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.oracle import plain_latents, tgate_latents
from tests.tiny_models import latent_noise, load_tiny_sdxl
from tests.whole.cases import NAME, TOLERANCE, relative
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_export.methods import find_method
from tgate_export.plans import add_plan, make_plans
from tgate_export.sampling import compile_sampler, make_scheduler
from tgate_runtime.pipeline import Pipeline

VARIANT, PROMPT, NEGATIVE, SCALE = "conv_projection", "a large red circle above a small blue square", "blue", 5.0


@contextmanager
def extrapolating(unet: Any, left_out: tuple[int, ...]) -> Iterator[list[int]]:
    """A U-Net that computes at the calls that are not left out, whose numbers it gives."""
    computed: list[int] = []
    seen: list[torch.Tensor] = []
    calls = 0
    forward = unet.forward

    @functools.wraps(forward)
    def forecast(sample: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        nonlocal calls
        i, calls = calls, calls + 1
        if i not in left_out:
            (output,) = forward(sample, *arguments, **{**more, "return_dict": False})
            computed.append(i)
            halves = output.chunk(2)
            seen.append(halves[0] + SCALE * (halves[1] - halves[0]) if len(sample) == 2 else output)
            return (output,)
        ahead = (i - computed[-1]) / (computed[-1] - computed[-2])
        guided = seen[-1] + ahead * (seen[-1] - seen[-2])
        return (torch.cat([guided] * len(sample)),)  # both halves alike: guidance changes nothing

    unet.forward = forecast
    try:
        yield computed
    finally:
        unet.forward = forward


def plan_of(bundle: Path, method: str, *, n: int, m: int, k: int, r: int, sampler: str) -> Plan:
    manifest = Bundle.open(bundle).manifest
    named = {"k": k, "w": 0} if method == "tgate" else {}
    made = find_method(method)
    plans = make_plans(
        NAME,
        made,
        made.settings(steps=n, gate=m, r=r, defaults={}, **named),
        sampler=compile_sampler(sampler, manifest.scheduler, n),
        guidance_scale=SCALE,
        guided=True,
        graphs=manifest.shapes[0].graphs,
        carries=manifest.carries,
    )
    return plans[NAME]


@pytest.mark.parametrize("method", ["forecast", "tgate"])
@pytest.mark.parametrize(
    ("n", "m", "r", "sampler"),
    [(10, 4, 2, "dpmpp_2m"), (9, 3, 3, "euler"), (8, 2, 2, "pndm"), (12, 5, 4, "unipc")],
)
def test_latents_equal_a_pipeline_that_extrapolates(
    tiny_checkpoint: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
    method: str,
    n: int,
    m: int,
    r: int,
    sampler: str,
) -> None:
    bundle = tiny_bundle(VARIANT)
    plan = plan_of(bundle, method, n=n, m=m, k=2, r=r, sampler=sampler)
    start = latent_noise(VARIANT, 1)
    pipe = load_tiny_sdxl(tiny_checkpoint(VARIANT))
    arguments: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "steps": n,
        "guidance_scale": SCALE,
        "latents": start,
        "scheduler": make_scheduler(sampler, Bundle.open(bundle).manifest.scheduler),
    }
    lead_in = plan.sampler.lead_in
    left_out = tuple(i for i in range(lead_in + m, lead_in + n) if (i - lead_in - m) % r)
    with extrapolating(pipe.unet, left_out) as computed:
        if method == "forecast":
            want = plain_latents(pipe, **arguments)
        else:
            want = tgate_latents(pipe, **arguments, m=m, k=2, f=1, w=0)
    assert len(plan.steps) == len(computed) == n + lead_in - len(left_out)
    with Pipeline.open(bundle, threads=1, plans=[plan]) as engine:
        got = engine(PROMPT, negative_prompt=NEGATIVE, plan=plan, initial_latents=start.numpy()).latents
    assert relative(got, want) < TOLERANCE
    assert relative(got, plain_latents(pipe, **arguments)) > 10 * TOLERANCE


def test_a_plan_with_forecasts_is_no_sampler_of_fewer_steps(mini_bundle: Path, tmp_path: Path) -> None:
    """Plans that are made later take the sampler of so many steps from a table, not from such a plan."""
    bundle = tmp_path / "bundle"
    shutil.copytree(mini_bundle, bundle)
    made = add_plan(bundle, name="quick", m=5, steps=10, forecast_interval=2)["quick"]
    assert (made.settings["n"], made.settings["r"], len(made.steps)) == (10, 2, 8)
    assert made.baselines
    assert all(len(Bundle.open(bundle).manifest.plan(name).steps) == 10 for name in made.baselines)
    other = add_plan(bundle, name="eight", m=8, steps=8, save=False)["eight"]
    assert "forecast_of_steps" not in other.sampler.options
    assert len(other.steps) == 8
    macs = Bundle.open(bundle).manifest.shapes[0].graphs
    assert made.macs(macs)[1] == sum(macs[step.graph].macs.all for step in made.steps)
