"""Typed access to JSON: names, numbers, and errors that say where."""

from __future__ import annotations

from typing import Any

import pytest

from tgate_engine.errors import BundleError
from tgate_engine.reader import Reader, check_name


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


def test_long_values_are_cut_in_errors() -> None:
    with pytest.raises(BundleError) as error:
        reader(a="x" * 10_000).whole("a")
    assert len(str(error.value)) < 200
