"""Graphs small enough to read, the same arithmetic in NumPy, and a bundle of them: what engines are tested with.

An engine knows graphs and memory, so nothing here has a plan, a sampler or a prompt.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from tgate_engine import underway
from tgate_engine.bundle import Bundle, digests_of
from tgate_engine.dtypes import DTYPES, decode, encode
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, DECODE, DENOISE, TEXT, Dim, GraphSpec, Macs, Role, TensorSpec
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.step import GUIDANCE, STEP, STEP_ROW, TIMESTEP

Arrays = Mapping[str, NDArray[Any]]
"""Tensors by their names, in the storage dtype."""

WEIGHTS = "weights.safetensors"
LATENTS = (2, 4, 4)
FEATURES = 32
WORDS, LENGTH, WIDTH = 12, 8, 4


def tensor(name: str, *shape: Dim, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def save(
    path: Path,
    nodes: Sequence[Any],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    initializers: Sequence[Any] = (),
    *,
    role: Role = DENOISE,
    batch: tuple[int, int] = (1, 4),
    domain: str = "",
) -> GraphSpec:
    """Write a graph of those nodes; its spec."""

    def info(spec: TensorSpec) -> Any:
        return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype].onnx, spec.shape)

    graph = helper.make_graph(list(nodes), "g", [*map(info, inputs)], [*map(info, outputs)], list(initializers))
    opsets = [helper.make_opsetid("", 23), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return GraphSpec(
        file=path.name,
        role=role,
        batch=batch,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        macs=Macs(paper=0, all=0),
    )


def one_node(path: Path, operator: str, dtype: str = "float32", *, domain: str = "") -> GraphSpec:
    """A graph y = operator(x) over [batch, 3]."""
    node = helper.make_node(operator, ["x"], ["y"], domain=domain)
    x, y = (tensor(name, BATCH, 3, dtype=dtype) for name in "xy")
    return save(path, [node], [x], [y], domain=domain)


def outside(name: str, offset: int, length: int, shape: Sequence[int], dtype: str = "float32") -> Any:
    """An initializer that lies in the weight file; ``offset`` and ``length`` in bytes."""
    weight = TensorProto(name=name, data_type=DTYPES[dtype].onnx, dims=shape)
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", WEIGHTS), ("offset", offset), ("length", length)):
        weight.external_data.add(key=key, value=str(value))
    return weight


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    shapes = {
        "w.self": (FEATURES, FEATURES),
        "w.out": (FEATURES, FEATURES),
        "w.text": (WIDTH, FEATURES),
        "w.embed": (WORDS, WIDTH),
        "w.image": (LATENTS[0], 3),
    }
    return {name: (rng.standard_normal(s) / np.sqrt(s[0])).astype(np.float32) for name, s in shapes.items()}


def network(own: Arrays, inputs: Arrays, dtype: str) -> dict[str, NDArray[Any]]:
    """What ``full`` and ``reuse`` give: one block of "attention" on 32 features, kept in ``dtype``."""
    latents, step = inputs["latents"], inputs[STEP]
    hidden = latents.reshape(-1, FEATURES) + step[:, TIMESTEP, None] * np.float32(1e-3)
    kept = inputs.get("self.0", encode(np.tanh(hidden @ own["w.self"]), dtype))
    text = inputs["text"].mean(1) @ own["w.text"]
    output = ((hidden + decode(kept, dtype) + text) @ own["w.out"]).reshape(latents.shape)
    return {"next_latents": latents + step[:, GUIDANCE].reshape(-1, 1, 1, 1) * output, "output": output, "self.0": kept}


def embedding(own: Arrays, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """What ``text`` gives."""
    return {"text": own["w.embed"][inputs["ids"]]}


def picture(own: Arrays, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """What ``decoder`` gives."""
    colours = inputs["latents"].transpose(0, 2, 3, 1) @ own["w.image"]
    return {"image": np.clip(colours * 60 + 127.5, 0, 255).astype(np.uint8)}


class Small:
    """A bundle of four graphs over one weight file: ``full`` gives a carry that ``reuse`` takes, ``text`` goes before
    and ``decoder`` after. ``references``: each graph's arithmetic in NumPy, inputs in and outputs out."""

    def __init__(
        self, folder: Path, *, batch: tuple[int, int] = (1, 4), carry_dtype: str = "float32", seed: int = 0
    ) -> None:
        folder.mkdir()
        self.weights = weights(seed)
        save_file(self.weights, folder / WEIGHTS)
        offsets = offsets_of(folder / WEIGHTS)
        build = _Graphs(folder, {name: offsets[name] for name in self.weights}, batch, carry_dtype)
        graphs = {"full": build.full(), "reuse": build.reuse(), "text": build.text(), "decoder": build.decoder()}
        shape = Shape(width=4, height=4, batch=batch, latents=LATENTS, constants={}, graphs=graphs)
        self.bundle = Bundle(folder, manifest_of(folder, shape))
        self.graphs: Mapping[str, GraphSpec] = graphs
        self.references: Mapping[str, Callable[[Arrays], dict[str, NDArray[Any]]]] = {
            "full": lambda inputs: network(self.weights, inputs, carry_dtype),
            "reuse": lambda inputs: network(self.weights, inputs, carry_dtype),
            "text": lambda inputs: embedding(self.weights, inputs),
            "decoder": lambda inputs: picture(self.weights, inputs),
        }

    def expected(self, graph: str, inputs: Arrays) -> dict[str, NDArray[Any]]:
        """The graph's outputs, by name."""
        outputs = self.references[graph](inputs)
        return {name: outputs[name] for name in self.graphs[graph].output_names()}


