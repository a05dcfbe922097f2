"""The second method through the whole product, against its rule written out over diffusers (:mod:`tests.oracle_delta`);
and neither contract nor run time has a word of any method."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import once
from tests.oracle_delta import delta_latents
from tests.oracle_families import Request, guidance_stopped_latents, tgate_latents, written_out_latents
from tests.tiny_families import latent_noise as family_noise
from tests.tiny_families import load_tiny
from tests.tiny_models import latent_noise, load_tiny_sdxl, tiny_model
from tests.whole.cases import NAME, TOLERANCE, plans_of, relative
from tgate_engine.bundle import Bundle
from tgate_engine.report import Silent
from tgate_export.attention import AttentionSite
from tgate_export.build import ExportSettings, export
from tgate_export.methods import METHODS
from tgate_export.methods.base import FIDELITY, PLANNING, Network, Settings
from tgate_export.sampling import make_scheduler
from tgate_runtime.generators import in_step, noise
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

SDXL, PIXART = "conv_projection", "pixart_sigma_a"
ALONE, COMBINED = "guidance_delta", "tgate+guidance_delta"
PROMPTS, NEGATIVE, SEED = ["a large red circle above a small blue square", "a photo"], "blue square", 23


@dataclass(frozen=True, kw_only=True)
class Case:
    n: int
    m: int
    k: int = 1
    f: int = 1
    w: int = 0
    g: int = 0
    sampler: str = "dpmpp_2m"
    scale: float = 5.0
    images: int = 1

    def __str__(self) -> str:
        numbers = f"n{self.n}-m{self.m}-k{self.k}-f{self.f}-w{self.w}-g{self.g}"
        return f"{numbers}-{self.sampler}-g{self.scale:g}-images{self.images}"


CASES = (
    Case(n=8, m=4, k=2, f=2),
    Case(n=10, m=5, k=3, w=2, sampler="euler", scale=2.0, images=2),
    Case(n=6, m=6, k=2, sampler="ddim"),
    Case(n=5, m=1, f=2, scale=7.5),
    Case(n=7, m=3, k=2, f=3, w=1, sampler="pndm"),
    Case(n=6, m=3, k=2, sampler="euler_a", images=2),
    Case(n=9, m=3, k=2, f=2, g=2),
    Case(n=7, m=2, g=3, sampler="pndm", images=2),
)


class Subject:
    """A small model: its eager pipeline, and its bundle of a method."""

    def __init__(self, eager: Any, bundle: Path, start: Callable[[int], torch.Tensor]) -> None:
        self.eager, self.bundle, self.start = eager, Bundle.open(bundle), start

    def request(self, case: Case) -> Request:
        shape = self.bundle.manifest.shapes[0].latents

        def drawn(step: int) -> torch.Tensor:
            each = [noise(SEED + j, shape, draw=in_step(step)) for j in range(case.images)]
            return torch.stack([torch.from_numpy(values) for values in each])

        return Request(
            prompt=PROMPTS[: case.images],
            negative_prompt=[NEGATIVE] * case.images,
            steps=case.n,
            guidance_scale=case.scale,
            latents=self.start(case.images),
            step_noise=drawn,
        )

    def scheduler(self, case: Case) -> Any:
        return make_scheduler(case.sampler, self.bundle.manifest.scheduler)

    def engine(self, case: Case) -> NDArray[Any]:
        """Final latents of the engine."""
        own = {"n": case.n, "m": case.m, "k": case.k, "f": case.f, "w": case.w, "g": case.g}
        plan = plans_of(self.bundle, **own, sampler=case.sampler, guidance_scale=case.scale)[NAME]
        with Pipeline.open(self.bundle, threads=1, plans=[plan]) as pipe:
            return pipe(
                PROMPTS[: case.images],
                negative_prompt=NEGATIVE,
                plan=plan,
                seed=SEED,
                initial_latents=self.start(case.images).numpy(),
            ).latents


@pytest.fixture(scope="module")
def subject_of(
    tiny_checkpoint: Callable[[str], Path],
    tiny_bundle: Callable[..., Path],
    family_bundle: Callable[..., tuple[Path, Path]],
) -> Callable[[str, str], Subject]:
    @functools.cache
    def eager(variant: str) -> Any:
        return load_tiny_sdxl(tiny_checkpoint(SDXL)) if variant == SDXL else load_tiny(family_bundle(PIXART)[0], PIXART)

    @functools.cache
    def get(variant: str, method: str) -> Subject:
        if variant == SDXL:
            bundle = tiny_bundle(SDXL, method=method, batch=(2, 2))  # static: traced in a third of the time
            return Subject(eager(SDXL), bundle, functools.partial(latent_noise, SDXL))
        return Subject(
            eager(PIXART), family_bundle(PIXART, method=method)[1], lambda batch: family_noise(PIXART, batch)
        )

    return get


def eager_latents(subject: Subject, method: str, case: Case, **more: Any) -> torch.Tensor:
    attention = (case.k, case.f, case.w) if method == COMBINED else None
    return delta_latents(
        subject.eager, subject.request(case), subject.scheduler(case), case.m, attention=attention, g=case.g, **more
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("method", [ALONE, COMBINED])
@pytest.mark.parametrize("variant", [SDXL, PIXART])
def test_latents_equal_the_rule_written_out(
    subject_of: Callable[[str, str], Subject], variant: str, method: str, case: Case
) -> None:
    subject = subject_of(variant, method)
    assert relative(subject.engine(case), eager_latents(subject, method, case)) < TOLERANCE


@pytest.mark.parametrize("variant", [SDXL, PIXART])
def test_the_rule_is_another_than_its_neighbours(subject_of: Callable[[str, str], Subject], variant: str) -> None:
    """So that the test above can fail: on the gate, on attention, on the half that is kept, on what is guided by."""
    case = Case(n=8, m=4, k=2, f=2)
    subject = subject_of(variant, COMBINED)
    arguments = (subject.eager, subject.request(case), subject.scheduler(case))
    alone, combined = (delta_latents(*arguments, 4, attention=attention) for attention in (None, (2, 2, 0)))
    others = {
        "alone": [guidance_stopped_latents(*arguments, 4), delta_latents(*arguments, 3), combined],
        "combined": [
            written_out_latents(*arguments, 4, 2, 2, 0),
            *(delta_latents(*arguments, m, attention=a) for m, a in ((3, (2, 2, 0)), (4, (2, 1, 0)), (4, (3, 2, 0)))),
        ],
    }
    for mine, theirs in ((alone, others["alone"]), (combined, others["combined"])):
        for other in theirs:
            assert relative(mine.numpy(), other) > 10 * TOLERANCE


def test_before_the_gate_it_is_the_paper_s_method(subject_of: Callable[[str, str], Subject]) -> None:
    """The reference itself, against the package, where nothing is beyond the gate."""
    case = Case(n=6, m=6, k=2)
    subject = subject_of(SDXL, COMBINED)
    package = tgate_latents(subject.eager, subject.request(case), subject.scheduler(case), 6, 2, 1, 0)
    assert relative(eager_latents(subject, COMBINED, case).numpy(), package) < TOLERANCE / 10


@pytest.mark.slow
@pytest.mark.parametrize("method", [ALONE, COMBINED])
def test_with_rescaled_guidance(
    subject_of: Callable[[str, str], Subject],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
    method: str,
) -> None:
    """Rescaled to the deviation of the prompt's half, as long as guidance lasts: to the end."""
    model, case = tiny_model(SDXL), Case(n=6, m=3, k=2)
    height, width = (side * model.vae_factor for side in model.latent_size)

    def make(folder: Path) -> None:
        settings = ExportSettings(
            model="sdxl",
            checkpoint=str(tiny_checkpoint(SDXL)),
            components=("text", "denoiser"),
            method=method,
            guidance_rescale=0.7,
            sizes=[(width, height)],
            batches=[(1, 1)],
            verify=False,
            output=folder / "bundle",
        )
        export(settings, Silent())

    plain = subject_of(SDXL, method)
    bundle = once(tmp_path_factory, f"rescaled-{method}", make) / "bundle"
    subject = Subject(plain.eager, bundle, plain.start)
    got = subject.engine(case)
    assert relative(got, eager_latents(subject, method, case, rescale=0.7)) < TOLERANCE
    assert relative(got, eager_latents(subject, method, case)) > 10 * TOLERANCE


