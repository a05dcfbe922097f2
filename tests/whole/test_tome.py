"""Token merging through the whole product, against its authors' package and the rule written out
(:mod:`tests.oracle_tome`); and under the paper's gate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import family_settings
from tests.oracle_families import Request, plain_latents, tgate_latents, written_out_latents
from tests.oracle_tome import patched, written_out
from tests.runtime.engines.ways import WAYS
from tests.tiny_families import latent_noise as family_noise
from tests.tiny_families import load_tiny, make_tiny
from tests.tiny_models import latent_noise, load_tiny_sdxl
from tests.whole.cases import TOLERANCE, relative
from tgate_engine.bundle import Bundle
from tgate_engine.errors import MethodError
from tgate_engine.plan import Plan
from tgate_export.candidates import candidates
from tgate_export.job import prepare
from tgate_export.methods import find_method
from tgate_export.plans import add_plan, make_plans
from tgate_export.sampling import compile_sampler, make_scheduler
from tgate_runtime.generators import in_step, noise
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

ALONE, GATED, RATIO = "tome", "tgate+tome", 0.5
PROMPTS, NEGATIVE, SEED = ["a large red circle above a small blue square", "a photo"], "blue square", 23


@dataclass(frozen=True, kw_only=True)
class Case:
    """``m``: None is the method without a gate."""

    n: int
    m: int | None = None
    k: int = 1
    f: int = 1
    sampler: str = "dpmpp_2m"
    scale: float = 5.0

    def __str__(self) -> str:
        return f"n{self.n}-m{self.m}-k{self.k}-f{self.f}-{self.sampler}-g{self.scale:g}"


PACKAGES = (
    Case(n=6),
    Case(n=5, sampler="euler_a", scale=2.0),
    Case(n=5, sampler="pndm"),
    Case(n=7, m=3),
    Case(n=6, m=1, sampler="euler", scale=7.5),
    Case(n=5, m=5, sampler="ddim"),
)
"""What both packages do as the rule says."""
RULE = (Case(n=9, m=6, k=2), Case(n=8, m=3, k=2, f=2, sampler="euler"), Case(n=7, m=4, k=3, sampler="pndm"))
"""Self-attention is reused: see :mod:`tests.oracle_tome`."""
VARIANTS = (
    "conv_projection",
    pytest.param("sdxl_like", marks=pytest.mark.slow),
    pytest.param("sd21_v", marks=pytest.mark.slow),
    pytest.param("sd15_b", marks=pytest.mark.slow),
)


class Subject:
    """A small model: its eager pipeline, and a bundle of the gated method, among whose graphs are the other's."""

    def __init__(self, eager: Any, bundle: Path, start: Callable[[int], torch.Tensor], images: int = 1) -> None:
        self.eager, self.bundle, self.start, self.images = eager, Bundle.open(bundle), start, images

    def request(self, case: Case) -> Request:
        shape = self.bundle.manifest.shapes[0].latents

        def drawn(step: int) -> torch.Tensor:
            each = [noise(SEED + j, shape, draw=in_step(step)) for j in range(self.images)]
            return torch.stack([torch.from_numpy(values) for values in each])

        return Request(
            prompt=PROMPTS[: self.images],
            negative_prompt=[NEGATIVE] * self.images,
            steps=case.n,
            guidance_scale=case.scale,
            latents=self.start(self.images),
            step_noise=drawn,
        )

    def plan(self, case: Case) -> Plan:
        manifest = self.bundle.manifest
        method = find_method(ALONE if case.m is None else GATED)
        named = {} if case.m is None else {"k": case.k, "f": case.f, "w": 0}
        return make_plans(
            "case",
            method,
            method.settings(steps=case.n, gate=case.m, defaults={}, **named),
            sampler=compile_sampler(case.sampler, manifest.scheduler, case.n),
            guidance_scale=case.scale,
            guided=manifest.guided,
            graphs=manifest.shapes[0].graphs,
            carries=manifest.carries,
        )["case"]

    def engine(self, case: Case, **options: Any) -> NDArray[Any]:
        """Final latents of the engine."""
        plan, start = self.plan(case), self.start(self.images).numpy()
        options = options or {"threads": 1}
        with Pipeline.open(self.bundle, plans=[plan], **options) as pipe:
            return pipe(
                PROMPTS[: self.images],
                negative_prompt=NEGATIVE if self.bundle.manifest.guided else None,
                plan=plan,
                seed=SEED,
                initial_latents=start,
            ).latents

    def eagerly(self, case: Case, merging: Any = None, *, package: bool = False) -> torch.Tensor:
        """Final latents of eager PyTorch while ``merging`` is open; ``package``: the loaders of ``tgate``."""
        scheduler = make_scheduler(case.sampler, self.bundle.manifest.scheduler)
        arguments = (self.eager, self.request(case), scheduler)
        with merging or nullcontext():
            if case.m is None:
                return plain_latents(*arguments)
            run = tgate_latents if package else written_out_latents
            return run(*arguments, case.m, case.k, case.f, 0)

    def package(self, case: Case, ratio: float = RATIO) -> torch.Tensor:
        return self.eagerly(case, patched(self.eager, ratio, k=max(case.k, case.f)), package=True)

    def rule(self, case: Case, ratio: float = RATIO) -> torch.Tensor:
        return self.eagerly(case, written_out(self.eager, ratio))


Subjects = Callable[..., Subject]


