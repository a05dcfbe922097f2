"""Attention outputs as carries, on a network of three attention modules: what is stored, and what stands in for it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tgate_export.attention import AttentionSite, observe
from tgate_export.methods.tgate.cache import AttentionCache, Cached, Kept, cache

WIDTH, TOKENS, WORDS = 8, 3, 2


class Attending(nn.Module):
    """Self, cross, self."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = Attention(WIDTH, heads=2)
            self.text = Attention(WIDTH, cross_attention_dim=6, heads=2)
            self.last = Attention(WIDTH, heads=2)

    def forward(self, states: Tensor, text: Tensor) -> Tensor:
        for module, others in ((self.first, None), (self.text, text), (self.last, None)):
            states = states + module(states, encoder_hidden_states=others)
        return states


@pytest.fixture
def network() -> Attending:
    return Attending()


def inputs(batch: int, halves: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """States and text of B images, an image's halves together and within them its frames."""
    generator = torch.Generator().manual_seed(seed)
    many = batch * halves * rows
    return torch.randn(many, TOKENS, WIDTH, generator=generator), torch.randn(many, WORDS, 6, generator=generator)


def sites(network: Attending, rows: int = 1) -> tuple[AttentionSite, ...]:
    return observe(network, lambda: network(*inputs(1, 1, rows)))


def outputs_of(network: Attending, states: Tensor, text: Tensor) -> dict[str, Tensor]:
    """What each module returns, watched by hooks of this test's own."""
    seen: dict[str, Tensor] = {}
    hooks = [
        getattr(network, name).register_forward_hook(lambda _m, _i, output, name=name: seen.update({name: output}))
        for name in ("first", "text", "last")
    ]
    with torch.no_grad():
        network(states, text)
    for hook in hooks:
        hook.remove()
    return seen


def stored(
    network: Attending, part: AttentionCache, batch: int, halves: int, states: Tensor, text: Tensor
) -> dict[str, Tensor]:
    with torch.no_grad(), part.attached(network):
        part.begin({}, batch, halves)
        network(states, text)
        return part.end(None)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("halves", "kept"), [(1, "all"), (2, "all"), (2, "mean"), (2, "positive")])
def test_what_is_kept_lies_image_by_image(network: Attending, halves: int, kept: Kept, rows: int) -> None:
    batch = 3
    states, text = inputs(batch, halves, rows)
    raw = outputs_of(network, states, text)
    carries = stored(
        network,
        cache(sites(network, rows), stores=(("self", kept), ("cross", kept))),
        batch,
        halves,
        states,
        text,
    )
    suffix = "" if kept == "all" else f".{kept}"
    assert list(carries) == [f"self.0{suffix}", f"self.1{suffix}", "cross.0"]
    for name, module in (("self.0", "first"), ("self.1", "last"), ("cross.0", "text")):
        carry = carries[name if name == "cross.0" else f"{name}{suffix}"]
        inner = halves * rows if kept == "all" else rows
        assert carry.shape == ((batch, inner, TOKENS, WIDTH) if inner > 1 else (batch, TOKENS, WIDTH))
        for image in range(batch):  # by hand: the rows of one image, cut out of the module's output
            own = raw[module][image * halves * rows : (image + 1) * halves * rows]
            negative, positive = own[:rows], own[-rows:]
            expected = {"all": own, "mean": 0.5 * negative + 0.5 * positive, "positive": positive}[kept]
            assert torch.allclose(carry[image].reshape(expected.shape), expected, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("halves", "kept"), [(1, "all"), (2, "all"), (1, "mean"), (1, "positive")])
def test_what_was_kept_stands_in_for_the_module(network: Attending, halves: int, kept: Kept, rows: int) -> None:
    """The modules replaced give the carry whatever their input; the others still compute."""
    batch, places = 2, sites(network, rows)
    source = inputs(batch, halves if kept == "all" else 2, rows, seed=1)
    own: Cached = (("self", kept), ("cross", kept))
    carries = stored(network, cache(places, stores=own), batch, len(source[0]) // batch // rows, *source)
    expected = {"first": "self.0", "last": "self.1", "text": "cross.0"}
    suffix = "" if kept == "all" else f".{kept}"
    now = inputs(batch, halves, rows, seed=2)
    for kinds in ((("self", kept),), (("cross", kept),), own):
        part = cache(places, reuses=kinds)
        read = {name: carries[name] for name in part.reads}
        replaced = {m for m, n in expected.items() if any(n.startswith(kind) for kind, _ in kinds)}
        states = now[0]
        with torch.no_grad(), part.attached(network):
            part.begin(read, batch, halves)
            result = network(*now)
        with torch.no_grad():  # the residual stream, added up again
            for name, module in (("first", network.first), ("text", network.text), ("last", network.last)):
                if name in replaced:
                    carry = carries[expected[name] if name == "text" else expected[name] + suffix]
                    states = states + carry.reshape(states.shape)
                else:
                    states = states + module(states, encoder_hidden_states=now[1] if name == "text" else None)
        assert torch.allclose(result, states, atol=1e-6)


def test_a_network_is_given_back_as_it_was(network: Attending) -> None:
    before = dict(network.named_modules())
    part = cache(sites(network), reuses=(("cross", "mean"),), stores=(("self", "all"),))

    def fail() -> None:
        with part.attached(network):
            assert network.text is not before["text"]
            raise RuntimeError("on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert dict(network.named_modules()) == before
    assert not any(module._forward_hooks for module in network.modules())


def test_a_stored_tensor_is_no_other_ones(network: Attending) -> None:
    """A graph's outputs are buffers of their own."""
    states, text = inputs(1, 1, 1)
    part = cache(sites(network), stores=(("self", "all"), ("cross", "all")))
    with torch.no_grad(), part.attached(network):
        part.begin({}, 1, 1)
        network(states, text)
        carries = part.end(None)
        seen = [tensor.data_ptr() for tensor in part._outputs.values()]
    assert not {tensor.data_ptr() for tensor in carries.values()} & set(seen)


@pytest.mark.parametrize(
    ("reuses", "ends"),
    [
        ((("self", "all"),), False),
        ((("cross", "mean"),), True),
        ((("self", "mean"), ("cross", "mean")), True),
        ((), False),
    ],
)
def test_text_ends_where_cross_attention_is_reused(network: Attending, reuses: Cached, ends: bool) -> None:
    assert cache(sites(network), reuses=reuses).ends_text is ends


def test_numbers_count_each_kind_in_the_order_it_runs() -> None:
    kinds: Sequence[str] = ("cross", "self", "self", "cross", "self")
    places = tuple(AttentionSite(f"m{i}", kind) for i, kind in enumerate(kinds))  # type: ignore[arg-type]
    part = cache(places, stores=(("self", "positive"), ("cross", "positive")))
    assert {name: facts["module"] for name, facts in part.facts.items()} == {
        "self.0.positive": "m1",
        "self.1.positive": "m2",
        "self.2.positive": "m4",
        "cross.0": "m0",
        "cross.1": "m3",
    }
