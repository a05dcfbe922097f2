"""DeepCache through the whole product, against both authors' packages and the rule written out
(:mod:`tests.oracle_deepcache`)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.conftest import family_settings
from tests.oracle_deepcache import cached_latents, full_calls, helper_latents, loader_latents
from tests.oracle_families import Request, plain_latents, tgate_latents
from tests.tiny_families import latent_noise as family_noise
from tests.tiny_families import load_tiny, make_tiny
from tests.tiny_models import latent_noise, load_tiny_sdxl, tiny_model
from tests.whole.cases import TOLERANCE, relative
from tgate_engine.bundle import Bundle
from tgate_engine.errors import MethodError
from tgate_engine.plan import Plan
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.job import prepare
from tgate_export.methods import find_method
from tgate_export.plans import add_plan, make_plans
from tgate_export.sampling import compile_sampler, make_scheduler
from tgate_runtime.generators import CONDITIONING, in_step, noise
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

ALONE, GATED = "deepcache", "tgate+deepcache"
PROMPTS, NEGATIVE, SEED = ["a large red circle above a small blue square", "a photo"], "blue square", 23


@dataclass(frozen=True, kw_only=True)
class Case:
    """``m``: None is the method without a gate."""

    n: int
    c: int
    m: int | None = None
    sampler: str = "dpmpp_2m"
    scale: float = 5.0

    def __str__(self) -> str:
        return f"n{self.n}-m{self.m}-c{self.c}-{self.sampler}-g{self.scale:g}"


CASES = (
    Case(n=8, c=3),
    Case(n=7, c=2, sampler="euler", scale=2.0),
    Case(n=5, c=5, sampler="ddim"),
    Case(n=6, c=2, sampler="euler_a"),
    Case(n=10, m=4, c=3),
    Case(n=9, m=5, c=2, sampler="euler", scale=7.5),
    Case(n=6, m=1, c=3, sampler="ddim"),
    Case(n=6, m=6, c=3),
    Case(n=7, m=2, c=2, sampler="euler_a"),
)
VARIANTS = (
    "conv_projection",
    pytest.param("sdxl_like", marks=pytest.mark.slow),
    pytest.param("sd21_v", marks=pytest.mark.slow),
)
LEAD_IN = (Case(n=7, c=2, sampler="pndm"), Case(n=8, m=4, c=3, sampler="pndm"))


class Subject:
    """A small model: its eager pipeline, and a bundle of the gated method, whose graphs the other one shares."""

    def __init__(self, eager: Any, bundle: Path, start: Callable[[int], torch.Tensor], images: int = 1) -> None:
        self.eager, self.bundle, self.start, self.images = eager, Bundle.open(bundle), start, images
        shape = self.bundle.manifest.shapes[0]
        video = type(eager).__name__ == "StableVideoDiffusionPipeline"
        self.picture = _picture(shape.height, shape.width) if video else None

    def request(self, case: Case) -> Request:
        shape = self.bundle.manifest.shapes[0]

        def drawn(step: int) -> torch.Tensor:
            each = [noise(SEED + j, shape.latents, draw=in_step(step)) for j in range(self.images)]
            return torch.stack([torch.from_numpy(values) for values in each])

        augmentation = noise(SEED, (1, 3, shape.height, shape.width), draw=CONDITIONING)
        return Request(
            prompt=None if self.picture else PROMPTS[: self.images],
            negative_prompt=None if self.picture else [NEGATIVE] * self.images,
            image=self.picture,
            steps=case.n,
            guidance_scale=case.scale,
            latents=self.start(self.images),
            step_noise=drawn,
            augmentation=torch.from_numpy(augmentation) if self.picture else None,
        )

    def scheduler(self, case: Case) -> Any:
        return make_scheduler(case.sampler, self.bundle.manifest.scheduler)

    def plan(self, case: Case) -> Plan:
        manifest = self.bundle.manifest
        method = find_method(ALONE if case.m is None else GATED)
        return make_plans(
            "case",
            method,
            method.settings(steps=case.n, gate=case.m, c=case.c, defaults={}),
            sampler=compile_sampler(case.sampler, manifest.scheduler, case.n),
            guidance_scale=case.scale if manifest.guided else manifest.guidance_scale,
            guided=manifest.guided,
            graphs=manifest.shapes[0].graphs,
            carries=manifest.carries,
        )["case"]

    def engine(self, case: Case) -> NDArray[Any]:
        """Final latents of the engine."""
        plan, start = self.plan(case), self.start(self.images).numpy()
        guided = self.bundle.manifest.guided
        with Pipeline.open(self.bundle, threads=1, plans=[plan]) as pipe:
            if self.picture is not None:
                return pipe(image=self.picture, plan=plan, seed=SEED, initial_latents=start).latents
            return pipe(
                PROMPTS[: self.images],
                negative_prompt=NEGATIVE if guided else None,
                plan=plan,
                seed=SEED,
                initial_latents=start,
            ).latents

    def package(self, case: Case, branch: int = 0) -> torch.Tensor:
        """Final latents of the authors' package: DeepCache's, or with a gate TGATE's."""
        arguments = (self.eager, self.request(case), self.scheduler(case))
        if case.m is None:
            return helper_latents(*arguments, case.c, branch)
        return loader_latents(*arguments, case.m, case.c, branch)

    def rule(self, case: Case) -> torch.Tensor:
        return cached_latents(self.eager, self.request(case), self.scheduler(case), case.c, m=case.m)


