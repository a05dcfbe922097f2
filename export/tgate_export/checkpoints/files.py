"""Files of a checkpoint, read as what they are: written by a stranger.

Every JSON and every header of a checkpoint, a LoRA or a tokenizer comes through here before a library sees it.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tgate_engine.errors import ExportError

JSON_BYTES = 4 << 20
"""Largest JSON file of a checkpoint; that of a network with a table of a thousand betas has 40 KiB."""

DEPTH = 32
"""How deep lists and objects may lie in each other."""

_DIGITS = 40
"""Longest whole number: a tokenizer without a limit says 10^30."""

_SHOWN = 60
"""Characters of a value in a message."""


def open_regular(path: Path) -> BinaryIO:
    """A regular file, opened for reading; the caller closes it.

    Raises :class:`ExportError` for a FIFO, a device, a directory, a link to nothing, and what cannot be opened. Never
    waits for a FIFO's other end.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and path.is_symlink():
            raise ExportError(
                f"{path} is a link to {os.readlink(path)}, which is not there; download the checkpoint again"
            ) from None
        why = getattr(error, "strerror", None) or error
        raise ExportError(f"{path} cannot be opened ({why}); the checkpoint is incomplete, or damaged") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise ExportError(f"{path} is {_kind(mode)}, and a regular file is wanted; download the checkpoint again")
    return os.fdopen(descriptor, "rb")


def present(path: Path) -> bool:
    """Whether there is something of that name: a link to nothing is, and is refused when it is opened."""
    return os.path.lexists(path)


def check_inside(root: Path, path: Path) -> None:
    """Raises :class:`ExportError` for a file or directory below ``root`` that links lead out of it.

    The hub's cache holds a checkpoint as links into the ``blobs`` beside its snapshots; those are its own.
    """
    real, home = path.resolve(), root.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        homes.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in homes):
        raise ExportError(
            f"{path} leads to {real}, outside the checkpoint {root}; a checkpoint names its own files alone: put the "
            "file itself there"
        )


def read_bytes(path: Path, limit: int) -> bytes:
    """A regular file's content. Raises :class:`ExportError` for one of more than ``limit`` bytes."""
    with open_regular(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise ExportError(f"{path} cannot be read ({error}); download the checkpoint again") from None
    if len(content) > limit:
        raise ExportError(f"{path} has more than {limit} bytes, the most that such a file may have; it is damaged")
    return content


def read_json(path: Path, *, limit: int = JSON_BYTES, infinite: Collection[str] = ()) -> dict[str, Any]:
    """A JSON file that holds an object.

    ``infinite``: keys that may be an infinity. Raises :class:`ExportError` naming the file, and the key where there is
    one, for what is no regular file, no JSON, no object, too large, too deep, says a key twice or holds a number that
    is not finite.
    """
    return parse_object(read_bytes(path, limit), str(path), infinite=infinite)


def parse_object(text: bytes | str, where: str, *, infinite: Collection[str] = ()) -> dict[str, Any]:
    """A JSON object from its text, as :func:`read_json` reads it. ``where``: what messages call it."""
    try:
        data = json.loads(
            text if isinstance(text, str) else text.decode("utf-8"), object_pairs_hook=_once, parse_int=_whole
        )
    except _Twice as error:
        raise ExportError(f"{where} says {quoted(error.key)} twice; nothing tells which of them counts") from None
    except RecursionError:
        raise ExportError(f"{where} is nested deeper than {DEPTH} levels; it is damaged") from None
    except ValueError as error:
        raise ExportError(f"{where} is not readable JSON ({error!s:.200}); the checkpoint is damaged") from None
    if not isinstance(data, dict):
        raise ExportError(f"{where} holds {kind_of(data)}, and an object is wanted; the checkpoint is damaged")
    for key, value in _values(where, data):
        if isinstance(value, float) and not math.isfinite(value) and not (key in infinite and value == value):
            raise ExportError(
                f"{where} has {plain(key)} = {value}, or another number that large; a finite number is wanted"
            )
        if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ExportError(f"{where} has half a character in {plain(key)}; the checkpoint is damaged")
    return data


def quoted(value: object) -> str:
    """A stranger's value in a message: on one line, and not all of it where it is long."""
    text = repr(value if not isinstance(value, str) else value[: 2 * _SHOWN])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def plain(name: object, most: int = _SHOWN) -> str:
    """A key, a class's name or a path in a message: as it is where it fits on a line, and as a value where not."""
    return name if isinstance(name, str) and name.isprintable() and 0 < len(name) <= most else quoted(name)


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


class _Twice(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Twice(key)
            seen.add(key)
    return made


def _whole(digits: str) -> int | float:
    if digits == "-0":  # no whole number to others: safetensors' library refuses a size of it
        return -0.0
    return int(digits) if len(digits) <= _DIGITS else math.inf


def _values(where: str, data: Any) -> Iterator[tuple[str, Any]]:
    """Every value that is neither list nor object, and every key, under the name of the nearest key above it."""
    level = [("", data)]
    for _ in range(DEPTH):
        below: list[tuple[str, Any]] = []
        for name, value in level:
            if isinstance(value, dict):
                for key, inner in value.items():
                    yield name, key
                    below.append((key, inner))
            elif isinstance(value, list):
                below += [(name, inner) for inner in value]
            else:
                yield name, value
        level = below
        if not level:
            return
    raise ExportError(f"{where} is nested deeper than {DEPTH} levels; it is damaged")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a device",
        stat.S_IFBLK: "a device",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "no regular file")
