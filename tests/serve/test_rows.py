"""Rows: images of a call become neighbours, nobody is lost, and who stays together stays where they are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgate_engine.errors import RequestError
from tgate_serve.rows import Rows


def laid(tickets: str, count: int) -> Rows:
    """Rows with an image where there is a letter, and none at a dot."""
    rows = Rows(count)
    for row, ticket in enumerate(tickets):
        if ticket != ".":
            rows._put(ord(ticket), row)
    return rows


def follow(rows: Rows, before: dict[int, int], moves: list[tuple[int, int]]) -> None:
    """Make the moves on a board of one's own: each from an image to a row without one, and all where rows say."""
    board = {row: ticket for ticket, row in before.items()}
    for old, new in moves:
        assert old in board
        assert new not in board
        board[new] = board.pop(old)
    assert {ticket: row for row, ticket in board.items()} == {ticket: rows.row(ticket) for ticket in before}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whoever_comes_and_goes(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 9))
    rows, following = Rows(count), 0
    there: list[int] = []
    for _ in range(data.draw(st.integers(1, 30))):
        while len(there) < count and data.draw(st.booleans()):
            row = rows.take(following)
            assert row not in [rows.row(ticket) for ticket in there]
            there.append(following)
            following += 1
        if data.draw(st.booleans()) and there:
            rows.free(there.pop(data.draw(st.integers(0, len(there) - 1))))
        if not there:
            continue
        call: list[int] = data.draw(st.lists(st.sampled_from(there), unique=True, min_size=1))
        before = {ticket: rows.row(ticket) for ticket in there}
        stretch, moves = rows.gather(call)
        follow(rows, before, moves)
        assert sorted(rows.row(ticket) for ticket in call) == list(stretch)
        assert len({old for old, _ in moves}) == len(moves)  # nobody moves twice
        outsiders = [before[ticket] for ticket in there if ticket not in call]
        assert all(old in stretch for old, _ in moves if old in outsiders)
        assert rows.gather(call) == (stretch, [])


@pytest.mark.parametrize(
    ("tickets", "call", "after"),
    [
        ("abcd", "abcd", "abcd."),  # neighbours stay
        ("abcd", "dc", "abcd."),
        ("ab.d", "abd", "abd.."),  # one has left: one moves
        ("abcde", "abe", "abed.c"),  # another one is in the way
        ("abc", "ac", ".bca"),
        ("a.b.c", "abc", "acb..."),
        ("axbyc", "abc", "acby.x"),
    ],
)
def test_what_moves(tickets: str, call: str, after: str) -> None:
    rows = laid(tickets, len(after) - 1)
    rows.gather([ord(ticket) for ticket in call])
    assert "".join("." if ticket is None else chr(ticket) for ticket in rows._tickets) == after


def test_those_that_join_together_lie_together() -> None:
    rows = laid("a.b", 6)
    assert [rows.take(ticket) for ticket in (1, 2, 3)] == [3, 4, 5]
    assert rows.take(4) == 6  # the spare row is as good as any while one is empty
    with pytest.raises(RequestError, match="all 6 rows are taken"):
        rows.take(5)


def test_rows_that_cannot_be() -> None:
    with pytest.raises(RequestError, match="at least 1 row, got 0"):
        Rows(0)
    with pytest.raises(KeyError):
        Rows(1).row(3)
    with pytest.raises(KeyError):
        Rows(1).free(3)
