"""Eager references for the flow-matching families: diffusers' own pipeline, and the methods written out inside it.

The pipeline calls its transformer with both halves of guidance in one batch, the negative one first, and combines what
it gives; Wan's and Qwen-Image's call it twice, the prompt's half first. So a method is written out in the transformer's
place: a call that is to run one half is given that half alone, and what it gives is returned as the two halves whose
combination the pipeline then takes to be that. Wan 2.2's pipeline has two transformers, and says itself when it passes
to the second.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest import mock

import torch
from diffusers.schedulers import scheduling_scm
from torch import Tensor

from tests.oracle import Action, _actions
from tgate_runtime.generators import in_step, noise

SEED = 5

Call = Callable[..., tuple[Tensor]]
Rule = Callable[[int, Call, Call, Call, bool], Tensor]
"""(step, both halves, the negative half, the prompt's half, whether the last step was another network's) to what the
pipeline is given, [2B, ...]."""


def plain_run(pipe: Any, prompt: str, negative: str, *, latents: Tensor, **options: Any) -> Tensor:
    """Final latents of diffusers' own pipeline. ``latents``: noise, [1, ...] as bundles have it. ``options``: others of
    its call."""
    kind = type(pipe).__name__
    if kind != "SanaSprintPipeline":  # which knows no negative prompt
        options["negative_prompt"] = negative
    with torch.no_grad(), drawn_as_engines_do(latents):
        result: Tensor = pipe(prompt=prompt, output_type="latent", latents=held(pipe, latents), **options)[0]
    if kind == "LTXPipeline":
        return cast(Tensor, pipe._unpack_latents(result, *latents.shape[2:]))
    if kind in _PATCHED:
        result = pipe._unpack_latents(result, options["height"], options["width"], pipe.vae_scale_factor)
        return result[:, :, 0] if result.ndim == 5 else result
    return result


@contextmanager
def drawn_as_engines_do(latents: Tensor) -> Iterator[None]:
    """While open, a sampler of Sana-Sprint draws what an engine draws with :data:`SEED`, a step after the other."""
    calls = itertools.count()

    def drawn(*_args: Any, **_options: Any) -> Tensor:
        return torch.from_numpy(noise(SEED, latents.shape[1:], draw=in_step(next(calls))))[None]

    with mock.patch.object(scheduling_scm, "randn_tensor", drawn):
        yield


def held(pipe: Any, latents: Tensor) -> Tensor:
    """Latents as the pipeline's loop holds them: some have them as one row of places."""
    kind = type(pipe).__name__
    if kind == "LTXPipeline":
        return cast(Tensor, pipe._pack_latents(latents))
    if kind == "Cosmos2TextToImagePipeline":
        return latents.unsqueeze(2)  # of one frame
    return cast(Tensor, pipe._pack_latents(latents, *latents.shape)) if kind in _PATCHED else latents


_PATCHED = ("QwenImagePipeline", "FluxPipeline")
"""Whose places are of 2 by 2 latents."""


def gated_run(pipe: Any, prompt: str, negative: str, m: int, k: int, f: int, w: int, **options: Any) -> Tensor:
    """TGATE: every attention is computed at every step; a hook on its output keeps, stores or replaces it."""
    stored: dict[str, Tensor] = {}
    now: dict[str, Action] = {}

    def hook_for(name: str) -> Callable[..., Tensor]:
        kind = "cross" if name.endswith("attn2") else "self"

        def hook(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            action = now[kind]
            if action == "reuse":
                assert stored[name].shape == output.shape
                return stored[name]
            if action == "store":
                stored[name] = output
            if action == "store_mean":
                stored[name] = output.reshape(2, -1, *output.shape[1:]).mean(dim=0)
            return output

        return hook

    guided = type(pipe).__name__ != "SanaSprintPipeline"

    def rule(step: int, both: Call, negative_half: Call, _positive: Call, passed: bool) -> Tensor:
        now["self"], now["cross"] = _actions(step, m=m, k=k, f=f, w=w, guided=guided)
        if passed:  # nothing of what there is is this network's: it computes everything, and keeps what it will need
            stored.clear()
            now["self"], now["cross"] = ("store_mean", "store_mean") if step >= m - 1 else ("store", "compute")
        if step < m or passed or not guided:
            return both()[0]
        return torch.cat([negative_half()[0]] * 2)

    with ExitStack() as stack:
        for name, module in (pair for network in _networks(pipe) for pair in network.named_modules()):
            if name.endswith(("attn1", "attn2")):
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
        stack.enter_context(_ruled(pipe, rule))
        return plain_run(pipe, prompt, negative, **options)


def stopped_run(pipe: Any, prompt: str, negative: str, m: int, **options: Any) -> Tensor:
    """Guidance stopped at m: the prompt's half alone from there on."""

    def rule(step: int, both: Call, _negative: Call, positive: Call, _passed: bool) -> Tensor:
        return both()[0] if step < m else torch.cat([positive()[0]] * 2)

    with _ruled(pipe, rule):
        return plain_run(pipe, prompt, negative, **options)


def delta_run(pipe: Any, prompt: str, negative: str, m: int, **options: Any) -> Tensor:
    """Guidance by its last difference, from m on (guidance_delta)."""
    kept: list[Tensor] = []

    def rule(step: int, both: Call, _negative: Call, positive: Call, passed: bool) -> Tensor:
        if step < m or passed:
            halves = both()[0]
            other, own = halves.chunk(2)
            kept[:] = [own - other]
            return halves
        own = positive()[0]
        return torch.cat([own - kept[0], own])

    with _ruled(pipe, rule):
        return plain_run(pipe, prompt, negative, **options)


def _networks(pipe: Any) -> list[Any]:
    own = [pipe.unet if hasattr(pipe, "unet") else pipe.transformer, getattr(pipe, "transformer_2", None)]
    return [network for network in own if network is not None]


def _half(given: Any, index: int) -> Any:
    """One half of every batch in arguments; a timestep for all is one number."""
    if isinstance(given, dict):
        return {name: _half(value, index) for name, value in given.items()}
    return given.chunk(2)[index] if isinstance(given, Tensor) and given.ndim and len(given) > 1 else given


def forecast_run(
    pipe: Any, prompt: str, negative: str, left_out: Collection[int], scale: float, **options: Any
) -> Tensor:
    """Calls ``left_out``, whose guided outputs are the line through those of the last two that are made."""
    seen: list[tuple[int, Tensor]] = []
    count = 1 if type(pipe).__name__ == "FluxPipeline" else 2  # which knows no halves

    def rule(step: int, both: Call, _negative: Call, _positive: Call, _passed: bool) -> Tensor:
        if step in left_out:
            (before, first), (at, then) = seen[-2:]
            guided = then + (step - at) / (at - before) * (then - first)
            return torch.cat([guided] * count)  # halves alike: guidance changes nothing
        halves = both()[0]
        other, own = halves.chunk(2) if count == 2 else (halves, halves)
        guided = other + scale * (own - other)
        if type(pipe).__name__ == "QwenImagePipeline":  # of each place, as long as the prompt's half
            guided = guided * (own.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))
        seen.append((step, guided))
        return halves

    with _ruled(pipe, rule):
        return plain_run(pipe, prompt, negative, **options)


