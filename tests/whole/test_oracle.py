"""The references agree with one another; each fault of the paper's package is pinned to what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from diffusers.models.attention_processor import Attention
from tgate import TgateSDXLLoader

from tests.oracle import (
    guidance_stopped_latents,
    plain_latents,
    restored,
    tgate_latents,
    written_out_latents,
)
from tests.tiny_models import (
    CONSISTENCY_VARIANT,
    VARIANTS,
    directory_bytes,
    latent_noise,
    load_tiny_sdxl,
    make_tiny_sdxl,
    sharded_files,
    tiny_model,
)

TOLERANCE = 1e-5  # of the norm, between two eager runs that order the same sums alike
PROMPT, NEGATIVE = "a large red circle", "blue square"
PAIR = ["a large red circle", "a small blue square above a photo"]

Pipes = Callable[[str], StableDiffusionXLPipeline]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only lose by more threads, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: make_tiny_sdxl(root / name, name) for name in (*VARIANTS, CONSISTENCY_VARIANT)}


@pytest.fixture(scope="module")
def pipes(checkpoints: dict[str, Path]) -> Pipes:
    loaded: dict[str, StableDiffusionXLPipeline] = {}

    def get(name: str) -> StableDiffusionXLPipeline:
        if name not in loaded:
            loaded[name] = load_tiny_sdxl(checkpoints[name])
        return loaded[name]

    return get


def relative(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    assert actual.shape == wanted.shape
    return float((actual - wanted).norm() / wanted.norm())


_NOISE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SAMPLERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: DDIMScheduler(**_NOISE, steps_offset=1, clip_sample=False),
    "deis": lambda: DEISMultistepScheduler(**_NOISE),
    "dpm": lambda: DPMSolverMultistepScheduler(**_NOISE),
    "dpm_karras": lambda: DPMSolverMultistepScheduler(**_NOISE, use_karras_sigmas=True),
    "euler": lambda: EulerDiscreteScheduler(**_NOISE, steps_offset=1),
    "euler_ancestral": lambda: EulerAncestralDiscreteScheduler(**_NOISE),
    "lcm": lambda: LCMScheduler(**_NOISE),
    "pndm": lambda: PNDMScheduler(**_NOISE, skip_prk_steps=True),
    "pndm_runge_kutta": lambda: PNDMScheduler(**_NOISE),
    "unipc": lambda: UniPCMultistepScheduler(**_NOISE),
}


def request_for(variant: str, sampler: str, steps: int, **changes: Any) -> dict[str, Any]:
    batch = len(changes["prompt"]) if isinstance(changes.get("prompt"), list) else 1
    return {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "steps": steps,
        "guidance_scale": 4.0,
        "latents": latent_noise(variant, batch),
        "scheduler": _SAMPLERS[sampler](),
        "generator": torch.Generator().manual_seed(3),
        **changes,
    }


def both(pipe: StableDiffusionXLPipeline, *arguments: Any, m: int, k: int, f: int, w: int, **changes: Any) -> float:
    """Distance between package and written-out reference."""
    settings: dict[str, Any] = {"m": m, "k": k, "f": f, "w": w}
    package = tgate_latents(pipe, **request_for(*arguments, **changes), **settings)
    return relative(package, written_out_latents(pipe, **request_for(*arguments, **changes), **settings))


# n, m, k, f, w
SETTINGS = [
    (8, 5, 3, 1, 2),
    (8, 5, 1, 1, 2),
    (8, 8, 3, 1, 2),  # gate step is the last step
    (6, 9, 2, 2, 1),  # gate beyond the end
    (8, 1, 1, 1, 0),  # nothing before the gate step
    (8, 1, 2, 3, 2),
    (8, 2, 3, 2, 5),  # warm-up beyond the gate
    (8, 4, 2, 3, 3),  # warm-up ends at the gate step
    (9, 3, 2, 4, 0),  # f > 1, first step after the gate reuses the mean
    (9, 4, 5, 2, 0),  # f > 1, first step after the gate computes
    (9, 6, 4, 2, 1),  # w not a multiple of k
]


@pytest.mark.parametrize("sampler", ["dpm", "pndm"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_package_is_the_written_out_method(pipes: Pipes, settings: tuple[int, ...], sampler: str) -> None:
    n, m, k, f, w = settings
    assert both(pipes("conv_projection"), "conv_projection", sampler, n, m=m, k=k, f=f, w=w) < TOLERANCE


@pytest.mark.parametrize("sampler", sorted(_SAMPLERS))
def test_every_sampler(pipes: Pipes, sampler: str) -> None:
    # PNDM with its Runge-Kutta start makes nine extra calls, all plain.
    assert both(pipes("conv_projection"), "conv_projection", sampler, 6, m=4, k=2, f=2, w=1) < TOLERANCE


@pytest.mark.parametrize("negative", [NEGATIVE, "", None])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant(pipes: Pipes, variant: str, negative: str | None) -> None:
    arguments = (variant, "euler", 5)
    assert both(pipes(variant), *arguments, m=3, k=2, f=2, w=0, negative_prompt=negative) < TOLERANCE


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5, 7.5])
def test_batch_of_two(pipes: Pipes, guidance_scale: float) -> None:
    changes = {"prompt": PAIR, "negative_prompt": [NEGATIVE, ""], "guidance_scale": guidance_scale}
    assert both(pipes("conv_projection"), "conv_projection", "dpm", 6, m=4, k=2, f=2, w=0, **changes) < TOLERANCE


def test_batch_is_its_images(checkpoints: dict[str, Path]) -> None:
    """In float64: in float32 the order of sums differs with the batch, and rounding would blur this."""
    pipe = load_tiny_sdxl(checkpoints["sdxl_like"]).to(dtype=torch.float64)
    settings: dict[str, Any] = {"m": 3, "k": 2, "f": 2, "w": 0}
    noise = latent_noise("sdxl_like", 2).double()
    changes = {"latents": noise, "prompt": PAIR, "negative_prompt": [NEGATIVE, ""]}
    pair = tgate_latents(pipe, **request_for("sdxl_like", "euler", 5, **changes), **settings)
    for row, (prompt, negative) in enumerate(zip(PAIR, (NEGATIVE, ""), strict=True)):
        one = {"latents": noise[row : row + 1], "prompt": prompt, "negative_prompt": negative}
        alone = tgate_latents(pipe, **request_for("sdxl_like", "euler", 5, **one), **settings)
        assert relative(pair[row : row + 1], alone) < 1e-9


@pytest.mark.parametrize("m", [1, 2])
def test_consistency_model(pipes: Pipes, m: int) -> None:
    variant = CONSISTENCY_VARIANT
    for guidance_scale in (1.0, 8.0):  # distilled: never doubled
        changes = {"guidance_scale": guidance_scale}
        assert both(pipes(variant), variant, "lcm", 4, m=m, k=1, f=1, w=0, **changes) < TOLERANCE


@pytest.mark.parametrize("sampler", ["euler", "pndm", "dpm_karras"])
def test_without_a_gate_all_are_diffusers(pipes: Pipes, sampler: str) -> None:
    pipe, request = pipes("sdxl_like"), request_for("sdxl_like", sampler, 4)
    wanted = plain_latents(pipe, **request)
    assert relative(guidance_stopped_latents(pipe, **request, m=5), wanted) < TOLERANCE
    assert relative(written_out_latents(pipe, **request, m=5, k=1, f=1, w=2), wanted) < TOLERANCE
    assert relative(tgate_latents(pipe, **request, m=5, k=1, f=1, w=2), wanted) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_models_can_fail_parity(pipes: Pipes, variant: str) -> None:
    """Each rule moves the latents far more than the tolerance; a change of 1e-6 in the noise does not."""
    pipe = pipes(variant)

    def run(**changes: Any) -> torch.Tensor:
        settings: dict[str, Any] = {"m": 4, "k": 3, "f": 3, "w": 1}
        settings.update({name: changes.pop(name) for name in tuple(changes) if name in settings})
        request = request_for(variant, tiny_model(variant).scheduler, 8, **changes)
        return written_out_latents(pipe, **request, **settings)

    base = run()
    for changes in ({"m": 3}, {"k": 1}, {"w": 0}, {"prompt": "a photo"}, {"negative_prompt": None}):
        assert relative(run(**changes), base) > 1e-2, changes
    assert relative(run(f=1), base) > 5e-4  # late steps weigh little

    # Cross-attention alone: without guidance, and with all self-attention computed, nothing else differs.
    alone = request_for(variant, tiny_model(variant).scheduler, 8, guidance_scale=1.0)
    assert relative(written_out_latents(pipe, **alone, m=2, k=1, f=1, w=0), plain_latents(pipe, **alone)) > 1.5e-2

    noise = latent_noise(variant, 1)
    shaken = noise * (1 + 1e-6 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)))
    assert relative(run(latents=shaken), base) < 5e-5


def test_after_the_gate_the_pooled_text_is_the_negative_prompts(pipes: Pipes) -> None:
    """What the table says; the positive prompt's would be a different trajectory."""
    pipe = pipes("conv_projection")
    seen: list[torch.Tensor] = []
    hook = pipe.unet.add_embedding.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        tgate_latents(pipe, **request_for("conv_projection", "pndm", 4), m=2, k=1, f=1, w=0)
    finally:
        hook.remove()
    assert [len(rows) for rows in seen] == [2, 2, 2, 1, 1]  # one extra call, then two guided steps of four
    assert torch.equal(seen[-1][0], seen[0][0])
    assert not torch.equal(seen[-1][0], seen[0][1])


