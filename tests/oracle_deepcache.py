"""DeepCache, alone and under the paper's gate: both authors' packages, and the rule written out over diffusers.

=========================  ==========================================================================================
:func:`helper_latents`     ``DeepCache==0.1.1``: ``DeepCacheSDHelper`` on diffusers' own pipeline
:func:`loader_latents`     ``tgate==1.0.0``: its loaders that put TGATE over that helper, for SD and SDXL
:func:`cached_latents`     the rule written out, independent of both packages
=========================  ==========================================================================================

The rule. Step i of n; a full call computes the network and notes what enters its last residual block from below; a
shallow one has that entrance from the last full call. (Here the whole network is computed even so, and the noted tensor
put in its place by a hook on that block's input: slow, and nothing is left out by mistake.)

=========  ==================================================================================================
step       what it does
=========  ==================================================================================================
i < m      full where i mod c = 0, and at m - 1; cross-attention's mean of both halves is noted at m - 1
i >= m     full where (i - m) mod c = 0; one half, guidance off, cross-attention reused
=========  ==================================================================================================

Without a gate m is never reached, and m - 1 is no step of its own.

Faults of the packages, with diffusers 0.42, pinned in ``tests/whole/test_deepcache.py``:

*   **PNDM.** The helper finds the step by the place of its timestep in the scheduler's list, and PNDM's second timestep
    is there twice: its third call counts as the second, and is never a full one. Here the lead-in call is full, as
    everywhere in the method, and the steps are counted after it. The package is refused with PNDM.
*   **No guidance.** As in ``tests/oracle_families.py``, the gate step halves a batch that is not doubled. Refused.
*   **They do not clean up.** ``disable`` leaves the modules' own methods behind as attributes of instances, and tgate's
    patches stay as ever. Here both are removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import tgate
import torch
from DeepCache import DeepCacheSDHelper
from torch import Tensor

from tests import oracle, oracle_families
from tests.oracle_families import Pipeline, Request, _call, _denoise, _extra_calls, _Model, _model, _run

_LOADERS: dict[str, Callable[..., Pipeline]] = {
    "StableDiffusionPipeline": tgate.TgateSDDeepCacheLoader,
    "StableDiffusionXLPipeline": tgate.TgateSDXLDeepCacheLoader,
}


def helper_latents(pipe: Pipeline, request: Request, scheduler: Any, c: int, branch: int = 0) -> Tensor:
    """Final latents of diffusers' pipeline with the helper of DeepCache's authors, at interval ``c``."""
    _refuse_lead_in(scheduler, request)
    with _run(pipe, request, scheduler), _clean(pipe):
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=c, cache_branch_id=branch)
        helper.enable()
        latents: Tensor = pipe(**_call(pipe, request))[0]
        return latents


def loader_latents(pipe: Pipeline, request: Request, scheduler: Any, m: int, c: int, branch: int = 0) -> Tensor:
    """Final latents of the loaders of TGATE's authors. Raises ValueError where they are known to be wrong."""
    _refuse_lead_in(scheduler, request)
    if request.guidance_scale <= 1:
        raise ValueError("without guidance the package halves the batch all the same; use cached_latents")
    with _run(pipe, request, scheduler), _clean(pipe):
        loaded = _LOADERS[type(pipe).__name__](pipe, cache_interval=c, cache_branch_id=branch)
        latents: Tensor = loaded.tgate(**_call(pipe, request), gate_step=m).images
        return latents


def cached_latents(pipe: Pipeline, request: Request, scheduler: Any, c: int, *, m: int | None = None) -> Tensor:
    """Final latents of the rule written out, [B, ...]. ``m``: None is without a gate."""
    noted: dict[str, Tensor] = {}
    now: dict[str, bool] = {}  # "full", "gated", "gate": what this call is
    shallowest = pipe.unet.conv_in.out_channels

    def enter(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states, *rest = inputs
        deep = states.shape[1] - shallowest  # channels: those from below come first, then the skip connection's
        if now["full"]:
            noted["deep"] = states[:, :deep]
            return inputs
        assert noted["deep"].shape == states[:, :deep].shape
        return (torch.cat([noted["deep"], states[:, deep:]], dim=1), *rest)

    def hook_for(name: str) -> Callable[..., Tensor]:
        def attend(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            if now["gated"]:
                return noted[name]
            if now["gate"]:
                noted[name] = output if model.negative is None else sum(output.chunk(2)) / 2
            return output

        return attend

    with _run(pipe, request, scheduler), torch.no_grad(), ExitStack() as stack:
        sdxl = type(pipe).__name__ == "StableDiffusionXLPipeline"
        model = _sdxl(pipe, request) if sdxl else _model(pipe, request)
        stack.callback(pipe.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(enter).remove)
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                stack.callback(module.register_forward_hook(hook_for(name)).remove)

        def predict(step: int, sample: Tensor, timestep: Tensor) -> Tensor:
            gated = m is not None and step >= m
            since = step - m if m is not None and gated else step
            now.update(gated=gated, gate=step + 1 == m, full=step < 0 or since % c == 0 or step + 1 == m)
            if model.negative is None:
                return model.network(sample, timestep, model.positive)
            if gated:
                video = type(pipe).__name__ == "StableVideoDiffusionPipeline"
                return model.network(sample, timestep, model.positive if video else model.negative)
            return model.guide(sample, timestep)

        return _denoise(pipe, request, predict)


def full_calls(pipe: Pipeline, request: Request, scheduler: Any, c: int) -> list[int]:
    """The network calls in which the helper computes the middle of the network; PNDM's as well."""
    calls: list[int] = []
    with _run(pipe, request, scheduler), _clean(pipe), ExitStack() as stack:
        count = iter(range(10**6))
        stack.callback(pipe.unet.conv_in.register_forward_hook(lambda *_: calls.append(-next(count) - 1)).remove)
        middle = pipe.unet.mid_block.resnets[0]
        stack.callback(middle.register_forward_hook(lambda *_: calls.append(-calls.pop() - 1)).remove)
        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=c)
        helper.enable()
        pipe(**_call(pipe, request))
    return [call for call in calls if call >= 0]


@contextmanager
def _clean(pipe: Pipeline) -> Iterator[None]:
    try:
        yield
    finally:
        for module in pipe.unet.modules():
            vars(module).pop("forward", None)


def _refuse_lead_in(scheduler: Any, request: Request) -> None:
    if _extra_calls(scheduler, request.steps):
        raise ValueError("the package miscounts PNDM's doubled timestep; use cached_latents")


def _sdxl(pipe: Pipeline, request: Request) -> _Model:
    """SDXL's network and conditioning; that of a consistency model, too."""
    text = oracle._encode(pipe, *oracle_families._prompts(request), request.guidance_scale, request.latents)

    def network(sample: Tensor, timestep: Tensor, half: oracle_families.Half) -> Tensor:
        output: Tensor = pipe.unet(
            sample,
            timestep,
            encoder_hidden_states=half["tokens"],
            timestep_cond=half.get("guidance"),
            added_cond_kwargs={"text_embeds": half["pooled"], "time_ids": half["ids"]},
            return_dict=False,
        )[0]
        return output

    def tensors(half: oracle._Conditioning) -> dict[str, Tensor]:
        named = {"tokens": half.tokens, "pooled": half.pooled, "ids": half.time_ids}
        return named if half.guidance is None else named | {"guidance": half.guidance}

    negative = None if text.negative is None else tensors(text.negative)
    return _Model(network, tensors(text.positive), negative, request.guidance_scale)