Subjects = Callable[..., Subject]


@pytest.fixture(scope="module")
def subject_of(
    tiny_checkpoint: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
    family_bundle: Callable[..., tuple[Path, Path]],
) -> Subjects:
    @functools.cache
    def get(variant: str, *, images: int = 1, guidance_scale: float = 5.0) -> Subject:
        if variant in ("sdxl_like", "conv_projection"):
            batch = (images, images)  # static: traced in a third of the time
            bundle = tiny_bundle(variant, method=GATED, batch=batch, guidance_scale=guidance_scale)
            return Subject(
                load_tiny_sdxl(tiny_checkpoint(variant)), bundle, functools.partial(latent_noise, variant), images
            )
        checkpoint, bundle = family_bundle(variant, method=GATED)
        return Subject(load_tiny(checkpoint, variant), bundle, lambda batch: family_noise(variant, batch), images)

    return get


def _picture(height: int, width: int) -> Image.Image:
    coarse = Image.fromarray(np.random.default_rng(4).integers(0, 255, (4, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_equal_the_packages(subject_of: Subjects, variant: str, case: Case) -> None:
    """SDXL without attention in its last layer and with it, and Stable Diffusion; several images where there are two
    in a call."""
    subject = subject_of(variant, images=2 if variant == "conv_projection" else 1)
    package = subject.package(case)
    assert relative(subject.engine(case), package) < TOLERANCE
    assert relative(subject.rule(case).numpy(), package) < TOLERANCE / 10, "the rule written out is the packages'"


@pytest.mark.parametrize("case", LEAD_IN, ids=str)
def test_with_a_lead_in_latents_equal_the_rule(subject_of: Subjects, case: Case) -> None:
    subject = subject_of("conv_projection", images=2)
    assert relative(subject.engine(case), subject.rule(case)) < TOLERANCE
    assert [step.graph for step in subject.plan(case).steps][:3] == ["full", "full", "shallow"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(n=4, c=2), Case(n=4, m=1, c=2), Case(n=6, m=4, c=3)], ids=str)
def test_without_guidance_latents_equal_the_rule(subject_of: Subjects, case: Case) -> None:
    """One half all along: nothing is averaged, and what is kept before the gate serves after it in kind."""
    subject = subject_of("conv_projection", guidance_scale=1.0)
    case = replace(case, scale=1.0)
    assert relative(subject.engine(case), subject.rule(case)) < TOLERANCE
    if case.m is None:
        assert relative(subject.engine(case), subject.package(case)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(n=4, c=2), Case(n=4, m=1, c=2), Case(n=4, m=2, c=2)], ids=str)
def test_a_consistency_model_equals_the_rule(subject_of: Subjects, case: Case) -> None:
    subject = subject_of("lcm_sdxl")
    case = replace(case, sampler="lcm", scale=subject.bundle.manifest.guidance_scale)
    assert relative(subject.engine(case), subject.rule(case)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", [Case(n=6, c=2), Case(n=8, m=4, c=2)], ids=str)
def test_a_video_equals_the_rule(subject_of: Subjects, case: Case) -> None:
    """A carry of many rows: every frame's, of both halves."""
    subject = subject_of("svd_a")
    case = replace(case, sampler="euler", scale=subject.bundle.manifest.guidance_scale)
    assert relative(subject.engine(case), subject.rule(case)) < TOLERANCE
    if case.m is None:
        assert relative(subject.engine(case), subject.package(case)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("branch", [1, 2, 5])
def test_a_deeper_branch_equals_the_packages(
    subject_of: Subjects,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    branch: int,
) -> None:
    """One layer more, the whole last block, and the whole block before it."""
    model, plain = tiny_model("sdxl_like"), subject_of("sdxl_like")
    height, width = (side * model.vae_factor for side in model.latent_size)
    settings = ExportSettings(
        model="sdxl",
        checkpoint=str(tiny_checkpoint("sdxl_like")),
        components=("text", "denoiser"),
        method=GATED,
        cache_branch=branch,
        sizes=[(width, height)],
        batches=[(1, 1)],
        verify=False,
        output=tmp_path_factory.mktemp("branch") / "bundle",
    )
    subject = Subject(plain.eager, export(settings, Silent()), plain.start)
    for case in (Case(n=7, c=3), Case(n=8, m=4, c=2, sampler="euler")):
        got = subject.engine(case)
        assert relative(got, subject.package(case, branch)) < TOLERANCE
        assert relative(got, subject.package(case)) > 10 * TOLERANCE
    graphs, shallower = (each.bundle.manifest.shapes[0].graphs for each in (subject, plain))
    assert graphs["full"].macs == shallower["full"].macs
    assert shallower["shallow"].macs.paper < graphs["shallow"].macs.paper < graphs["full"].macs.paper


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_rule_is_another_than_its_neighbours(subject_of: Subjects, variant: str) -> None:
    """So that the tests above can fail: on the interval, the gate, and what either does without the other."""
    subject = subject_of(variant, images=2 if variant == "conv_projection" else 1)
    case = Case(n=10, m=4, c=3, sampler="euler")
    arguments = (subject.eager, subject.request(case), subject.scheduler(case))
    others = [
        plain_latents(*arguments),
        tgate_latents(*arguments, 4, 1, 1, 0),
        *(cached_latents(*arguments, c, m=m) for c, m in ((2, 4), (4, 4), (3, 3), (3, 5), (3, None))),
    ]
    mine = subject.rule(case).numpy()
    for other in others:
        assert relative(mine, other) > 10 * TOLERANCE
    assert relative(subject.rule(replace(case, m=None)).numpy(), others[0]) > 10 * TOLERANCE


def test_the_helper_counts_a_doubled_timestep_as_one(subject_of: Subjects) -> None:
    """Why PNDM is compared with the rule: the third call has the second one's number, the fourth the fourth's."""
    subject = subject_of("conv_projection", images=2)
    plain, doubled = Case(n=7, c=2, sampler="ddim"), Case(n=7, c=2, sampler="pndm")
    counted = [
        full_calls(subject.eager, subject.request(case), subject.scheduler(case), 2) for case in (plain, doubled)
    ]
    assert counted == [[0, 2, 4, 6], [0, 4, 6]]
    with pytest.raises(ValueError, match="doubled timestep"):
        subject.package(doubled)


@pytest.mark.parametrize(
    ("variant", "method"),
    [
        ("conv_projection", GATED),  # which others of these tests export, too
        pytest.param("sdxl_like", GATED, marks=pytest.mark.slow),
        pytest.param("sdxl_like", ALONE, marks=pytest.mark.slow),
    ],
)
def test_a_bundle_proves_itself_and_has_no_more_graphs_than_it_needs(
    tiny_bundle: Callable[..., Path], variant: str, method: str
) -> None:
    bundle = Bundle.open(tiny_bundle(variant, method=method, batch=(2, 2) if variant == "conv_projection" else (1, 1)))
    checked = {golden.name: golden for golden in verify(bundle, threads=1)}
    assert {"ungated", "gated"} <= set(checked)
    assert all(golden.ok for golden in checked.values())
    graphs = bundle.manifest.shapes[0].graphs
    after = {"reuse_cross", "shallow_reuse_cross", "unguided"} if method == GATED else set()
    assert {name for name, graph in graphs.items() if graph.role == "denoise"} == {"full", "shallow"} | after
    assert "deep_feature" in graphs["shallow"].input_names()
    assert graphs["shallow"].macs.all < graphs["full"].macs.all / 2
    with pytest.raises(MethodError, match="wants the step" if method == GATED else "has no gate; leave it out"):
        add_plan(bundle.path, name="other", m=None if method == GATED else 3, steps=6, save=False)


@pytest.mark.slow
def test_a_shallow_graph_holds_the_last_layer_alone(subject_of: Subjects) -> None:
    """Of SDXL's kind, whose last layer attends to nothing: no text, no attention, and a fraction of the arithmetic."""
    graphs = subject_of("sdxl_like").bundle.manifest.shapes[0].graphs
    full, shallow = graphs["full"], graphs["shallow"]
    assert "deep_feature" in shallow.input_names()
    assert not {name for name in shallow.input_names() if name.startswith(("prompt_embeds", "cross", "self"))}
    assert {name for name in full.input_names() if name.startswith("prompt_embeds")}
    assert shallow.macs.paper == shallow.macs.all < full.macs.all / 5
    attending = subject_of("sd21_v").bundle.manifest.shapes[0].graphs
    crossed = [name for name in attending["shallow_reuse_cross"].input_names() if name.startswith("cross")]
    assert len(crossed) == 1, "the last layer's cross-attention is reused in shallow calls, too"
    assert not [name for name in attending["shallow_reuse_cross"].input_names() if name.startswith("prompt_embeds")]


def test_a_transformer_is_refused_by_name(tmp_path: Path) -> None:
    checkpoint = make_tiny(tmp_path / "checkpoint", "pixart_sigma_a")
    for method in (ALONE, GATED):
        settings = family_settings("pixart_sigma_a", checkpoint, tmp_path / "bundle", method=method)
        with pytest.raises(MethodError, match=f"method {method.replace('+', '.')} keeps what a U-Net's last layers"):
            prepare(settings)
