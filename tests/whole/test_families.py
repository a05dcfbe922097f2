"""Every family through the whole product: final latents of the engine against the package and eager references.

As ``tests/whole/test_parity.py`` does for SDXL. The references (:mod:`tests.oracle_families`) are the package where it
covers the family, the method written out for Latte, and diffusers itself for ungated trajectories.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import family_settings
from tests.oracle_families import (
    Request,
    guidance_stopped_latents,
    plain_latents,
    tgate_latents,
    written_out_latents,
)
from tests.tiny_families import FAMILY_VARIANTS, latent_noise, load_tiny, make_tiny, reshape_unet
from tests.whole.cases import GUIDANCE_STOPPED, NAME, TOLERANCE, UNGATED, plans_of, relative
from tgate_engine.bundle import Bundle
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_export.job import prepare
from tgate_export.sampling import make_scheduler
from tgate_runtime.generators import CONDITIONING, in_step, noise
from tgate_runtime.pipeline import Pipeline

SEED = 11
PROMPT = "a large red circle above a small blue square"
ONE_OF_EACH = ("sd21_v", "pixart_alpha_1024", "pixart_sigma_a", "lcm_pixart", "svd_a", "latte_a")
"""In every run of the tests; the other shapes are slow."""


@dataclass(frozen=True, kw_only=True)
class Case:
    n: int
    m: int
    k: int = 1
    f: int = 1
    w: int = 2
    sampler: str

    def __str__(self) -> str:
        return f"n{self.n}-m{self.m}-k{self.k}-f{self.f}-w{self.w}-{self.sampler}"


CASES = (
    Case(n=8, m=4, k=2, f=2, w=0, sampler="own"),
    Case(n=10, m=5, k=3, sampler="euler"),
    Case(n=4, m=1, w=0, sampler="ddim"),
    Case(n=6, m=6, k=2, sampler="own"),
    Case(n=5, m=2, k=1, sampler="euler_a"),
)
CONSISTENCY = (
    Case(n=4, m=1, w=0, sampler="lcm"),
    Case(n=4, m=2, w=0, f=2, sampler="lcm"),
    Case(n=6, m=4, k=2, w=0, sampler="lcm"),
)


class Subject:
    """One tiny checkpoint: its eager pipeline, and its bundle with every graph there is."""

    def __init__(self, variant: str, checkpoint: Path, bundle: Path) -> None:
        self.variant, self.tiny = variant, FAMILY_VARIANTS[variant]
        self.eager = load_tiny(checkpoint, variant)
        self.video = self.tiny.model in ("svd", "opensora")
        self.consistency = self.tiny.model.startswith("lcm")
        self.bundle = Bundle.open(bundle)
        self.shape = self.bundle.manifest.shapes[0]
        self.image = _picture(self.shape.height, self.shape.width) if self.tiny.model == "svd" else None
        self.pipe = Pipeline.open(self.bundle, threads=1, plans=["default"])

    def own_sampler(self) -> str:
        return {"svd": "euler", "opensora": "ddim"}.get(self.tiny.model, "dpmpp_2m")

    def request(self, case: Case) -> Request:
        """What every eager reference is asked for."""
        shape = self.shape.latents
        augmentation = noise(SEED, (1, 3, self.shape.height, self.shape.width), draw=CONDITIONING)
        return Request(
            prompt=None if self.image is not None else PROMPT,
            negative_prompt=None if self.image is not None or self.consistency else "a photo",
            image=self.image,
            steps=case.n,
            guidance_scale=self.bundle.manifest.guidance_scale,
            latents=latent_noise(self.variant),
            step_noise=lambda step: torch.from_numpy(noise(SEED, shape, draw=in_step(step)))[None],
            augmentation=torch.from_numpy(augmentation) if self.image is not None else None,
        )

    def scheduler(self, case: Case) -> Any:
        return make_scheduler(self._sampler(case), self.bundle.manifest.scheduler)

    def engine(self, case: Case, plan: str = NAME) -> NDArray[np.float32]:
        """Final latents of the engine, walking the case's plan, or that baseline of it."""
        own = {"n": case.n, "m": case.m, "k": case.k, "f": case.f, "w": case.w}
        walked = plans_of(self.bundle, **own, sampler=self._sampler(case))[plan]
        start = latent_noise(self.variant).numpy()
        with Pipeline.open(self.bundle, threads=1, plans=[walked]) as pipe:
            if self.image is not None:
                return pipe(image=self.image, plan=walked, seed=SEED, initial_latents=start).latents
            negative = None if self.consistency else "a photo"
            return pipe(PROMPT, negative_prompt=negative, plan=walked, seed=SEED, initial_latents=start).latents

    def _sampler(self, case: Case) -> str:
        if self.tiny.model == "svd":  # its network is told a quarter of log sigma, which Euler's class alone does
            return self.own_sampler()
        return self.own_sampler() if case.sampler == "own" else case.sampler


@pytest.fixture(scope="module")
def subject_of(family_bundle: Callable[[str], tuple[Path, Path]]) -> Callable[[str], Subject]:
    return functools.cache(lambda variant: Subject(variant, *family_bundle(variant)))


