"""Bipartite soft matching of tokens around self-attention (arXiv 2303.17604, sections 3 and 4).

The grid's tokens are of two kinds: the first of each 2 x 2 cell is one to merge into, and all others look for the one
of those that is most like them, by the cosine of what enters the transformer block. The ratio's share of all tokens,
those that are most alike, are merged: attention sees the mean of each group in its place. Behind it every token of a
group gets what the group got.

Equal cosines are settled by the order of tokens, lower first, as ONNX has it for ``ArgMax`` and ``TopK``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tgate_engine.errors import MethodError
from tgate_export.methods.parts import Part

CELL = 2
"""The side of a cell, one of whose tokens the others may be merged into."""


_SHORTEST = 1e-12
"""What stands for the length of a token of zeros, which is like no other."""


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int] | None:
    """The rows and columns of a U-Net's level that has so many tokens, for latents of that height and width: each
    level halves both sides, rounded up. None where none has."""
    while height * width > tokens:
        height, width = -(-height // 2), -(-width // 2)
    return (height, width) if height * width == tokens else None


class Matching:
    """Which tokens are merged into which, for one call of one layer.

    ``states``: what tells how much alike they are, [N, T, C], over a grid of ``rows`` and ``columns``, row by row.
    ``ratio``: the share of T that is merged, at most all that may be. Raises :class:`MethodError` for a grid of which
    nothing would be merged.
    """

    def __init__(self, states: Tensor, rows: int, columns: int, ratio: float) -> None:
        cells = itertools.product(range(rows // CELL), range(columns // CELL))
        into = [CELL * (row * columns + column) for row, column in cells]
        others = sorted(set(range(rows * columns)) - set(into))
        merged = min(len(others), int(rows * columns * ratio))
        if not into or merged < 1:
            raise MethodError(
                f"a merge ratio of {ratio:g} merges none of the {columns} x {rows} tokens of the finest "
                "self-attention; export at a larger --size, or take another --method"
            )
        self._merged, self._left = merged, len(others) - merged
        device = states.device
        self._into, self._others = (torch.tensor(tokens, device=device) for tokens in (into, others))
        places = {token: place for place, token in enumerate([*others, *into])}
        self._places = torch.tensor([places[token] for token in range(rows * columns)], device=device)
        # In float32 whatever the network's arithmetic: in a narrower one most cosines of neighbours are the same.
        wide = states.float()
        unit = wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=_SHORTEST)
        seeking, sought = unit.index_select(1, self._others), unit.index_select(1, self._into)
        best, self._partner = (seeking @ sought.transpose(1, 2)).max(dim=-1)  # [N, others]
        self._order = best.sort(dim=-1, descending=True).indices

    def merge(self, states: Tensor) -> Tensor:
        """[N, T, C] to [N, T - merged, C]: the tokens that are left as they are, then a mean for each cell."""
        others, into = states.index_select(1, self._others), states.index_select(1, self._into)
        moving, staying = self._order[:, : self._merged], self._order[:, self._merged :]
        cells = torch.arange(into.shape[1], device=states.device)[None, :, None]
        joins = (self._partner.gather(1, moving)[:, None, :] == cells).to(states.dtype)  # [N, cells, merged]
        # A product in place of a scattered sum: the same on every engine, and in one order.
        means = (into + joins @ _rows(others, moving)) / (1 + joins.sum(-1, keepdim=True))
        return torch.cat([_rows(others, staying), means], dim=1) if self._left else means

    def unmerge(self, states: Tensor) -> Tensor:
        """[N, T - merged, C] to [N, T, C]: to every token what its group got."""
        rank = self._order.sort(dim=-1).indices  # of each token among those that look for another
        others = torch.where(rank < self._merged, self._partner + self._left, rank - self._merged)
        return torch.cat([_rows(states, others), states[:, self._left :]], dim=1).index_select(1, self._places)


def _rows(states: Tensor, index: Tensor) -> Tensor:
    """Of [N, T, C] the rows [N, M] as [N, M, C]."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


class MergeTokens(Part):
    """Merges tokens before the self-attention ``modules``, the first layers of transformer blocks, and unmerges them
    after it. Attached before what keeps or replaces a layer's output."""

    def __init__(self, modules: Sequence[str], ratio: float) -> None:
        self._modules, self._ratio = tuple(modules), ratio
        self._size: tuple[int, int] = (0, 0)

    @contextmanager
    def attached(self, denoiser: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(denoiser.register_forward_pre_hook(self._see, with_kwargs=True).remove)
            for name in self._modules:
                block = denoiser.get_submodule(name.rpartition(".")[0])
                layer = _Layer(self)
                stack.callback(block.register_forward_pre_hook(layer.enter, with_kwargs=True).remove)
                attention = denoiser.get_submodule(name)
                stack.callback(attention.register_forward_pre_hook(layer.merge, with_kwargs=True).remove)
                stack.callback(attention.register_forward_hook(layer.unmerge).remove)
            yield

    def matching(self, states: Tensor) -> Matching:
        """How the tokens of one layer are merged. ``states``: what enters its block, [N, T, C]."""
        grid = grid_of(states.shape[1], *self._size)
        if grid is None:
            raise MethodError(
                f"the {states.shape[1]} tokens of {self._modules[0]} are no level of a U-Net over latents of "
                f"{self._size[1]} x {self._size[0]}, and cannot be merged; take another --method"
            )
        return Matching(states, *grid, self._ratio)

    def _see(self, _module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        self._size = (int(height), int(width))


class _Layer:
    """The hooks of one layer."""

    def __init__(self, part: MergeTokens) -> None:
        self._part = part
        self._states: Tensor | None = None
        self._matching: Matching | None = None

    def enter(self, _block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._states = args[0] if args else kwargs["hidden_states"]

    def merge(
        self, _attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert self._states is not None
        self._matching = self._part.matching(self._states)
        return (self._matching.merge(args[0]), *args[1:]), kwargs

    def unmerge(self, _attention: nn.Module, _args: object, output: Tensor) -> Tensor:
        assert self._matching is not None
        unmerged = self._matching.unmerge(output)
        self._states = self._matching = None
        return unmerged
