"""The deep feature as a carry, on a network of three modules: what is kept, and what stands in for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tgate_export.methods.deepcache.feature import KeepFeature, TakeFeature


class Layer(nn.Module):
    """Gives a tuple where diffusers asks for one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, 1, generator=torch.Generator().manual_seed(seed)))
        self.calls = 0

    def forward(self, states: Tensor, return_dict: bool = True) -> Tensor | tuple[Tensor]:
        self.calls += 1
        output = states * self.weight
        return output if return_dict else (output,)


class Stack(nn.Module):
    def __init__(self, *, tuples: bool) -> None:
        super().__init__()
        self.layers, self._tuples = nn.ModuleList([Layer(0), Layer(1), Layer(2)]), tuples

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layers:
            states = layer(states, return_dict=False)[0] if self._tuples else layer(states)
        return states


def inputs(batch: int, halves: int, rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch * halves * rows, 3, 2, 2, generator=generator)


@pytest.mark.parametrize("tuples", [False, True])
@pytest.mark.parametrize(("halves", "rows"), [(1, 1), (2, 1), (1, 4), (2, 4)])
def test_what_a_full_call_keeps_a_shallow_one_takes(tuples: bool, halves: int, rows: int) -> None:
    network, batch = Stack(tuples=tuples), 3
    keep, take = KeepFeature("layers.1", rows), TakeFeature("layers.1", rows)
    states = inputs(batch, halves, rows)
    with torch.no_grad():
        with keep.attached(network):
            keep.begin({}, batch, halves)
            full = network(states)
            carried = keep.end(None)
        assert list(carried) == list(keep.writes) == list(take.reads) == list(keep.facts) == ["deep_feature"]
        kept = carried["deep_feature"]
        assert kept.shape == ((batch, halves * rows, 3, 2, 2) if halves * rows > 1 else (batch, 3, 2, 2))
        want = states * network.layers[0].weight * network.layers[1].weight
        torch.testing.assert_close(kept.reshape(-1, 3, 2, 2), want)
        assert kept[1].reshape(-1, 3, 2, 2).equal(want[halves * rows : 2 * halves * rows]), "row j is image j's"

        before = network.layers[1].calls
        with take.attached(network):
            take.begin(carried, batch, halves)
            shallow = network(inputs(batch, halves, rows, seed=1))  # nothing of it reaches the end
            assert take.end(None) == {}
        torch.testing.assert_close(shallow, full)
        assert network.layers[1].calls == before
        assert not torch.equal(network(inputs(batch, halves, rows, seed=1)), full), "the module is itself again"


def test_a_carry_of_one_half_has_a_name_of_its_own() -> None:
    assert KeepFeature("x", 1, "negative").writes == TakeFeature("x", 1, "negative").reads == ("deep_feature.negative",)
    assert not KeepFeature("x", 1).ends_text


def test_a_kept_tensor_is_none_of_the_networks() -> None:
    network, keep = Stack(tuples=False), KeepFeature("layers.2", 1)
    with torch.no_grad(), keep.attached(network):
        keep.begin({}, 2, 1)
        output = network(inputs(2, 1, 1))
        kept = keep.end(None)["deep_feature"]
    assert torch.equal(kept, output)
    assert kept is not output
