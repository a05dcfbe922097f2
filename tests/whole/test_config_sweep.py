"""Every key of every configuration: changed or left out, the export changes as diffusers does, or refuses.

The keys, the values that are tried and what is expected of each stand in :mod:`tests.config_values`; diffusers' side is
:mod:`tests.pipeline_reference`. An export is rehearsed: everything but tracing, in eager PyTorch. "Honoured" means that
diffusers' result changes and ours with it; "no effect" that neither changes; "refused" one line of error.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.config_page import PAGE, written
from tests.config_values import CASES, TABLES, Case, class_keys, plain_scheduler
from tests.pipeline_reference import (
    LEFT_OUT,
    STEPS,
    Reference,
    Request,
    Result,
    config_file,
    mutate,
    variant_latents,
)
from tests.tiny_families import FAMILY_VARIANTS, make_tiny
from tests.tiny_models import make_tiny_sdxl
from tgate_engine.errors import TgateError
from tgate_engine.plan import Plan, Step
from tgate_export.checkpoints import Checkpoint
from tgate_export.conditioning import encode
from tgate_export.families import MODELS
from tgate_export.families.base import Family, Texts
from tgate_export.goldens import both_halves, walk
from tgate_export.job import ExportSettings, Job, prepare
from tgate_export.methods.base import FULL, Variant, ungated
from tgate_export.modules import Decoder, real_module
from tgate_export.tokenizers import export_tokenizers, token_ids

TOLERANCE = 1e-4
"""Largest absolute difference over largest absolute value, float32."""

SHAKE, EDGE = 1e-6, 1e-3
"""Some rounding errors, and what they may be blown up to at most."""

SAME = 1e-5
"""Below this, diffusers' own result has not changed."""

PROMPT = "a large red circle above a small blue square"
DETERMINISTIC = {"opensora": "dpmpp_2m", "lcm-sdxl": "euler"}
"""Samplers other than the model's own: Latte's clips in diffusers where a configuration is silent, LCM draws noise."""


