"""Which tokens are merged, against the authors' package and the rule token by token; and the hooks around a layer."""

from __future__ import annotations

from typing import Any

import pytest
import tomesd.merge
import torch
from torch import Tensor, nn

from tests.oracle_tome import groups
from tgate_engine.errors import MethodError
from tgate_export.methods.tome.merge import Matching, MergeTokens, grid_of

GRIDS = [(8, 8), (6, 10), (5, 7), (2, 2), (9, 2), (3, 12)]
RATIOS = [0.1, 0.3, 0.5, 0.75]


def states(rows: int, columns: int, batch: int = 3, channels: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, rows * columns, channels, generator=torch.Generator().manual_seed(seed))


def attended(x: Tensor) -> Tensor:
    """Something that knows no order of tokens, but their number."""
    return torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize(("rows", "columns"), GRIDS)
def test_a_matching_is_the_packages(rows: int, columns: int, ratio: float) -> None:
    told, x = states(rows, columns), states(rows, columns, seed=1)
    merged = int(rows * columns * ratio)
    if merged < 1:
        with pytest.raises(MethodError, match=f"merges none of the {columns} x {rows} tokens"):
            Matching(told, rows, columns, ratio)
        return
    matching = Matching(told, rows, columns, ratio)
    merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(told, columns, rows, 2, 2, merged, no_rand=True)
    assert matching.merge(x).shape == merge(x).shape
    torch.testing.assert_close(matching.unmerge(matching.merge(x)), unmerge(merge(x)))
    torch.testing.assert_close(matching.unmerge(attended(matching.merge(x))), unmerge(attended(merge(x))))
    for own, row, given in zip(told, x, matching.unmerge(matching.merge(x)), strict=True):
        for group in groups(own, rows, columns, ratio):
            torch.testing.assert_close(given[group], row[group].mean(0).expand(len(group), -1))


def test_equal_tokens_are_merged_in_their_order() -> None:
    """A grid of one token throughout: all that look for another find the first cell's, and the first ones merge."""
    matching = Matching(torch.ones(1, 16, 4), 4, 4, 0.5)
    x = states(4, 4, batch=1)
    given = matching.unmerge(matching.merge(x))[0]
    others = [token for token in range(16) if token not in (0, 2, 8, 10)]
    first, last = [0, *others[:8]], [*others[8:], 2, 8, 10]
    torch.testing.assert_close(given[first], x[0, first].mean(0).expand(9, -1))
    assert given[last].equal(x[0, last])


def test_a_token_of_zeros_is_like_no_other() -> None:
    told = states(4, 4, batch=1).abs()
    told[0, 5] = 0
    x = states(4, 4, batch=1, seed=1)
    matching = Matching(told, 4, 4, 0.5)
    assert matching.unmerge(matching.merge(x)).isfinite().all()
    assert matching.unmerge(matching.merge(x))[0, 5].equal(x[0, 5])


def test_half_precision_is_matched_in_full() -> None:
    """In float16 itself most cosines of tokens that are much alike would be one number."""
    told = (1 + states(8, 8) / 200).half()
    x = states(8, 8, seed=1)
    narrow, wide = Matching(told, 8, 8, 0.5), Matching(told.float(), 8, 8, 0.5)
    assert narrow.unmerge(narrow.merge(x)).equal(wide.unmerge(wide.merge(x)))
    assert narrow.merge(x.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("tokens", "height", "width", "grid"),
    [
        (96, 8, 12, (8, 12)),
        (24, 8, 12, (4, 6)),
        (6, 8, 12, (2, 3)),
        (20, 7, 9, (4, 5)),
        (1, 8, 8, (1, 1)),
        (95, 8, 12, None),
        (32, 8, 8, None),
        (100, 8, 12, None),
    ],
)
def test_a_levels_grid(tokens: int, height: int, width: int, grid: tuple[int, int] | None) -> None:
    assert grid_of(tokens, height, width) == grid


class Block(nn.Module):
    """As much of a transformer block as the part knows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn1 = nn.LayerNorm(6), Attention()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.attn1(self.norm(hidden_states), encoder_hidden_states=None)


class Attention(nn.Module):
    seen = 0

    def forward(self, x: Tensor, encoder_hidden_states: object) -> Tensor:
        self.seen = x.shape[1]
        return attended(x)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, sample: Tensor) -> Tensor:
        x = sample.flatten(2).transpose(1, 2)
        return self.second(hidden_states=self.first(x))


def test_a_layer_sees_fewer_tokens_and_gives_as_many() -> None:
    network, part = Network().eval(), MergeTokens(["first.attn1"], 0.5)
    sample = states(5, 7, batch=2).transpose(1, 2).reshape(2, 6, 5, 7)
    x = sample.flatten(2).transpose(1, 2)
    with torch.no_grad():
        whole = network(sample)
        merge, unmerge = tomesd.merge.bipartite_soft_matching_random2d(x, 7, 5, 2, 2, 17, no_rand=True)
        first = x + unmerge(attended(merge(network.first.norm(x))))
        for given in ((sample,), ()):
            with part.attached(network):
                part.begin({}, 2, 1)
                got = network(*given, **({} if given else {"sample": sample}))
                assert part.end(None) == {}
            torch.testing.assert_close(got, first + attended(network.second.norm(first)))
            assert (network.first.attn1.seen, network.second.attn1.seen) == (35 - 17, 35)
        assert network(sample).equal(whole), "the modules are themselves again"
    assert not torch.allclose(got, whole, atol=1e-2)


def test_tokens_of_no_grid_are_refused() -> None:
    network: Any = Network()
    network.forward = lambda sample: network.first(sample.flatten(2).transpose(1, 2)[:, 1:])
    with (
        MergeTokens(["first.attn1"], 0.5).attached(network),
        pytest.raises(
            MethodError,
            match=r"the 63 tokens of first\.attn1 are no level of a U-Net over latents of 8 x 8, and cannot be",
        ),
    ):
        network(torch.zeros(1, 6, 8, 8))
