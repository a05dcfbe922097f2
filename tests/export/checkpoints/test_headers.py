"""Headers of safetensors files: what is let through here the library reads, and nothing else reaches it."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Stored
from tgate_export.checkpoints.headers import HEADER_BYTES, read_header

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ExportError) as caught:
        read_header(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert len(line) < 500 + len(str(path))
    return line


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(3, 4),
        "b": torch.zeros(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(1, dtype=torch.int64),
        "small": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", "note": "é"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt", "note": "é"}
    assert header.tensors == {
        "a.weight": Stored("F32", (3, 4)),
        "b": Stored("BF16", (2,)),
        "empty": Stored("F32", (0, 5)),
        "scalar": Stored("I64", ()),
        "small": Stored("F8_E4M3", (3,)),
    }


@pytest.mark.parametrize(
    ("header", "why"),
    [
        ([], "does not begin with an object"),
        (b"[" * 100_000, "does not begin with an object"),
        (b'{"a":' * 100_000, "deeper than"),
        (b'{"a":' + b"[" * 100_000, "deeper than"),
        (b'{"a": 1, "a": 1}', "says 'a' twice"),
        (b'{"a": {"dtype": "F32", "shape": [2], "shape": [2], "data_offsets": [0, 8]}}', "says 'shape' twice"),
        (b"\xff{}", "does not begin"),
        (b'{"a": "\xff"}', "not readable JSON"),
        ({"a": []}, "has a list, and dtype, shape and data_offsets are wanted"),
        ({"a": None}, "has null"),
        ({"a": {}}, "are wanted"),
        ({"a": {**ONE, "more": 1}}, "are wanted"),
        ({"a": {**ONE, "dtype": "F7"}}, "dtype = 'F7'"),
        ({"a": {**ONE, "dtype": ["F32"]}}, "dtype = ['F32']"),
        ({"a": {**ONE, "shape": "2"}}, "shape = '2'"),
        ({"a": {**ONE, "shape": [2.0]}}, "shape = [2.0]"),
        ({"a": {**ONE, "shape": [True, 2]}}, "shape = [True, 2]"),
        ({"a": {**ONE, "shape": [-2]}}, "shape = [-2]"),
        ({"a": {**ONE, "shape": [[2]]}}, "shape = [[2]]"),
        ({"a": {**ONE, "shape": [2**63]}}, "shape = [9223372036854775808]"),
        ({"a": {**ONE, "shape": [2**40, 2**40]}}, "shape = "),
        ({"a": {**ONE, "shape": [1] * 5000}}, "shape = "),
        ({"a": {**ONE, "shape": [3]}}, "has 8 bytes, and F32 [3] has 12"),
        ({"a": {**ONE, "data_offsets": [0]}}, "data_offsets = [0]"),
        ({"a": {**ONE, "data_offsets": [8, 0]}}, "data_offsets = [8, 0]"),
        ({"a": {**ONE, "data_offsets": {"0": 8}}}, "data_offsets = "),
        ({"a": {**ONE, "data_offsets": [4, 12]}}, "begins at byte 4"),
        ({"a": ONE, "b": ONE}, "begins at byte 0, and the one before it ends at 8"),
        ({"a": {**ONE, "data_offsets": [0, 8]}, "b": {**ONE, "data_offsets": [9, 17]}}, "begins at byte 9"),
        ({}, "its tensors have 0 bytes, and 8 follow"),
        ({"a\n\x1b[2J": ONE}, "not printable"),
        ({"a" * 2000: ONE}, "too long"),
        ({"a": ONE, "__metadata__": []}, "__metadata__ is a list"),
        ({"a": ONE, "__metadata__": {"x": 1}}, "has 'x' = 1, and a text is wanted"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_a_header_that_is_none_is_refused(tmp_path: Path, header: Any, why: str) -> None:
    assert why in refused(write(tmp_path / "a.safetensors", header))


@pytest.mark.parametrize("content", [b"", b"{}", struct.pack("<Q", 2), struct.pack("<Q", 2**64 - 1) + b"{}"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    refused(tmp_path / "a.safetensors")


def test_a_header_as_large_as_it_likes_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", b"{", length=HEADER_BYTES + 1)
    os.truncate(path, 1 << 40)
    assert "by its own account" in refused(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")
    assert "is a FIFO" in refused(tmp_path / "a.safetensors")
    assert "is a directory" in refused(tmp_path)


def test_a_tensor_of_terabytes_costs_nothing(tmp_path: Path) -> None:
    """A sparse file is as long as it says, and holds nothing."""
    size = 4 << 40
    header = {"a": {"dtype": "F32", "shape": [size >> 2], "data_offsets": [0, size]}}
    path = write(tmp_path / "a.safetensors", header, b"")
    try:
        os.truncate(path, path.stat().st_size + size)
    except OSError:
        pytest.skip("no file of that length here")
    assert read_header(path).tensors == {"a": Stored("F32", (size >> 2,))}


def test_what_is_let_through_the_library_reads(tmp_path: Path) -> None:
    """Four hundred damaged files: the library, written by others, is never asked for one that it would refuse."""
    whole = tmp_path / "whole.safetensors"
    save_file({"a": torch.arange(4.0), "b.c": torch.zeros(2, 2, dtype=torch.float16)}, whole, {"format": "pt"})
    content, generator, path = whole.read_bytes(), random.Random(0), tmp_path / "a.safetensors"
    passed = 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 5))):
            place = generator.randrange(len(damaged))
            damaged[place] = generator.choice((*b'0123456789"{}[],:.-eF', generator.randrange(256)))
        if generator.random() < 0.2:
            del damaged[generator.randrange(len(damaged)) :]
        path.write_bytes(damaged)
        try:
            header = read_header(path)
        except ExportError:
            continue
        passed += 1
        with safetensors.safe_open(path, framework="pt") as file:
            assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == {  # noqa: SIM118
                key: stored.shape for key, stored in header.tensors.items()
            }
    assert passed > 20
