"""Typed access to JSON: names, numbers, and errors that say where."""

from __future__ import annotations

from typing import Any

import pytest

from tgate_engine.errors import BundleError
from tgate_engine.reader import Reader, check_name, is_word, parse_json, unique


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/x", "a//b", ".x", "a/", "", "a b", "a\\b", "ä", "a\n", "..", "a/.b", "a\x00b"]
)
def test_names_that_are_not_plain(name: str) -> None:
    with pytest.raises(BundleError, match="is not a plain name inside the bundle"):
        check_name(name)


@pytest.mark.parametrize(
    "name", ["x", "a/b.json", "weights.safetensors", "_a-b.c", "0", "full-832x1216-batch-1-4.onnx"]
)
def test_plain_names(name: str) -> None:
    assert check_name(name) == name


def reader(**data: Any) -> Reader:
    return Reader(data, "here")


def test_what_is_read_is_what_is_there() -> None:
    r = reader(text="x", whole=3, number=0.5, flag=True, list=[1, 2], table={"a": {"n": 1}}, strings={"a": "b"})
    assert (r.text("text"), r.whole("whole"), r.number("number"), r.flag("flag")) == ("x", 3, 0.5, True)
    assert r.number("whole") == 3.0
    assert r.whole_tuple("list") == (1, 2)
    assert r.strings("strings") == {"a": "b"}
    assert r.table("table", lambda inner: inner.whole("n")) == {"a": 1}
    assert reader(list=[{"n": 1}, {"n": 2}]).items("list", lambda inner: inner.whole("n")) == (1, 2)
    assert r.choice("text", ("w", "x")) == "x"


@pytest.mark.parametrize(
    ("read", "says"),
    [
        (lambda: Reader([], "here"), "here: expected an object, got list"),
        (lambda: reader().text("a"), "here: 'a' is missing"),
        (lambda: reader(a=3).text("a"), "here.a: expected str, got 3"),
        (lambda: reader(a=True).whole("a"), "here.a: expected int, got True"),
        (lambda: reader(a=0).whole("a", 1), "here.a: expected at least 1, got 0"),
        (lambda: reader(a="3").number("a"), "here.a: expected int or float, got '3'"),
        (lambda: reader(a=True).number("a"), "here.a: expected int or float, got True"),
        (lambda: reader(a=float("inf")).number("a"), "here.a: expected a finite number, of float32, got inf"),
        (lambda: reader(a=10**400).number("a"), "here.a: expected a finite number, of float32, got 1000"),
        (lambda: reader(a=1).flag("a"), "here.a: expected bool, got 1"),
        (lambda: reader(a="../x").name("a"), "'../x' is not a plain name"),
        (lambda: reader(a="z").choice("a", ("x", "y")), "here.a: expected one of x, y, got 'z'"),
        (lambda: reader(a=[1, 0]).whole_tuple("a"), "here.a: expected positive whole numbers, got [1, 0]"),
        (lambda: reader(a=[True]).whole_tuple("a"), "here.a: expected positive whole numbers, got [True]"),
        (lambda: reader(a={"b": 1}).strings("a"), "here.a: expected text values, got {'b': 1}"),
        (lambda: reader(a=[{"n": 1}, {}]).items("a", lambda r: r.whole("n")), "here.a[1]: 'n' is missing"),
        (lambda: reader(a={"b": {}}).table("a", lambda r: r.whole("n")), "here.a.b: 'n' is missing"),
        (lambda: reader(a={"b": 1}).table("a", lambda r: r.whole("n")), "here.a.b: expected an object, got int"),
    ],
)
def test_what_is_refused_says_where(read: Any, says: str) -> None:
    with pytest.raises(BundleError) as error:
        read()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_what_to_do_is_the_files_own() -> None:
    """What a bundle says is what a bundle needs; another file's reader says another thing, inside of it too."""
    for advice in ("export the bundle again", "save it again"):
        r = Reader({"a": [{}], "b": {"c": {}}}, "here", advice) if "save" in advice else reader(a=[{}], b={"c": {}})
        for read in (
            lambda r=r: r.text("x"),
            lambda r=r: r.items("a", lambda inner: inner.flag("n")),
            lambda r=r: r.table("b", lambda inner: inner.whole("n")),
            lambda advice=advice: Reader(1, "here", advice),
        ):
            with pytest.raises(BundleError, match=f"; {advice}$"):
                read()