def random_inputs(spec: GraphSpec, batch: int, seed: int = 1) -> dict[str, NDArray[Any]]:
    """Words of the vocabulary, masks of which some are set, and numbers."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, NDArray[Any]] = {}
    for each in spec.inputs:
        shape = each.resolve(batch)
        if each.dtype == "int64":
            inputs[each.name] = rng.integers(0, WORDS, shape)
        elif "mask" in each.name:
            inputs[each.name] = encode(rng.random(shape) < 0.7, each.dtype)
        else:
            inputs[each.name] = encode(rng.standard_normal(shape), each.dtype)
    return inputs


def assert_close(spec: GraphSpec, got: Arrays, want: Arrays, tolerance: float = 1e-5) -> None:
    """Each output within ``tolerance`` times its largest value; of pictures, half way between two colours is either."""
    for each in spec.outputs:
        a, b = got[each.name], want[each.name]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), each.name
        a, b = decode(a, each.dtype).astype(np.float64), decode(b, each.dtype).astype(np.float64)
        bound = max(1, 255 * tolerance) if each.dtype == "uint8" else tolerance * np.abs(b).max()
        assert np.abs(a - b).max() <= bound, each.name


class _Graphs:
    """Writes the bundle's graphs."""

    def __init__(
        self, folder: Path, offsets: Mapping[str, tuple[int, int, tuple[int, ...]]], batch: tuple[int, int], carry: str
    ) -> None:
        self.folder = folder
        self.batch = batch
        self.carry = tensor("self.0", BATCH, FEATURES, dtype=carry)
        self.initializers = {name: outside(name, *place) for name, place in offsets.items()}
        for name, values in (
            ("timestep", np.array([TIMESTEP])),
            ("guidance", np.array([GUIDANCE])),
            ("thousandth", np.array(1e-3, np.float32)),
            ("words", np.array([1])),
            ("rows", np.array([-1, FEATURES])),
            ("images", np.array([-1, *LATENTS])),
            ("numbers", np.array([-1, 1, 1, 1])),
            ("contrast", np.array(60, np.float32)),
            ("grey", np.array(127.5, np.float32)),
            ("black", np.array(0, np.float32)),
            ("white", np.array(255, np.float32)),
        ):
            self.initializers[name] = numpy_helper.from_array(values, name)

    def full(self) -> GraphSpec:
        nodes = [
            helper.make_node("MatMul", ["hidden", "w.self"], ["scores"]),
            helper.make_node("Tanh", ["scores"], ["tanh"]),
            helper.make_node("Cast", ["tanh"], ["self.0"], to=DTYPES[self.carry.dtype].onnx),
        ]
        return self._step("full", nodes, [], [self.carry])

    def reuse(self) -> GraphSpec:
        return self._step("reuse", [], [self.carry], [])

    def _step(self, name: str, own: Sequence[Any], more: Sequence[TensorSpec], kept: Sequence[TensorSpec]) -> GraphSpec:
        node = helper.make_node
        nodes = [
            node("Reshape", ["latents", "rows"], ["flat"]),
            node("Gather", [STEP, "timestep"], ["time"], axis=1),
            node("Mul", ["time", "thousandth"], ["offset"]),
            node("Add", ["flat", "offset"], ["hidden"]),
            *own,
            node("Cast", ["self.0"], ["attention"], to=TensorProto.FLOAT),
            node("ReduceMean", ["text", "words"], ["mean"], keepdims=0),
            node("MatMul", ["mean", "w.text"], ["cross"]),
            node("Sum", ["hidden", "attention", "cross"], ["sum"]),
            node("MatMul", ["sum", "w.out"], ["product"]),
            node("Reshape", ["product", "images"], ["output"]),
            node("Gather", [STEP, "guidance"], ["column"], axis=1),
            node("Reshape", ["column", "numbers"], ["weight"]),
            node("Mul", ["output", "weight"], ["move"]),
            node("Add", ["latents", "move"], ["next_latents"]),
        ]
        inputs = [
            tensor("latents", BATCH, *LATENTS),
            tensor(STEP, BATCH, STEP_ROW),
            tensor("text", BATCH, LENGTH, WIDTH),
        ]
        outputs = [tensor("next_latents", BATCH, *LATENTS), tensor("output", BATCH, *LATENTS)]
        return self._save(name, nodes, [*inputs, *more], [*outputs, *kept], DENOISE)

    def text(self) -> GraphSpec:
        nodes = [helper.make_node("Gather", ["w.embed", "ids"], ["text"], axis=0)]
        inputs, outputs = [tensor("ids", BATCH, LENGTH, dtype="int64")], [tensor("text", BATCH, LENGTH, WIDTH)]
        return self._save("text", nodes, inputs, outputs, TEXT)

    def decoder(self) -> GraphSpec:
        node = helper.make_node
        nodes = [
            node("Transpose", ["latents"], ["last"], perm=[0, 2, 3, 1]),
            node("MatMul", ["last", "w.image"], ["colours"]),
            node("Mul", ["colours", "contrast"], ["scaled"]),
            node("Add", ["scaled", "grey"], ["shifted"]),
            node("Clip", ["shifted", "black", "white"], ["clipped"]),
            node("Cast", ["clipped"], ["image"], to=TensorProto.UINT8),
        ]
        inputs, outputs = [tensor("latents", BATCH, *LATENTS)], [tensor("image", BATCH, 4, 4, 3, dtype="uint8")]
        return self._save("decoder", nodes, inputs, outputs, DECODE)

    def _save(
        self, name: str, nodes: Sequence[Any], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], role: Role
    ) -> GraphSpec:
        used = {each for node in nodes for each in node.input}
        initializers = [each for name, each in self.initializers.items() if name in used]
        path = self.folder / f"{name}.onnx"
        return save(path, nodes, inputs, outputs, initializers, role=role, batch=self.batch)