def test_the_pipeline_is_left_as_it_was(pipes: Pipes) -> None:
    pipe = pipes("conv_projection")
    request = request_for("conv_projection", "euler", 4)
    scheduler, given = pipe.scheduler, request["scheduler"]
    before = plain_latents(pipe, **request)
    tgate_latents(pipe, **request, m=2, k=2, f=2, w=0)
    written_out_latents(pipe, **request, m=2, k=2, f=2, w=0)
    assert torch.equal(plain_latents(pipe, **request), before)
    assert pipe.scheduler is scheduler
    assert given.num_inference_steps is None
    assert "tgate" not in vars(pipe)
    for module in pipe.unet.modules():
        assert not {"forward", "cache"} & set(vars(module))
        assert not module._forward_hooks


@pytest.mark.parametrize("change", [{"m": 0}, {"k": 0}, {"f": 0}, {"w": -1}])
def test_refused_settings(pipes: Pipes, change: dict[str, int]) -> None:
    settings: dict[str, Any] = {"m": 2, "k": 1, "f": 1, "w": 0, **change}
    for reference in (tgate_latents, written_out_latents):
        with pytest.raises(ValueError, match="want m, k, f"):
            reference(pipes("conv_projection"), **request_for("conv_projection", "euler", 2), **settings)


