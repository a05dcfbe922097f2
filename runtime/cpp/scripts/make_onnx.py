"""Writes what graphs may hold, as Python checks it, for C++: `make_onnx.py form` prints `src/contract/onnx_form.inc`,
and so do `messages` and `operators` their own.

Nothing is said a second time here: tables are read out of `tgate_engine.onnx_form` and `tgate_engine.onnx_operators`,
and a rule that this program does not understand ends it. `tests/cpp/test_graph_check.py` sees that the files are what
it prints.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tgate_engine import onnx_form, onnx_operators

KINDS = {"string": "bytes", "float": "float32"}
"""What a kind of field is called here, where that is not its name in Python: texts are bytes on the wire."""


def main() -> None:
    """Prints the table that the command line names."""
    tables = {"form": form, "messages": messages, "operators": operators}
    if len(sys.argv) != 2 or sys.argv[1] not in tables:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(tables)}")
    print(f"// Made by `scripts/make_onnx.py {sys.argv[1]}`; change the tables in Python that it reads.")
    for text in tables[sys.argv[1]]():
        print("\n".join(map(_wrapped, text.split("\n"))))


def form() -> Iterator[str]:
    """Limits and versions."""
    yield f"constexpr std::size_t most_bytes = {onnx_form.MOST_BYTES};"
    yield f"constexpr std::size_t most_nodes = {onnx_form.MOST_NODES};"
    yield f"constexpr std::size_t most_dimensions = {onnx_operators.MOST_DIMENSIONS};"
    yield from _ends("ir_version", onnx_form.IR_VERSIONS)
    yield from _ends("opset", onnx_form.OPSETS)
    yield f"constexpr std::int32_t external = {onnx_form._EXTERNAL};"
    yield _array("ElementBytes element_bytes", (f"{{{number}, {size}}}" for number, size in onnx_form._SIZES.items()))
    values = (f"{{{kind}, {number}}}" for kind, number in _value_fields())
    yield _array("ValueField value_fields", values)


def _value_fields() -> Iterator[tuple[int, int]]:
    """The number of the field that holds an attribute's value, by its type."""
    numbers = {name: number for name, number, _, _ in _fields("AttributeProto")}
    for kind, field in onnx_form._VALUES.items():
        yield kind, numbers[field]


def messages() -> Iterator[str]:
    """Every message, after those that it holds."""
    done: set[str] = set()
    while left := [name for name in onnx_form.FORM if name not in done]:
        name = next(name for name in left if all(kind in done for _, _, kind, _ in _fields(name) if _is_message(kind)))
        yield from _message(name)
        done.add(name)


def _array(what: str, items: Iterable[str]) -> str:
    return f"constexpr {what}[] = {{{', '.join(items)}}};"


def _wrapped(line: str) -> str:
    """In lines of at most 120 columns, broken after commas."""
    words = [word.replace(" ", "\0") for word in line.split(", ")]
    text = textwrap.fill(", ".join(words), 120, subsequent_indent=" " * 8, break_long_words=False)
    return text.replace("\0", " ")


def _ends(name: str, versions: range) -> Iterator[str]:
    yield f"constexpr std::int64_t least_{name} = {versions[0]}, most_{name} = {versions[-1]};"


def _fields(message: str) -> Iterator[tuple[str, int, str, bool]]:
    """Name, number and kind of each, and whether there are several."""
    for text in onnx_form.FORM[message].split():
        name, number, kind = re.split("[=:]", text)
        yield name, int(number), kind.rstrip("*"), kind.endswith("*")


def _is_message(kind: str) -> bool:
    return kind in onnx_form.FORM


def _snake(name: str) -> str:
    return re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _message(name: str) -> Iterator[str]:
    yield f"namespace {_snake(name)} {{"
    numbers = ", ".join(f"{field} = {number}" for field, number, _, _ in _fields(name))
    yield f"constexpr std::uint32_t {numbers};"
    yield f'constexpr wire::Message message{{"{name}",'
    rows = []
    for _, number, kind, several in sorted(_fields(name), key=lambda field: field[1]):
        inner = f"&{_snake(kind)}::message" if _is_message(kind) else "nullptr"
        kind = "message" if _is_message(kind) else KINDS.get(kind, kind)
        rows.append(f"{{{number}, wire::Kind::{kind}, {str(several).lower()}, {inner}}}")
    yield "    {" + ",\n     ".join(rows) + "},"
    others = onnx_form.REFUSED.get(name, {})
    yield "    {" + ", ".join(f'{{{number}, "{other}"}}' for number, other in others.items()) + "}};"
    yield "}"


def operators() -> Iterator[str]:
    """Rules of attributes, by name, and operators, sorted by name."""
    yield f"constexpr std::size_t most_tensors = {onnx_operators.MOST_TENSORS};"
    yield f"constexpr std::size_t most_numbers = {_longest_list()};"
    yield f'constexpr std::string_view contrib = "{onnx_operators.CONTRIB}";'
    yield "\nnamespace attribute {"
    for name, (kind, fits) in sorted(onnx_operators.RULES.items()):
        yield f'constexpr Rule {name}{{"{name}", {kind}, {_rule(kind, fits)}}};'
    yield "}\n\nconstexpr Operator operators[] = {"
    for name, inputs in sorted(onnx_operators.INPUTS.items()):
        attributes = ", ".join(f"&attribute::{each}" for each in sorted(onnx_operators.NAMES.get(name, "").split()))
        lowered = str(name in onnx_operators.LOWERED).lower()
        yield f'    {{"{name}", "{inputs}", {onnx_operators.OUTPUTS.get(name, 1)}, {lowered}, {{{attributes}}}}},'
    yield "};"


def _rule(kind: int, fits: Callable[[Any], bool]) -> str:
    """A rule's least and most number, bits of its numbers, its words and its letters: what of them it has."""
    if fits is math.isfinite:
        return '0, 0, 0, "", ""'
    known = inspect.getclosurevars(fits).nonlocals.get("known")
    if kind in (2, 7) and isinstance(known, range) and known.step == 1:
        return f'{known[0]}, {known[-1]}, 0, "", ""'
    if kind == 2 and isinstance(known, tuple) and all(0 <= number < 64 for number in known):
        return f'0, 63, {sum(1 << number for number in known):#x}, "", ""'
    if kind == 3 and isinstance(known, set) and not any(b" " in word or not word for word in known):
        return f'0, 0, 0, "{b" ".join(sorted(known)).decode("ascii")}", ""'
    if kind == 3 and known is None:
        return _letters(fits)
    raise SystemExit(f"a rule of type {kind} is not understood: {inspect.getsource(fits)}")


def _letters(fits: Callable[[Any], bool]) -> str:
    """A text of so many letters out of a few: which, and how many, the rule is asked."""
    letters = [letter for letter in range(256) if fits(bytes([letter]))]
    lengths = [length for length in range(1000) if fits(bytes([letters[0]]) * length)]
    if lengths != [*range(1, lengths[-1] + 1)] or not fits(bytes(letters)[: lengths[-1]]):
        raise SystemExit(f"not a text of letters: {inspect.getsource(fits)}")
    return f'1, {lengths[-1]}, 0, "", R"({bytes(letters).decode("ascii")})"'


def _longest_list() -> int:
    """How many numbers an attribute has at most: the rules are asked."""
    lists = [fits for kind, fits in onnx_operators.RULES.values() if kind == 7]
    (most,) = {next(n for n in range(1000) if not fits([1] * (n + 1))) for fits in lists}
    return most


if __name__ == "__main__":
    main()
