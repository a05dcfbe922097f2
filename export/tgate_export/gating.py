"""A denoiser becomes one module per phase: attention outputs turn into inputs and outputs.

This is the method itself (arXiv 2404.02747, section 4), applied to any network that attends by diffusers'
``Attention``. A reused module is replaced by its carry, so its norm, projections and attention product have no reader
left and vanish from the traced graph. "Attention output" is what the module returns: after the output projection,
before the residual addition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.plan import FULL, REUSE_BOTH, REUSE_CROSS, REUSE_SELF, UNGUIDED
from tgate_engine.rows import GUIDANCE, INPUT_SCALE, LATENTS, NOISE, OUTPUTS, TIMESTEP
from tgate_engine.sampler import HISTORY

Kind = Literal["self", "cross"]
Halves = Literal["both", "negative", "positive"]
Denoise = Callable[[nn.Module, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(denoiser, latents [N, ...], timesteps [N], guidance scales [N], conditioning by name, each [N, ...]) -> model output
[N, ...], of the latents' shape."""


@dataclass(frozen=True)
class AttentionSite:
    """An attention module that the method gates: its qualified name in the denoiser, and its kind."""

    module: str
    kind: Kind


def observe(denoiser: nn.Module, call: Callable[[], object]) -> tuple[AttentionSite, ...]:
    """The attention modules that ``call`` runs, in their order, each by what it attends to.

    ``call`` runs the denoiser once; parameters and inputs may be fake. Names tell nothing: with diffusers'
    ``only_cross_attention`` the module called attn1 attends to the text as well. Raises :class:`ExportError` for
    modules whose output is no attention output that a step could reuse.
    """
    kinds: dict[str, Kind] = {}

    def watch(name: str, module: Attention) -> Callable[..., None]:
        def look(_module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> None:
            if name in kinds:
                raise ExportError(f"attention module {name!r} runs more than once in a step, and cannot be reused")
            if module.residual_connection or module.added_kv_proj_dim is not None or module.spatial_norm is not None:
                raise ExportError(
                    f"attention module {name!r} is none of a transformer block (it adds its own residual, attends to "
                    "text and picture at once, or normalises by place), and cannot be gated; its block type is that "
                    "of another architecture"
                )
            attended = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
            kinds[name] = "self" if attended is None else "cross"

        return look

    hooks = [
        module.register_forward_pre_hook(watch(name, module), with_kwargs=True)
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention)
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(AttentionSite(name, kind) for name, kind in kinds.items())


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What one denoising graph computes.

    ``halves``: which halves of classifier-free guidance it runs. ``reuses``: the attention outputs that are
    inputs, ``stores`` those that are outputs, each as (kind, mean): the mean of both halves, or the halves as they
    are. Cross-attention is only ever carried as its mean.
    """

    name: str
    halves: Halves
    reuses: tuple[tuple[Kind, bool], ...] = ()
    stores: tuple[tuple[Kind, bool], ...] = ()


def variants(*, guided: bool, fidelity_reuse: bool, after_gate: Halves = "negative") -> tuple[Variant, ...]:
    """The graphs of a bundle.

    ``guided``: with classifier-free guidance; without it every graph runs the prompt's half, and there is no
    guidance to stop. ``after_gate``: the half that goes on after the gate, whose conditioning outside
    cross-attention stays. ``fidelity_reuse``: plans with f > 1 are wanted, which reuse self-attention after the gate.
    """
    both: Halves = "both" if guided else "positive"
    one: Halves = after_gate if guided else "positive"
    # With one half there is no mean: self-attention after the gate is carried as it was before it.
    after: tuple[tuple[Kind, bool], ...] = (("self", guided),) if fidelity_reuse else ()
    means = after if guided else ()
    graphs = [
        Variant(name=FULL, halves=both, stores=(("self", False), ("cross", True), *means)),
        Variant(name=REUSE_SELF, halves=both, reuses=(("self", False),)),
        Variant(name=REUSE_CROSS, halves=one, reuses=(("cross", True),), stores=after),
    ]
    if fidelity_reuse:
        graphs.append(Variant(name=REUSE_BOTH, halves=one, reuses=(*after, ("cross", True))))
    if guided:
        graphs.append(Variant(name=UNGUIDED, halves="positive"))
    return tuple(graphs)


def carry_name(kind: Kind, index: int, mean: bool) -> str:
    """``self.3`` (both halves), ``self.3.mean`` (their mean) or ``cross.3`` (always the mean)."""
    return f"{kind}.{index}.mean" if kind == "self" and mean else f"{kind}.{index}"


@dataclass
class _Taps:
    """What the attention modules of one call are given and what they gave."""

    given: dict[str, Tensor] = field(default_factory=dict)
    taken: dict[str, Tensor] = field(default_factory=dict)


class _Carried(nn.Module):
    """Stands where an attention module was and returns its carry."""

    def __init__(self, taps: _Taps, module: str) -> None:
        super().__init__()
        self._taps, self._module = taps, module

    def forward(self, *_args: object, **_kwargs: object) -> Tensor:
        return self._taps.given[self._module]


class GatedStep(nn.Module):
    """One whole denoising step as a module: input scaling, network, guidance, sampler update, carries.

    Inputs by name, in the order of ``input_names``: ``latents`` [B, ...] (of a picture [B, C, h, w], of a video with
    its frames), its three predecessors ``latents.1`` … ``latents.3``, the last three outputs ``output.1`` …
    ``output.3``, the step's ``noise`` of the same shape, the step row [B, 12] (:mod:`tgate_engine.rows`),
    conditioning ``<name>.negative`` and ``<name>.positive`` [B, ...], and the carries that the variant reuses.
    Outputs, in the order of ``output_names``: ``next_latents``, ``output`` (both float32 [B, ...]) and the carries
    it stores, whose first dimensions are multiples of B.

    ``ramp``: None, or guidance over the frames, a tensor that broadcasts to [B, ...] with numbers from 0 to 1: the
    scale is then 1 where it is 0, and the step row's where it is 1. ``rescale``: how far the guided output is brought
    back to the deviation of the prompt's half, from 0, not at all, to 1 (arXiv 2305.08891, equations 15 and 16).

    The denoiser is borrowed: :meth:`attached` puts the taps on it and takes them off again.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        denoise: Denoise,
        sites: Sequence[AttentionSite],
        variant: Variant,
        conditioning: Sequence[str],
        dtype: torch.dtype,
        ramp: Tensor | None = None,
        rescale: float = 0.0,
    ) -> None:
        super().__init__()
        self._ramp = ramp
        self._rescale = rescale
        self.denoiser = denoiser
        self._denoise = denoise
        self._variant = variant
        self._conditioning = tuple(conditioning)
        self._dtype = dtype
        self._taps = _Taps()
        self._index: dict[str, tuple[Kind, int]] = {}
        counts: dict[Kind, int] = {"self": 0, "cross": 0}
        for site in sites:
            self._index[site.module] = (site.kind, counts[site.kind])
            counts[site.kind] += 1
        halves = ("negative", "positive") if variant.halves == "both" else (variant.halves,)
        self._halves = halves
        self._read = {
            module: carry_name(kind, i, mean)
            for wanted, mean in variant.reuses
            for module, (kind, i) in self._index.items()
            if kind == wanted
        }
        self.input_names: tuple[str, ...] = (
            "latents",
            *(f"latents.{j}" for j in range(1, HISTORY + 1)),
            *(f"output.{j}" for j in range(1, HISTORY + 1)),
            "noise",
            "step",
            *(f"{name}.{half}" for name in self._conditioning for half in halves),
            *self._read.values(),
        )
        self._stored = [
            (module, carry_name(kind, i, mean), mean)
            for wanted, mean in variant.stores
            for module, (kind, i) in self._index.items()
            if kind == wanted
        ]
        self.output_names: tuple[str, ...] = ("next_latents", "output", *(name for _, name, _ in self._stored))

    @contextmanager
    def attached(self) -> Iterator[GatedStep]:
        """While open, the denoiser's attention modules read from and write to this step."""
        undo: list[Callable[[], object]] = []
        try:
            for module_name in self._index:
                parent_name, _, leaf = module_name.rpartition(".")
                parent = self.denoiser.get_submodule(parent_name)
                module = self.denoiser.get_submodule(module_name)
                if module_name in self._read:
                    setattr(parent, leaf, _Carried(self._taps, module_name))
                    undo.append(functools.partial(setattr, parent, leaf, module))
                else:
                    undo.append(module.register_forward_hook(self._tap(module_name)).remove)
            yield self
        finally:
            for restore in reversed(undo):
                restore()
            self._taps.given.clear()
            self._taps.taken.clear()

    def _tap(self, module_name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def take(_module: nn.Module, _args: object, output: Tensor) -> None:
            self._taps.taken[module_name] = output

        return take

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.input_names, inputs, strict=True))
        step = named["step"]
        self._taps.given = {module: named[carry] for module, carry in self._read.items()}
        self._taps.taken = {}

        latents = named["latents"]
        rank = latents.dim()
        scaled = (latents * _column(step, INPUT_SCALE, rank)).to(self._dtype)
        timestep, guidance = step[:, TIMESTEP], step[:, GUIDANCE]
        both = len(self._halves) == 2
        if both:
            scaled, timestep, guidance = (torch.cat([x, x]) for x in (scaled, timestep, guidance))
        conditioning = {
            name: torch.cat([named[f"{name}.{half}"] for half in self._halves])
            if both
            else named[f"{name}.{self._halves[0]}"]
            for name in self._conditioning
        }
        output = self._denoise(self.denoiser, scaled, timestep, guidance, conditioning).float()
        if both:
            negative, positive = _halves(output)
            scale = _column(step, GUIDANCE, rank)
            if self._ramp is not None:
                scale = 1 + (scale - 1) * self._ramp
            output = negative + scale * (positive - negative)
            if self._rescale:
                rescaled = output * (_deviation(positive) / _deviation(output))
                output = self._rescale * rescaled + (1 - self._rescale) * output

        # The sampler: x_{i+1} = sum_j a_j x_{i-j} + sum_j b_j e_{i-j} + c z_i (tgate_engine.sampler).
        past = [(named[f"latents.{j}"], named[f"output.{j}"]) for j in range(1, HISTORY + 1)]
        terms = [
            _column(step, LATENTS.start + j, rank) * x + _column(step, OUTPUTS.start + j, rank) * e
            for j, (x, e) in enumerate([(latents, output), *past])
        ]
        terms.append(_column(step, NOISE, rank) * named["noise"])
        following = functools.reduce(torch.add, terms)

        return following, output, *(self._store(module, mean) for module, _, mean in self._stored)

    def _store(self, module: str, mean: bool) -> Tensor:
        taken = self._taps.taken[module]
        if mean and len(self._halves) == 2:
            negative, positive = _halves(taken)
            return (negative + positive) / 2
        # An output may not be the very tensor of another one, nor of the residual stream.
        return taken.clone()


def _halves(doubled: Tensor) -> tuple[Tensor, ...]:
    """[2B, ...] to two of [B, ...], for a B that may be symbolic."""
    return doubled.unflatten(0, (2, -1)).unbind(0)


def _deviation(tensor: Tensor) -> Tensor:
    """The standard deviation of each result, [B, 1, ...]."""
    return tensor.std(dim=tuple(range(1, tensor.dim())), keepdim=True)


def _column(step: Tensor, index: int, rank: int) -> Tensor:
    """Column ``index`` of the step rows, shaped to scale a tensor of that rank, [B, ...]."""
    return step[:, index].reshape(-1, *[1] * (rank - 1))