class Subject:
    """A tiny checkpoint, its pipeline in diffusers, and what that makes of it unchanged."""

    def __init__(self, variant: str, root: Path) -> None:
        self.variant, self.root = variant, root
        tiny = FAMILY_VARIANTS.get(variant)
        self.model = tiny.model if tiny else "sdxl"
        self.checkpoint = root / "checkpoint"
        if tiny:
            make_tiny(self.checkpoint, variant)
        else:
            make_tiny_sdxl(self.checkpoint, variant)
        self.reference = Reference(self.checkpoint)
        self._unchanged: dict[tuple[Path, Request], Result] = {}
        folders = [path for path in self.checkpoint.iterdir() if path.is_dir()]
        self._whole = {tuple(sorted(path.stat().st_ino for path in folder.iterdir())) for folder in folders}
        self._modules: dict[tuple[int, ...], torch.nn.Module] = {}

    @functools.cache  # noqa: B019  a handful of subjects, which live as long as the module
    def base(self, scheduler: str | None) -> Path:
        """The checkpoint, with a plain configuration of that scheduler class instead of its own if one is named."""
        if scheduler is None:
            return self.checkpoint
        target = self.root / scheduler
        shutil.copytree(self.checkpoint, target, copy_function=os.link)
        _rewrite(target / "scheduler" / "scheduler_config.json", plain_scheduler(scheduler))
        index = json.loads((target / "model_index.json").read_text("utf-8"))
        _rewrite(target / "model_index.json", index | {"scheduler": ["diffusers", scheduler]})
        return target

    @functools.cache  # noqa: B019
    def request(self, factor: int, sampler: str | None, prompt: str | None, negative: bool) -> Request:
        """``factor``: image pixels per latent pixel."""
        latents, model = variant_latents(self.variant), MODELS[self.model]
        height, width = (side * factor for side in latents[-2:])
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(1, *latents, generator=generator)
        image = augmentation = None
        if self.model == "svd":
            coarse = Image.fromarray(np.random.default_rng(4).integers(0, 255, (4, 4, 3), np.uint8))
            image = coarse.resize((width, height), Image.Resampling.BICUBIC)
            augmentation = torch.randn(1, 3, height, width, generator=generator)
        return Request(
            prompt=None if image else prompt or PROMPT,
            negative_prompt="a photo" if negative and not image else None,
            image=image,
            guidance_scale=model.guidance_scale,
            latents=noise,
            augmentation=augmentation,
            sampler=sampler or DETERMINISTIC.get(self.model, model.sampler),
        )

    def unchanged(self, base: Path, request: Request) -> Result:
        """What diffusers makes of a base. :meth:`request` gives the same request for the same settings."""
        key = (base, request)
        if key not in self._unchanged:
            result = self.reference.run(base, "scheduler", request)
            assert isinstance(result, Result), result
            self._unchanged[key] = result
        return self._unchanged[key]

    def rehearsed(self, directory: Path, request: Request) -> Result:
        """Ours."""
        shape = request.latents.shape
        factor = _factor(directory)
        picture = None if request.image is None else torch.from_numpy(np.array(request.image))[None]
        settings = ExportSettings(
            model=self.model,
            checkpoint=str(directory),
            steps=STEPS,
            m=1,
            k=1,
            warm_up=0,
            sampler=request.sampler,
            guidance_scale=request.guidance_scale,
            height=shape[-2] * factor,
            width=shape[-1] * factor,
            frames={"svd": shape[1], "opensora": shape[2]}.get(self.model),
        )
        with torch.no_grad():
            return self._rehearse(prepare(settings), request, picture)

    def _rehearse(self, job: Job, request: Request, picture: Tensor | None) -> Result:
        """What an export's graphs compute along the ungated plan, by the same modules in eager PyTorch."""
        family, checkpoint = job.family, job.checkpoint
        conditioning = self._conditioning(job, request, picture)
        assert tuple(request.latents.shape[1:]) == tuple(job.latents)
        program = ungated(STEPS, job.sampler.lead_in)
        steps = tuple(
            Step(index=i, phase=phase, graph=graph, call=call, reads=(), writes=())
            for i, ((phase, graph), call) in enumerate(zip(program, job.sampler.calls, strict=True))
        )
        plan = Plan(name="ungated", sampler=job.sampler, guidance_scale=job.guidance_scale, steps=steps)
        whole = Variant(name=FULL, halves="both" if job.guided else "positive")
        denoiser = self._module(family, checkpoint, family.denoiser)
        latents = walk(job, plan, denoiser, {FULL: whole}, request.latents, conditioning)[-1]
        vae = self._module(family, checkpoint, family.decoder)
        decoder = Decoder(vae, family.scaling(checkpoint), torch.float32, family.frames_axis)
        return Result(latents, conditioning, decoder(latents)[1])

    def _conditioning(self, job: Job, request: Request, picture: Tensor | None) -> Texts:
        family, checkpoint = job.family, job.checkpoint
        modules = [self._module(family, checkpoint, name) for name in family.text_components or family.image_components]
        negative: Texts | None = None
        if picture is not None:
            names = [c.conditioning.name for c in job.inputs_from("image")]
            assert request.augmentation is not None
            positive = encode(family.image(modules, checkpoint, job.size), names, picture, request.augmentation)
        else:
            names = [c.conditioning.name for c in job.inputs_from("text")]
            text, folder = family.text(modules), self.root / "tokenizers"
            shutil.rmtree(folder, ignore_errors=True)
            tokenizers = export_tokenizers(family, checkpoint, folder)
            positive = encode(text, names, *token_ids(folder, tokenizers, request.prompt or "").values())
            if request.negative_prompt is not None or not family.zero_negative(checkpoint):
                ids = token_ids(folder, tokenizers, request.negative_prompt or "")
                negative = encode(text, names, *ids.values())
        return both_halves(job, positive, negative)

    def _module(self, family: Family, checkpoint: Checkpoint, component: str) -> torch.nn.Module:
        """A component with its weights. One that a case leaves alone, as hard links tell, is loaded once."""
        folder = Path(checkpoint.where) / component
        key = tuple(sorted(path.stat().st_ino for path in folder.iterdir()))
        if key not in self._modules:
            made = real_module(family, checkpoint, component)
            if key not in self._whole:
                return made
            self._modules[key] = made
        return self._modules[key]


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    return functools.cache(lambda variant: Subject(variant, tmp_path_factory.mktemp(variant)))


