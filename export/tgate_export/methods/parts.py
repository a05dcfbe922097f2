"""What a method does inside one denoising graph, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from tgate_engine.sampler import Fact


class Part:
    """One method in one graph: the carries that the graph takes and gives for it, and how they meet the network.

    A carry's row j is image j's, [B, ...]. A part is used by one step at a time; :meth:`begin` and :meth:`end` frame
    every call of the network.
    """

    reads: tuple[str, ...] = ()
    """Carries that the graph takes."""
    writes: tuple[str, ...] = ()
    """Carries that the graph gives."""
    facts: Mapping[str, Mapping[str, Fact]] = {}
    """What to tell people of the carries that it gives."""
    ends_text: bool = False
    """Whether conditioning that is attended to has no reader left in the graph."""

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        """While open, the denoiser's modules work with this part."""
        yield

    def begin(self, carried: Mapping[str, Tensor], batch: int, halves: int) -> None:
        """A call of the network begins, for ``batch`` images and 1 or 2 halves of each. ``carried``: :attr:`reads`."""

    def difference(self) -> Tensor | None:
        """The prompt's half less the negative one, [B, ...], where the graph computes the prompt's alone."""
        return None

    def end(self, difference: Tensor | None) -> dict[str, Tensor]:
        """The call has ended: the tensors of :attr:`writes`. ``difference``: that of both halves' outputs, where both
        were computed."""
        return {}
