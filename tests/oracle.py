"""Eager references for SDXL, which the engine's results are compared with.

Four functions, all on a float32 ``StableDiffusionXLPipeline`` on the CPU, all from unit-variance noise to
final latents:

=================================  =========================================================================
:func:`plain_latents`             diffusers itself: no gating
:func:`tgate_latents`             the paper's own package, ``tgate==1.0.0``
:func:`written_out_latents`       the method written out from its table, independent of the package
:func:`guidance_stopped_latents`  guidance alone is stopped at the gate; every attention is computed
=================================  =========================================================================

Package and written-out reference agree wherever the package is sound. They leave the pipeline as they found
it, and do not touch the scheduler passed in: each call runs on a copy.

Faults of ``tgate==1.0.0``. All but 8 are pinned by a test in ``tests/test_oracle.py``; 8 is from reading the
code, as is what 5 says of two images. :func:`tgate_latents` refuses or works around those that its arguments
can reach:

1.  **It does not clean up.** The patched ``forward`` of each attention module stays, with the last step's
    settings. A plain ``pipe(...)`` afterwards silently reuses the cached cross-attention of the earlier
    prompt (or fails on shapes). Here: forwards restored, ``cache`` attributes deleted, before and after each
    run.
2.  **Its cache survives the call.** ``gate_step=0`` reuses before anything is stored: in a fresh pipeline it
    computes everything, unguided, on the negative prompt; in a used one it silently reuses the previous
    call's attention outputs. Here: a gate below 1 is refused.
3.  **No guidance without ``lcm=True``.** The gate step halves the batch although it is not doubled: one image
    raises, two images are averaged with each other. Here: ``lcm=True`` is passed whenever guidance is off.
4.  **Guidance with ``lcm=True``.** The gate step stores both halves, which do not fit the single half after
    the gate. Not reachable from here.
5.  **Samplers with two network calls per step (Heun).** The step index counts calls, but settings
    change at every second call only. An odd gate skips the gate step: cross-attention is never stored, hence
    never reused. An even gate applies the gate step's settings to the first unguided call as well: one image
    raises, two are averaged with each other. Here: refused; the method's table has no rule for them either.
6.  **``set_begin_index`` is never called**, which diffusers does before its loop. When a sampler rounds its
    first two timesteps to the same integer, the package starts one step late and fails at the end. Rare:
    DPM-Solver++ with Karras sigmas does it when trained on few timesteps, not with 1000 and n ≤ 150. Here:
    the copy of the scheduler has its begin index set each time timesteps are set.
7.  **Intervals of zero** end in ``ZeroDivisionError``, at the first step that needs them. Here: refused.
8.  **IP-Adapter**: text and image embeddings arrive as a tuple, on which the patched attention fails.
9.  **Processors are ignored.** It always computes plain scaled-dot-product attention, whatever processor is
    set. Not worked around: leave the default processor in place.

Not faults, but worth knowing. After the gate the pooled text embedding and the time ids are the negative
prompt's (so :func:`guidance_stopped_latents`, which keeps the positive prompt, is a different trajectory);
with no guidance they are the prompt's own. When f > 1, reuse after the gate takes what was stored *last*: the
mean of both halves at first, and the single half's own output once a step with i mod f = 0 has stored it. The
gate step may lie inside the warm-up (m − 1 ≤ w): it stores all the same. n < m gates nothing, and n = m only
stores. PNDM's extra first call is a full, guided step. Both diffusers and the package interleave the doubled
time ids ([negative, positive, negative, …]) while everything else is stacked by halves; with equal ids, the
only case here, that makes no difference.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import Attention
from tgate import TgateSDXLLoader

Prompt = str | list[str]
Action = Literal["compute", "store", "store_mean", "reuse"]


def plain_latents(
    pipe: StableDiffusionXLPipeline,
    *,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    steps: int,
    guidance_scale: float,
    latents: torch.Tensor,
    scheduler: Any,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Final latents of diffusers itself.

    Args:
        pipe: float32, on the CPU. Left as it was.
        prompt: one prompt, or a list of B prompts.
        negative_prompt: as ``prompt``; None is the empty prompt, or zeros where the checkpoint says so.
        steps: n.
        guidance_scale: guidance is off at 1 and below, and in models with a guidance embedding.
        latents: noise of unit variance [B, 4, h, w]; its size sets the size of the image.
        scheduler: any diffusers scheduler. Copied, not changed.
        generator: noise of stochastic samplers.

    Returns:
        [B, 4, h, w].
    """
    with restored(pipe, scheduler):
        result = pipe(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=latents.clone(),
            generator=generator,
            output_type="latent",
            **_image_size(pipe, latents),
        )
    return result.images


