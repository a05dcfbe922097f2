"""Final latents of the engine against those of the paper's package, and of diffusers itself.

Every case runs the whole product: checkpoint, export, bundle, ONNX Runtime. The reference runs the checkpoint's own
pipeline under diffusers, in eager float32, with the same initial latents (:mod:`tests.oracle`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray

from tests.oracle import guidance_stopped_latents, plain_latents, tgate_latents
from tests.tiny_models import load_tiny_sdxl
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan, build_plan
from tgate_engine.schedule import Schedule
from tgate_export.families import location
from tgate_export.sampling import SAMPLERS as EVERY_SAMPLER
from tgate_export.sampling import compile_sampler, make_scheduler
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session

SAMPLERS = tuple(name for name in EVERY_SAMPLER if name not in ("lcm", "euler_a"))
"""The deterministic ones. Stochastic ones, whose noise must be injected, are in ``tests/test_families.py``."""

TOLERANCE = 1e-4
"""Largest absolute difference over largest absolute value, float32."""

PROMPT = "a large red circle above a small blue square"
VARIANTS = ("sdxl_like", "conv_projection", "half_on_disk", "sharded")


@dataclass(frozen=True, kw_only=True)
class Case:
    n: int
    m: int
    k: int = 1
    f: int = 1
    w: int = 2
    sampler: str = "dpmpp_2m"
    guidance: float = 5.0
    negative: str | None = None

    def __str__(self) -> str:
        negative = "none" if self.negative is None else (self.negative.split() or ["empty"])[0]
        return (
            f"n{self.n}-m{self.m}-k{self.k}-f{self.f}-w{self.w}-{self.sampler}-g{self.guidance:g}-negative_{negative}"
        )


def grid() -> list[Case]:
    """What the product promises: n, m (1, 2, middle, n-1, n), k, f, w, sampler, guidance, negative prompt."""
    return [
        Case(n=n, m=m, k=k, f=f, w=w, sampler=sampler, guidance=guidance, negative=negative)
        for n, k, f, w, sampler, guidance, negative in itertools.product(
            (4, 7, 10), (1, 2, 3, 5), (1, 2), (0, 2), SAMPLERS, (2.0, 5.0, 7.5), (None, "", "a small blue photo")
        )
        for m in dict.fromkeys((1, 2, n // 2, n - 1, n))
    ]


CORNERS = (
    Case(n=1, m=1, k=5, w=0),
    Case(n=2, m=1, f=2, w=0, sampler="euler"),
    Case(n=10, m=10, k=3),
    Case(n=10, m=9, k=2, f=2, w=0, sampler="unipc"),
    Case(n=7, m=4, k=2, w=6, sampler="ddim"),
    Case(n=10, m=5, k=3, f=2, w=0, sampler="pndm", negative="a small blue photo"),
    Case(n=4, m=1, k=5, f=2, w=2, sampler="lms", guidance=2.0, negative=""),
)


def sample(count: int, seed: int) -> tuple[Case, ...]:
    """The corners and ``count`` cases of the grid, the same for the same seed."""
    return (*CORNERS, *random.Random(seed).sample(grid(), count))


class Subject:
    """One checkpoint with its eager pipeline and its bundle, opened once."""

    def __init__(self, checkpoint: Path, bundle: Path) -> None:
        self.eager: StableDiffusionXLPipeline = load_tiny_sdxl(checkpoint)
        opened = Bundle.open(bundle)
        plans = [*opened.manifest.plans.values(), self._every_graph(opened)]
        self.session = Session.open(opened, plans=plans, threads=1)

    @staticmethod
    def _every_graph(bundle: Bundle) -> Plan:
        plan = bundle.manifest.goldens["gated"].plan
        assert plan is not None
        return plan

    @property
    def base_scheduler(self) -> dict[str, Any]:
        return dict(self.session.manifest.scheduler)

    def noise(self, batch: int = 1) -> NDArray[np.float32]:
        shape = (batch, *self.session.manifest.latents)
        return np.random.default_rng(5).standard_normal(shape, dtype=np.float32)

    def engine(
        self, plan: Plan, case: Case, *, prompt: str | list[str] = PROMPT, batch: int = 1
    ) -> NDArray[np.float32]:
        """Final latents of the engine, walking ``plan``."""
        bundle = self.session.bundle.with_plans({plan.name: plan})
        session = Session(bundle, self.session.backend, self.session._executables or {})
        result = Pipeline(session)(
            prompt,
            plan=plan.name,
            negative_prompt=case.negative,
            guidance_scale=case.guidance if bundle.manifest.guided else None,
            initial_latents=self.noise(batch),
        )
        return result.latents

    def plan(self, case: Case, change: Callable[[Schedule], Schedule] = lambda schedule: schedule) -> Plan:
        manifest = self.session.manifest
        sampler = compile_sampler(case.sampler, self.base_scheduler, case.n)
        schedule = Schedule(
            steps=case.n,
            gate=case.m,
            self_interval=case.k,
            fidelity_interval=case.f,
            warm_up=case.w,
            lead_in=sampler.lead_in,
        )
        return build_plan(
            "case",
            schedule=change(schedule),
            sampler=sampler,
            guidance_scale=case.guidance,
            graphs=manifest.graphs,
            carries=manifest.carries,
        )

    def arguments(self, case: Case, *, prompt: str | list[str] = PROMPT, batch: int = 1) -> dict[str, Any]:
        """What every eager reference takes."""
        negative: Any = case.negative
        if isinstance(prompt, list) and case.negative is not None:
            negative = [case.negative] * len(prompt)
        return {
            "prompt": prompt,
            "negative_prompt": negative,
            "steps": case.n,
            "guidance_scale": case.guidance,
            "latents": torch.from_numpy(self.noise(batch)),
            "scheduler": make_scheduler(case.sampler, self.base_scheduler),
        }


@pytest.fixture(scope="module", params=("mini-sdxl", *VARIANTS))
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "mini-sdxl":
        yield Subject(Path(location("mini-sdxl")), request.getfixturevalue("mini_full_bundle"))
    else:
        checkpoint = request.getfixturevalue("tiny_checkpoint")(request.param)
        yield Subject(checkpoint, request.getfixturevalue("tiny_bundle")(request.param))


def relative(got: NDArray[np.float32], want: torch.Tensor) -> float:
    wanted = want.numpy().astype(np.float64)
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("case", sample(9, seed=1), ids=str)
def test_gated_latents_equal_the_package(subject: Subject, case: Case) -> None:
    want = tgate_latents(subject.eager, **subject.arguments(case), m=case.m, k=case.k, f=case.f, w=case.w)
    assert relative(subject.engine(subject.plan(case), case), want) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(150, seed=2), ids=str)
def test_gated_latents_equal_the_package_on_more_of_the_grid(subject: Subject, case: Case) -> None:
    want = tgate_latents(subject.eager, **subject.arguments(case), m=case.m, k=case.k, f=case.f, w=case.w)
    assert relative(subject.engine(subject.plan(case), case), want) < TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_ungated_latents_equal_diffusers(subject: Subject, sampler: str) -> None:
    case = Case(n=6, m=6, sampler=sampler, negative="a small blue photo")
    want = plain_latents(subject.eager, **subject.arguments(case))
    assert relative(subject.engine(subject.plan(case, Schedule.ungated), case), want) < TOLERANCE


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "pndm"])
def test_guidance_stopped_latents_equal_eager(subject: Subject, sampler: str) -> None:
    case = Case(n=6, m=3, sampler=sampler)
    want = guidance_stopped_latents(subject.eager, **subject.arguments(case), m=case.m)
    assert relative(subject.engine(subject.plan(case, Schedule.guidance_stopped), case), want) < TOLERANCE


def test_the_paper_settings_equal_the_package(subject: Subject) -> None:
    """n=25, m=10, k=5 on DPM-Solver++: what the product runs by default."""
    case = Case(n=25, m=10, k=5)
    want = tgate_latents(subject.eager, **subject.arguments(case), m=10, k=5, f=1, w=2)
    got = subject.engine(subject.plan(case), case)
    assert relative(got, want) < TOLERANCE
    # The test could fail: the ungated trajectory is another one, and so is that of a neighbouring gate.
    assert relative(got, plain_latents(subject.eager, **subject.arguments(case))) > 10 * TOLERANCE
    other = tgate_latents(subject.eager, **subject.arguments(case), m=9, k=5, f=1, w=2)
    assert relative(got, other) > 10 * TOLERANCE


def test_without_guidance_equal_the_package(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path]
) -> None:
    """A bundle exported with guidance off has one half: nothing is doubled and nothing averaged."""
    variant = "conv_projection"
    subject = Subject(tiny_checkpoint(variant), tiny_bundle(variant, guidance_scale=1.0))
    for case in (Case(n=8, m=4, k=2, f=2, w=0, guidance=1.0), Case(n=4, m=1, w=0, guidance=1.0, sampler="euler")):
        want = tgate_latents(subject.eager, **subject.arguments(case), m=case.m, k=case.k, f=case.f, w=case.w)
        assert relative(subject.engine(subject.plan(case), case), want) < TOLERANCE


def test_a_dynamic_batch_equals_the_package(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path]
) -> None:
    variant = "conv_projection"
    subject = Subject(tiny_checkpoint(variant), tiny_bundle(variant, batch=(1, 4)))
    prompts = [PROMPT, "a small blue photo", "red"]
    case = Case(n=8, m=4, k=2, f=2, w=0, negative="large")
    arguments = subject.arguments(case, prompt=prompts, batch=3)
    want = tgate_latents(subject.eager, **arguments, m=4, k=2, f=2, w=0)
    assert relative(subject.engine(subject.plan(case), case, prompt=prompts, batch=3), want) < TOLERANCE
