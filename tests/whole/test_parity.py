"""Final latents of the engine against those of the paper's package, and of diffusers itself.

Every case runs the whole product: checkpoint, export, bundle, ONNX Runtime. The reference runs the checkpoint's own
pipeline under diffusers, in eager float32, with the same initial latents (:mod:`tests.oracle`).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from numpy.typing import NDArray

from tests.oracle import guidance_stopped_latents, plain_latents, tgate_latents
from tests.tiny_models import load_tiny_sdxl
from tests.whole.cases import GUIDANCE_STOPPED, NAME, TOLERANCE, UNGATED, plans_of, relative
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_export.families import location
from tgate_export.sampling import SAMPLERS as EVERY_SAMPLER
from tgate_export.sampling import make_scheduler
from tgate_runtime.pipeline import Pipeline

SAMPLERS = tuple(name for name in EVERY_SAMPLER if name not in ("lcm", "euler_a", "scm"))
"""The deterministic ones. Stochastic ones, whose noise must be injected, are in ``tests/whole/test_families.py``; SCM,
which knows other networks, in ``tests/whole/test_flow_families.py``."""

PROMPT = "a large red circle above a small blue square"
VARIANTS = ("sdxl_like", "conv_projection", "half_on_disk", "sharded")
MARKS = {name: [pytest.mark.slow] for name in ("sdxl_like", "half_on_disk", "sharded")}
"""How files are read is tested where they are, in ``test_directory.py``; ``conv_projection`` is of SDXL's kind, too."""


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
        self.bundle = Bundle.open(bundle)
        f = 2 if "reuse_both" in self.bundle.manifest.shapes[0].graphs else 1
        every_graph = self.plans(Case(n=6, m=3, k=2, f=f, w=0)).values()
        self.pipe = Pipeline.open(self.bundle, plans=[*every_graph], threads=1)

    @property
    def base_scheduler(self) -> dict[str, Any]:
        return dict(self.bundle.manifest.scheduler)

    def noise(self, batch: int = 1, size: str | None = None) -> NDArray[np.float32]:
        shape = (batch, *self.bundle.manifest.shapes_of(size)[0].latents)
        return np.random.default_rng(5).standard_normal(shape, dtype=np.float32)

    def plans(self, case: Case) -> dict[str, Plan]:
        """The plan of a case, and its baselines."""
        own = {"n": case.n, "m": case.m, "k": case.k, "f": case.f, "w": case.w}
        return plans_of(self.bundle, **own, sampler=case.sampler, guidance_scale=case.guidance)

    def engine(
        self, case: Case, *, plan: str = NAME, prompt: str | list[str] = PROMPT, size: str | None = None
    ) -> NDArray[np.float32]:
        """Final latents of the engine, walking the case's plan, or that baseline of it."""
        return self.pipe(
            prompt,
            plan=self.plans(case)[plan],
            size=size,
            negative_prompt=case.negative,
            guidance_scale=case.guidance if self.bundle.manifest.guided else None,
            initial_latents=self.noise(1 if isinstance(prompt, str) else len(prompt), size),
        ).latents

    def arguments(
        self, case: Case, *, prompt: str | list[str] = PROMPT, latents: NDArray[np.float32] | None = None
    ) -> dict[str, Any]:
        """What every eager reference takes."""
        negative: Any = case.negative
        if isinstance(prompt, list) and case.negative is not None:
            negative = [case.negative] * len(prompt)
        return {
            "prompt": prompt,
            "negative_prompt": negative,
            "steps": case.n,
            "guidance_scale": case.guidance,
            "latents": torch.from_numpy(self.noise() if latents is None else latents),
            "scheduler": make_scheduler(case.sampler, self.base_scheduler),
        }

    def package(self, case: Case, **more: Any) -> torch.Tensor:
        """Final latents of the paper's package."""
        return tgate_latents(self.eager, **self.arguments(case, **more), m=case.m, k=case.k, f=case.f, w=case.w)


@pytest.fixture(
    scope="module", params=("mini-sdxl", *(pytest.param(name, marks=MARKS.get(name, ())) for name in VARIANTS))
)
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "mini-sdxl":
        yield Subject(Path(location("mini-sdxl")), request.getfixturevalue("mini_bundle"))
    else:
        checkpoint = request.getfixturevalue("tiny_checkpoint")(request.param)
        yield Subject(checkpoint, request.getfixturevalue("tiny_bundle")(request.param))


