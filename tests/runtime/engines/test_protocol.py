"""What every engine checks: options, and buffers before they are bound."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.runtime.engines.small import tensor
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, DENOISE, GraphSpec, Macs
from tgate_runtime.engines.host import CpuBuffer
from tgate_runtime.engines.protocol import (
    EngineOptions,
    check_buffers,
    check_interface,
    fitted,
    most_threads,
    row_shape,
)

SPEC = GraphSpec(
    file="g.onnx",
    role=DENOISE,
    batch=(1, 3),
    inputs=(tensor("x", BATCH, 3), tensor("scale", 2)),
    outputs=(tensor("y", BATCH, 3), tensor("half", BATCH, dtype="float16")),
    macs=Macs(paper=0, all=0),
)

# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, -1, 100_000, 10**30, "4", 2.5, True, [1]])
def test_threads_that_cannot_be(threads: Any) -> None:
    says = rf"threads must be a whole number, at least 1 and here at most \d+, got {re.escape(repr(threads))}$"
    with pytest.raises(EngineError, match=says):
        EngineOptions(threads=threads)


@pytest.mark.parametrize(("processors", "most"), [(1, 64), (None, 64), (8, 64), (96, 768)])
def test_the_most_threads_follow_the_machine(
    monkeypatch: pytest.MonkeyPatch, processors: int | None, most: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert most_threads() == most
    assert EngineOptions(threads=most).threads == most
    with pytest.raises(EngineError, match=f"at most {most}, got {most + 1}"):
        EngineOptions(threads=most + 1)


@pytest.mark.parametrize("device", [-1, 1.0, "0", False])
def test_devices_that_cannot_be(device: Any) -> None:
    with pytest.raises(EngineError, match="a device is a whole number from 0, got"):
        EngineOptions(device=device)


def test_words_that_are_not_known() -> None:
    with pytest.raises(EngineError, match="memory must be one of shared, fast, got 'huge'"):
        EngineOptions(memory="huge")
    with pytest.raises(EngineError, match="precision must be one of f32, bf16, f16, got 'f8'"):
        EngineOptions(precision="f8")


# --- buffers ------------------------------------------------------------------------------------


def test_an_array_is_seen_in_a_buffer_s_shape() -> None:
    seen = fitted(np.arange(3, dtype=np.float32), (2, 3), "float32")
    assert seen.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert not seen.flags.writeable


def test_the_shape_of_rows() -> None:
    assert row_shape((5, 2), 1, 4) == (4, 2)
    assert row_shape((1,), 0, 1) == (1,)


def buffers(**kinds: tuple[tuple[int, ...], str]) -> dict[str, CpuBuffer]:
    return {name: CpuBuffer.zeros(*kind) for name, kind in kinds.items()}


INPUTS = {"x": ((2, 3), "float32"), "scale": ((2,), "float32")}
OUTPUTS = {"y": ((2, 3), "float32"), "half": ((2,), "float16")}


def test_buffers_that_fit_a_graph() -> None:
    check_buffers(SPEC, buffers(**INPUTS), buffers(**OUTPUTS))
    check_buffers(SPEC, buffers(**INPUTS), buffers(half=OUTPUTS["half"]))


Kinds = dict[str, tuple[tuple[int, ...], str]]


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ({}, OUTPUTS, "graph g.onnx: inputs missing or not known: scale, x"),
        ({**INPUTS, "w": ((1,), "float32")}, OUTPUTS, "inputs missing or not known: w"),
        (INPUTS, {}, "graph g.onnx: bind at least one of its outputs"),
        (INPUTS, {"w": ((2,), "float32")}, "graph g.onnx has no output w"),
        ({**INPUTS, "x": ((2, 3), "float16")}, OUTPUTS, "graph g.onnx: x is float32, got a buffer of float16"),
        (INPUTS, {"half": ((2,), "float32")}, "half is float16, got a buffer of float32"),
        (INPUTS, {"y": ((1, 3), "float32")}, "y is [batch, 3] for 1 to 3 images, got a buffer of [1, 3]"),
        (INPUTS, {"half": ((2, 1), "float16")}, "half is [batch] for 1 to 3 images, got a buffer of [2, 1]"),
        ({**INPUTS, "x": ((4, 3), "float32")}, OUTPUTS, "x is [batch, 3] for 1 to 3 images, got a buffer of [4, 3]"),
        ({**INPUTS, "x": ((2, 4), "float32")}, OUTPUTS, "x is [batch, 3] for 1 to 3 images, got a buffer of [2, 4]"),
        ({**INPUTS, "x": ((), "float32")}, OUTPUTS, "x is [batch, 3] for 1 to 3 images, got a buffer of []"),
        ({**INPUTS, "scale": ((1,), "float32")}, OUTPUTS, "scale is [2] for 1 to 3 images, got a buffer of [1]"),
    ],
)
def test_buffers_that_do_not_fit_a_graph(inputs: Kinds, outputs: Kinds, says: str) -> None:
    with pytest.raises(EngineError, match=re.escape(says)):
        check_buffers(SPEC, buffers(**inputs), buffers(**outputs))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda ends: ends["inputs"].pop("x"), "g.onnx does not have the inputs its manifest says: x float32; export"),
        (lambda ends: ends["outputs"].update(y="int64"), "the outputs its manifest says: y float32, y int64; export"),
        (lambda ends: ends["outputs"].update(z="int64"), "the outputs its manifest says: z int64; export it again"),
    ],
)
def test_an_interface_that_is_another(change: Callable[[Any], Any], says: str) -> None:
    ends = {
        "inputs": {t.name: t.dtype for t in SPEC.inputs},
        "outputs": {t.name: t.dtype for t in SPEC.outputs},
    }
    check_interface(SPEC, **ends)
    change(ends)
    with pytest.raises(EngineError, match=re.escape(says)):
        check_interface(SPEC, **ends)
