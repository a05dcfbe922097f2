"""JSON that nobody vouches for: parsed strictly, and read with types and bounds."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence, Sized
from typing import Any, TypeVar

from tgate_engine.errors import BundleError

T = TypeVar("T")
L = TypeVar("L", bound=str)
V = TypeVar("V", bound=Sized)

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


LARGEST_WHOLE = 2**63 - 1
"""The largest whole number that JSON may hold here: an int64."""
LARGEST_NUMBER = 3.4028234663852886e38
"""The largest number that float32 holds: everything that is read as a number ends in it."""


MOST_DEPTH = 100
"""How deep JSON may be nested here."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""An escape that is half a surrogate pair, or one of the two of a whole one."""


def parse_json(text: bytes | str) -> Any:
    """The value of a JSON text, in UTF-8, that means one thing to everybody.

    Raises :class:`ValueError` in one line for a text that is none, for a key that an object has twice, for numbers
    that are not finite or, whole, not of 64 bits, for half a surrogate pair, and for what is nested more than
    :data:`MOST_DEPTH` deep.
    """
    try:
        words = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(
            words,
            object_pairs_hook=_object,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_constant,
        )
        if is_nested(value, MOST_DEPTH):
            raise RecursionError
        if isinstance(text, str) or _HALF.search(words):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is no character") from None
    return value


def is_nested(value: Any, levels: int) -> bool:
    """Whether lists and objects are inside of one another more than ``levels`` deep."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(levels):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"an object has the key {key!r:.60} twice")
            seen.add(key)
    return data


def _whole(digits: str) -> int:
    number = int(digits) if len(digits) <= 20 else None
    if number is None or not -LARGEST_WHOLE - 1 <= number <= LARGEST_WHOLE:
        raise ValueError(f"{digits:.20}{'…' * (len(digits) > 20)} is no whole number of 64 bits")
    return number


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits:.20} is beyond every number")
    return number


def _constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


MOST_LETTERS = 200
"""How long a name may be."""


def is_word(text: object) -> bool:
    """Whether it is a name that can be shown in a line as it is: printable, not empty, and not too long."""
    return isinstance(text, str) and 0 < len(text) <= MOST_LETTERS and text.isprintable()


def unique(names: Iterable[str], where: str) -> None:
    """Raises :class:`BundleError` for the first of ``names`` that is there twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise BundleError(f"{where}: {name!r:.60} is there twice; export the bundle again")
        seen.add(name)


def check_name(name: str) -> str:
    """``name`` if it is a plain relative name inside a bundle, such as ``tokenizer/0.json``; else BundleError."""
    if len(name) > MOST_LETTERS or not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
        raise BundleError(
            f"file name {name!r:.60} is not a plain name inside the bundle; the bundle is not trustworthy"
        )
    return name


_MOST_TEXT = 4096
_WORD = f"expected a name of 1 to {MOST_LETTERS} printable characters"