@contextmanager
def _ruled(pipe: Any, rule: Rule) -> Iterator[None]:
    steps = iter(range(1000))
    waiting: list[tuple[dict[str, Any], Tensor]] = []
    ran: list[int] = []  # the network of each step
    asked: list[Tensor] = []
    texts: list[tuple[Tensor, Tensor]] = []
    encode = pipe.encode_prompt

    def encoded(*args: Any, **options: Any) -> Any:
        texts.append(encode(*args, **options))
        return texts[-1]

    def placed(index: int, network: Any) -> Any:
        """What stands in the place of that network's forward."""
        forward = network.forward

        def ruled(both: Call, negative: Call, positive: Call) -> Tensor:
            ran.append(index)
            return rule(next(steps), both, negative, positive, len(ran) > 1 and ran[-2] != index)

        def run(**options: Any) -> tuple[Tensor]:
            def half(which: int) -> Call:
                return lambda: forward(**_half(options, which))

            return (ruled(lambda: forward(**options), half(0), half(1)),)

        def run_twice(**options: Any) -> tuple[Tensor]:
            if not waiting:  # the prompt's half, which is filled in when the other one is known
                channels = network.config.out_channels or network.config.in_channels
                waiting.append((options, torch.zeros_like(options["hidden_states"][:, :channels])))
                return (waiting[0][1],)
            first, positive = waiting.pop()
            both = {n: torch.cat([v, first[n]]) if isinstance(v, Tensor) else v for n, v in options.items()}
            negative, prompts = run(**both)[0].chunk(2)
            positive.copy_(prompts)
            return (negative,)

        def run_known(**options: Any) -> tuple[Tensor]:
            """The prompt's half first, of which the pipeline makes something before it asks for the other."""
            if asked:
                return (asked.pop(),)
            other = {**options, "encoder_hidden_states": texts[-1][1]}
            each = ("hidden_states", "timestep", "encoder_hidden_states")
            negative, prompts = run(**{**options, **{n: torch.cat([other[n], options[n]]) for n in each}})[0].chunk(2)
            asked.append(negative)
            return (prompts,)

        def run_apart(**options: Any) -> tuple[Tensor]:
            """Texts of their own lengths, which lie in no batch together."""
            if not waiting:
                waiting.append((options, torch.zeros_like(options["hidden_states"])))
                return (waiting[0][1],)
            first, positive = waiting.pop()

            def negative_half() -> tuple[Tensor]:
                return (forward(**options)[0],)

            def positive_half() -> tuple[Tensor]:
                return (forward(**first)[0],)

            def both() -> tuple[Tensor]:
                return (torch.cat([negative_half()[0], positive_half()[0]]),)

            negative, prompts = ruled(both, negative_half, positive_half).chunk(2)
            positive.copy_(prompts)
            return (negative,)

        def run_turned(**options: Any) -> tuple[Tensor]:
            """The prompt's half first, in one batch."""

            def half(which: int) -> Call:
                return lambda: forward(**_half(options, which))

            def both() -> tuple[Tensor]:
                prompts, negative = forward(**options)[0].chunk(2)
                return (torch.cat([negative, prompts]),)

            negative, prompts = ruled(both, half(1), half(0)).chunk(2)
            return (torch.cat([prompts, negative]),)

        def run_alone(**options: Any) -> tuple[Tensor]:
            """No halves at all."""

            def whole() -> tuple[Tensor]:
                return (forward(**options)[0],)

            return (ruled(whole, whole, whole),)

        ways = {
            "WanPipeline": run_twice,
            "WanImageToVideoPipeline": run_twice,
            "Cosmos2TextToImagePipeline": run_known,
            "QwenImagePipeline": run_apart,
            "LuminaPipeline": run_turned,
        }
        ways |= dict.fromkeys(("FluxPipeline", "SanaSprintPipeline"), run_alone)

        def named(*args: Any, **options: Any) -> tuple[Tensor]:
            given = {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **options}
            return ways.get(type(pipe).__name__, run)(**given)

        return named

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(pipe, "encode_prompt", encoded))
        for index, network in enumerate(_networks(pipe)):
            stack.enter_context(mock.patch.object(network, "forward", placed(index, network)))
        yield