@pytest.mark.parametrize("case", sample(4, seed=1), ids=str)
def test_gated_latents_equal_the_package(subject: Subject, case: Case) -> None:
    assert relative(subject.engine(case), subject.package(case)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", sample(150, seed=2), ids=str)
def test_gated_latents_equal_the_package_on_more_of_the_grid(subject: Subject, case: Case) -> None:
    assert relative(subject.engine(case), subject.package(case)) < TOLERANCE


@pytest.mark.parametrize(
    ("subject", "sampler"),
    [
        *[("mini-sdxl", sampler) for sampler in SAMPLERS],  # which knows nothing of the checkpoint
        *[
            pytest.param(name, sampler, marks=MARKS.get(name, ()))
            for name in VARIANTS
            for sampler in ("dpmpp_2m", "pndm")
        ],
    ],
    indirect=["subject"],
)
def test_ungated_latents_equal_diffusers(subject: Subject, sampler: str) -> None:
    case = Case(n=6, m=6, sampler=sampler, negative="a small blue photo")
    want = plain_latents(subject.eager, **subject.arguments(case))
    assert relative(subject.engine(case, plan=UNGATED), want) < TOLERANCE


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "pndm"])
def test_guidance_stopped_latents_equal_eager(subject: Subject, sampler: str) -> None:
    case = Case(n=6, m=3, sampler=sampler)
    want = guidance_stopped_latents(subject.eager, **subject.arguments(case), m=case.m)
    assert relative(subject.engine(case, plan=GUIDANCE_STOPPED), want) < TOLERANCE


def test_the_paper_settings_equal_the_package(subject: Subject) -> None:
    """n=25, m=10, k=5 on DPM-Solver++: what the product runs by default."""
    case = Case(n=25, m=10, k=5)
    got = subject.engine(case)
    assert relative(got, subject.package(case)) < TOLERANCE
    # The test could fail: the ungated trajectory is another one, and so is that of a neighbouring gate.
    assert relative(got, plain_latents(subject.eager, **subject.arguments(case))) > 10 * TOLERANCE
    assert relative(got, subject.package(replace(case, m=9))) > 10 * TOLERANCE


def test_without_guidance_equal_the_package(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path]
) -> None:
    """A bundle exported with guidance off has one half: nothing is doubled and nothing averaged."""
    variant = "conv_projection"
    subject = Subject(tiny_checkpoint(variant), tiny_bundle(variant, guidance_scale=1.0))
    for case in (Case(n=8, m=4, k=2, f=2, w=0, guidance=1.0), Case(n=4, m=1, w=0, guidance=1.0, sampler="euler")):
        assert relative(subject.engine(case), subject.package(case)) < TOLERANCE


@pytest.mark.parametrize(
    ("variant", "most"), [("conv_projection", 4), pytest.param("sdxl_like", 2, marks=pytest.mark.slow)]
)
def test_a_dynamic_batch_equals_the_package(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path], variant: str, most: int
) -> None:
    """Its own batch, and each image alone: an image's rows lie together, which the package's do not."""
    subject = Subject(tiny_checkpoint(variant), tiny_bundle(variant, batch=(1, most)))
    case = Case(n=8, m=4, k=2, f=2, w=0, negative="large")
    for prompts in ([PROMPT, "a small blue photo", "red"][:most], ["red", PROMPT]):
        start = subject.noise(len(prompts))
        got = subject.engine(case, prompt=prompts)
        assert relative(got, subject.package(case, prompt=prompts, latents=start)) < TOLERANCE
        for j, prompt in enumerate(prompts):
            alone = subject.package(case, prompt=prompt, latents=start[j : j + 1])
            assert relative(got[j : j + 1], alone) < TOLERANCE


def test_every_size_of_a_bundle_equals_the_package(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path]
) -> None:
    """Wider, and higher than wide; a further size costs its graphs and no weights."""
    variant = "conv_projection"
    bundle = tiny_bundle(variant, sizes=((64, 64), (96, 64), (64, 128)))
    subject = Subject(tiny_checkpoint(variant), bundle)
    manifest = subject.bundle.manifest
    assert manifest.sizes == ("64x64", "96x64", "64x128")
    case = Case(n=7, m=4, k=2, w=0, sampler="euler")
    for size, latents in (("64x64", (8, 8)), ("96x64", (8, 12)), ("64x128", (16, 8))):
        got = subject.engine(case, size=size)
        assert got.shape[-2:] == latents
        assert relative(got, subject.package(case, latents=subject.noise(size=size))) < TOLERANCE

    single = Bundle.open(tiny_bundle(variant)).manifest
    assert manifest.files[manifest.weights] == single.files[single.weights]
    own = {size: {graph.file for graph in manifest.shapes_of(size)[0].graphs.values()} for size in manifest.sizes}
    further = (own["96x64"] | own["64x128"]) - own["64x64"]
    assert len(further) == 2 * len(own["64x64"]) - 2  # all but the text encoder's
    assert sum(manifest.files[file].bytes for file in further) < 4 * 2**20
    assert not [file for file in manifest.files if file.endswith((".onnx", ".bin", ".data")) and file not in
                set().union(*own.values())]  # fmt: skip