def tgate_latents(
    pipe: StableDiffusionXLPipeline,
    *,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    steps: int,
    guidance_scale: float,
    latents: torch.Tensor,
    scheduler: Any,
    m: int,
    k: int,
    f: int,
    w: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Final latents [B, 4, h, w] of the paper's own package; arguments as for :func:`plain_latents`.

    Args:
        m: the gate step.
        k: the self-attention interval before the gate.
        f: the self-attention interval after the gate.
        w: the warm-up.

    Raises:
        ValueError: a setting on which the package is known to be wrong (see the module's docstring).
    """
    _check(scheduler, m=m, k=k, f=f, w=w)
    with restored(pipe, scheduler):
        result = TgateSDXLLoader(pipe).tgate(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            latents=latents.clone(),
            generator=generator,
            output_type="latent",
            gate_step=m,
            sp_interval=k,
            fi_interval=f,
            warm_up=w,
            lcm=not _guided(pipe, guidance_scale),
            **_image_size(pipe, latents),
        )
    return result.images


def guidance_stopped_latents(
    pipe: StableDiffusionXLPipeline,
    *,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    steps: int,
    guidance_scale: float,
    latents: torch.Tensor,
    scheduler: Any,
    m: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Final latents [B, 4, h, w] when guidance stops after step m − 1 and the prompt's half goes on alone.

    Arguments as for :func:`plain_latents`. No attention output is ever reused, and unlike under the method,
    the network sees the positive prompt's embeddings after the gate, in cross-attention and pooled. Steps
    count from PNDM's second call.
    """
    with restored(pipe, scheduler), torch.no_grad():
        text = _encode(pipe, prompt, negative_prompt, guidance_scale, latents)

        def predict(step: int, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            if text.negative is None or step >= m:
                return _network(pipe, sample, timestep, text.positive)
            return _guided_network(pipe, sample, timestep, text.negative, text.positive, guidance_scale)

        return _denoise(pipe, predict, latents, steps, generator)


def written_out_latents(
    pipe: StableDiffusionXLPipeline,
    *,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    steps: int,
    guidance_scale: float,
    latents: torch.Tensor,
    scheduler: Any,
    m: int,
    k: int,
    f: int,
    w: int,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Final latents [B, 4, h, w] of the method itself, without the package. Arguments: :func:`tgate_latents`.

    Every attention module computes at every step. A hook on its output then keeps it, stores it or replaces
    it by what was stored: slow, and as plain as the method's table.

    Raises:
        ValueError: m, k or f below 1, w below 0, or a sampler with several network calls per step.
    """
    _check(scheduler, m=m, k=k, f=f, w=w)
    # By module name: [2B, tokens, C] before the gate, [B, tokens, C] from the gate on.
    stored: dict[str, torch.Tensor] = {}
    now: dict[str, Action] = {}  # "self" and "cross" -> what this step does

    def hook_for(name: str) -> Callable[..., torch.Tensor]:
        kind = "cross" if name.endswith("attn2") else "self"

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            action = now[kind]
            if action == "reuse":
                if stored[name].shape != output.shape:
                    raise AssertionError(f"{name}: stored {stored[name].shape}, computed {output.shape}")
                return stored[name]
            if action == "store":
                stored[name] = output
            if action == "store_mean":
                unconditional, conditional = output.chunk(2)
                stored[name] = (unconditional + conditional) / 2
            return output

        return hook

    with restored(pipe, scheduler), torch.no_grad():
        text = _encode(pipe, prompt, negative_prompt, guidance_scale, latents)

        def predict(step: int, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            now["self"], now["cross"] = _actions(step, m=m, k=k, f=f, w=w, guided=text.negative is not None)
            if text.negative is None:
                return _network(pipe, sample, timestep, text.positive)
            if step >= m:  # conditioning outside cross-attention is the negative prompt's from here on
                return _network(pipe, sample, timestep, text.negative)
            return _guided_network(pipe, sample, timestep, text.negative, text.positive, guidance_scale)

        hooks = [
            module.register_forward_hook(hook_for(name))
            for name, module in pipe.unet.named_modules()
            if name.endswith(("attn1", "attn2"))
        ]
        try:
            return _denoise(pipe, predict, latents, steps, generator)
        finally:
            for handle in hooks:
                handle.remove()


@contextmanager
def restored(pipe: StableDiffusionXLPipeline, scheduler: Any) -> Iterator[None]:
    """Run the body on a copy of ``scheduler`` and clean attention modules; put everything back afterwards.

    What the package leaves behind is removed before the body as well as after it, in case somebody else
    called the package on this pipeline.
    """
    before, progress = pipe.scheduler, getattr(pipe, "_progress_bar_config", None)
    _remove_patches(pipe)
    pipe.scheduler = _with_begin_index(copy.deepcopy(scheduler))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        _remove_patches(pipe)
        pipe.scheduler = before
        pipe.set_progress_bar_config(**(progress or {}))


def _remove_patches(pipe: StableDiffusionXLPipeline) -> None:
    """Delete what the package sets on instances; the classes' own methods come back to light."""
    vars(pipe).pop("tgate", None)
    for module in pipe.unet.modules():
        if isinstance(module, Attention):
            vars(module).pop("forward", None)
            vars(module).pop("cache", None)


def _with_begin_index(scheduler: Any) -> Any:
    """Make ``set_timesteps`` also set the begin index, as diffusers' loop does and the package's does not.

    The package was written when schedulers looked the first index up by its timestep; that lookup is wrong
    when two timesteps are equal. Only this copy of the scheduler is changed.
    """
    if not hasattr(scheduler, "set_begin_index"):
        return scheduler
    set_timesteps = scheduler.set_timesteps

    # retrieve_timesteps reads the signature to learn whether sigmas are accepted; no caller here passes any.
    def set_timesteps_and_begin(*args: Any, **kwargs: Any) -> None:
        set_timesteps(*args, **kwargs)
        scheduler.set_begin_index(0)

    scheduler.set_timesteps = set_timesteps_and_begin
    return scheduler


def _check(scheduler: Any, *, m: int, k: int, f: int, w: int) -> None:
    if m < 1 or k < 1 or f < 1 or w < 0:
        raise ValueError(f"got m={m}, k={k}, f={f}, w={w}; want m, k, f ≥ 1 and w ≥ 0")
    if getattr(scheduler, "order", 1) != 1:
        raise ValueError(
            f"{type(scheduler).__name__} calls the network {scheduler.order} times per step; the method's "
            "table has no rule for that, and the package is wrong on it. Use plain_latents or "
            "guidance_stopped_latents"
        )


def _guided(pipe: StableDiffusionXLPipeline, guidance_scale: float) -> bool:
    return guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None


def _image_size(pipe: StableDiffusionXLPipeline, latents: torch.Tensor) -> dict[str, int]:
    """Height and width in image pixels."""
    return {
        "height": latents.shape[-2] * pipe.vae_scale_factor,
        "width": latents.shape[-1] * pipe.vae_scale_factor,
    }


def _actions(i: int, *, m: int, k: int, f: int, w: int, guided: bool) -> tuple[Action, Action]:
    """What step ``i`` does to self-attention and to cross-attention: the method's table, row by row."""
    if i < 0:  # PNDM's extra first call
        return "compute", "compute"
    if i < m - 1:  # semantics-planning
        if i < w:
            return "compute", "compute"
        if i == w or i % k == 0:
            return "store", "compute"
        return "reuse", "compute"
    if i == m - 1:  # the gate step; with one half only there is nothing to average
        return ("store_mean", "store_mean") if guided else ("store", "store")
    return ("store" if i % f == 0 else "reuse"), "reuse"  # fidelity-improving


@dataclass(frozen=True)
class _Conditioning:
    """One half of the batch: B rows each."""

    tokens: torch.Tensor  # [B, length, width]
    pooled: torch.Tensor  # [B, pooled width]
    time_ids: torch.Tensor  # [B, 6], image pixels
    guidance: torch.Tensor | None  # [B, width], consistency models only

    def stacked_on(self, other: _Conditioning) -> _Conditioning:
        """[2B, …]: ``other`` first."""
        return _Conditioning(
            tokens=torch.cat([other.tokens, self.tokens]),
            pooled=torch.cat([other.pooled, self.pooled]),
            time_ids=torch.cat([other.time_ids, self.time_ids]),
            guidance=None,  # consistency models are never doubled
        )


@dataclass(frozen=True)
class _Text:
    positive: _Conditioning
    negative: _Conditioning | None  # None without guidance


def _encode(
    pipe: StableDiffusionXLPipeline,
    prompt: Prompt,
    negative_prompt: Prompt | None,
    guidance_scale: float,
    latents: torch.Tensor,
) -> _Text:
    guided = _guided(pipe, guidance_scale)
    tokens, negative_tokens, pooled, negative_pooled = pipe.encode_prompt(
        prompt=prompt,
        negative_prompt=negative_prompt,
        device=latents.device,
        do_classifier_free_guidance=guided,
    )
    batch = latents.shape[0]
    if tokens.shape[0] != batch:
        raise ValueError(f"{tokens.shape[0]} prompts for {batch} latents; pass one prompt for each")
    size = _image_size(pipe, latents)
    original_crop_target = [size["height"], size["width"], 0, 0, size["height"], size["width"]]
    time_ids = torch.tensor([original_crop_target] * batch, dtype=tokens.dtype)
    guidance = None
    if pipe.unet.config.time_cond_proj_dim is not None:
        guidance = pipe.get_guidance_scale_embedding(
            torch.tensor(guidance_scale - 1).repeat(batch), embedding_dim=pipe.unet.config.time_cond_proj_dim
        )
    positive = _Conditioning(tokens, pooled, time_ids, guidance)
    negative = _Conditioning(negative_tokens, negative_pooled, time_ids, None) if guided else None
    return _Text(positive, negative)


def _network(
    pipe: StableDiffusionXLPipeline, sample: torch.Tensor, timestep: torch.Tensor, given: _Conditioning
) -> torch.Tensor:
    """One call of the denoiser: [R, 4, h, w] -> [R, 4, h, w], where ``given`` has R rows."""
    return pipe.unet(
        pipe.scheduler.scale_model_input(sample, timestep),
        timestep,
        encoder_hidden_states=given.tokens,
        timestep_cond=given.guidance,
        added_cond_kwargs={"text_embeds": given.pooled, "time_ids": given.time_ids},
        return_dict=False,
    )[0]


def _guided_network(
    pipe: StableDiffusionXLPipeline,
    sample: torch.Tensor,
    timestep: torch.Tensor,
    negative: _Conditioning,
    positive: _Conditioning,
    guidance_scale: float,
) -> torch.Tensor:
    """One call on both halves, combined: [B, 4, h, w] -> [B, 4, h, w]."""
    both = _network(pipe, torch.cat([sample, sample]), timestep, positive.stacked_on(negative))
    unconditional, conditional = both.chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)


def _denoise(
    pipe: StableDiffusionXLPipeline,
    predict: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    latents: torch.Tensor,
    steps: int,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """The sampler's loop. ``predict(step, sample, timestep)`` sees −1 at PNDM's extra first call."""
    scheduler = pipe.scheduler
    scheduler.set_timesteps(steps, device=latents.device)
    extra_calls = max(len(scheduler.timesteps) - steps * scheduler.order, 0)
    options = pipe.prepare_extra_step_kwargs(generator, 0.0)
    sample = latents * scheduler.init_noise_sigma
    for call, timestep in enumerate(scheduler.timesteps):
        prediction = predict(call - extra_calls, sample, timestep)
        sample = scheduler.step(prediction, timestep, sample, **options, return_dict=False)[0]
    return sample
