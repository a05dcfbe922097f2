"""Texts of strangers in messages: readable, one line, and nothing a terminal obeys."""

import unicodedata

import pytest

from tgate_engine.errors import RequestError, shown


def test_every_character_that_is_not_to_be_seen_is_escaped() -> None:
    """Over all of Unicode: whatever is left is no control, format, surrogate, private or line character."""
    kept = set(shown("".join(map(chr, range(0x110000))), most=10**8))
    categories = {unicodedata.category(c) for c in kept}
    assert not {c for c in categories if c.startswith("C")} | categories & {"Zl", "Zp"}
    assert {"Lo", "Lu", "Mn", "So", "Zs"} <= categories
    "".join(kept).encode("utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red circle", "a red circle"),
        ("漢字\u3000é 🙂 c:\\new", "漢字\u3000é 🙂 c:\\new"),
        ("\x1b]0;owned\x07\x1b[2Jx", r"\x1b]0;owned\x07\x1b[2Jx"),
        ("two\r\nlines\u2028three", r"two\r\nlines\u2028three"),
        ("a\u202eexe.png\u2066\u200b\ufeff", r"a\u202eexe.png\u2066\u200b\ufeff"),
        ("\x9b31m", r"\x9b31m"),
        ("\ud800 half", r"\ud800 half"),
        ("\U000e0041", r"\U000e0041"),
        (None, "None"),
        (b"\x1b", r"b'\x1b'"),
    ],
)
def test_shown(text: object, expected: str) -> None:
    assert shown(text) == expected


def test_what_is_too_long_is_cut() -> None:
    assert shown("x" * 80) == "x" * 80
    assert shown("x" * 81) == "x" * 79 + "…"
    assert shown("\x1b" * 10**7, 20) == r"\x1b" * 4 + r"\x1" + "…"


def test_numbers_and_nesting_that_python_does_not_write_out() -> None:
    nested: list[object] = []
    for _ in range(10**5):
        nested = [nested]
    assert shown(10**5000) == "a whole number of 16610 bits"
    assert shown([10**5000]) == "a list that cannot be written out"
    assert shown(nested) == "a list that cannot be written out"
    assert shown(-(10**40)) == f"-{10**40}"


def test_the_text_of_an_error_is_one_line_whoever_wrote_it() -> None:
    """The prompt of a request is not the only text that is quoted: the catch is at the end of the way."""
    error = RequestError("the model evil\x1b[2J\nname is not there")
    assert str(error) == r"the model evil\x1b[2J\nname is not there"
