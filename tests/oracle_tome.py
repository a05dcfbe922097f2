"""Token merging (arXiv 2303.17604): its authors' package, and the rule written out over diffusers' networks.

====================  ===============================================================================================
:func:`patched`       ``tomesd==0.1.3`` on diffusers' own pipeline, or under the loaders of ``tgate``; not at random
:func:`written_out`   the rule, token by token, independent of the package and of :mod:`tgate_export`
====================  ===============================================================================================

While either is open, whatever runs the pipeline (the functions of ``tests/oracle.py`` and ``tests/oracle_families.py``)
runs it with merged tokens.

The rule, for every self-attention at the finest level that has any, and for each row of its batch by itself: one token
of each 2 x 2 cell, its first, may be merged into; each other one has as its partner the one of those nearest to it by
the cosine of what enters the block. Of all others, those with the largest cosine are merged, as many as the ratio says
of all tokens. Attention gets the mean of a partner and of all that are merged into it, and what it gives for that
is what each of them has.

Where both meet: with k = 1 the loaders of ``tgate`` never reuse self-attention, and the packages go together. With k
above 1 they keep what attention gave for merged tokens, and would hand it out by another step's partners; the
rule keeps what each token has. Refused here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import tomesd
import torch
from torch import Tensor

Pipeline = Any


@contextmanager
def patched(pipe: Pipeline, ratio: float, *, k: int = 1) -> Iterator[None]:
    """The authors' package. Raises ValueError for k above 1, with which ``tgate`` and it do not go together."""
    if k > 1:
        raise ValueError("tgate would hand out merged tokens by another step's partners; use written_out")
    # What a level is called there: by how many times its grid's side is smaller than that of the latents.
    tomesd.apply_patch(pipe, ratio=ratio, max_downsample=2 ** _finest(pipe)[0], use_rand=False)
    try:
        yield
    finally:
        tomesd.remove_patch(pipe)


@contextmanager
def written_out(pipe: Pipeline, ratio: float) -> Iterator[None]:
    """The rule. Hooks that others put on attention modules later see each token's output."""
    level, names = _finest(pipe)
    with ExitStack() as stack:
        size: list[int] = []

        def look(_module: Any, args: tuple[Tensor, ...]) -> None:
            size[:] = [-(-side // 2**level) for side in args[0].shape[2:]]

        stack.callback(pipe.unet.register_forward_pre_hook(look).remove)
        for name in names:
            layer = _Layer(size, ratio)
            block = pipe.unet.get_submodule(name.rpartition(".")[0])
            stack.callback(block.register_forward_pre_hook(layer.enter).remove)
            attention = pipe.unet.get_submodule(name)
            stack.callback(attention.register_forward_pre_hook(layer.group).remove)
            stack.callback(attention.register_forward_hook(layer.hand_out).remove)
        yield


class _Layer:
    """The hooks of one layer. ``size``: height and width of its grid, known when it runs."""

    def __init__(self, size: list[int], ratio: float) -> None:
        self._size, self._ratio = size, ratio

    def enter(self, _block: Any, args: tuple[Tensor, ...]) -> None:
        height, width = self._size
        self._groups = [groups(row, height, width, self._ratio) for row in args[0]]

    def group(self, _attention: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (states,) = args
        rows = zip(states, self._groups, strict=True)
        return (torch.stack([torch.stack([row[group].mean(0) for group in found]) for row, found in rows]),)

    def hand_out(self, _attention: Any, _args: object, output: Tensor) -> Tensor:
        given = output.new_empty(len(output), self._size[0] * self._size[1], output.shape[-1])
        for row, outputs, found in zip(given, output, self._groups, strict=True):
            for group, each in zip(found, outputs, strict=True):
                row[group] = each
        return given


def groups(told: Tensor, height: int, width: int, ratio: float) -> list[list[int]]:
    """The tokens [T] that attention sees as one, by what tells how alike they are, [T, C]."""
    assert len(told) == height * width
    cosines = torch.nn.functional.cosine_similarity(told[:, None], told[None], dim=-1).tolist()
    targets = [
        row * width + column for row in range(0, height - 1, 2) for column in range(0, width - 1, 2)
    ]  # of whole cells
    others = [token for token in range(height * width) if token not in targets]
    partner = {token: max(targets, key=lambda target: cosines[token][target]) for token in others}
    others.sort(key=lambda token: -cosines[token][partner[token]])
    merged = others[: int(height * width * ratio)]
    together = {target: [target] for target in targets}
    for token in merged:
        together[partner[token]].append(token)
    return [*([token] for token in others[len(merged) :]), *together.values()]


def _finest(pipe: Pipeline) -> tuple[int, list[str]]:
    """The finest level with self-attention, 0 being that of the latents, and the names of its modules."""
    levels = len(pipe.unet.config.block_out_channels)
    names = [name for name, _ in pipe.unet.named_modules() if name.endswith(".attn1")]
    for level in range(levels):
        own = [n for n in names if n.startswith((f"down_blocks.{level}.", f"up_blocks.{levels - 1 - level}."))]
        if own:
            return level, own
    raise ValueError("no level but the last has self-attention")