class Reader:
    """Typed access to a JSON object; every error says where it is, what was got and what was wanted.

    ``advice``: what to do where a file is not what it should be. What is read by :meth:`all_of` may hold no more than
    was asked for.
    """

    def __init__(self, data: Any, where: str, advice: str = "export the bundle again") -> None:
        if not isinstance(data, dict):
            raise BundleError(f"{where}: expected an object, got {type(data).__name__}; {advice}")
        self.data: dict[str, Any] = data
        self.where = where
        self.advice = advice
        self._asked: set[str] = set()

    def all_of(self, build: Callable[[Reader], T]) -> T:
        """What ``build`` makes of the object. Raises :class:`BundleError` for a key that it did not ask for: an input
        that changes nothing is a fault."""
        built = build(self)
        if odd := [key for key in self.data if key not in self._asked]:
            raise BundleError(f"{self.where}: {odd[0]!r:.60} is not known here; {self.advice}")
        return built

    def inner(self, key: str) -> Reader:
        """A reader of the object that a key has."""
        return Reader(self.get(key, object), f"{self.where}.{key}", self.advice)

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.data:
            raise BundleError(f"{self.where}: {key!r} is missing; {self.advice}")
        self._asked.add(key)
        value = self.data[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise BundleError(f"{self.where}.{key}: expected {names}, got {value!r:.60}; {self.advice}")
        return value

    def text(self, key: str) -> str:
        value = str(self.get(key, str))
        if len(value) > _MOST_TEXT:
            raise BundleError(f"{self.where}.{key}: expected at most {_MOST_TEXT} characters, got {len(value)}")
        return value

    def word(self, key: str) -> str:
        """A name, see :func:`is_word`."""
        value = self.text(key)
        if not is_word(value):
            raise BundleError(f"{self.where}.{key}: {_WORD}, got {value!r:.60}")
        return value

    def whole(self, key: str, least: int = 0, most: int = LARGEST_WHOLE) -> int:
        value = int(self.get(key, int))
        if value < least:
            raise BundleError(f"{self.where}.{key}: expected at least {least}, got {value}; {self.advice}")
        if value > most:
            raise BundleError(f"{self.where}.{key}: expected at most {most}, got {value}; {self.advice}")
        return value

    def number(self, key: str, least: float = -LARGEST_NUMBER, most: float = LARGEST_NUMBER) -> float:
        number = self.finite(key, self.get(key, (int, float)))
        if not least <= number <= most:
            raise BundleError(f"{self.where}.{key}: expected {least} to {most}, got {number}; {self.advice}")
        return number

    def finite(self, key: str, value: Any) -> float:
        """``value`` as a float that float32 can hold."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, (bool, str)) or not abs(number) <= LARGEST_NUMBER:
            raise BundleError(f"{self.where}.{key}: expected a finite number, of float32, got {value!r:.60}")
        return number

    def flag(self, key: str) -> bool:
        return bool(self.get(key, bool))

    def name(self, key: str) -> str:
        return check_name(self.text(key))

    def choice(self, key: str, choices: Sequence[L]) -> L:
        value = self.text(key)
        for choice in choices:
            if value == choice:
                return choice
        raise BundleError(f"{self.where}.{key}: expected one of {', '.join(choices)}, got {value!r:.60}")

    def whole_tuple(self, key: str, most: int = LARGEST_WHOLE, *, least: int = 1) -> tuple[int, ...]:
        values = self.get(key, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
            kind = "positive whole numbers" if least == 1 else f"whole numbers of at least {least}"
            raise BundleError(f"{self.where}.{key}: expected {kind}, got {values!r:.60}")
        if any(v > most for v in values):
            raise BundleError(f"{self.where}.{key}: expected numbers of at most {most}, got {values!r:.60}")
        return tuple(values)

    def words(self, key: str) -> tuple[str, ...]:
        """Names, none of them twice."""
        values = self.get(key, list)
        if odd := [value for value in values if not is_word(value)]:
            raise BundleError(f"{self.where}.{key}: {_WORD}, got {odd[0]!r:.60}; {self.advice}")
        if len(set(values)) < len(values):
            raise BundleError(f"{self.where}.{key}: expected names that differ, got {values!r:.60}; {self.advice}")
        return tuple(values)

    def strings(self, key: str) -> dict[str, str]:
        values = self.get(key, dict)
        if not all(isinstance(v, str) for v in values.values()):
            raise BundleError(f"{self.where}.{key}: expected text values, got {values!r:.60}")
        return dict(values)

    def items(self, key: str, build: Callable[[Reader], T], most: int = LARGEST_WHOLE) -> tuple[T, ...]:
        values = self._at_most(most, key, self.get(key, list))
        return tuple(Reader(v, f"{self.where}.{key}[{i}]", self.advice).all_of(build) for i, v in enumerate(values))

    def table(self, key: str, build: Callable[[Reader], T], most: int = LARGEST_WHOLE) -> dict[str, T]:
        """An object of objects, whose keys are names that the bundle chose."""
        return {
            k: Reader(v, f"{self.where}.{key}.{k}", self.advice).all_of(build) for k, v in self.named(key, most).items()
        }

    def named(self, key: str, most: int = LARGEST_WHOLE) -> dict[str, Any]:
        """An object whose keys are names that the bundle chose."""
        values: dict[str, Any] = self._at_most(most, key, self.get(key, dict))
        if odd := [name for name in values if not is_word(name)]:
            raise BundleError(f"{self.where}.{key}: {_WORD}, got {odd[0]!r:.60}")
        return values

    def _at_most(self, most: int, key: str, values: V) -> V:
        if len(values) > most:
            raise BundleError(f"{self.where}.{key}: expected at most {most} entries, got {len(values)}")
        return values
