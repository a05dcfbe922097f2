"""Guidance with its last difference, written out in eager PyTorch over diffusers' modules and schedulers.

The rule, from the description of the method and from nothing of the package under test:

=========  ==================================================================================================
step       output of the network, and what attention does
=========  ==================================================================================================
i < m      e = e_neg + s (e_pos - e_neg), both halves computed; d = e_pos - e_neg is noted
i >= m     e = e_pos + (s - 1) d, the prompt's half computed alone; d is step m - 1's
=========  ==================================================================================================

``g`` above 0 refreshes: of the steps i >= m, every g-th (i - m = g - 1, 2 g - 1, ...) is as those before m, notes its
d, and every attention module computes and is kept anew.

``attention``, with (k, f, w), adds TGATE: before the gate self-attention is reused as the paper has it, and from the
gate on every cross-attention module returns what it gave at step m - 1 for the *prompt's half*, not the mean of both;
self-attention after the gate is that of the prompt's half as well, computed again where i mod f = 0.

As in ``tests/oracle.py`` every attention module computes at every step, and a hook on its output keeps it or replaces
it. Steps count from PNDM's second call. SDXL and the families of ``tests/oracle_families.py`` work alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor

from tests import oracle, oracle_families
from tests.oracle_families import Pipeline, Request, _denoise, _Model, _model, _network, _run

Attention = tuple[int, int, int]
"""k, f and w."""


def delta_latents(
    pipe: Pipeline,
    request: Request,
    scheduler: Any,
    m: int,
    *,
    attention: Attention | None = None,
    rescale: float = 0.0,
    g: int = 0,
) -> Tensor:
    """Final latents [B, ...] where guidance goes on with the difference of step ``m`` - 1.

    ``attention``: None computes every attention; (k, f, w) reuses it as well. ``rescale``: diffusers'
    ``guidance_rescale``. The request must be guided.
    """
    kept: dict[str, Tensor] = {}  # by module: outputs of both halves [2B, ...], or of the prompt's [B, ...]
    now: list[int] = []
    differences: list[Tensor] = []

    def both_at(step: int) -> bool:
        return step < m or (g > 0 and (step - m) % g == g - 1)

    def hook_for(name: str, kind: str) -> Callable[..., Tensor]:
        def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            k, f, w = attention or (1, 1, 0)
            if now[-1] >= m and both_at(now[-1]):
                kept[name] = output.chunk(2)[1]
                return output
            match _use(kind, now[-1], m=m, k=k, f=f, w=w):
                case "keep":
                    kept[name] = output
                case "keep the prompt's half":
                    kept[name] = output.chunk(2)[1]
                case "reuse":
                    assert kept[name].shape == output.shape
                    return kept[name]
            return output

        return hook

    with _run(pipe, request, scheduler), torch.no_grad(), ExitStack() as stack:
        model = (
            _sdxl(pipe, request)
            if oracle_families._kind(pipe) == "StableDiffusionXLPipeline"
            else _model(pipe, request)
        )
        assert model.negative is not None
        negative_half, scale = model.negative, model.scale
        assert isinstance(scale, float)

        def predict(step: int, sample: Tensor, timestep: Tensor) -> Tensor:
            now.append(step)
            if both_at(step):
                both = {n: torch.cat([negative_half[n], model.positive[n]]) for n in model.positive}
                negative, positive = model.network(torch.cat([sample, sample]), timestep, both).chunk(2)
                differences.append(positive - negative)
                guided = negative + scale * (positive - negative)
            else:
                positive = model.network(sample, timestep, model.positive)
                guided = positive + (scale - 1) * differences[-1]
            return rescale_noise_cfg(guided, positive, guidance_rescale=rescale) if rescale else guided

        if attention is not None:
            for name, module in _network(pipe).named_modules():
                if name.endswith(("attn1", "attn2")) and module is not None:
                    kind = "cross" if name.endswith("attn2") else "self"
                    stack.callback(module.register_forward_hook(hook_for(name, kind)).remove)
        return _denoise(pipe, request, predict)


def _use(kind: str, i: int, *, m: int, k: int, f: int, w: int) -> str:
    """What step ``i`` does with the outputs of one kind of attention."""
    if i < 0:  # PNDM's extra first call
        return "compute"
    if i == m - 1:
        return "keep the prompt's half"
    if i >= m:
        return "reuse" if kind == "cross" or i % f else "keep"
    if kind == "cross" or i < w:
        return "compute"
    return "keep" if i == w or i % k == 0 else "reuse"


def _sdxl(pipe: Pipeline, request: Request) -> _Model:
    """SDXL's network with the conditioning of both halves, each of B rows."""
    text = oracle._encode(pipe, *oracle_families._prompts(request), request.guidance_scale, request.latents)
    assert text.negative is not None

    def network(sample: Tensor, timestep: Tensor, half: oracle_families.Half) -> Tensor:
        output: Tensor = pipe.unet(
            sample,
            timestep,
            encoder_hidden_states=half["tokens"],
            added_cond_kwargs={"text_embeds": half["pooled"], "time_ids": half["ids"]},
            return_dict=False,
        )[0]
        return output

    positive, negative = (
        {"tokens": half.tokens, "pooled": half.pooled, "ids": half.time_ids} for half in (text.positive, text.negative)
    )
    return _Model(network, positive, negative, request.guidance_scale)