def offsets_of(path: Path) -> dict[str, tuple[int, int, tuple[int, ...]]]:
    """Where each tensor of a safetensors file begins, its length, both in bytes, and its shape."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header: dict[str, Any] = json.loads(raw[8 : 8 + length])
    return {
        name: (
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            entry["shape"],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def manifest_of(folder: Path, shape: Shape) -> Manifest:
    return Manifest(
        model="small",
        family="small",
        licence="Apache-2.0",
        dtype="float32",
        frames=1,
        fps=0,
        guidance="none",
        guidance_scale=1.0,
        guidance_rescale=0.0,
        clip_skip=0,
        zero_negative=False,
        weights=WEIGHTS,
        samplers="",
        shapes=(shape,),
        carries={},
        conditioning=(),
        tokenizers=(),
        plans={},
        goldens={},
        files=digests_of(folder),
        scheduler={},
    )


LONG_SIDE, LONG_PRODUCTS = 256, 400


def long_graph(path: Path) -> GraphSpec:
    """A graph that takes the better part of a second: y = x rotated as often as it has products."""
    rotated = np.roll(np.eye(LONG_SIDE, dtype=np.float32), 1, axis=1)
    names = ["x", *(f"h{i}" for i in range(1, LONG_PRODUCTS)), "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    x, y = (tensor(name, LONG_SIDE, LONG_SIDE) for name in "xy")
    return save(path, nodes, [x], [y], [numpy_helper.from_array(rotated, "w")])


def cancelled_and_called_again(engine: Any, load: Callable[[Path, GraphSpec], Any], folder: Path) -> None:
    """A call that is cancelled from another thread fails, long before its end, and may be called again."""
    executable = load(folder / "long.onnx", long_graph(folder / "long.onnx"))
    x, y = (engine.allocate((LONG_SIDE, LONG_SIDE), "float32") for _ in "xy")
    values = np.random.default_rng(0).standard_normal((LONG_SIDE, LONG_SIDE)).astype(np.float32)
    x.write(values)
    call = executable.bind({"x": x}, {"y": y})
    begin_s = time.perf_counter()
    call()
    whole_s = time.perf_counter() - begin_s
    timer = threading.Timer(whole_s / 10, underway.cancel_calls)
    begin_s = time.perf_counter()
    timer.start()
    with pytest.raises(EngineError, match=r"graph long\.onnx failed in "):
        call()
    assert time.perf_counter() - begin_s < whole_s * 0.7
    timer.join()
    y.write(np.zeros_like(values))
    call()
    np.testing.assert_array_equal(y.read(), np.roll(values, LONG_PRODUCTS, axis=1))