# Faults of the package, called as its users call it; numbered as in oracle.py.


def package(pipe: StableDiffusionXLPipeline, n: int, noise: torch.Tensor, **changes: Any) -> torch.Tensor:
    """Call the package with no shim but the image's size; the caller cleans up."""
    options: dict[str, Any] = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "guidance_scale": 4.0,
        "gate_step": 2,
        "sp_interval": 1,
        "fi_interval": 1,
        "warm_up": 0,
        **changes,
    }
    options |= {"num_inference_steps": n, "latents": noise, "output_type": "latent", **_size(pipe, noise)}
    return TgateSDXLLoader(pipe).tgate(**options).images


def _size(pipe: StableDiffusionXLPipeline, noise: torch.Tensor) -> dict[str, int]:
    return {
        "height": noise.shape[-2] * pipe.vae_scale_factor,
        "width": noise.shape[-1] * pipe.vae_scale_factor,
    }


@pytest.fixture
def tiny(pipes: Pipes) -> StableDiffusionXLPipeline:
    return pipes("conv_projection")


@pytest.fixture
def noise() -> torch.Tensor:
    return latent_noise("conv_projection", 1)


def test_fault_1_a_plain_call_afterwards_reuses_cross_attention(
    tiny: StableDiffusionXLPipeline, noise: torch.Tensor
) -> None:
    request = request_for("conv_projection", "euler", 4, prompt="a photo")
    wanted = plain_latents(tiny, **request)
    with restored(tiny, _SAMPLERS["euler"]()):
        package(tiny, 4, noise)
        assert any("cache" in vars(module) for module in tiny.unet.modules())
        call = {
            "negative_prompt": NEGATIVE,
            "num_inference_steps": 4,
            "guidance_scale": 4.0,
            "output_type": "latent",
        }
        stale = tiny(prompt="a photo", latents=noise, **call, **_size(tiny, noise)).images
    assert relative(stale, wanted) > 0.1
    assert torch.equal(plain_latents(tiny, **request), wanted)


