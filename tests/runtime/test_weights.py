"""The weight file is mapped, as the graphs name it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.external_data_helper import load_external_data_for_tensor
from onnx.numpy_helper import to_array
from safetensors.numpy import save_file

from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import DTYPES, storage
from tgate_engine.errors import BundleError
from tgate_runtime.weights import map_weights


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    arrays = {name: np.arange(6).reshape(2, 3).astype(storage(name)) for name in DTYPES if name != "bfloat16"} | {
        "number": np.array(2.5, np.float32)
    }
    save_file(arrays, tmp_path / "weights.safetensors", {"format": "pt"})
    weights = map_weights(tmp_path / "weights.safetensors")
    assert weights.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(weights[name].array, array)
        assert weights[name].array.shape == array.shape
        assert weights[name].dtype == str(array.dtype)
        assert not weights[name].array.flags.writeable
    first, second = weights["float32"], map_weights(tmp_path / "weights.safetensors")["float32"]
    assert not np.shares_memory(first.array, weights["int64"].array)
    assert second.array.ctypes.data != first.array.ctypes.data  # of a mapping of its own


def test_bfloat16_is_its_bits(tmp_path: Path) -> None:
    import ml_dtypes

    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    save_file({"w": values}, tmp_path / "weights.safetensors")
    weight = map_weights(tmp_path / "weights.safetensors")["w"]
    assert (weight.dtype, weight.array.tolist()) == ("bfloat16", values.view(np.uint16).tolist())


def test_graphs_find_theirs(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    weights = map_weights(bundle.file(bundle.manifest.weights))
    model = onnx.load(bundle.file(bundle.manifest.shapes[0].graphs["full"].file), load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert len(outside) > 100
    for tensor in outside:
        load_external_data_for_tensor(tensor, str(mini_bundle))
        np.testing.assert_array_equal(weights[tensor.name].array, to_array(tensor))


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_short(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": np.zeros((64, 64), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BundleError, match=r"weights\.safetensors is not a whole weight file"):
        map_weights(path)


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__": {"format": "pt"}}'])
def test_a_header_that_is_shorter_than_it_says(tmp_path: Path, header: bytes) -> None:
    """Which is whole JSON, and names no tensor that could lie beyond the end."""
    path = tmp_path / "weights.safetensors"
    path.write_bytes((len(header) + 1).to_bytes(8, "little") + header)
    with pytest.raises(BundleError, match=r"it ends in its header\); export the bundle again"):
        map_weights(path)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(1))
    assert map_weights(path) == {}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b"[]", "its header: expected an object, got list"),
        (b'{"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}', "F64"),
        (
            b'{"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
            "has .0, 8. of 8 bytes",
        ),
        (b'{"w": {"dtype": "F32", "shape": [2]}}', "data_offsets"),
    ],
)
def test_a_header_that_is_wrong(tmp_path: Path, header: bytes, says: str) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BundleError, match=says):
        map_weights(path)
