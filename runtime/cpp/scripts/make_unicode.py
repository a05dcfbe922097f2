"""Writes ``runtime/cpp/src/tokenizer/unicode.inc``: what the ``tokenizers`` library knows of every character.

The library is a mixture of packages, each with a version of Unicode of its own, so no published table is right for all
of it. Every property is therefore asked of the library itself, character by character, in the way in which a tokenizer
comes to feel it. Run this when ``constraints.txt`` pins another ``tokenizers``::

    python runtime/cpp/scripts/make_unicode.py
"""

from __future__ import annotations

import base64
import json
import struct
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers
from tokenizers import Regex, normalizers, pre_tokenizers

TARGET = Path(__file__).parents[1] / "src" / "tokenizer" / "unicode.inc"

CHARACTERS = [chr(code) for code in range(0x110000) if not 0xD800 <= code <= 0xDFFF]

CLASSES = ("control", "extend", "spacing", "prepend", "picture", "consonant", "linker", "l", "v", "t", "lv", "lvt")
"""How a character acts on the borders of graphemes. Regional indicators are no class: no text tells whether a pair of
them is one grapheme, see :func:`graphemes`."""

ACUTE, JOINER, COPYRIGHT, KA, VIRAMA = "\u0301", "\u200d", "\u00a9", "\u0915", "\u094d"

Range = tuple[int, int]


def together(normalizer: normalizers.Normalizer, texts: Iterable[str]) -> list[str]:
    """Texts without line ends, each normalized, in one call of the library."""
    return str(normalizer.normalize_str("\n".join(texts))).split("\n")


def only(regex: str) -> set[str]:
    """The characters that a regular expression for one character finds, as the library's own engine reads it."""
    left = normalizers.Replace(Regex(f"[^{regex}]"), "").normalize_str("".join(CHARACTERS))
    return {*left}


def words() -> set[str]:
    """What is part of a word for the pre-tokenizer ``Whitespace``, whose regular expressions are another engine's."""
    pieces = pre_tokenizers.Whitespace().pre_tokenize_str(" ".join(f"a{c}" for c in CHARACTERS))
    return {piece[1] for piece, _ in pieces if len(piece) == 2 and piece[0] == "a"}


def whites() -> set[str]:
    """What parts words for the pre-tokenizer ``WhitespaceSplit``."""
    kept = pre_tokenizers.WhitespaceSplit().pre_tokenize_str("".join(CHARACTERS))
    return {*CHARACTERS} - {c for piece, _ in kept for c in piece}


def changed(normalizer: normalizers.Normalizer, characters: Sequence[str]) -> dict[str, str]:
    """What becomes of those characters that do not stay what they are."""
    rest = [c for c in characters if c != "\n"]
    return {c: to for c, to in zip(rest, together(normalizer, rest), strict=True) if c != to}


def decompositions() -> tuple[dict[str, str], dict[tuple[str, str], str]]:
    """Whole canonical decompositions, and the pairs that are composed again. Hangul is arithmetic and left out."""
    parts = {c: d for c, d in changed(normalizers.NFD(), CHARACTERS).items() if not "\uac00" <= c <= "\ud7a3"}
    several = [c for c, d in parts.items() if len(d) > 1]
    pairs = {}
    back = together(normalizers.NFC(), (parts[c] for c in several))
    heads = together(normalizers.NFC(), (parts[c][:-1] for c in several))
    for c, whole, head in zip(several, back, heads, strict=True):
        if whole == c:
            if len(head) != 1:
                raise SystemExit(f"U+{ord(c):04X} is composed of more than a pair, which the reader does not know")
            pairs[head, parts[c][-1]] = c
    return parts, pairs