def test_fault_2_gate_zero_reuses_the_previous_call(tiny: StableDiffusionXLPipeline, noise: torch.Tensor) -> None:
    with restored(tiny, _SAMPLERS["euler"]()):
        fresh = package(tiny, 4, noise, gate_step=0, fi_interval=1)
    # In a fresh pipeline: unguided, on the negative prompt, with nothing reused.
    request = request_for("conv_projection", "euler", 4, prompt=NEGATIVE, guidance_scale=1.0)
    assert relative(fresh, plain_latents(tiny, **request)) < TOLERANCE
    with restored(tiny, _SAMPLERS["euler"]()):
        package(tiny, 4, noise, prompt="a photo")
        used = package(tiny, 4, noise, gate_step=0, fi_interval=1)
    assert relative(used, fresh) > 1e-2


def test_fault_3_no_guidance_without_lcm(tiny: StableDiffusionXLPipeline, noise: torch.Tensor) -> None:
    with restored(tiny, _SAMPLERS["euler"]()), pytest.raises(ValueError, match="not enough values to unpack"):
        package(tiny, 4, noise, guidance_scale=1.0)

    pair = latent_noise("conv_projection", 2)
    with restored(tiny, _SAMPLERS["euler"]()):
        mixed = package(tiny, 4, pair, guidance_scale=1.0, prompt=PAIR, negative_prompt=None)
        caches = [m.cache for m in tiny.unet.modules() if isinstance(m, Attention) and m.to_k.in_features == 48]
    assert {len(cache) for cache in caches} == {1}  # one cross-attention output for two images
    changes = {"prompt": PAIR, "negative_prompt": None, "guidance_scale": 1.0}
    request = request_for("conv_projection", "euler", 4, **changes)
    assert relative(mixed, written_out_latents(tiny, **request, m=2, k=1, f=1, w=0)) > 1e-2


def test_fault_4_guidance_with_lcm(tiny: StableDiffusionXLPipeline, noise: torch.Tensor) -> None:
    with (
        restored(tiny, _SAMPLERS["euler"]()),
        pytest.raises(RuntimeError, match=r"is invalid for input of size|must match"),
    ):
        package(tiny, 4, noise, lcm=True)  # which error depends on the architecture


def test_fault_5_samplers_with_two_calls_per_step(tiny: StableDiffusionXLPipeline, noise: torch.Tensor) -> None:
    heun = HeunDiscreteScheduler(**_NOISE)
    for reference in (tgate_latents, written_out_latents):
        request = request_for("conv_projection", "euler", 4, scheduler=heun)
        with pytest.raises(ValueError, match="2 times per step"):
            reference(tiny, **request, m=2, k=1, f=1, w=0)

    with restored(tiny, heun), pytest.raises(ValueError, match="not enough values to unpack"):
        package(tiny, 4, noise, gate_step=2)

    with restored(tiny, heun):  # an odd gate: guidance stops, and nothing is ever stored
        package(tiny, 4, noise, gate_step=3)
        cross = [m for m in tiny.unet.modules() if isinstance(m, Attention) and m.to_k.in_features == 48]
        assert cross
        assert all(module.cache is None for module in cross)


def test_fault_6_the_first_step_is_looked_up_by_its_timestep(
    tiny: StableDiffusionXLPipeline, noise: torch.Tensor
) -> None:
    steps = 30
    coarse = DPMSolverMultistepScheduler(**_NOISE, num_train_timesteps=10, use_karras_sigmas=True)
    coarse.set_timesteps(steps)
    assert coarse.timesteps[0] == coarse.timesteps[1]
    with restored(tiny, tiny.scheduler):
        tiny.scheduler = coarse  # in place of the copy with the shim
        with pytest.raises(IndexError):
            package(tiny, steps, noise)
    arguments = ("conv_projection", "dpm_karras", steps)
    assert both(tiny, *arguments, m=2, k=1, f=1, w=0, scheduler=coarse) < TOLERANCE


@pytest.mark.parametrize("change", [{"sp_interval": 0, "gate_step": 4}, {"fi_interval": 0}])
def test_fault_7_intervals_of_zero(
    tiny: StableDiffusionXLPipeline, noise: torch.Tensor, change: dict[str, int]
) -> None:
    with restored(tiny, _SAMPLERS["euler"]()), pytest.raises(ZeroDivisionError):
        package(tiny, 5, noise, **change)


