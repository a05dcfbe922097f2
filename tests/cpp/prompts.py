"""Texts of every kind that a prompt may be, none of them likely to have been thought of."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

SPECIAL = ("<|startoftext|>", "<|endoftext|>", "</s>", "<pad>", "<unk>", "<s>", "<cat>")

_WORDS = (
    *("a", "red", "circle", "above", "small", "blue", "square", "don't", "we'll", "it's", "star's", "12", "3"),
    *("RING", "Über", "straße", "ﬁ", "½", "ﷺ"),
)
_SPACES = (
    " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\u180e\u200b\ufeff\u2060"
)
_MARKS = "".join(
    chr(code)
    for code in (
        *range(0x300, 0x370),
        *(0x483, 0x591, 0x5B0, 0x64B, 0x670, 0x93C, 0x94D, 0xE38, 0xF71, 0xF72, 0x1DC0, 0x20D0, 0x3099, 0x309A),
        *(0x302A, 0xFE20, 0x1D165, 0x1D16D, 0x334),
    )
)
_EMOJI = ("👨‍👩‍👧", "🏳️‍🌈", "🇩🇪", "🇩", "👍🏽", "©️", "©", "☺", "⭐", "❤️‍🔥", "\u200d")
_INDIC = "कखतन\u094d\u200c\u200dषािअକ\u0b4dମ\u0d4dမ\u1039\u17d2ခ"
_PREPENDED = "\u0600\u06dd\u070f\u08e2\u0d4e"


def prompts(rng: Random, count: int) -> list[str]:
    """Up to twenty parts each, of a few kinds or of all."""
    made = []
    kinds = _kinds(rng)
    for _ in range(count):
        some = rng.sample(kinds, rng.randrange(1, 6)) if rng.random() < 0.6 else kinds
        made.append("".join(rng.choice(some)() for _ in range(rng.choice((1, 2, 3, 5, 8, 20)))))
    return made


def _kinds(rng: Random) -> list[Callable[[], str]]:
    pick = rng.choice

    def any_character() -> str:
        code = pick((rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(0x20000)))
        return chr(code) if not 0xD800 <= code <= 0xDFFF else any_character()

    def hangul() -> str:
        ranges = ((0xAC00, 0xD7A4), (0x1100, 0x1200), (0xA960, 0xA980), (0xD7B0, 0xD800))
        return chr(rng.randrange(*pick(ranges)))

    return [
        lambda: pick(_WORDS),
        lambda: pick(_WORDS).upper(),
        lambda: pick(_SPACES) * rng.randrange(1, 4),
        any_character,
        lambda: any_character() + pick(_MARKS),
        lambda: pick("aeiouAEIOUcsλ") + "".join(pick(_MARKS) for _ in range(rng.randrange(1, 5))),
        lambda: pick(_EMOJI),
        lambda: "".join(pick(_INDIC) for _ in range(rng.randrange(1, 5))),
        hangul,
        lambda: hangul() + hangul(),
        lambda: pick(SPECIAL),
        lambda: pick(SPECIAL).upper(),
        lambda: chr(rng.randrange(32)),
        lambda: chr(rng.randrange(0xE000, 0xE010)),
        lambda: chr(rng.randrange(33, 127)),
        lambda: "".join(pick("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randrange(1, 12))),
        lambda: "'" + pick(("s", "t", "re", "ve", "m", "ll", "d", "S")),
        lambda: " ",
        lambda: " ",
        lambda: "▁",
        lambda: pick(_PREPENDED),
    ]