def combining(decomposed: Mapping[str, str]) -> dict[str, int]:
    """Canonical combining classes other than 0, found by how the library orders two marks."""
    nfd = normalizers.NFD()
    lowest, highest = "\u0334", "\u0345"  # classes 1 and 240
    rest = [c for c in CHARACTERS if c not in decomposed and c != "\n" and not "\uac00" <= c <= "\ud7a3"]
    above = zip(rest, together(nfd, (c + lowest for c in rest)), strict=True)
    below = zip(rest, together(nfd, (highest + c for c in rest)), strict=True)
    marks = sorted({c for c, text in above if text[0] != c} | {c for c, text in below if text[0] == c} | {highest})
    known: dict[int, str] = {}
    for c in marks:
        if number := unicodedata.combining(c):
            known.setdefault(number, c)

    def stays(text: str) -> bool:
        return bool(nfd.normalize_str(text) == text)

    classes = {}
    for c in marks:
        same = [number for number, other in known.items() if c == other or (stays(c + other) and stays(other + c))]
        if len(same) != 1:
            raise SystemExit(f"U+{ord(c):04X} has a combining class of which Python knows no character")
        classes[c] = same[0]
    return classes


def counting_map() -> bytes:
    """A ``precompiled_charsmap`` that makes one letter of each grapheme of up to 5 bytes, and of each character of a
    longer one: its trie holds every first byte, and the library looks for the shortest beginning. Line ends stay."""
    units = [0] * 768
    units[0] = 0x100 << 10
    for byte in range(1, 256):
        units[0x100 | byte] = byte | 0x100 | 0x300 << 10
        units[0x200 | byte] = 1 << 31 | (2 if byte == 10 else 0)
    return struct.pack("<I768I", 4 * 768, *units) + b"P\0\n\0"


def counting() -> normalizers.Normalizer:
    """The normalizer of :func:`counting_map`, which only a whole tokenizer can be asked for."""
    vocabulary = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    mapped = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(counting_map()).decode()}
    unused: dict[str, None] = dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder"))
    whole: dict[str, object] = {
        "version": "1.0",
        "normalizer": mapped,
        "model": vocabulary,
        "added_tokens": [],
        **unused,
    }
    normalizer: normalizers.Normalizer = tokenizers.Tokenizer.from_str(json.dumps(whole)).normalizer
    return normalizer


def graphemes() -> dict[str, set[str]]:
    """The characters of each of :data:`CLASSES`; those of none stand alone.

    A grapheme is looked up as one only where it has at most 5 bytes. So it does not matter how regional indicators and
    other characters of 4 bytes are joined to what follows: alone or not, they are looked up by themselves.
    """
    count = counting()
    rest = [c for c in CHARACTERS if c not in "\r\n"]

    def where(text: Callable[[str], str], counted: Callable[[str], int]) -> set[str]:
        found = together(count, (text(c) for c in rest))
        return {c for c, line in zip(rest, found, strict=True) if len(line) == counted(c)}

    joined = where(lambda c: f"a{c}", lambda _: 1)
    found = {
        "control": where(lambda c: c + ACUTE * 2, lambda _: 2) | {"\r", "\n"},
        "prepend": where(lambda c: f"{c}a", lambda _: 1),
        "picture": where(lambda c: c + JOINER + COPYRIGHT + ACUTE, lambda _: 4),
        "consonant": where(lambda c: c + VIRAMA + KA + ACUTE, lambda _: 4),
        "linker": where(lambda c: KA + c + KA + ACUTE, lambda _: 4) & joined,
        "extend": where(lambda c: COPYRIGHT + c + JOINER + COPYRIGHT + ACUTE, lambda _: 5) & joined,
    }
    found["spacing"] = joined - found["extend"] - {JOINER}
    before_l = where(lambda c: f"{c}\u1100{ACUTE}", lambda _: 3) - found["prepend"]
    before_v = where(lambda c: f"{c}\u1161{ACUTE}", lambda _: 3) - found["prepend"]
    before_t = where(lambda c: f"{c}\u11a8{ACUTE}", lambda _: 3) - found["prepend"]
    after_lv = where(lambda c: f"\uac00{c}{ACUTE}", lambda _: 3) - joined
    found["l"] = before_l
    found["v"] = (before_v & before_t & after_lv) - before_l
    found["lv"] = (before_v & before_t) - before_l - after_lv
    found["t"] = (before_t & after_lv) - before_v
    found["lvt"] = before_t - before_v - after_lv
    return found