def test_fault_9_processors_are_ignored(tiny: StableDiffusionXLPipeline, noise: torch.Tensor) -> None:
    def refuse(*_arguments: Any, **_options: Any) -> torch.Tensor:
        raise AssertionError("called")

    class Refusing:
        __call__ = staticmethod(refuse)

    processors = tiny.unet.attn_processors
    with restored(tiny, _SAMPLERS["euler"]()):
        for module in tiny.unet.modules():
            if isinstance(module, Attention):
                module.processor = Refusing()
        try:
            assert package(tiny, 3, noise).shape == noise.shape
        finally:
            tiny.unet.set_attn_processor(processors)


def test_several_images_per_prompt_and_embeddings_without_a_negative_are_sound(
    tiny: StableDiffusionXLPipeline,
) -> None:
    pair = latent_noise("conv_projection", 2)
    request = request_for("conv_projection", "euler", 4, prompt=[PROMPT, PROMPT], negative_prompt=None)
    wanted = written_out_latents(tiny, **request, m=2, k=1, f=1, w=0)
    with restored(tiny, _SAMPLERS["euler"]()):
        several = package(tiny, 4, pair, num_images_per_prompt=2, negative_prompt=None)
    assert relative(several, wanted) < TOLERANCE

    with torch.no_grad():
        embeddings, _, pooled, _ = tiny.encode_prompt([PROMPT, PROMPT], do_classifier_free_guidance=False)
    with restored(tiny, _SAMPLERS["euler"]()):
        options = {
            "prompt": None,
            "negative_prompt": None,
            "prompt_embeds": embeddings,
            "pooled_prompt_embeds": pooled,
        }
        embedded = package(tiny, 4, pair, **options)
    assert relative(embedded, wanted) < TOLERANCE


# The checkpoints themselves.


@pytest.mark.parametrize("variant", [*VARIANTS, CONSISTENCY_VARIANT])
def test_checkpoints(checkpoints: dict[str, Path], pipes: Pipes, variant: str) -> None:
    directory, model, pipe = checkpoints[variant], tiny_model(variant), pipes(variant)
    assert directory_bytes(directory) < 6_000_000
    assert (len(sharded_files(directory)) > 1) == (model.max_shard_size is not None)
    assert all((directory / "unet" / name).is_file() for name in sharded_files(directory))
    assert pipe.vae_scale_factor == model.vae_factor
    assert pipe.unet.dtype == torch.float32
    height, width = (size * model.vae_factor for size in model.latent_size)
    with torch.no_grad():
        image = pipe.vae.decode(latent_noise(variant, 1) / pipe.vae.config.scaling_factor).sample
    assert image.shape == (1, 3, height, width)
    assert image.isfinite().all()


def test_a_checkpoint_is_the_same_each_time(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    again = make_tiny_sdxl(tmp_path, "conv_projection")
    for written in sorted(checkpoints["conv_projection"].rglob("*.safetensors")):
        assert written.read_bytes() == (again / written.relative_to(checkpoints["conv_projection"])).read_bytes()


def test_unknown_variant(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are: consistency, conv_projection"):
        make_tiny_sdxl(tmp_path, "no_such")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_2"])
def test_plain_tokenizers_give_the_same_ids(
    checkpoints: dict[str, Path], pipes: Pipes, variant: str, name: str
) -> None:
    reference = getattr(pipes(variant), name)
    length = tiny_model(variant).text_length
    plain = tokenizers.Tokenizer.from_file(str(checkpoints[variant] / name / "tokenizer.json"))
    plain.enable_truncation(length)
    plain.enable_padding(length=length, pad_id=reference.pad_token_id, pad_token=reference.pad_token)
    assert reference.pad_token_id == (0 if name == "tokenizer_2" else reference.eos_token_id)
    for text in ("", PROMPT, "Über-grüne  Äpfel!! 漢字 🙂 it's 42", "a large red circle above " * 30):
        wanted = reference(text, padding="max_length", max_length=length, truncation=True).input_ids
        assert plain.encode(text).ids == wanted
        assert len(wanted) == length
        assert wanted[0] == reference.bos_token_id