@pytest.mark.parametrize("method", [ALONE, COMBINED])
def test_a_bundle_proves_itself(subject_of: Callable[[str, str], Subject], method: str) -> None:
    subject = subject_of(SDXL, method)
    checked = {golden.name: golden for golden in verify(subject.bundle, threads=1)}
    assert {"ungated", "gated", "guidance_stopped"} <= set(checked)
    assert all(golden.ok for golden in checked.values())


@pytest.mark.parametrize("method", [ALONE, COMBINED])
def test_the_difference_is_one_carry_of_the_latents_size(
    subject_of: Callable[[str, str], Subject], method: str
) -> None:
    manifest = subject_of(SDXL, method).bundle.manifest
    plan = plans_of(subject_of(SDXL, method).bundle, n=6, m=3, k=2, w=0, sampler="dpmpp_2m")[NAME]
    full = {tensor.name: tensor for tensor in manifest.shapes[0].graphs["full"].outputs}
    assert full["guidance_difference"].shape == ("batch", *manifest.shapes[0].latents)
    assert full["guidance_difference"].dtype == "float32"
    writing = [step.index for step in plan.steps if "guidance_difference" in step.writes]
    reading = [step.index for step in plan.steps if "guidance_difference" in step.reads]
    assert (writing, reading) == ([2], [3, 4, 5])
    others = set(plan.carries()) - {"guidance_difference"}
    assert bool(others) is (method == COMBINED)