@pytest.fixture
def clean(tmp_path: Path) -> Any:
    """A directory that does not stay: there are thousands of cases."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.parametrize("name", TABLES)
def test_the_table_has_every_key_of_the_class(name: str) -> None:
    """A key that a new release brings fails here until somebody has decided what becomes of it."""
    assert set(TABLES[name].keys) == class_keys(name)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.slow] if case.slow else []) for case in CASES]
)
def test_a_key_is_honoured_or_refused(subject_of: Callable[[str], Subject], clean: Path, case: Case) -> None:
    subject = subject_of(case.variant)
    base = subject.base(case.scheduler)
    changed = mutate(base, clean / "changed", case.component, case.changes)
    negative = case.negative and subject.model not in ("sdxl", "lcm-sdxl")
    request = subject.request(_factor(changed), case.sampler, case.prompt, negative)
    if case.verdict == "refused":
        with pytest.raises(TgateError) as refusal:
            subject.rehearsed(changed, request)
        assert "\n" not in str(refusal.value)
        return
    before = subject.unchanged(base, subject.request(_factor(base), case.sampler, case.prompt, negative))
    want = subject.reference.run(changed, case.component, request)
    if case.verdict == "not read":
        assert isinstance(want, str)
        want = before
    assert isinstance(want, Result), f"diffusers cannot run it, so it is to be refused: {want}"
    got = subject.rehearsed(changed, request)
    far = {name: value for name, value in differences(got, want).items() if not value < TOLERANCE}
    if far and case.slow:  # a network drawn anew may sit on an edge, where rounding moves diffusers itself further
        shaken = subject.reference.run(
            changed, case.component, dataclasses.replace(request, latents=request.latents * (1 + SHAKE))
        )
        assert isinstance(shaken, Result), shaken
        allowed = differences(shaken, want)
        far = {name: value for name, value in far.items() if not value < min(4 * allowed[name], EDGE)}
    assert not far, f"not diffusers' result: {far}"
    moved = max(differences(want, before).values())
    assert (moved > SAME) == (case.verdict == "honoured"), f"the key moves diffusers' result by {moved:.1e}"


@pytest.mark.parametrize("name", TABLES)
def test_each_key_is_tried_with_another_value(subject_of: Callable[[str], Subject], name: str) -> None:
    """Or in another place with another one; a key that has but one legal value is left out."""
    table = TABLES[name]
    single = []
    for key, tries in {**table.keys, **table.more}.items():
        values = [attempt for attempt in tries if attempt.value is not LEFT_OUT]
        others = 0
        for variant, component in table.places:
            base = subject_of(variant).base(name if component == "scheduler" else None)
            config = json.loads((base / config_file(component)).read_text("utf-8"))
            others += sum(key not in config or config[key] != a.value or bool(a.also) for a in values)
        if values and not others:
            single.append(key)
    assert single == (["solver_p"] if name == "UniPCMultistepScheduler" else [])


SIZES = [
    ("sd15_a", "unet"),
    ("conv_projection", "unet"),
    ("pixart_alpha_a", "transformer"),
    ("pixart_sigma_a", "transformer"),
]


@pytest.mark.parametrize("size", [16, [12, 8], LEFT_OUT], ids=str)
@pytest.mark.parametrize(("variant", "component"), SIZES)
def test_the_default_size_is_diffusers(
    subject_of: Callable[[str], Subject], clean: Path, variant: str, component: str, size: Any
) -> None:
    """``sample_size`` where no height and width are given. Videos have defaults of their own (docs/models.md)."""
    subject = subject_of(variant)
    changed = mutate(subject.checkpoint, clean / "changed", component, {"sample_size": size})
    want = subject.reference.default_size(changed, component)
    settings = ExportSettings(model=subject.model, checkpoint=str(changed))
    if isinstance(want, str) and isinstance(size, list) and subject.model == "sdxl":  # SD's pipeline alone takes pairs
        made = prepare(settings).size
        assert [made.height, made.width] == [side * _factor(changed) for side in size]
        return
    if isinstance(want, str):  # diffusers cannot tell either
        with pytest.raises(TgateError):
            prepare(settings)
        return
    made = prepare(settings).size
    assert (made.height, made.width) == want


def test_the_page_says_what_is_tried() -> None:
    """docs/models.md lists every key; ``python -m tests.config_page`` writes its table."""
    page = PAGE.read_text("utf-8")
    assert page == written(page)


def test_most_keys_are_honoured() -> None:
    """An exporter that refused everything would pass all the others."""
    counts = {verdict: sum(case.verdict == verdict for case in CASES) for verdict in ("honoured", "no effect")}
    assert min(counts.values()) > 400, counts


def differences(got: Result, want: Result) -> dict[str, float]:
    """Largest absolute difference over largest absolute value, by tensor of ``want``; infinite for another shape."""
    found = {"latents": _relative(got.latents, want.latents)}
    if want.decoded is not None:
        found["decoded"] = float("inf") if got.decoded is None else _relative(got.decoded, want.decoded)
    for name, value in want.conditioning.items():
        have = got.conditioning.get(name)
        if have is None:
            found[name] = float("inf")
            continue
        if have.dim() == 3:  # Latte's pipeline cuts texts where the prompt ends; ours has a mask
            have = have[:, : value.shape[1]]
        found[name] = _relative(have, value)
    return found


def _relative(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        return float("inf")
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-12))


def _factor(directory: Path) -> int:
    """Image pixels per latent pixel, as diffusers counts them."""
    config = json.loads((directory / "vae" / "config.json").read_text("utf-8"))
    return int(2 ** (len(config.get("block_out_channels", (64,))) - 1))


def _rewrite(path: Path, content: Any) -> None:
    path.unlink()  # a hard link
    path.write_text(json.dumps(content), "utf-8")
