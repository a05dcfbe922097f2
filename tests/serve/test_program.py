"""Where two images meet, beside all the ways that there are, tried one by one on strings."""

from __future__ import annotations

from itertools import takewhile

from hypothesis import example, given
from hypothesis import strategies as st

from tgate_serve.program import WORTH, Left, Programs, meeting

GRAPHS = st.text("fsc", min_size=1, max_size=14)


def left(programs: Programs, graphs: str) -> Left:
    made = programs.left(graphs)
    assert made is not None
    return made


def together(one: str, other: str) -> int:
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


@given(lead=GRAPHS, other=GRAPHS)
@example(lead="ccccc", other="fccccc")  # one step for five
@example(lead="cccc", other="fcccc")  # and for four
@example(lead="fffff", other="fsfffff")  # one at once, or five after two
@example(lead="c" * 12, other="fc" + "s" + "c" * 12)
def test_images_meet_where_most_is_gained(lead: str, other: str) -> None:
    programs = Programs()
    gains = {behind: together(lead, other[behind:]) - WORTH * behind for behind in range(len(other))}
    best = max(gains.values())
    met = meeting(left(programs, lead), left(programs, other))
    if best <= 0:
        assert met is None
    else:
        assert met is not None
        assert met.gain == best == gains[met.behind]


@given(first=GRAPHS, second=GRAPHS)
def test_the_same_to_do_is_the_same_object(first: str, second: str) -> None:
    programs = Programs()
    one, other = left(programs, first), left(programs, second)
    assert (one is other) == (first == second)
    for at in range(len(first)):
        assert (one.graph, one.steps) == (first[at], len(first) - at)
        assert one is programs.left(first[at:])
        if one.then is None:
            assert at == len(first) - 1
        else:
            one = one.then


def test_nothing_to_do() -> None:
    assert Programs().left(()) is None
