"""One whole denoising step as a module: input scaling, network, guidance, sampler update, carries."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from tgate_engine.control import picture_name, residual_name, scale_name
from tgate_engine.sampler import HISTORY
from tgate_engine.step import (
    GUIDANCE,
    HALVES,
    INPUT_SCALE,
    LATENTS,
    LATENTS_COLUMNS,
    NOISE,
    NOISE_COLUMN,
    OUTPUT,
    OUTPUT_COLUMNS,
    STEP,
    STEP_INPUTS,
    STEP_OUTPUTS,
    TIMESTEP,
    half,
    past,
)
from tgate_export.methods.base import Variant

Denoise = Callable[[nn.Module, Tensor, Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""(denoiser, latents [N, ...], timesteps [N], guidance scales [N], conditioning by name, each [N, ...]) -> model output
[N, ...], of the latents' shape."""

Steer = Callable[[nn.Module, Tensor, Tensor, Tensor, Mapping[str, Tensor], Sequence[Tensor]], Tensor]
"""The same with what ControlNets add, each [N, ...]."""

Look = Callable[[nn.Module, Tensor, Tensor, Mapping[str, Tensor], Tensor], Sequence[Tensor]]
"""(ControlNet, latents [N, ...], timesteps [N], conditioning by name, each [N, ...], pictures [N / halves, 3, H, W]
from 0 to 1, each for all halves of an image) -> what is added to the denoiser's own, each [N, ...]."""

Lengths = Callable[[Tensor], Tensor | None]
"""Model output [B, ...] -> how long it is, numbers that broadcast to it, or None."""