def ranges(characters: Iterable[str]) -> list[Range]:
    """First and last of neighbours, in order."""
    found: list[Range] = []
    for code in sorted(map(ord, characters)):
        if found and found[-1][1] == code - 1:
            found[-1] = (found[-1][0], code)
        else:
            found.append((code, code))
    return found


def table(name: str, kind: str, rows: Iterable[Sequence[int]]) -> str:
    """An array of C++ whose rows are of that kind."""
    lines, line = [], ""
    for row in rows:
        item = "{" + ", ".join(f"{number:#x}" if number > 9 else str(number) for number in row) + "}, "
        if len(line) + len(item) > 119:
            lines.append(line.rstrip())
            line = ""
        line += item
    body = "\n".join([*lines, line.rstrip()])
    return f"constexpr {kind} {name}[] = {{\n{body}\n}};\n"


def lowercase(mapped: Mapping[str, str]) -> list[tuple[int, int, int, int]]:
    """Runs (first, last, every how many, what the first becomes) of characters with one for each."""
    runs: list[list[int]] = []
    for c, to in sorted(mapped.items()):
        code, lower = ord(c), ord(to)
        if runs:
            first, last, step, becomes = runs[-1]
            gap = code - last
            if lower - code == becomes - first and gap in (1, 2) and (last == first or gap == step):
                runs[-1][1:3] = [code, gap]
                continue
        runs.append([code, code, 1, lower])
    return [(first, last, step, becomes) for first, last, step, becomes in runs]


def written() -> str:
    """The whole file."""
    parts, pairs = decompositions()
    lower = changed(normalizers.Lowercase(), CHARACTERS)
    marks = combining(parts)
    classes = graphemes()
    both = [(name, other) for name in CLASSES for other in CLASSES if name < other and classes[name] & classes[other]]
    if {*both} - {("extend", "linker")} or classes["linker"] - classes["extend"]:
        raise SystemExit(f"characters of two classes, which the reader does not know: {both}")
    spaces = only(r"\s")
    if spaces != whites():
        raise SystemExit(
            "the library's regular expressions know other spaces than the rest of it, the reader knows one kind"
        )
    borders = [
        (first, last, CLASSES.index(name) + 1)
        for name in CLASSES
        for first, last in ranges(classes[name] - (classes["linker"] if name == "extend" else set()))
    ]
    ordered = [(*r, k) for k in sorted({*marks.values()}) for r in ranges(c for c in marks if marks[c] == k)]
    longest = max(map(len, parts.values()))
    if longest > 4:
        raise SystemExit(f"a character is decomposed into {longest}, the reader takes 4")
    tables = [
        table("letters", "Range", ranges(only(r"\p{L}"))),
        table("numbers", "Range", ranges(only(r"\p{N}"))),
        table("spaces", "Range", ranges(spaces)),
        table("word_characters", "Range", ranges(words())),
        table("lowercase_runs", "Run", lowercase({c: to for c, to in lower.items() if len(to) == 1})),
        table("lowercase_pairs", "Pair", [(ord(c), *map(ord, to)) for c, to in lower.items() if len(to) > 1]),
        table("combining_classes", "Classed", sorted(ordered)),
        table("decompositions", "Decomposed", [(ord(c), *(map(ord, d.ljust(4, "\0")))) for c, d in parts.items()]),
        table("compositions", "Pair", sorted((ord(a), ord(b), ord(c)) for (a, b), c in pairs.items())),
        table("grapheme_classes", "Classed", sorted(borders)),
    ]
    version = tokenizers.__version__
    head = f"// What tokenizers {version} knows of characters. Written by scripts/make_unicode.py, not by hand.\n"
    return head + "\n" + "\n".join(tables)


if __name__ == "__main__":
    TARGET.write_text(written(), encoding="utf-8")