def test_long_values_are_cut_in_errors() -> None:
    with pytest.raises(BundleError) as error:
        reader(a="x" * 10_000).whole("a")
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "has the key 'c' twice"),
        (b"NaN", "NaN is no number of JSON"),
        (b"[Infinity]", "Infinity is no number of JSON"),
        (b"1e999", "1e999 is beyond every number"),
        (b"-1e999", "-1e999 is beyond every number"),
        (b"9223372036854775808", "9223372036854775808 is no whole number of 64 bits"),
        (b"-9223372036854775809", "is no whole number of 64 bits"),
        (b"1" + b"0" * 5000, "^10000000000000000000… is no whole number of 64 bits$"),
        (b"[" * 100_000, "it is nested more than 100 deep"),
        (b"[" * 101 + b"]" * 101, "it is nested more than 100 deep"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "it is nested more than 100 deep"),
        (b'"\\ud83d"', "half a surrogate pair"),
        (b'{"\\uDE00": 1}', "half a surrogate pair"),
        (b'["\\ude00\\ud83d"]', "half a surrogate pair"),
        ('"\ud800"', "half a surrogate pair"),
        ("[]".encode("utf-16"), "codec can't decode"),
        (b"\xef\xbb\xbf[]", "BOM"),
    ],
)
def test_json_that_means_two_things_or_none(text: bytes | str, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_json(text)
    assert str(error.value).isprintable()


def test_json_that_means_one_thing() -> None:
    assert parse_json('{"a": [9223372036854775807, -9223372036854775808, -0, 0.5, "\u00e4"]}') == {
        "a": [2**63 - 1, -(2**63), 0, 0.5, "ä"]
    }
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json(b"[" * 100 + b"]" * 100)


def test_what_nobody_asked_for_is_named() -> None:
    """At every level that is read whole; the first one there is."""

    def build(r: Reader) -> tuple[Any, ...]:
        inner = r.inner("a").all_of(lambda a: a.whole("n"))
        return inner, r.items("b", lambda b: b.whole("n")), r.table("c", lambda c: c.whole("n")), r.strings("free")

    good: dict[str, Any] = {"a": {"n": 1}, "b": [{"n": 2}], "c": {"d": {"n": 3}}, "free": {"x": "y"}}
    assert reader(**good).all_of(build) == (1, (2,), {"d": 3}, {"x": "y"})
    for change, says in (
        ({"z": 1, "y": 2}, "here: 'z' is not known here; export the bundle again"),
        ({"a": {"n": 1, "m": 1}}, "here.a: 'm' is not known here"),
        ({"b": [{"n": 1}, {"n": 1, "m": 1}]}, "here.b[1]: 'm' is not known here"),
        ({"c": {"d": {"n": 3, "\n": 1}}}, r"here.c.d: '\n' is not known here"),
    ):
        with pytest.raises(BundleError) as error:
            reader(**{**good, **change}).all_of(build)
        assert says in str(error.value)


@pytest.mark.parametrize("text", ["", "x" * 201, "a\nb", "\x1b[2J", "a\u202eb", "\ud800", 3, None])
def test_what_is_no_name(text: object) -> None:
    assert not is_word(text)


def test_names_and_bounds_say_where() -> None:
    for read, says in (
        (lambda: reader(a="a\nb").word("a"), "here.a: expected a name of 1 to 200 printable characters, got 'a\\nb'"),
        (lambda: reader(a={"\n": {}}).table("a", lambda r: r), "here.a: expected a name"),
        (lambda: reader(a=[{}] * 3).items("a", lambda r: r, 2), "here.a: expected at most 2 entries, got 3"),
        (lambda: reader(a=3).whole("a", 0, 2), "here.a: expected at most 2, got 3"),
        (lambda: reader(a=[3]).whole_tuple("a", 2), "here.a: expected numbers of at most 2, got [3]"),
        (lambda: reader(a="x" * 5000).text("a"), "here.a: expected at most 4096 characters, got 5000"),
        (lambda: reader(a=2).number("a", 0, 1), "here.a: expected 0 to 1, got 2.0"),
        (lambda: unique("aba", "here"), "here: 'a' is there twice"),
    ):
        with pytest.raises(BundleError) as error:
            read()
        assert says in str(error.value)