class DenoisingStep(nn.Module):
    """The module of one graph.

    Inputs by name, in the order of ``input_names``: those of :mod:`tgate_engine.step`, conditioning
    ``<name>.negative`` and ``<name>.positive`` [B, ...], the carries that the variant's parts read, and of each
    ControlNet a scale [B] and its residuals by half [B, ...] (:mod:`tgate_engine.control`). Outputs, in the
    order of ``output_names``: ``next_latents``, ``output`` (both float32 [B, ...]) and the carries that the parts
    write. The network runs B or 2B rows: where it runs both halves, each image's negative half lies before its
    positive one, so that an image's rows are together.

    ``ramp``: None, or guidance over the frames, a tensor that broadcasts to [B, ...] with numbers from 0 to 1: the
    scale is then 1 where it is 0, and the step row's where it is 1. ``rescale``: how far the guided output is brought
    back to the deviation of the prompt's half, from 0, not at all, to 1 (arXiv 2305.08891, equations 15 and 16).
    ``beyond``: added to every step row's guidance scale.
    ``lengths``: the guided output is then brought to the lengths of the prompt's half, where that gives any.
    ``controls``: how many residuals each ControlNet has, by its name; where there are any, ``steer`` is called in place
    of ``denoise``.

    The denoiser is borrowed: :meth:`attached` has the parts work in it, and takes them off again.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        denoise: Denoise,
        variant: Variant,
        conditioning: Sequence[str],
        dtype: torch.dtype,
        ramp: Tensor | None = None,
        rescale: float = 0.0,
        lengths: Lengths = lambda _: None,
        beyond: float = 0.0,
        controls: Mapping[str, int] | None = None,
        steer: Steer | None = None,
    ) -> None:
        super().__init__()
        self._ramp = ramp
        self._rescale = rescale
        self._lengths = lengths
        self._beyond = beyond
        self.denoiser = denoiser
        self._denoise = denoise
        self._parts = variant.parts
        self._conditioning = tuple(conditioning)
        self._dtype = dtype
        self._controls = dict(controls or {})
        self._steer = steer
        self._halves = halves_of(variant)
        self.input_names: tuple[str, ...] = (
            *STEP_INPUTS,
            *(half(name, which) for name in self._conditioning for which in self._halves),
            *(carry for part in self._parts for carry in part.reads),
            *(name for net, count in self._controls.items() for name in control_inputs(net, count, self._halves)),
        )
        self.output_names: tuple[str, ...] = (*STEP_OUTPUTS, *(carry for part in self._parts for carry in part.writes))

    @contextmanager
    def attached(self) -> Iterator[DenoisingStep]:
        """While open, the denoiser's modules work with this step's parts."""
        with ExitStack() as stack:
            for part in self._parts:
                stack.enter_context(part.attached(self.denoiser))
            yield self

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.input_names, inputs, strict=True))
        step, latents = named[STEP], named[LATENTS]
        batch, rank = latents.shape[0], latents.dim()
        for part in self._parts:
            part.begin({name: named[name] for name in part.reads}, batch, len(self._halves))

        scaled = (latents * _column(step, INPUT_SCALE, rank)).to(self._dtype)
        scaled, timestep, guidance = (self._repeat(x) for x in (scaled, step[:, TIMESTEP], step[:, GUIDANCE]))
        conditioning = {
            name: _interleave([named[half(name, which)] for which in self._halves]) for name in self._conditioning
        }
        if self._controls:
            assert self._steer is not None
            residuals = self._residuals(named)
            output = self._steer(self.denoiser, scaled, timestep, guidance, conditioning, residuals).float()
        else:
            output = self._denoise(self.denoiser, scaled, timestep, guidance, conditioning).float()
        output, difference = self._guide(output, step, batch)

        # The sampler: x_{i+1} = sum_j a_j x_{i-j} + sum_j b_j e_{i-j} + c z_i (tgate_engine.sampler).
        earlier = [(named[past(LATENTS, j)], named[past(OUTPUT, j)]) for j in range(1, HISTORY + 1)]
        terms = [
            _column(step, LATENTS_COLUMNS.start + j, rank) * x + _column(step, OUTPUT_COLUMNS.start + j, rank) * e
            for j, (x, e) in enumerate([(latents, output), *earlier])
        ]
        terms.append(_column(step, NOISE_COLUMN, rank) * named[NOISE])
        following = functools.reduce(torch.add, terms)

        carries: dict[str, Tensor] = {}
        for part in self._parts:
            carries |= part.end(difference)
        return following, output, *(carries[name] for name in self.output_names[2:])

    def _guide(self, output: Tensor, step: Tensor, batch: int) -> tuple[Tensor, Tensor | None]:
        """The guided output [B, ...], and the difference of both halves where both were computed."""
        scale = _column(step, GUIDANCE, output.dim())
        if self._beyond:
            scale = scale + self._beyond
        if self._ramp is not None:
            scale = 1 + (scale - 1) * self._ramp
        difference: Tensor | None = None
        if len(self._halves) == 2:
            negative, positive = output.reshape(batch, 2, *output.shape[1:]).unbind(1)
            difference = positive - negative
            guided = negative + scale * difference
        else:
            kept = next((d for part in self._parts if (d := part.difference()) is not None), None)
            if kept is None:
                return output, None
            positive = output
            guided = positive + (scale - 1) * kept
        if self._rescale:
            rescaled = guided * (_deviation(positive) / _deviation(guided))
            guided = self._rescale * rescaled + (1 - self._rescale) * guided
        wanted, own = self._lengths(positive), self._lengths(guided)
        if wanted is not None and own is not None:
            guided = guided * (wanted / own)
        return guided, difference

    def _repeat(self, rows: Tensor) -> Tensor:
        return _interleave([rows] * len(self._halves))

    def _residuals(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """What all ControlNets add together, times their scales; nothing of one whose scale is 0, even if what lies in
        its place is not finite."""
        sums: list[Tensor] = []
        for net, count in self._controls.items():
            scale = self._repeat(named[scale_name(net)])
            for index in range(count):
                own = _interleave([named[half(residual_name(net, index), which)] for which in self._halves])
                column = scale.reshape(-1, *[1] * (own.dim() - 1))
                added = torch.where(column != 0, own * column.to(own.dtype), 0.0)
                if index < len(sums):
                    sums[index] = sums[index] + added
                else:
                    sums.append(added)
        return sums


class ControlStep(nn.Module):
    """A ControlNet's module: what a denoising graph takes of it, for the halves of guidance that that graph runs.

    Inputs, in the order of ``input_names``: ``latents``, ``step``, conditioning by half, as
    :class:`DenoisingStep` has them, and the picture, uint8 [B, H, W, 3]. Outputs: those of ``wanted``, residuals by
    half [B, ...]. The picture is looked at once for both halves. The network is borrowed.
    """

    def __init__(
        self,
        net: nn.Module,
        look: Look,
        name: str,
        wanted: Sequence[str],
        conditioning: Sequence[str],
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.net = net
        self._look = look
        self._name = name
        self._conditioning = tuple(conditioning)
        self._dtype = dtype
        self._halves = tuple(which for which in HALVES if any(each.endswith(f".{which}") for each in wanted))
        self.input_names: tuple[str, ...] = (
            LATENTS,
            STEP,
            *(half(each, which) for each in self._conditioning for which in self._halves),
            picture_name(name),
        )
        self.output_names: tuple[str, ...] = tuple(wanted)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.input_names, inputs, strict=True))
        step, latents = named[STEP], named[LATENTS]
        batch, several = latents.shape[0], len(self._halves)
        scaled = (latents * _column(step, INPUT_SCALE, latents.dim())).to(self._dtype)
        scaled, timestep = (_interleave([x] * several) for x in (scaled, step[:, TIMESTEP]))
        conditioning = {
            each: _interleave([named[half(each, which)] for which in self._halves]) for each in self._conditioning
        }
        pixels = (named[picture_name(self._name)].permute(0, 3, 1, 2).float() / 255).to(self._dtype)
        given: dict[str, Tensor] = {}
        for index, residual in enumerate(self._look(self.net, scaled, timestep, conditioning, pixels)):
            rows = residual.reshape(batch, several, *residual.shape[1:]).unbind(1)
            given |= {half(residual_name(self._name, index), w): r for w, r in zip(self._halves, rows, strict=True)}
        return tuple(given[each] for each in self.output_names)


def halves_of(variant: Variant) -> tuple[str, ...]:
    """The halves of guidance that a graph runs, in their order."""
    return HALVES if variant.halves == "both" else (variant.halves,)


def control_inputs(net: str, count: int, halves: Sequence[str]) -> tuple[str, ...]:
    """What a denoising graph of those halves takes of a ControlNet with so many residuals."""
    residuals = (half(residual_name(net, index), which) for index in range(count) for which in halves)
    return (scale_name(net), *residuals)


def _interleave(halves: Sequence[Tensor]) -> Tensor:
    """Halves of [B, ...] each as [halves * B, ...], an image's halves next to each other."""
    return halves[0] if len(halves) == 1 else torch.stack(list(halves), 1).flatten(0, 1)


def _deviation(tensor: Tensor) -> Tensor:
    """The standard deviation of each result, [B, 1, ...]."""
    return tensor.std(dim=tuple(range(1, tensor.dim())), keepdim=True)


def _column(step: Tensor, index: int, rank: int) -> Tensor:
    """Column ``index`` of the step rows, shaped to scale a tensor of that rank, [B, ...]."""
    return step[:, index].reshape(-1, *[1] * (rank - 1))
