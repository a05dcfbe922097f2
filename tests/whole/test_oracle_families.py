"""The references of all families agree, and each tiny checkpoint is able to fail them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import tgate
import torch

from tests.oracle_families import (
    Request,
    _network,
    guidance_stopped_latents,
    plain_latents,
    restored,
    tgate_latents,
    written_out_latents,
)
from tests.tiny_families import FAMILY_VARIANTS, latent_noise, load_tiny, make_tiny

TOLERANCE = 1e-5
IN_PACKAGE = [name for name, tiny in FAMILY_VARIANTS.items() if tiny.model != "opensora"]
PIXART = [name for name, tiny in FAMILY_VARIANTS.items() if "PixArt" in tiny.pipeline]
SETTINGS = {"m": 4, "k": 3, "f": 3, "w": 1}

Pipes = Callable[[str], Any]


def distilled(variant: str) -> bool:
    return FAMILY_VARIANTS[variant].model.startswith("lcm")


def marks(variant: str) -> list[pytest.MarkDecorator]:
    """Of each family one is in every run of the tests; others of the same shape are slow."""
    return [pytest.mark.slow] if variant.endswith("_b") else []


EVERY = [pytest.param(name, marks=marks(name)) for name in FAMILY_VARIANTS]
IN_PACKAGE_GUIDED = [
    pytest.param(name, on, marks=marks(name))
    for name in IN_PACKAGE
    for on in (True, False)
    if not (on and distilled(name))
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Pipes:
    root, loaded = tmp_path_factory.mktemp("families"), {}

    def get(name: str) -> Any:
        if name not in loaded:
            loaded[name] = load_tiny(make_tiny(root / name, name), name)
        return loaded[name]

    return get


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    assert actual.shape == wanted.shape
    return float((actual - wanted).norm() / wanted.norm())


def picture(variant: str, seed: int = 0) -> PIL.Image.Image:
    tiny = FAMILY_VARIANTS[variant]
    height, width = (side * tiny.vae_factor for side in tiny.latents[-2:])
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def noise_from(variant: str, seed: int, batch: int = 1) -> Callable[[int], torch.Tensor]:
    return lambda step: latent_noise(variant, batch, seed=seed + step)


def request_for(variant: str, batch: int = 1, **changes: Any) -> Request:
    tiny = FAMILY_VARIANTS[variant]
    given: dict[str, Any] = {"steps": 8, "guidance_scale": 4.0, "latents": latent_noise(variant, batch)}
    if tiny.model == "svd":
        size = (1, 3, *(side * tiny.vae_factor for side in tiny.latents[-2:]))
        augmentation = torch.randn(size, generator=torch.Generator().manual_seed(7))
        given |= {"guidance_scale": 3.0, "image": picture(variant), "augmentation": augmentation}
    else:
        given |= {"prompt": "a large red circle", "negative_prompt": "blue square"}
    if distilled(variant):
        given |= {"guidance_scale": 1.0, "step_noise": noise_from(variant, 100, batch)}
    return Request(**{**given, **changes})


@pytest.mark.parametrize("variant", EVERY)
def test_plain_is_deterministic_and_leaves_the_pipeline(pipes: Pipes, variant: str) -> None:
    pipe, request = pipes(variant), request_for(variant)
    before, scheduler = set(vars(pipe)), pipe.scheduler
    wanted = plain_latents(pipe, request, scheduler)
    assert wanted.shape == request.latents.shape
    assert bool(torch.isfinite(wanted).all())
    written_out_latents(pipe, request, scheduler, **SETTINGS)
    if variant in IN_PACKAGE:
        tgate_latents(pipe, request, scheduler, **SETTINGS)
    assert torch.equal(plain_latents(pipe, request, scheduler), wanted)
    assert set(vars(pipe)) == before
    assert pipe.scheduler is scheduler
    assert scheduler.num_inference_steps is None
    for module in _network(pipe).modules():
        assert not {"forward", "cache"} & set(vars(module))
        assert not module._forward_hooks


def test_the_same_weights_every_time(tmp_path: Path, pipes: Pipes) -> None:
    for variant in ("svd_b", "latte_b", "pixart_alpha_b", "sd15_a"):
        again = load_tiny(make_tiny(tmp_path / variant, variant), variant)
        for one, other in zip(_network(pipes(variant)).parameters(), _network(again).parameters(), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("variant", EVERY)
def test_without_a_gate_all_are_diffusers(pipes: Pipes, variant: str) -> None:
    pipe, request = pipes(variant), request_for(variant, steps=4)
    wanted = plain_latents(pipe, request, pipe.scheduler)
    assert relative(guidance_stopped_latents(pipe, request, pipe.scheduler, m=5), wanted) < TOLERANCE
    assert relative(written_out_latents(pipe, request, pipe.scheduler, m=5, k=1, f=1, w=2), wanted) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("variant", "guided"), IN_PACKAGE_GUIDED)
def test_package_is_the_written_out_method(pipes: Pipes, variant: str, guided: bool, batch: int) -> None:
    pipe, request = pipes(variant), request_for(variant, batch)
    if batch == 2 and request.prompt is not None:
        request = replace(request, prompt=["a large red circle", "a photo"], negative_prompt=["blue", ""])
    if not guided:
        request = replace(request, guidance_scale=1.0)
    # n, m, k, f, w
    for n, m, k, f, w in ((7, 4, 3, 3, 1), (4, 4, 2, 1, 0), (4, 1, 1, 2, 0)):
        request = replace(request, steps=n)
        package = tgate_latents(pipe, request, pipe.scheduler, m, k, f, w)
        assert relative(package, written_out_latents(pipe, request, pipe.scheduler, m, k, f, w)) < TOLERANCE


def test_a_stochastic_sampler_takes_the_noise_it_is_given(pipes: Pipes) -> None:
    for variant in ("sd15_a", "pixart_sigma_a", "svd_b"):
        pipe = pipes(variant)
        ancestral = diffusers.EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        request = request_for(variant, step_noise=noise_from(variant, 50))
        package = tgate_latents(pipe, request, ancestral, **SETTINGS)
        assert relative(package, written_out_latents(pipe, request, ancestral, **SETTINGS)) < TOLERANCE
        other = replace(request, step_noise=noise_from(variant, 80))
        assert relative(tgate_latents(pipe, other, ancestral, **SETTINGS), package) > 1e-2


@pytest.mark.parametrize("variant", EVERY)
def test_the_models_can_fail_parity(pipes: Pipes, variant: str) -> None:
    """Each rule and each input moves the latents; a change of 1e-6 in the noise does not."""
    pipe, request = pipes(variant), request_for(variant)

    def run(changed: Request = request, **settings: int) -> torch.Tensor:
        return written_out_latents(pipe, changed, pipe.scheduler, **{**SETTINGS, **settings})

    base = run()
    for name, value in (("m", 3), ("k", 1), ("w", 0), ("f", 1)):
        assert relative(run(request, **{name: value}), base) > 1e-3, name
    inputs: list[dict[str, Any]] = [{"prompt": "a photo"}, {"negative_prompt": ""}]
    if FAMILY_VARIANTS[variant].model == "svd":
        inputs = [{"image": picture(variant, seed=1)}, {"augmentation": None}, {"guidance_scale": 2.0}]
    elif distilled(variant):
        inputs = [{"prompt": "a photo"}, {"step_noise": noise_from(variant, 200)}]
    for changes in inputs:
        assert relative(run(replace(request, **changes)), base) > 1e-3, changes
    assert relative(guidance_stopped_latents(pipe, request, pipe.scheduler, m=4), base) > 1e-3
    assert relative(plain_latents(pipe, request, pipe.scheduler), base) > 1e-3
    shaken = request.latents * (1 + 1e-6 * latent_noise(variant, seed=1))
    assert relative(run(replace(request, latents=shaken)), base) < 2e-5

    alone = replace(request, guidance_scale=1.0)
    crossed = relative(run(alone, m=2, k=1, f=1), plain_latents(pipe, alone, pipe.scheduler))
    if FAMILY_VARIANTS[variant].model == "svd":
        assert crossed < TOLERANCE  # one token: cross-attention does not depend on the step
    else:
        assert crossed > 1e-3


@pytest.mark.parametrize("variant", PIXART)
def test_pixart_mask_and_size_matter(pipes: Pipes, variant: str) -> None:
    pipe, request = pipes(variant), request_for(variant)
    wanted = plain_latents(pipe, request, pipe.scheduler)
    seen: list[dict[str, Any]] = []

    def without(name: str) -> torch.Tensor:
        def hook(_module: Any, arguments: Any, keywords: dict[str, Any]) -> Any:
            seen.append(keywords)
            given = keywords[name]
            if isinstance(given, dict):
                changed: Any = {part: 2 * value for part, value in given.items()}
            else:
                changed = torch.ones_like(given)
            return arguments, {**keywords, name: changed}

        handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return plain_latents(pipe, request, pipe.scheduler)
        finally:
            handle.remove()

    assert relative(without("encoder_attention_mask"), wanted) > 1e-3
    length = 300 if variant.startswith("pixart_sigma") else 120
    assert seen[0]["encoder_attention_mask"].shape[1] == length
    if pipe.transformer.use_additional_conditions:
        assert relative(without("added_cond_kwargs"), wanted) > 1e-3
        height, width = (side * FAMILY_VARIANTS[variant].vae_factor for side in request.latents.shape[-2:])
        assert seen[-1]["added_cond_kwargs"]["resolution"][0].tolist() == [height, width]
    else:
        assert seen[0]["added_cond_kwargs"]["resolution"] is None


def test_latte_cuts_one_prompt_and_zeroes_several(pipes: Pipes) -> None:
    pipe = pipes("latte_b")
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.caption_projection.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    try:
        plain_latents(pipe, request_for("latte_b", prompt="Red circle ", steps=1), pipe.scheduler)
        written_out_latents(pipe, request_for("latte_b", 2, steps=1), pipe.scheduler, **SETTINGS)
    finally:
        hook.remove()
    assert seen[0].shape[:2] == (2, 3)  # red, circle, end; the negative prompt is cut there as well
    assert seen[-1].shape[:2] == (4, 120)
    assert float(seen[-1][2:, 5:].abs().max()) == 0.0  # the positive half's padding
    assert float(seen[-1][:2, 5:].abs().min(dim=-1).values.max()) > 0.0  # the negative half's is as encoded


# Faults of the package, called as its users call it.


def package(pipe: Any, loader: Any, request: Request, **changes: Any) -> torch.Tensor:
    scheduler = changes.pop("scheduler", pipe.scheduler)
    height, width = (side * pipe.vae_scale_factor for side in request.latents.shape[-2:])
    options: dict[str, Any] = {"height": height, "width": width, "gate_step": 2, "sp_interval": 1, "warm_up": 0}
    options |= {"num_inference_steps": request.steps, "latents": request.latents, "output_type": "latent", **changes}
    with restored(pipe, scheduler):
        return loader(pipe).tgate(**options, return_dict=False)[0]


def test_sd_without_guidance_raises(pipes: Pipes) -> None:
    with pytest.raises(ValueError, match="not enough values to unpack"):
        package(
            pipes("sd15_a"), tgate.TgateSDLoader, request_for("sd15_a", steps=3), prompt="a photo", guidance_scale=1.0
        )


def test_svd_without_guidance_raises(pipes: Pipes) -> None:
    pipe, request = pipes("svd_a"), request_for("svd_a", steps=3)
    for frames in (2, 3):
        given = replace(request, latents=request.latents[:, :frames])
        options: dict[str, Any] = {"image": request.image, "num_frames": frames, "max_guidance_scale": 1.0}
        with pytest.raises((RuntimeError, ValueError)):
            package(pipe, tgate.TgateSVDLoader, given, **options)


def test_pixart_alpha_with_pndm_fails(pipes: Pipes) -> None:
    pipe, request = pipes("pixart_alpha_a"), request_for("pixart_alpha_a", steps=4)
    pndm = diffusers.PNDMScheduler(skip_prk_steps=True)
    options: dict[str, Any] = {"prompt": "a photo", "use_resolution_binning": False, "clean_caption": False}
    with pytest.raises((RuntimeError, ValueError)):
        package(pipe, tgate.TgatePixArtAlphaLoader, request, scheduler=pndm, **options)
    with pytest.raises(ValueError, match="miscounts PNDM"):
        tgate_latents(pipe, request, pndm, **SETTINGS)
    sigma, given = pipes("pixart_sigma_a"), request_for("pixart_sigma_a", steps=6)
    counted = tgate_latents(sigma, given, pndm, **SETTINGS)
    assert relative(counted, written_out_latents(sigma, given, pndm, **SETTINGS)) < TOLERANCE


def test_pixart_alpha_at_one_step_fails(pipes: Pipes) -> None:
    pipe, request = pipes("lcm_pixart"), request_for("lcm_pixart", steps=1)
    options: dict[str, Any] = {"prompt": "a photo", "use_resolution_binning": False, "clean_caption": False}
    with pytest.raises(AttributeError, match="pred_original_sample"):
        package(pipe, tgate.TgatePixArtAlphaLoader, request, guidance_scale=1.0, lcm=True, **options)
    wanted = plain_latents(pipe, request, pipe.scheduler)
    assert relative(written_out_latents(pipe, request, pipe.scheduler, m=1, k=1, f=1, w=0), wanted) < TOLERANCE


def test_latte_is_not_in_the_package(pipes: Pipes) -> None:
    with pytest.raises(ValueError, match="no loader"):
        tgate_latents(pipes("latte_a"), request_for("latte_a"), pipes("latte_a").scheduler, **SETTINGS)