@pytest.fixture(scope="module")
def subject_of(
    tiny_checkpoint: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
    family_bundle: Callable[..., tuple[Path, Path]],
) -> Subjects:
    @functools.cache
    def get(variant: str) -> Subject:
        if variant in ("sdxl_like", "conv_projection"):
            images = 2 if variant == "conv_projection" else 1
            bundle = tiny_bundle(variant, method=GATED, batch=(images, images))
            return Subject(
                load_tiny_sdxl(tiny_checkpoint(variant)), bundle, functools.partial(latent_noise, variant), images
            )
        checkpoint, bundle = family_bundle(variant, method=GATED)
        return Subject(load_tiny(checkpoint, variant), bundle, lambda batch: family_noise(variant, batch))

    return get


@pytest.mark.parametrize("case", PACKAGES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_equal_the_packages(subject_of: Subjects, variant: str, case: Case) -> None:
    """SDXL that attends at its finest level, and one that first does a level below; and Stable Diffusion."""
    subject = subject_of(variant)
    package = subject.package(case)
    assert relative(subject.engine(case), package) < TOLERANCE
    assert relative(subject.rule(case).numpy(), package) < TOLERANCE / 10, "the rule written out is the packages'"


@pytest.mark.parametrize("case", RULE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_with_self_attention_reused_latents_equal_the_rule(subject_of: Subjects, variant: str, case: Case) -> None:
    subject = subject_of(variant)
    assert relative(subject.engine(case), subject.rule(case)) < TOLERANCE
    with pytest.raises(ValueError, match="another step's partners"):
        subject.package(case)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rule_is_another_than_its_neighbours(subject_of: Subjects, variant: str) -> None:
    """So that the tests above can fail: on the ratio, on the gate, and on merging at all."""
    subject, alone = subject_of(variant), Case(n=6, sampler="euler")
    gated = replace(alone, m=3, k=2)
    mine = [subject.rule(case).numpy() for case in (alone, gated)]
    others = [
        *(subject.eagerly(case) for case in (alone, gated)),
        *(subject.rule(case, ratio) for case in (alone, gated) for ratio in (0.25, 0.4, 0.6, 0.75)),
        *(subject.rule(case) for case in (replace(gated, k=1), replace(gated, m=2))),
    ]
    for own in mine:
        for other in others:
            assert relative(own, other) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow) if way == "aoti" else way for way in WAYS if "fast" not in way]
)
def test_every_engine_settles_it_alike(
    subject_of: Subjects, way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))
    subject, case = subject_of("conv_projection"), Case(n=4, m=2)
    assert relative(subject.engine(case, engine=WAYS[way]()), subject.rule(case)) < TOLERANCE


@pytest.mark.parametrize("method", [ALONE, GATED])
def test_a_bundle_proves_itself_and_tells_its_ratio(tiny_bundle: Callable[..., Path], method: str) -> None:
    bundle = Bundle.open(tiny_bundle("conv_projection", method=method, batch=(2, 2)))
    checked = {golden.name: golden for golden in verify(bundle, threads=1)}
    assert {"ungated", "gated"} <= set(checked)
    assert all(golden.ok for golden in checked.values())
    graphs = bundle.manifest.shapes[0].graphs
    gated = {"merged_reuse_self", "merged_reuse_cross", "merged_reuse_both", "unguided"} if method == GATED else set()
    assert {name for name, graph in graphs.items() if graph.role == "denoise"} == {"full", "merged"} | gated
    assert bundle.manifest.plan("default").settings["ratio"] == RATIO
    assert {step.graph for step in bundle.manifest.plan("ungated").steps} == {"full"}, "nothing is merged there"
    other = add_plan(bundle.path, name="other", m=2 if method == GATED else None, steps=5, save=False)["other"]
    assert other.settings["ratio"] == RATIO
    found = candidates(bundle, steps=5).plans
    assert [label for label, plan in found.items() if plan.same_program(other)] == (
        ["m=2 merged=0.5"] if method == GATED else ["merged=0.5"]
    )
    assert "m=2 r=3 alone" in found, "and what nothing is merged in is compared with it"


def test_what_is_saved_is_what_attention_no_longer_sees(subject_of: Subjects) -> None:
    """Four projections of each merged token, and both products; the search for partners and their means cost some."""
    subject = subject_of("conv_projection")
    graphs, unet = subject.bundle.manifest.shapes[0].graphs, subject.eager.unet
    height, width = subject.bundle.manifest.shapes[0].latents[1:]
    tokens, channels = height * width, unet.config.block_out_channels[0]
    names = [name for name, _ in unet.named_modules() if name.endswith("attn1")]
    layers = sum(not name.startswith("mid_block") for name in names)  # which is a level below
    merged, targets = tokens // 2, tokens // 4
    projections = 4 * merged * channels**2
    products = 2 * (tokens**2 - (tokens - merged) ** 2) * channels
    search = (tokens - targets) * targets * channels + targets * merged * channels
    full, less = graphs["full"].macs, graphs["merged"].macs
    assert full.paper - less.paper == 2 * layers * projections  # both halves of guidance
    assert full.all - less.all == 2 * layers * (projections + products - search)


@pytest.mark.parametrize("variant", ["pixart_sigma_a", "svd_a"])
def test_a_transformer_and_a_video_are_refused_by_name(tmp_path: Path, variant: str) -> None:
    checkpoint = make_tiny(tmp_path / "checkpoint", variant)
    for method in (ALONE, GATED):
        settings = family_settings(variant, checkpoint, tmp_path / "bundle", method=method)
        with pytest.raises(MethodError, match=f"method {method.replace('+', '.')} merges tokens before the self-att"):
            prepare(settings)