# --- contract and run time ----------------------------------------------------------------------


ROOT = Path(__file__).resolve().parents[2]


def words() -> re.Pattern[str]:
    """Everything that methods name, but for words of people's own: a plan that is "full" or "ungated", "--forecast"."""
    sites = (AttentionSite("x", "self"), AttentionSite("y", "cross"))
    network = Network(sites=sites, guided=True, deep="z", finest=("x",))
    settings = Settings(steps=6, gate=3, fidelity_interval=2, merge_ratio=0.5)
    names = {FIDELITY, PLANNING, "self-attention", "cross-attention"}
    for method in METHODS.values():
        names |= {method.name, *method.baselines(settings, guided=True)}
        for variant in method.variants(network, settings):
            names |= {variant.name} | {name for part in variant.parts for name in (*part.reads, *part.writes)}
    names -= {"full", "merged", "tgate", "ungated", "forecast"}
    assert {
        "reuse_cross",
        "reuse_delta",
        "self.0.positive",
        "guidance_difference",
        "guidance_stopped",
        "deep_feature",
        "merged_reuse_cross",
    } <= names
    stems = {re.escape(name.partition(".0")[0]) + (r"\.\d" if ".0" in name else "") for name in names}
    return re.compile("|".join(sorted(stems)))


def code_strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of every name and every text in a file that is no docstring, nor what --help says."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.keyword) and node.arg == "help":
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value
        if isinstance(node, ast.Name | ast.Attribute):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        yield from code_strings(node)


def test_no_word_of_a_method_below_and_above_export() -> None:
    """A method is a folder of export's: neither contract, run time nor command line names a graph, a carry or it."""
    pattern = words()
    guilty = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for folder in ("tgate_engine", "runtime/tgate_runtime", "cli/tgate_cli")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in code_strings(ast.parse(path.read_text("utf-8")))
        if pattern.search(text)
    ]
    assert not guilty
    assert any(pattern.search(text) for _, text in code_strings(ast.parse("run('reuse_cross', read=['cross.12'])")))
