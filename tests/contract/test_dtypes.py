"""The one table of dtypes agrees with ONNX and safetensors, and numbers survive it."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto
from safetensors.numpy import save

from tgate_engine.dtypes import DTYPES, decode, encode, storage


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_dtypes_go_there_and_back(dtype: str) -> None:
    values = np.array([[0.5, -1.25], [3.0, 0.0]], np.float32)
    assert decode(encode(values, dtype), dtype).tolist() == values.tolist()


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.standard_normal(5000).astype(np.float32) * np.float32(10) ** rng.integers(-30, 30, 5000),
            np.array([0.0, -0.0, 1.00390625, 1.01171875, np.inf, -np.inf, 3.4e38], np.float32),
        ]
    ).astype(np.float32)
    want = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(encode(values, "bfloat16"), want)
    assert np.isnan(decode(encode(np.array([np.nan]), "bfloat16"), "bfloat16")).all()


def test_the_numbers_are_onnx_s() -> None:
    names = {name: TensorProto.DataType.Name(dtype.onnx) for name, dtype in DTYPES.items()}
    assert names == {**{name: name.upper() for name in DTYPES}, "float32": "FLOAT"}


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_the_tags_are_safetensors_own(dtype: str) -> None:
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else storage(dtype)
    raw = save({"x": np.zeros(3, kind)})
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["x"]["dtype"] == DTYPES[dtype].safetensors
    assert header["x"]["data_offsets"] == [0, 3 * storage(dtype).itemsize]
