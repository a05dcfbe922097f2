"""The deep feature as a carry: what a U-Net's last layers take of those below them (arXiv 2312.00858, section 3.2).

In a shallow graph the module that gives it returns the carry. Everything before it has no reader left then, and
vanishes from the traced graph, but for what the last layers' skip connections come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tgate_engine.sampler import Fact
from tgate_export.methods.parts import Part

FEATURE = "deep_feature"
"""The carry, [B, R, C, h, w]: R the rows of one image, its halves of guidance and within them a video's frames; with
one row [B, C, h, w]."""


def carry_name(half: str) -> str:
    """``deep_feature``, of all halves that a graph computes before the gate, or ``deep_feature.negative``."""
    return f"{FEATURE}.{half}" if half else FEATURE


class KeepFeature(Part):
    """Gives the output of ``module`` as a carry. ``rows``: of that output for one half of one image. ``half``: that
    which the graph computes, where other graphs compute both; else empty."""

    def __init__(self, module: str, rows: int, half: str = "") -> None:
        self._module, self._rows = module, rows
        self.writes = (carry_name(half),)
        self.facts: Mapping[str, Mapping[str, Fact]] = {
            self.writes[0]: {"keeps": "what the last layers take of those below", "module": module}
        }
        self._output: Tensor | None = None
        self._batch, self._halves = 1, 1

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        hook = denoiser.get_submodule(self._module).register_forward_hook(self._take)
        try:
            yield
        finally:
            hook.remove()
            self._output = None

    def begin(self, carried: Mapping[str, Tensor], batch: int, halves: int) -> None:
        self._batch, self._halves, self._output = batch, halves, None

    def end(self, difference: Tensor | None) -> dict[str, Tensor]:
        output = self._output  # [B * halves * rows, C, h, w]
        assert output is not None
        rows = self._halves * self._rows
        # An output may not be the very tensor of the residual stream.
        tensor = output.reshape(self._batch, rows, *output.shape[1:]) if rows > 1 else output.clone()
        return {self.writes[0]: tensor}

    def _take(self, _module: nn.Module, _args: object, output: Any) -> None:
        self._output = output if isinstance(output, Tensor) else output[0]


class TakeFeature(Part):
    """Has ``module`` return the carry; ``rows`` and ``half`` are those of :class:`KeepFeature`."""

    def __init__(self, module: str, rows: int, half: str = "") -> None:
        self._module, self._rows = module, rows
        self.reads = (carry_name(half),)
        self._carried: Tensor | None = None

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        # Not replaced by another module: networks ask a block how many residual blocks it has.
        module: Any = denoiser.get_submodule(self._module)
        module.forward = self._give
        try:
            yield
        finally:
            del module.forward  # the class's own comes to light
            self._carried = None

    def begin(self, carried: Mapping[str, Tensor], batch: int, halves: int) -> None:
        feature = carried[self.reads[0]]
        self._carried = feature.flatten(0, 1) if halves * self._rows > 1 else feature

    def _give(self, *_args: object, return_dict: bool = True, **_kwargs: object) -> Tensor | tuple[Tensor]:
        """The carry, in a tuple where diffusers asks for one."""
        assert self._carried is not None
        return self._carried if return_dict else (self._carried,)
