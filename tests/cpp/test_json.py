"""JSON in C++ beside Python: the same texts are taken, and what is taken means the same."""

from __future__ import annotations

import json
import struct
import sys
import time
import unicodedata
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cpp.asking import ask
from tests.fuzz.mutations import mutate_bytes, mutate_json
from tests.hostile import NUMBERS, OTHERS, TEXTS, Raw
from tgate_engine.errors import BundleError, shown
from tgate_engine.reader import check_name, is_word, parse_json

WHOLES = st.integers(-(2**63), 2**63 - 1)
LETTERS = st.characters(exclude_categories=["Cs"])
VALUES = st.recursive(
    st.none() | st.booleans() | WHOLES | st.floats(allow_nan=False, allow_infinity=False) | st.text(LETTERS),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(LETTERS), inner, max_size=4),
    max_leaves=30,
)


@pytest.fixture(scope="session")
def probe(cpp_build: Path) -> Path:
    return cpp_build / "probe-json"


def canonical(value: Any) -> bytes:
    """What a manifest's digest is made of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def verdict(text: bytes) -> bytes:
    """What Python makes of a text, as the probe says it; a refusal without its words."""
    try:
        return b"=" + canonical(parse_json(text))
    except ValueError:
        return b"!"


def same(answer: bytes, wanted: bytes) -> bool:
    return answer == wanted if wanted != b"!" else answer[:1] == b"!" and answer[1:].decode().isprintable()


@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, min_size=5, max_size=40), indent=st.sampled_from([None, 1]))
def test_any_value_is_written_as_python_writes_it(probe: Path, values: list[Any], indent: int | None) -> None:
    texts = [json.dumps(value, indent=indent).encode() for value in values]
    assert ask(probe, "parse", texts) == [b"=" + canonical(value) for value in values]


def test_every_kind_of_float_is_spelt_as_python_spells_it(probe: Path) -> None:
    rng = Random(0)
    numbers = [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(100_000)]
    numbers += [float(f"{rng.uniform(1, 10):.{rng.randrange(17)}f}e{rng.randint(-25, 25)}") for _ in range(100_000)]
    numbers += [float(f"{digits}e{power}") for digits in (1, 9.999999999999999, 1.5) for power in range(-320, 309)]
    numbers += [0.0, -0.0, 5e-324, sys.float_info.max, sys.float_info.min, 2.0**53, 1e15, 1e16, 1e22, 1e23, 0.1 + 0.2]
    numbers = [number for number in numbers if abs(number) <= sys.float_info.max]
    assert ask(probe, "parse", [canonical(numbers)]) == [b"=" + canonical(numbers)]


ODD: tuple[bytes, ...] = (
    *(
        b"",
        b" ",
        b"[1,2",
        b"[1,]",
        b"{,}",
        b'{"a"}',
        b'{"a":}',
        b"01",
        b"1.",
        b".5",
        b"+1",
        b"- 1",
        b"1e",
        b"0x1",
        b"'a'",
    ),
    *(b"NaN", b"[Infinity]", b"-Infinity", b"nan", b"tru", b"True", b"nullnull", b"[] []", b"[]//x", b"/**/[]"),
    *(b"1e999", b"-1e999", b"1e-999", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808"),
    *(b"-9223372036854775809", b"18446744073709551615", b"1" + b"0" * 5000, b"1" + b"0" * 5000 + b".0", b"-0", b"-0.0"),
    *(b"0e5", b"1E+2", b"1e-400", b"0." + b"1" * 5000, b"1" + b"0" * 308 + b"e0", b"1" + b"0" * 309 + b"e0"),
    *(b"[" * 100 + b"]" * 100, b"[" * 101 + b"]" * 101, b"[" * 100_000, b'{"a":' * 100 + b"1" + b"}" * 100),
    *(b'{"a":' * 101 + b"1" + b"}" * 101, b'{"a":' * 100 + b"[]" + b"}" * 100, b"[" * 100 + b"1" + b"]" * 100),
    *(b'{"a":1,"a":1}', b'{"a":1,"\\u0061":2}', b'[{"b":{"c":1,"c":2}}]', b'{"":1,"":2}', b'{"a":1,"A":2}'),
    *(b'"\\ud800"', b'"\\udc00"', b'"\\ud83d\\ude00"', b'"\\ude00\\ud83d"', b'"\\ud83d\\u0041"', b'"\\ud83dx"'),
    *(b'{"\\uD800":1}', b'"\\uDBFF\\uDFFF"', b'"\\u00zz"', b'"\\u12"', b'"\\x41"', b'"\\/"', b'"\\u0000"', b'"a\\'),
    *(
        b'"a\nb"',
        b'"a\tb"',
        b'"a\x00b"',
        b"[]\x00",
        b"[]\x00x",
        b"\x00[]",
        b'"\x7f"',
        b'"\x1f"',
        b"\x0c[]",
        b"\xc2\xa0[]",
    ),
    *(
        b"\xef\xbb\xbf[]",
        b"[]\xef\xbb\xbf",
        b'"\xef\xbb\xbf"',
        b'"\xff"',
        b'"\xc0\xaf"',
        b'"\xed\xa0\x80"',
        b'"\xf4\x90\x80\x80"',
    ),
    *(b'"\xe2\x82"', b'"\xf0\x9f\x98\x80"', b'"\xef\xbf\xbf"', "[]".encode("utf-16"), "[1]".encode("utf-32-le")),
)


def test_texts_that_mean_two_things_or_none(probe: Path) -> None:
    answers = ask(probe, "parse", ODD)
    assert [
        (text[:40], answer[:60]) for text, answer in zip(ODD, answers, strict=True) if not same(answer, verdict(text))
    ] == []
    assert sum(answer.startswith(b"!") for answer in answers) > 60
    assert sum(answer.startswith(b"=") for answer in answers) > 20


def test_changed_texts_mean_the_same_to_both(probe: Path) -> None:
    """Small changes to a text with everything in it; most are no JSON any more, and many still are."""
    rng = Random(1)
    whole = [1, -0.5, 1e300, 'a\u00e4\U0001f600\n\\"', True, None, {"k": [], "l": {}, "m": {"n": [1, 2, 3]}}]
    sound = json.dumps(whole).encode()
    texts = [mutate_json(sound, rng) for _ in range(3000)]
    texts += [
        mutate_bytes(sound, rng, (b"\\ud83d", b"\\ude00", b'"k":1,', b"[[", b"1e5", b"\xed\xa0\x80"))
        for _ in range(6000)
    ]
    answers = ask(probe, "parse", texts)
    odd = [text[:200] for text, answer in zip(texts, answers, strict=True) if not same(answer, verdict(text))]
    assert odd == []
    assert sum(answer.startswith(b"=") for answer in answers) > 1500
    assert sum(answer.startswith(b"!") for answer in answers) > 1500


def test_what_is_put_into_manifests_means_the_same_to_both(probe: Path) -> None:
    values = (*NUMBERS, *TEXTS, *OTHERS)
    texts = [b"[" + (value if isinstance(value, Raw) else json.dumps(value)).encode() + b"]" for value in values]
    answers = ask(probe, "parse", texts)
    assert [text[:40] for text, answer in zip(texts, answers, strict=True) if not same(answer, verdict(text))] == []


@pytest.mark.parametrize(
    "text",
    [
        b"[" + b"0," * (16 << 20) + b"0]",
        b"[" + b"[]," * (11 << 20) + b"0]",
        b"{" + b",".join(b'"%d":0' % i for i in range(3_000_000)) + b"}",
        b'"' + b"\\u0041" * 5_000_000 + b'"',
    ],
    ids=["numbers", "brackets", "keys", "escapes"],
)
def test_a_text_as_long_as_a_manifest_may_be_takes_seconds(probe: Path, text: bytes) -> None:
    began = time.monotonic()
    (answer,) = ask(probe, "parse", [text])
    assert answer[:1] == b"="
    assert time.monotonic() - began < 20


def test_names_are_the_same_to_both(probe: Path) -> None:
    """Every character there is. A Python with a later Unicode prints some that 3.11 does not know."""
    every = [chr(point).encode("utf-8", "surrogatepass") for point in range(sys.maxunicode + 1)]
    answers = [answer == b"yes" for answer in ask(probe, "words", every)]
    other = [hex(point) for point, answer in enumerate(answers) if answer != is_word(chr(point))]
    if unicodedata.unidata_version != "14.0.0":
        other = [point for point in other if answers[int(point, 16)]]
    assert other == []
    texts = ["", "x" * 200, "x" * 201, "ä" * 200, "ä" * 201, " ", "a b", "a\nb", "a\u202eb", "\u3000"]
    assert [answer == b"yes" for answer in ask(probe, "words", map(str.encode, texts))] == [is_word(t) for t in texts]


def is_name(text: str) -> bool:
    try:
        return check_name(text) == text
    except BundleError:
        return False


def test_file_names_are_the_same_to_both(probe: Path) -> None:
    rng = Random(2)
    texts = ["".join(rng.choices("ab0.-_/ \n\\é~", k=rng.randrange(6))) for _ in range(20_000)]
    texts += ["a" * 200, "a" * 201, "a/" * 99 + "a", "../x", "a/../b", "/a", "a/", "a//b", ".a", "a/.b", "-a", "a\x00"]
    answers = ask(probe, "names", map(str.encode, texts))
    assert [t for t, answer in zip(texts, answers, strict=True) if (answer == b"yes") != is_name(t)] == []
    assert answers.count(b"yes") > 500


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(LETTERS, max_size=120), min_size=1, max_size=50))
def test_texts_of_strangers_are_shown_alike(probe: Path, texts: list[str]) -> None:
    if unicodedata.unidata_version == "14.0.0":
        assert [answer.decode() for answer in ask(probe, "shown", map(str.encode, texts))] == [shown(t) for t in texts]
    for answer in ask(probe, "shown", [text.encode()[1:] + b"\xff\x1b" for text in texts]):
        assert shown(answer.decode()) == answer.decode()
