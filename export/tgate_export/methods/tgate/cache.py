"""Attention outputs as carries (arXiv 2404.02747, section 4).

"Attention output" is what the module returns: after the output projection, before the residual addition. A reused
module is replaced by its carry, so its norm, projections and attention product have no reader left and vanish from the
traced graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from tgate_engine.sampler import Fact
from tgate_export.attention import AttentionSite, Kind
from tgate_export.methods.parts import Part

Kept = Literal["all", "mean", "positive"]
"""What is kept of a module's output: every half that the graph computes, the mean of both, or the prompt's."""

Cached = tuple[tuple[Kind, Kept], ...]
"""Kinds of attention, and what is kept of each."""


def carry_name(kind: Kind, index: int, kept: Kept) -> str:
    """``self.3`` (all halves), ``self.3.mean``, ``self.3.positive``, or ``cross.3``, kept in one way in a bundle."""
    return f"{kind}.{index}" if kept == "all" or kind == "cross" else f"{kind}.{index}.{kept}"


def cache(sites: Sequence[AttentionSite], *, reuses: Cached = (), stores: Cached = ()) -> AttentionCache:
    """The part that reuses and stores the outputs of those kinds of attention."""
    numbered: list[tuple[AttentionSite, int]] = []
    counts: dict[Kind, int] = {"self": 0, "cross": 0, "joint": 0}
    for site in sites:
        numbered.append((site, counts[site.kind]))
        counts[site.kind] += 1

    def named(cached: Cached) -> dict[str, tuple[AttentionSite, Kept]]:
        return {
            carry_name(kind, i, kept): (site, kept)
            for kind, kept in cached
            for site, i in numbered
            if site.kind == kind
        }

    return AttentionCache(named(reuses), named(stores), [site.module for site in sites])


class AttentionCache(Part):
    """Replaces attention modules by carries, and gives the outputs of others as carries.

    A carry is [B, R, ...], where ... is one row of the module's output and R the rows of one image: its halves, and
    within them a video's frames or places; with one row it is [B, ...].
    """

    def __init__(
        self,
        reuses: Mapping[str, tuple[AttentionSite, Kept]],
        stores: Mapping[str, tuple[AttentionSite, Kept]],
        modules: Sequence[str],
    ) -> None:
        self._reuses, self._stores, self._modules = reuses, stores, modules
        self.reads = tuple(reuses)
        self.writes = tuple(stores)
        self.facts: Mapping[str, Mapping[str, Fact]] = {
            name: {"keeps": f"{site.kind}-attention", "of": kept, "module": site.module}
            for name, (site, kept) in stores.items()
        }
        self.ends_text = any(site.kind == "cross" for site, _ in reuses.values())
        self._carried: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._batch, self._halves = 1, 1

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        undo: list[Callable[[], object]] = []
        replaced = {site.module: site.projects for site, _ in self._reuses.values()}
        try:
            for name in self._modules:
                parent_name, _, leaf = name.rpartition(".")
                parent, module = denoiser.get_submodule(parent_name), denoiser.get_submodule(name)
                if name in replaced:
                    setattr(parent, leaf, _Carried(self._carried, name, None if replaced[name] else module.to_out))
                    undo.append(functools.partial(setattr, parent, leaf, module))
                else:
                    undo.append(module.register_forward_hook(self._watch(name)).remove)
            yield
        finally:
            for restore in reversed(undo):
                restore()
            self._carried.clear()
            self._outputs.clear()

    def begin(self, carried: Mapping[str, Tensor], batch: int, halves: int) -> None:
        self._batch, self._halves = batch, halves
        self._outputs.clear()
        for name, (site, kept) in self._reuses.items():
            many = site.rows * (halves if kept == "all" else 1) > 1
            self._carried[site.module] = carried[name].flatten(0, 1) if many else carried[name]

    def end(self, difference: Tensor | None) -> dict[str, Tensor]:
        return {name: self._store(site, kept) for name, (site, kept) in self._stores.items()}

    def _store(self, site: AttentionSite, kept: Kept) -> Tensor:
        output = self._outputs[site.module]  # [B * halves * rows, ...]
        rest = output.shape[1:]
        if kept == "all" or self._halves == 1:
            rows = self._halves * site.rows
            # An output may not be the very tensor of another one, nor of the residual stream.
            return output.reshape(self._batch, rows, *rest) if rows > 1 else output.clone()
        negative, positive = output.reshape(self._batch, 2, site.rows, *rest).unbind(1)
        tensor = (negative + positive) / 2 if kept == "mean" else positive.clone()
        return tensor if site.rows > 1 else tensor.squeeze(1)

    def _watch(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def take(_module: nn.Module, _args: object, output: Tensor) -> None:
            self._outputs[name] = output

        return take


class _Carried(nn.Module):
    """Stands where an attention module was and returns its carry. ``projection``: what the block takes from it."""

    def __init__(self, carried: Mapping[str, Tensor], name: str, projection: nn.Module | None) -> None:
        super().__init__()
        self._carried, self._name = carried, name
        if projection is not None:
            self.to_out = projection  # the block's own, which lies in it

    def forward(self, *_args: object, **_kwargs: object) -> Tensor:
        return self._carried[self._name]
