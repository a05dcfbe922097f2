"""libtgate draws what the Python runtime draws on the same engine, bit for bit: methods, samplers, sizes, batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.cpp.library import Library
from tests.cpp.twins import Twins, same
from tgate_cli.main import main
from tgate_runtime.mini import place_of

PROMPT, NEGATIVE = "a large red circle above a small blue square", "a green star"


@pytest.fixture(scope="module")
def mini(library: Library) -> Twins:
    return Twins(library, place_of("mini"))


def test_every_plan_of_the_bundle_that_ships(mini: Twins) -> None:
    plans = mini.bundle.names("plan")
    assert {"default", "ungated", "guidance_stopped"} <= {*plans}
    for plan in plans:
        request = mini.request(PROMPT, negative_prompt=NEGATIVE, plan=plan, seed=5).run()
        wanted = mini.wanted(PROMPT, negative_prompt=NEGATIVE, plan=plan, seed=5)
        same(request.latents(), wanted.latents)
        same(request.decode()[0], np.asarray(wanted.images[0]))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("scale", [1.5, 9.0])
def test_batches_and_guidance(mini: Twins, images: int, scale: float) -> None:
    asked: dict[str, Any] = {"images": images, "guidance_scale": scale, "seed": 2**63 - images - 1}
    same(mini.draw(PROMPT, **asked), mini.wanted(PROMPT, **asked).latents)


def test_the_embedded_unet(library: Library, mini_bundle: Path) -> None:
    """Two tokenizers, constants as conditioning, pooled text; every graph there is."""
    twins = Twins(library, mini_bundle)
    for plan in twins.bundle.names("plan"):
        same(twins.draw(PROMPT, plan=plan, seed=1), twins.wanted(PROMPT, plan=plan, seed=1).latents)
    request = twins.request(PROMPT, negative_prompt=NEGATIVE, images=2, seed=9).run()
    wanted = twins.wanted(PROMPT, negative_prompt=NEGATIVE, images=2, seed=9)
    same(request.latents(), wanted.latents)
    for image in range(2):
        same(request.decode(image)[0], np.asarray(wanted.images[image]))


@pytest.mark.parametrize("memory", ["fast", "shared"])
def test_both_ways_to_hold_the_weights(library: Library, memory: str) -> None:
    twins = Twins(library, place_of("mini"), ["default"], memory=memory)
    same(twins.draw(PROMPT, seed=3), twins.wanted(PROMPT, seed=3).latents)


@pytest.mark.parametrize(
    ("sampler", "generator"),
    [(name, "numpy") for name in ("euler_a", "lcm", "dpmpp_3m", "unipc", "pndm", "lms")]
    + [(name, "torch-cuda") for name in ("euler_a", "lcm")],
)
def test_samplers_of_plan_files(library: Library, tmp_path: Path, sampler: str, generator: str) -> None:
    """Those that draw noise in their steps among them; histories of all lengths."""
    plan = str(tmp_path / "plan.json")
    words = ["plan", "mini", "--name", "own", "--m", "4", "--steps", "10", "--sampler", sampler, "--output", plan]
    assert main([*words, "--quiet"]) == 0
    twins = Twins(library, place_of("mini"), [plan])
    asked: dict[str, Any] = {"plan": plan, "seed": 11, "images": 2, "generator": generator}
    wanted = twins.wanted(PROMPT, **asked).latents
    same(twins.draw(PROMPT, **asked), wanted)
    same(twins.draw(PROMPT, **{**asked, "plan": "own"}), wanted)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=pytest.mark.slow) for name in ("tgate", "guidance_delta", "tgate+guidance_delta")]
    + ["tgate+deepcache"],
)
def test_methods_and_a_batch_that_is_filled_up(library: Library, tiny_bundle: Callable[..., Path], method: str) -> None:
    """A bundle whose calls take two images: one, two and three of them."""
    twins = Twins(library, tiny_bundle("conv_projection", method=method, batch=(2, 2)))
    for plan in twins.bundle.names("plan"):
        for images in (1, 2, 3):
            asked: dict[str, Any] = {"plan": plan, "images": images, "seed": 4}
            same(twins.draw(PROMPT, **asked), twins.wanted(PROMPT, **asked).latents)


def test_every_size_of_a_bundle(library: Library, tiny_bundle: Callable[..., Path]) -> None:
    twins = Twins(library, tiny_bundle("conv_projection", sizes=((64, 64), (96, 64), (64, 128))))
    assert twins.bundle.names("size") == ["64x64", "96x64", "64x128"]
    for size in twins.bundle.names("size"):
        request = twins.request(PROMPT, image_size=size, seed=6).run()
        wanted = twins.wanted(PROMPT, image_size=size, seed=6)
        same(request.latents(), wanted.latents)
        same(request.decode()[0], np.asarray(wanted.images[0]))


@pytest.mark.parametrize(
    "variant",
    [*("sd15_a", "pixart_alpha_1024", "pixart_sigma_a", "latte_a"), pytest.param("lcm_sdxl", marks=pytest.mark.slow)],
)
def test_families_that_a_prompt_conditions(library: Library, family_bundle: Any, variant: str) -> None:
    twins = Twins(library, family_bundle(variant)[1], ["default"])
    request = twins.request(PROMPT, seed=8).run()
    wanted = twins.wanted(PROMPT, seed=8)
    same(request.latents(), wanted.latents)
    frames = wanted.videos[0] if wanted.videos else wanted.images
    same(request.decode(), np.stack([np.asarray(frame) for frame in frames]))


def test_a_video_from_a_picture(library: Library, family_bundle: Any) -> None:
    twins = Twins(library, family_bundle("svd_a")[1], ["default"])
    width, height = map(int, twins.bundle.names("size")[0].split("x"))
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3), np.uint8)
    request = twins.request(picture=pixels, seed=8).run()
    wanted = twins.wanted(picture=Image.fromarray(pixels), seed=8)
    same(request.latents(), wanted.latents)
    same(request.decode(), np.stack([np.asarray(frame) for frame in wanted.videos[0]]))


def test_without_guidance(library: Library, tiny_bundle: Callable[..., Path]) -> None:
    twins = Twins(library, tiny_bundle("conv_projection", guidance_scale=1.0))
    same(twins.draw(PROMPT, seed=2), twins.wanted(PROMPT, seed=2).latents)


def test_tensors_and_latents_that_a_request_brings(mini: Twins) -> None:
    rng = np.random.default_rng(7)
    tensors = {name: rng.standard_normal((1, *shape), np.float32) for name, shape in mini.bundle.tensors().items()}
    start = rng.standard_normal((2, *mini.python.session.shapes()[0].latents), np.float32)
    asked: dict[str, Any] = {"images": 2, "initial_latents": start, "guidance_scale": 3.0}
    same(mini.draw(tensors=tensors, **asked), mini.wanted(tensors=tensors, **asked).latents)
