"""Typed access to JSON that nobody vouches for."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from tgate_engine.errors import BundleError

T = TypeVar("T")
L = TypeVar("L", bound=str)

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def check_name(name: str) -> str:
    """``name`` if it is a plain relative name inside a bundle, such as ``tokenizer/0.json``; else BundleError."""
    if not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
        raise BundleError(f"file name {name!r} is not a plain name inside the bundle; the bundle is not trustworthy")
    return name


class Reader:
    """Typed access to a JSON object; every error says where it is, what was got and what was wanted."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise BundleError(f"{where}: expected an object, got {type(data).__name__}; export the bundle again")
        self.data: dict[str, Any] = data
        self.where = where

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.data:
            raise BundleError(f"{self.where}: {key!r} is missing; export the bundle again")
        value = self.data[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(k.__name__ for k in kinds)
            raise BundleError(f"{self.where}.{key}: expected {names}, got {value!r:.60}; export the bundle again")
        return value

    def text(self, key: str) -> str:
        return str(self.get(key, str))

    def whole(self, key: str, least: int = 0) -> int:
        value = int(self.get(key, int))
        if value < least:
            raise BundleError(f"{self.where}.{key}: expected at least {least}, got {value}; export the bundle again")
        return value

    def number(self, key: str) -> float:
        return self.finite(key, self.get(key, (int, float)))

    def finite(self, key: str, value: Any) -> float:
        """``value`` as a float. JSON has no NaN, but Python reads it, and 1e999 as infinity."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, (bool, str)) or not math.isfinite(number):
            raise BundleError(f"{self.where}.{key}: expected a finite number, got {value!r:.60}")
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

    def whole_tuple(self, key: str) -> tuple[int, ...]:
        values = self.get(key, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
            raise BundleError(f"{self.where}.{key}: expected positive whole numbers, got {values!r:.60}")
        return tuple(values)

    def strings(self, key: str) -> dict[str, str]:
        values = self.get(key, dict)
        if not all(isinstance(v, str) for v in values.values()):
            raise BundleError(f"{self.where}.{key}: expected text values, got {values!r:.60}")
        return dict(values)

    def items(self, key: str, build: Callable[[Reader], T]) -> tuple[T, ...]:
        return tuple(build(Reader(v, f"{self.where}.{key}[{i}]")) for i, v in enumerate(self.get(key, list)))

    def table(self, key: str, build: Callable[[Reader], T]) -> dict[str, T]:
        return {k: build(Reader(v, f"{self.where}.{key}.{k}")) for k, v in self.get(key, dict).items()}
