"""Flow-matching families through the whole product: prompt to latents and picture, against diffusers' own pipelines.

Ungated trajectories are diffusers' own; gated ones are the methods written out in its pipeline (``tests/oracle_flow``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.wan import pipeline_wan, pipeline_wan_i2v
from diffusers.utils import is_ftfy_available, is_torchvision_available
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.oracle_flow import (
    SEED,
    delta_run,
    drawn_as_engines_do,
    forecast_run,
    gated_run,
    held,
    plain_run,
    stopped_run,
)
from tests.tiny_flow import FLOW_VARIANTS, flow_noise, flow_picture, load_tiny_flow, make_tiny_flow
from tests.whole.cases import GUIDANCE_STOPPED, NAME, TOLERANCE, UNGATED, plans_of, relative
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_export.embed import embed
from tgate_export.families import MODELS, cosmos, wan
from tgate_export.job import ExportSettings
from tgate_export.schedulers import make_scheduler
from tgate_runtime.engines import open_engine
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

PROMPT, NEGATIVE = "A large red circle above a small blue square", "a photo of a green circle"
GATED = [name for name, tiny in FLOW_VARIANTS.items() if MODELS[tiny.model].facts.cross_attention]
JOINT = [name for name in FLOW_VARIANTS if name not in GATED]
GUIDED = [name for name, tiny in FLOW_VARIANTS.items() if MODELS[tiny.model].facts.guided]
ONE_OF_EACH = (
    "sana_a",
    "sprint_a",
    "lumina_a",
    "sd3_a",
    "wan22_a",
    "wan_i2v_a",
    "hunyuan_a",
    "ltx_a",
    "kolors_a",
    "qwen_a",
    "flux_a",
    "cosmos_a",
)
"""In every run of the tests; the other shapes are slow."""
OF_TWO = [name for name, tiny in FLOW_VARIANTS.items() if tiny.boundary is not None]
"""Of two networks, where what goes on in one of them is what goes on in those of one."""
EMBEDDED = [name for name, tiny in FLOW_VARIANTS.items() if not MODELS[tiny.model].facts.text_graph]


def _marked(variants: Iterable[str], quick: Container[str] = ONE_OF_EACH) -> list[Any]:
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.slow]) for name in variants]


class Subject:
    """One tiny checkpoint: its eager pipeline, its bundle, and what the engine makes of it."""

    def __init__(self, variant: str, method: str, root: Path) -> None:
        self.variant, self.tiny = variant, FLOW_VARIANTS[variant]
        self.checkpoint = make_tiny_flow(root / "checkpoint", variant)
        self.eager = load_tiny_flow(self.checkpoint, variant)
        self.bundle = Bundle.open(export(self.settings(root / "bundle", method), Silent()))
        self.model = MODELS[self.tiny.model]
        self.embeds: Mapping[str, NDArray[Any]] | None = None
        if not self.model.facts.text_graph:
            file = root / "prompt.safetensors"
            negative = NEGATIVE if self.model.facts.guided else None
            embed(self.tiny.model, [PROMPT], file, checkpoint=str(self.checkpoint), negative_prompt=negative)
            self.embeds = load_file(file)

    @property
    def pictured(self) -> bool:
        """Whether its videos start from a picture."""
        return "image" in self.model.facts.sources

    def settings(self, output: Path, method: str, **more: Any) -> ExportSettings:
        height, width = (side * self.tiny.pixels for side in self.tiny.latents[-2:])
        named: dict[str, Any] = {"steps": 6, "m": 3, "height": height, "width": width}
        if MODELS[self.tiny.model].facts.video:
            named["frames"] = self.tiny.frames
        if method == "tgate":
            named |= {"k": 2, "warm_up": 0, "fidelity_interval": 2}
        options = {**named, "method": method, "output": output, **more}
        return ExportSettings(model=self.tiny.model, checkpoint=str(self.checkpoint), **options)

    def options(self, sampler: str, steps: int) -> dict[str, Any]:
        """How diffusers' pipeline is asked for the same; its scheduler is the sampler's."""
        shape = self.bundle.manifest.shapes[0]
        binned = self.model.facts.name in ("sana", "sprint", "hunyuan")
        options: dict[str, Any] = {"use_resolution_binning": False} if binned else {}
        if self.model.facts.name not in ("sprint", "cosmos"):  # diffusers' own there, as the checkpoint has it
            self.eager.scheduler = make_scheduler(sampler, self.bundle.manifest.scheduler)
        if sampler == "scm" and steps != 2:
            options["intermediate_timesteps"] = None
        if self.model.facts.video:
            options["num_frames"] = self.tiny.frames
        noise, scale = flow_noise(self.variant), self.bundle.manifest.guidance_scale
        qwen = self.model.facts.name == "qwen"
        if self.tiny.boundary is not None:
            options["guidance_scale_2"] = self.model.guidance_scale_2
        if self.pictured:
            options["image"] = flow_picture(self.variant)
        if self.model.facts.name == "flux" and not self.tiny.network["guidance_embeds"]:
            options["max_sequence_length"] = 256  # which its authors have as the most
        return options | {
            "num_inference_steps": steps,
            "true_cfg_scale" if qwen else "guidance_scale": scale,
            "latents": noise,
            "height": shape.height,
            "width": shape.width,
        }

    def engine(self, sampler: str, plan: str, on: str = "ort-cpu", **settings: int) -> Any:
        walked = plans_of(self.bundle, sampler=sampler, **settings)[plan]
        given: dict[str, Any] = (
            {"prompt": PROMPT, "negative_prompt": NEGATIVE if self.model.facts.guided else None}
            if self.embeds is None
            else {"prompt_embeds": self.embeds}
        )
        if self.pictured:
            given["image"] = flow_picture(self.variant)
        exact: dict[str, Any] = {"precision": "f32"} if on == "openvino" else {}
        with Pipeline.open(self.bundle, engine=on, threads=1, plans=[walked], **exact) as pipe:
            return pipe(**given, plan=walked, seed=SEED, initial_latents=flow_noise(self.variant).numpy())


@pytest.fixture(scope="module", autouse=True)
def _cleaned() -> Iterator[None]:
    """Wan's pipeline cleans prompts by ftfy, which leaves texts such as these as they are; Cosmos's network resizes a
    mask by torchvision, which is zeros."""
    with ExitStack() as stack:
        if not is_torchvision_available():
            resized = SimpleNamespace(
                resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size, mode=interpolation)
            )
            library = SimpleNamespace(functional=resized, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
            stack.enter_context(mock.patch.object(transformer_cosmos, "transforms", library, create=True))
            stack.enter_context(mock.patch.object(cosmos, "is_torchvision_available", return_value=True))
        if not is_ftfy_available():
            library = SimpleNamespace(fix_text=str)
            for module in (pipeline_wan, pipeline_wan_i2v):
                stack.enter_context(mock.patch.object(module, "ftfy", library, create=True))
            stack.enter_context(mock.patch.object(wan, "is_ftfy_available", return_value=True))
        yield


@pytest.fixture(scope="module")
def subject_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    return functools.cache(lambda variant, method: Subject(variant, method, tmp_path_factory.mktemp(variant)))


@pytest.mark.parametrize("variant", _marked(FLOW_VARIANTS))
def test_ungated_latents_and_picture_are_those_of_diffusers(subject_of: Callable[..., Subject], variant: str) -> None:
    """From the prompt on, by every sampler that knows flow matching."""
    subject = subject_of(variant, _method(variant))
    scheduler = subject.bundle.manifest.scheduler
    handed = any(scheduler.get(key) for key in ("use_dynamic_shifting", "pipeline_sigmas", "pipeline_scales"))
    samplers = ("euler",) if handed else ("unipc", "euler", "dpmpp_2m")
    n = 4
    if subject.model.sampler == "scm":
        samplers, n = ("scm",), 2
    for sampler in samplers:
        options = subject.options(sampler, n)
        want = plain_run(subject.eager, PROMPT, NEGATIVE, **options)
        other = plain_run(subject.eager, NEGATIVE, PROMPT, **options)
        got = subject.engine(sampler, UNGATED, n=n, m=min(2, n - 1))
        assert relative(got.latents, want) < TOLERANCE, sampler
        assert relative(other.numpy(), want) > 50 * TOLERANCE, "what conditions it matters"
    if subject.pictured:
        other = plain_run(subject.eager, PROMPT, NEGATIVE, **options | {"image": flow_picture(variant, 1)})
        assert relative(other.numpy(), want) > 50 * TOLERANCE, "so does the picture"
    options = subject.options(sampler, n)
    noise = options.pop("latents")
    if sampler != "scm":
        options["negative_prompt"] = NEGATIVE
    with torch.no_grad(), drawn_as_engines_do(noise):
        wanted = subject.eager(prompt=PROMPT, output_type="np", latents=held(subject.eager, noise), **options)[0]
    pictures = np.stack([np.asarray(frame, np.float64) for frame in (got.videos[0] if got.videos else got.images)])
    assert pictures.std() > 5, "it is no grey card"
    assert np.abs(pictures - 255 * wanted.reshape(pictures.shape)).max() < 1.001


@pytest.mark.parametrize("case", [(6, 3, 2, 2, 0), (5, 2, 1, 1, 2), (7, 4, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("variant", _marked(GATED))
def test_gated_latents_are_the_method_written_out(
    subject_of: Callable[..., Subject], variant: str, case: tuple[int, int, int, int, int]
) -> None:
    n, m, k, f, w = case
    subject = subject_of(variant, "tgate")
    own = MODELS[subject.tiny.model].sampler
    options = subject.options(own, n)
    want = gated_run(subject.eager, PROMPT, NEGATIVE, m, k, f, w, **options)
    got = subject.engine(own, NAME, n=n, m=m, k=k, f=f, w=w).latents
    assert relative(got, want) < TOLERANCE
    plain = plain_run(subject.eager, PROMPT, NEGATIVE, **subject.options(own, n))
    assert relative(got, plain) > 10 * TOLERANCE, "gating changes the trajectory, so the test could fail"


@pytest.mark.parametrize("variant", _marked(OF_TWO))
def test_two_networks_on_openvino_and_by_their_goldens(subject_of: Callable[..., Subject], variant: str) -> None:
    pytest.importorskip("openvino")
    subject = subject_of(variant, "tgate")
    options = subject.options("unipc", 7)
    networks = ["late_" in step.graph for step in plans_of(subject.bundle, sampler="unipc", n=7, m=3)[NAME].steps]
    assert len(set(networks)) == 2
    want = gated_run(subject.eager, PROMPT, NEGATIVE, 3, 2, 2, 0, **options)
    got = subject.engine("unipc", NAME, "openvino", n=7, m=3, k=2, f=2, w=0).latents
    assert relative(got, want) < TOLERANCE
    plain = plain_run(subject.eager, PROMPT, NEGATIVE, **options)
    assert relative(subject.engine("unipc", UNGATED, "openvino", n=7, m=3).latents, plain) < TOLERANCE
    if subject.model.guidance_scale_2 != subject.model.guidance_scale:
        first = plain_run(subject.eager, PROMPT, NEGATIVE, **{**options, "guidance_scale_2": None})
        assert relative(first.numpy(), plain) > 10 * TOLERANCE, "the second network has a guidance scale of its own"
    checked = verify(subject.bundle, engine=open_engine("ort-cpu"))
    assert {"ungated", "gated", "late_gated", "late_guidance_stopped"} <= {golden.name for golden in checked}


@pytest.mark.parametrize("variant", _marked(GUIDED, ("sd3_a",)))
def test_guidance_by_its_last_difference_and_stopped(subject_of: Callable[..., Subject], variant: str) -> None:
    subject = subject_of(variant, "guidance_delta")
    own = MODELS[subject.tiny.model].sampler
    want = delta_run(subject.eager, PROMPT, NEGATIVE, 3, **subject.options(own, 6))
    assert relative(subject.engine(own, NAME, n=6, m=3).latents, want) < TOLERANCE
    stopped = stopped_run(subject.eager, PROMPT, NEGATIVE, 3, **subject.options(own, 6))
    assert relative(subject.engine(own, GUIDANCE_STOPPED, n=6, m=3).latents, stopped) < TOLERANCE
    assert relative(stopped.numpy(), want) > 10 * TOLERANCE


@pytest.mark.parametrize("variant", _marked(JOINT, ("qwen_a", "flux_a")))
def test_forecasts_are_guided_outputs_extrapolated(subject_of: Callable[..., Subject], variant: str) -> None:
    subject = subject_of(variant, _method(variant))
    n, m, r = 9, 3, 2
    options, scale = subject.options("euler", n), subject.bundle.manifest.guidance_scale
    left_out = [i for i in range(m, n) if (i - m) % r]
    want = forecast_run(subject.eager, PROMPT, NEGATIVE, left_out, scale, **options)
    got = subject.engine("euler", NAME, n=n, m=m, r=r).latents
    assert relative(got, want) < TOLERANCE
    assert relative(got, plain_run(subject.eager, PROMPT, NEGATIVE, **options)) > 10 * TOLERANCE


@pytest.mark.parametrize("variant", _marked(("sprint_a", "lumina_a", "cosmos_a", "wan_i2v_a")))
def test_goldens_pass_on_openvino(subject_of: Callable[..., Subject], variant: str) -> None:
    """Diffusers' trajectory, the gated one, and the picture."""
    pytest.importorskip("openvino")
    subject = subject_of(variant, _method(variant))
    checked = verify(subject.bundle, engine=open_engine("openvino", precision="f32", threads=1))
    assert {"ungated", "gated", "image"} <= {golden.name for golden in checked}
    assert all(golden.ok for golden in checked), checked


@pytest.mark.parametrize("variant", _marked(EMBEDDED))
def test_a_text_encoder_that_is_not_exported_is_refused_by_name(
    subject_of: Callable[..., Subject], tmp_path: Path, variant: str
) -> None:
    subject = subject_of(variant, _method(variant))
    settings = subject.settings(tmp_path / "b", _method(variant), components=("text", "denoiser"))
    with pytest.raises(ExportError, match=r"not exported; leave out text, and encode prompts with tgate embed"):
        export(settings, Silent())


def _method(variant: str) -> str:
    return MODELS[FLOW_VARIANTS[variant].model].method
