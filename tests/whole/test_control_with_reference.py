"""Requests with control pictures and a picture beside the prompt, of one bundle, against diffusers' ControlNet
pipelines with the same IP-Adapter, ungated and gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import once
from tests.oracle_control import Steered, latents_with
from tests.oracle_pictures import Gate
from tests.tiny_control import control_picture, make_control
from tests.tiny_families import FAMILY_VARIANTS
from tests.tiny_ip_adapter import save_ip_adapter
from tests.tiny_models import tiny_model
from tgate_engine.bundle import Bundle
from tgate_engine.graph import CONTROL
from tgate_engine.plan import Plan
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.plans import add_plan
from tgate_export.settings import ControlNet
from tgate_runtime.control import Control
from tgate_runtime.generators import noise
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

TOLERANCE = 1e-4
PROMPT, NEGATIVE, SEED, STEPS = "a red circle", "blue", 3, 10
GATE = Gate(m=6, k=3, f=1)
PIPELINES = {"sd": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}
SLOW = pytest.mark.slow  # a family with both is exported in ten seconds and more

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*keep_in_fp32.*"),
]

Made = tuple[Path, Path, Path, Path]
"""Checkpoint, ControlNet, IP-Adapter's file, bundle."""


@pytest.fixture(scope="module")
def made(
    family_bundle: Callable[..., tuple[Path, Path]],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Made]:
    def get(family: str) -> Made:
        if family == "sd":
            tiny = FAMILY_VARIANTS["sd15_a"]
            checkpoint, pixels, (height, width) = family_bundle("sd15_a")[0], tiny.vae_factor, tiny.latents[-2:]
        else:
            own = tiny_model("conv_projection")
            checkpoint, pixels, (height, width) = tiny_checkpoint("conv_projection"), own.vae_factor, own.latent_size

        def make(folder: Path) -> None:
            net = make_control(checkpoint, folder / "edges", pixels=pixels, seed=0)
            settings = ExportSettings(
                model="sd15" if family == "sd" else "sdxl",
                checkpoint=str(checkpoint),
                controlnets=[ControlNet("edges", str(net))],
                ip_adapter=save_ip_adapter(checkpoint, folder / "adapter", plus=family == "sdxl"),
                sizes=[(width * pixels, height * pixels)],
                batches=[(1, 1)],
                components=["text", "denoiser", "reference"],
                output=folder / "bundle",
            )
            export(settings, Silent())

        folder = once(tmp_path_factory, f"controlled-and-adapted-{family}", make)
        return checkpoint, folder / "edges", folder / "adapter" / "ip-adapter.safetensors", folder / "bundle"

    return functools.cache(get)


def seen() -> Image.Image:
    rough = np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8)
    return Image.fromarray(rough).resize((61, 97), Image.Resampling.BICUBIC)


def plans(bundle: Path, sampler: str) -> tuple[Plan, Plan]:
    """Without the gate, and with it."""
    made = add_plan(bundle, name="x", m=GATE.m, k=GATE.k, steps=STEPS, sampler=sampler, save=False)
    there = {**Bundle.open(bundle, check_digests=False).manifest.plans, **made}
    return there[made["x"].baselines[0]], made["x"]


def apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def draws(draw: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(noise(SEED, shape[1:], draw=draw))[None]


@pytest.mark.parametrize(
    ("family", "engine"),
    [
        ("sd", "ort-cpu"),
        pytest.param("sd", "openvino", marks=SLOW),
        pytest.param("sdxl", "ort-cpu", marks=SLOW),
        pytest.param("sdxl", "openvino", marks=SLOW),
    ],
)
def test_as_diffusers(made: Callable[[str], Made], family: str, engine: str) -> None:
    """Both pictures; and either alone is something else, ungated and gated."""
    if engine == "openvino":
        pytest.importorskip("openvino")
    checkpoint, net, adapter, bundle = made(family)
    sampler = "dpmpp_2m"
    both = plans(bundle, sampler)
    shape = Bundle.open(bundle, check_digests=False).manifest.shapes[0]
    control = {"edges": Control(image=control_picture((shape.width, shape.height)), scale=0.7, end=0.85)}
    beside: dict[str, Any] = {"ip_adapter_image": seen(), "ip_adapter_scale": 0.6}
    options: dict[str, Any] = {"precision": "f32"} if engine == "openvino" else {}
    with Pipeline.open(bundle, engine=engine, plans=both, threads=1, **options) as pipe:
        for plan, gate in zip(both, (None, GATE), strict=True):
            ask = functools.partial(pipe, PROMPT, negative_prompt=NEGATIVE, seed=SEED, plan=plan)
            wanted = latents_with(
                checkpoint,
                PIPELINES[family],
                [Steered(net=net, picture=control["edges"].image, scale=0.7, end=0.85)],
                sampler=sampler,
                steps=STEPS,
                prompt=PROMPT,
                negative_prompt=NEGATIVE,
                guidance_scale=plan.guidance_scale,
                draws=draws,
                gate=gate,
                adapter=adapter,
                adapter_scale=0.6,
                ip_adapter_image=seen(),
            )
            assert apart(ask(controls=control, **beside).latents, wanted) < TOLERANCE
            for less in ({"controls": control}, beside):
                assert apart(ask(**less).latents, wanted) > 20 * TOLERANCE


def test_controlnets_do_not_look_at_the_picture_beside_the_prompt(made: Callable[[str], Made]) -> None:
    """Their graphs take the text, and nothing of it; their goldens hold."""
    bundle = Bundle.open(made("sd")[3])
    graphs = [graph for graph in bundle.manifest.shapes[0].graphs.values() if graph.role == CONTROL]
    assert graphs
    for graph in graphs:
        stems = {name.rpartition(".")[0] for name in graph.input_names()}
        assert "prompt_embeds" in stems
        assert not {"reference", "reference_scale"} & stems
    checked = {each.name: each.ok for each in verify(bundle)}
    assert checked.keys() >= {"control-edges", "reference", "ungated", "gated"}
    assert all(checked.values())
