"""What an attacker does to a bundle: every place of its manifest set to every other thing, and signed again; its graphs
rewritten, and listed with digests that fit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from tgate_engine.bundle import Bundle
from tgate_engine.manifest import FileDigest
from tgate_engine.manifest_json import content_digest

Place = tuple[str | int, ...]
"""Where a value is in a JSON object: keys and indices from the outside in."""

TABLES = ("plans", "goldens", "graphs", "files", "constants", "carries", "tools", "settings", "options")
"""Objects whose keys are names that a bundle chooses."""


class Raw(str):
    """JSON text, to be put in as it is: what Python would not write, such as a number of 5000 digits."""


NUMBERS: tuple[Any, ...] = (
    0,
    -1,
    1,
    0.5,
    1e38,
    1e39,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    -(2**63) - 1,
    10**400,
    float("nan"),
    float("-inf"),
    Raw("1e999"),
    Raw("-0"),
    Raw("-0.0"),
    Raw("1" + "0" * 5000),
)
TEXTS: tuple[Any, ...] = (
    "",
    "x" * 100_000,
    "../x",
    "/etc/passwd",
    "a\nb",
    "a\x00b",
    "\x1b[2J",
    Raw('"\\ud800"'),
    "batch",
    "__proto__",
)
OTHERS: tuple[Any, ...] = (
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    {"": {}},
    [0] * 10_000,
    {str(i): {} for i in range(2000)},
    Raw("[" * 900 + "]" * 900),
    Raw("[" * 100_000),
    Raw('{"a": 1, "a": 2}'),
)


def leaves(data: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every place of a JSON value with what is there; of lists, and of tables by name, one representative alone."""
    if place:
        yield place, data
    if isinstance(data, dict):
        alike = bool(place) and place[-1] in TABLES
        for key in list(data)[: 1 if alike else None]:
            yield from leaves(data[key], (*place, key))
    elif isinstance(data, list) and data:
        yield from leaves(data[0], (*place, 0))


def bad_values(leaf: Any) -> list[Any]:
    """What to put in place of ``leaf``: the usual bad numbers and texts, and everything of another kind."""
    values = [*NUMBERS, *TEXTS, *OTHERS]
    return [value for value in values if isinstance(value, Raw) or type(value) is not type(leaf) or value != leaf]


def put(data: Any, place: Place, value: Any) -> Any:
    """``data`` with another value at a place; what is not on the way there is shared, not copied."""
    if not place:
        return value
    head, *rest = place
    changed = dict(data) if isinstance(data, dict) else list(data)
    changed[head] = put(data[head], tuple(rest), value)  # type: ignore[index]
    return changed


def sign(data: Any) -> str:
    """The file of a manifest's JSON object, with its digest; a :class:`Raw` text goes in as it is."""
    raws: list[Raw] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"raw {len(raws) - 1} raw"
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    plain = marked(data)
    for number, raw in enumerate(raws):
        try:
            plain = json.loads(json.dumps(plain).replace(f'"raw {number} raw"', raw))
        except (ValueError, RecursionError):
            continue  # nobody can say what its digest would be
    try:
        digest = content_digest(plain)
    except (UnicodeEncodeError, ValueError, RecursionError):
        digest = "0" * 64
    text = json.dumps({**marked(data), "digest": digest})
    for number, raw in enumerate(raws):
        text = text.replace(f'"raw {number} raw"', raw)
    return text


def with_graph(bundle: Bundle, file: str, edit: Callable[[Any], object]) -> Bundle:
    """The bundle with one graph rewritten on disk by ``edit``, which changes the ONNX model in place or gives other
    bytes, and listed in its manifest as if nothing had happened."""
    path = bundle.path / file
    model = onnx.load(path, load_external_data=False)
    content = edit(model)
    if not isinstance(content, bytes):
        content = model.SerializeToString()
    path.write_bytes(content)
    return relisted(bundle, file)


def relisted(bundle: Bundle, *names: str) -> Bundle:
    """The bundle with what lies under those names now, as if it had been there from the first."""
    files = {name: _digest(bundle.path / name) for name in names}
    return replace(bundle, manifest=replace(bundle.manifest, files={**bundle.manifest.files, **files}), states={})


def _digest(path: Path) -> FileDigest:
    content = path.read_bytes()
    return FileDigest(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
