"""The difference of both halves of guidance as a carry."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tgate_engine.sampler import Fact
from tgate_export.methods.parts import Part

DIFFERENCE = "guidance_difference"
"""The carry, float32 [B, ...] of the latents' shape."""


class KeepDifference(Part):
    """Gives the difference of a graph that computes both halves."""

    writes = (DIFFERENCE,)
    facts: Mapping[str, Mapping[str, Fact]] = {DIFFERENCE: {"keeps": "prompt's half less the negative one"}}

    def end(self, difference: Tensor | None) -> dict[str, Tensor]:
        assert difference is not None  # its graph runs both halves
        return {DIFFERENCE: difference.clone()}


class ReuseDifference(Part):
    """Guides a graph that computes the prompt's half with the difference of an earlier step."""

    reads = (DIFFERENCE,)

    def begin(self, carried: Mapping[str, Tensor], batch: int, halves: int) -> None:
        self._carried = carried[DIFFERENCE]

    def difference(self) -> Tensor | None:
        return self._carried
