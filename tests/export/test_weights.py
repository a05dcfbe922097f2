"""One weight file for all graphs: each tensor written once, cast and laid out, and found by every graph."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.graph import DENOISE
from tgate_export.graphs import TracedGraph, WeightRef
from tgate_export.weights import WEIGHTS_FILE, attach, collect, place_weights, save_graph, write_weights


class Held:
    """A checkpoint of one component, as far as the weight file asks."""

    where = "a checkpoint"

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def tensors(self, component: str) -> Any:
        return SimpleNamespace(read=lambda key: self._tensors[key].clone())


def ref(key: str, *shape: int, dtype: str = "float32", transposed: bool = False) -> WeightRef:
    return WeightRef(component="unet", key=key, transposed=transposed, shape=shape, dtype=dtype)


def graph(*refs: WeightRef) -> TracedGraph:
    """A graph of a sum for each weight, whose initializers have names of their own."""
    names = [f"w{i}" for i in range(len(refs))]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [len(refs) + 1])
    nodes = [helper.make_node("Concat", ["x", *names], ["y"], axis=0)]
    inputs = [
        x,
        *(helper.make_tensor_value_info(n, TensorProto.FLOAT, r.shape) for n, r in zip(names, refs, strict=True)),
    ]
    model = ir.from_proto(helper.make_model(helper.make_graph(nodes, "g", inputs, [y]), ir_version=10))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        model.graph.initializers[str(value.name)] = value
    return TracedGraph(
        name="g",
        role=DENOISE,
        batch=(1, 1),
        model=model,
        inputs=(),
        outputs=(),
        weights=dict(zip(names, refs, strict=True)),
    )


def write(path: Path, *refs: WeightRef, **tensors: Tensor) -> Mapping[WeightRef, Any]:
    done: list[tuple[int, int]] = []
    held: Any = Held(**tensors)
    placements = write_weights(path, refs, lambda component: held, lambda *bytes_: done.append(bytes_))
    assert done[-1][0] == done[-1][1]
    return placements


def test_every_weight_is_there_once_as_the_graphs_want_it(tmp_path: Path) -> None:
    a, b = torch.randn(2, 3), torch.randn(4)
    refs = (ref("a", 3, 2, transposed=True), ref("b", 4, dtype="float16"), ref("c", 4, dtype="float16"))
    placements = write(tmp_path / "w", *refs, a=a, b=b, c=b.clone())
    stored = load_file(tmp_path / "w")
    assert stored.keys() == {"unet.a^T", "unet.b"}, "equal tensors are one"
    assert torch.equal(stored["unet.a^T"], a.t())
    assert torch.equal(stored["unet.b"], b.half())
    assert placements[refs[1]] == placements[refs[2]]
    content = (tmp_path / "w").read_bytes()
    for key, want in ((refs[0], a.t().contiguous().numpy()), (refs[1], b.half().numpy())):
        place = placements[key]
        assert place.offset % want.itemsize == 0
        assert content[place.offset : place.offset + place.length] == want.tobytes()


def test_weights_of_all_graphs_are_collected_widest_first() -> None:
    narrow, wide = ref("n", 1, dtype="float16"), ref("w", 1)
    assert collect([graph(narrow, wide), graph(wide)]) == (wide, narrow)


def test_places_without_weights_are_those_of_a_file_of_unlike_ones(tmp_path: Path) -> None:
    refs = (ref("a", 5), ref("b", 3, dtype="float16"))
    assert place_weights(refs) == write(tmp_path / "w", *refs, a=torch.randn(5), b=torch.randn(3))


def test_graphs_point_at_the_file_and_equal_weights_are_one_initializer(tmp_path: Path) -> None:
    one, same, other = ref("a", 1), ref("b", 1), ref("c", 1)
    placements = write(tmp_path / WEIGHTS_FILE, one, same, other, a=torch.ones(1), b=torch.ones(1), c=torch.zeros(1))
    traced = graph(one, same, other)
    attach(traced, placements)
    save_graph(traced, tmp_path / "g.onnx")
    model = onnx.load(tmp_path / "g.onnx")  # which reads the external data
    assert {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer} == {
        "unet.a": [1.0],
        "unet.c": [0.0],
    }
    assert model.graph.node[0].input[1:] == ["unet.a", "unet.a", "unet.c"]


def test_a_weight_that_does_not_fit_names_itself(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"unet tensor 'a' has shape \[2\], the model wants \[3\]"):
        write(tmp_path / "w", ref("a", 3), a=torch.ones(2))
    with pytest.raises(ExportError, match=r"unet tensor 'a' holds numbers as large as 1e\+06"):
        write(tmp_path / "w", ref("a", 1, dtype="float16"), a=torch.tensor([1e6]))
    with pytest.raises(ExportError, match="unet tensor 'b' holds NaN"):
        write(tmp_path / "w", ref("a", 1), ref("b", 1), a=torch.ones(1), b=torch.full((1,), torch.nan))


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("tgate_export.weights.shutil.disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ExportError, match="no space for the weights"):
        write(tmp_path / "w", ref("a", 1000), a=torch.ones(1000))
    assert not (tmp_path / "w").exists()


# --- of a whole export --------------------------------------------------------------------------


def test_a_bundle_holds_one_copy_of_its_weights(mini_bundle: Path) -> None:
    """No two tensors of the file hold the same bytes, and everything else is less than 7 % of it."""
    bundle = Bundle.open(mini_bundle)
    unique: dict[tuple[str, bytes], int] = {}
    count = 0
    with safe_open(bundle.file(bundle.manifest.weights), framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  (a safetensors file is no mapping)
            tensor = file.get_tensor(name)
            unique[str(tensor.dtype) + str(tensor.shape), tensor.tobytes()] = tensor.nbytes
            count += 1
    assert len(unique) == count
    assert bundle.size_bytes() < 1.08 * sum(unique.values())


def test_every_graph_reads_its_weights_from_the_one_file(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    places: dict[str, set[tuple[int, int]]] = {}
    for name, spec in bundle.manifest.shapes[0].graphs.items():
        model = onnx.load(bundle.file(spec.file), load_external_data=False)
        onnx.checker.check_model(str(bundle.file(spec.file)))
        places[name] = set()
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                facts = {entry.key: entry.value for entry in tensor.external_data}
                assert facts["location"] == bundle.manifest.weights
                places[name].add((int(facts["offset"]), int(facts["length"])))
            else:
                assert onnx.numpy_helper.to_array(tensor).nbytes < 4096, "a weight lies in the graph"
    header = struct.unpack("<Q", bundle.file(bundle.manifest.weights).read_bytes()[:8])[0]
    assert min(offset for spots in places.values() for offset, _ in spots) == 8 + header
    # The method's graphs are cut out of the full one: what they use, it uses.
    for name in ("reuse_self", "reuse_cross", "reuse_both", "unguided"):
        assert places[name] <= places["full"]
    assert places["reuse_both"] < places["reuse_cross"] < places["unguided"]


def test_linear_weights_lie_as_engines_read_them(
    tiny_checkpoint: Callable[[str], Path], tiny_bundle: Callable[..., Path]
) -> None:
    """Checked against the checkpoint: a linear layer's weight is stored [in, out], a convolution's as it is."""
    bundle = Bundle.open(tiny_bundle("conv_projection"))
    unet = tiny_checkpoint("conv_projection") / "unet" / "diffusion_pytorch_model.safetensors"
    with (
        safe_open(unet, framework="numpy") as source,
        safe_open(bundle.file(bundle.manifest.weights), framework="numpy") as stored,
    ):
        key = next(k for k in source.keys() if k.endswith("attn1.to_q.weight"))  # noqa: SIM118
        np.testing.assert_array_equal(stored.get_tensor(f"unet.{key}^T"), source.get_tensor(key).T)
        np.testing.assert_array_equal(stored.get_tensor("unet.conv_in.weight"), source.get_tensor("conv_in.weight"))