def _picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(4)
    coarse = Image.fromarray(rng.integers(0, 255, (4, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _pairs() -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}-{case}", marks=[] if name in ONE_OF_EACH else [pytest.mark.slow])
        for name, tiny in FAMILY_VARIANTS.items()
        for case in (CONSISTENCY if tiny.model.startswith("lcm") else CASES)
    ]


def _names() -> list[Any]:
    return [pytest.param(name, marks=[] if name in ONE_OF_EACH else [pytest.mark.slow]) for name in FAMILY_VARIANTS]


@pytest.mark.parametrize(("variant", "case"), _pairs())
def test_gated_latents_equal_the_reference(subject_of: Callable[[str], Subject], variant: str, case: Case) -> None:
    """The package's, or for Latte, which it does not have, the method written out."""
    subject = subject_of(variant)
    reference = written_out_latents if subject.tiny.model == "opensora" else tgate_latents
    want = reference(subject.eager, subject.request(case), subject.scheduler(case), case.m, case.k, case.f, case.w)
    assert relative(subject.engine(case), want) < TOLERANCE


@pytest.mark.parametrize("variant", _names())
def test_ungated_latents_equal_diffusers(subject_of: Callable[[str], Subject], variant: str) -> None:
    subject = subject_of(variant)
    case = Case(n=5, m=5, sampler="lcm" if subject.consistency else "own")
    want = plain_latents(subject.eager, subject.request(case), subject.scheduler(case))
    got = subject.engine(case, UNGATED)
    assert relative(got, want) < TOLERANCE
    gated = subject.engine(Case(n=5, m=2, k=2, w=0, sampler=case.sampler))
    assert relative(gated, want) > 10 * TOLERANCE, "gating changes the trajectory, so the test could fail"


@pytest.mark.parametrize("variant", _names())
def test_guidance_stopped_latents_equal_eager(subject_of: Callable[[str], Subject], variant: str) -> None:
    subject = subject_of(variant)
    if not subject.bundle.manifest.guided:
        pytest.skip("nothing to stop")
    case = Case(n=6, m=3, sampler="own")
    want = guidance_stopped_latents(subject.eager, subject.request(case), subject.scheduler(case), case.m)
    assert relative(subject.engine(case, GUIDANCE_STOPPED), want) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["pixart_alpha_b", "svd_b", "latte_b", "sd15_b"])
def test_a_symbolic_batch_equals_single_requests(
    family_bundle: Callable[[str], tuple[Path, Path]], tmp_path: Path, variant: str
) -> None:
    """Images of one batch do not see each other; carries of videos have many rows for each."""
    checkpoint, single = family_bundle(variant)
    many = export(family_settings(variant, checkpoint, tmp_path / "many", batches=[(1, 3)]), Silent())
    start = latent_noise(variant, batch=2).numpy()
    image = _picture(64, 64) if FAMILY_VARIANTS[variant].model == "svd" else None
    prompts = None if image is not None else PROMPT
    with Pipeline.open(many, threads=1) as pipe:
        got = pipe(prompts, image=image, num_images=2, seed=SEED, initial_latents=start).latents
    with Pipeline.open(single, threads=1) as pipe:
        for i in range(2):
            want = pipe(prompts, image=image, seed=SEED + i, initial_latents=start[i : i + 1]).latents
            assert relative(got[i : i + 1], want) < 1e-5


@pytest.mark.parametrize("variant", _names())
def test_a_picture_or_a_video_comes_out(subject_of: Callable[[str], Subject], variant: str) -> None:
    """As many frames, and as large, as the manifest says."""
    subject = subject_of(variant)
    start = latent_noise(variant).numpy()
    result = subject.pipe(
        None if subject.image is not None else PROMPT, image=subject.image, seed=SEED, initial_latents=start
    )
    frames = result.videos[0] if subject.video else result.images
    assert len(frames) == subject.bundle.manifest.frames
    assert {frame.size for frame in frames} == {(subject.shape.width, subject.shape.height)}
    assert not (result.images if subject.video else result.videos)


@pytest.mark.slow
def test_only_cross_attention_is_gated_as_the_package_gates_it(tmp_path: Path) -> None:
    """The module called attn1 attends to the text then: after the gate its mean is reused, and no text is left."""
    root = make_tiny(tmp_path / "checkpoint", "sd15_a")
    reshape_unet(root, only_cross_attention=True)
    pipe = load_tiny(root, "sd15_a")
    settings = family_settings("sd15_a", root, tmp_path / "bundle", steps=6, m=3, k=2, warm_up=0)
    job = prepare(settings)
    attending = {site.module for site in job.sites if site.kind == "cross"}
    assert any(name.endswith("attn1") for name in attending)
    bundle = export(settings, Silent())
    request = Request(
        prompt=PROMPT,
        negative_prompt="a photo",
        steps=6,
        guidance_scale=job.guidance_scale,
        latents=latent_noise("sd15_a"),
    )
    want = tgate_latents(pipe, request, make_scheduler("dpmpp_2m", job.scheduler), 3, 2, 2, 0)
    with Pipeline.open(bundle, threads=1) as opened:
        after = opened.session.shapes()[0].graphs["reuse_cross"]
        got = opened(PROMPT, negative_prompt="a photo", initial_latents=latent_noise("sd15_a").numpy()).latents
    assert not [name for name in after.input_names() if name.startswith("prompt_embeds")]
    assert relative(got, want) < TOLERANCE
