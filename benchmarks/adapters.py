"""What an adapter costs a step: weights changed in copies, as a session does it, beside a low-rank branch at each
layer, as an engine with inputs for LoRAs has it.

    tgate-export --model sd15 --weights random --components denoiser --no-verify --output bundles/sd15-random
    python -m benchmarks.adapters bundles/sd15-random --output benchmarks/results/adapters.json

One graph, ``full``, on ``ort-cpu`` over one copy of the weights, with a LoRA of random numbers in all linear layers of
the transformer blocks. Calls of the ways are made in turns in one process. On a quiet machine: its load is saved with
the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.numpy import save

from benchmarks.frugality import machine
from tgate_engine.adapter import DOWN, FACTOR, TURNED, UP
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import encode
from tgate_engine.errors import RequestError
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import Adapter
from tgate_runtime.adapters import weights_with
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.engines.protocol import EngineOptions, Executable
from tgate_runtime.weights import Weight, map_weights

GRAPH, BLOCKS, NAME = "full", "transformer_blocks", "measured"
Factors = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Of a weight [inputs, outputs], by its name: down [inputs, rank] and up [rank, outputs]."""


def factors_of(weights: Mapping[str, Weight], rank: int) -> Factors:
    """A change of every linear layer of the transformer blocks, a hundredth of the weights' size."""
    rng = np.random.default_rng(0)
    found = {}
    for name, weight in weights.items():
        if name.endswith(f".weight{TURNED}") and f".{BLOCKS}." in name:
            inputs, outputs = weight.array.shape
            down = rng.standard_normal((inputs, rank), dtype=np.float32) / np.float32(inputs)
            found[name] = down, rng.standard_normal((rank, outputs), dtype=np.float32) * np.float32(0.01)
    if not found:
        raise RequestError("the bundle has no transformer blocks; take one of sd15")
    return found


@contextmanager
def kept(bundle: Bundle, factors: Factors) -> Iterator[Bundle]:
    """The bundle with the change as an adapter, which is taken out in the end."""
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[name + UP] = np.ascontiguousarray(up.T)
        tensors[name + DOWN] = np.ascontiguousarray(down.T)
        tensors[name + FACTOR] = np.ones(1, np.float32)
    rank = next(iter(factors.values()))[0].shape[1]
    adapter = Adapter(file=f"adapters/{NAME}.safetensors", layers=len(factors), rank=rank)
    try:
        yield bundle.save_adapter(NAME, adapter, save(tensors), force=True)
    finally:
        Bundle.open(bundle.path, check_digests=False).remove_adapters([NAME])


def low_rank(data: bytes, factors: Factors, dtype: str) -> bytes:
    """A graph with ``x @ down @ up`` added to each product with one of those weights."""
    model = onnx.load_model_from_string(data)
    graph, nodes = model.graph, []
    kind = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16}[dtype]
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "MatMul" or node.input[1] not in factors:
            continue
        weight, result = node.input[1], node.output[0]
        for part, values in zip(("down", "up"), factors[weight], strict=True):
            tensor = numpy_helper.from_array(encode(values, dtype), f"{weight}.{part}")
            assert tensor.data_type == kind
            if tensor.name not in {each.name for each in graph.initializer}:
                graph.initializer.append(tensor)
        node.output[0] = f"{result}.plain"
        nodes += [
            helper.make_node("MatMul", [node.input[0], f"{weight}.down"], [f"{result}.low"]),
            helper.make_node("MatMul", [f"{result}.low", f"{weight}.up"], [f"{result}.change"]),
            helper.make_node("Add", [f"{result}.plain", f"{result}.change"], [result]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def call_of(engine: OrtCpu, executable: Executable, spec: GraphSpec) -> tuple[Callable[[], None], Mapping[str, Any]]:
    """A call for one image on random inputs, the same for each; and its outputs."""
    rng = np.random.default_rng(1)
    inputs = {}
    for tensor in spec.inputs:
        inputs[tensor.name] = engine.allocate(tensor.resolve(1), tensor.dtype)
        values = rng.standard_normal(tensor.resolve(1))
        inputs[tensor.name].write(encode(values, tensor.dtype))
    outputs = {tensor.name: engine.allocate(tensor.resolve(1), tensor.dtype) for tensor in spec.outputs}
    return executable.bind(inputs, outputs), outputs


def resident_bytes() -> int:
    """Of this process, without the pages of files."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def measured(place: Path, *, rank: int, repeats: int, memory: str, threads: int | None) -> dict[str, Any]:
    """Milliseconds of a call each way, in turns, and what loading each took in seconds and bytes."""
    bundle = Bundle.open(place)
    spec = bundle.manifest.shapes[0].graphs[GRAPH]
    weights = map_weights(bundle.file(bundle.manifest.weights))
    factors = factors_of(weights, rank)
    engine = OrtCpu(EngineOptions(memory=memory, threads=threads))
    with kept(bundle, factors) as adapted:

        def plain() -> Executable:
            return engine.load(bundle, [spec])[spec.file]

        def copies() -> Executable:
            return engine.load(adapted, [spec], instead=weights_with(adapted, ((NAME, 1.0),)))[spec.file]

        def branch() -> Executable:
            data = low_rank(bundle.read(spec.file), factors, bundle.manifest.dtype)
            return engine.load_graph(data, bundle.path, spec)

        ways: dict[str, Callable[[], Executable]] = {"plain": plain, "copies": copies, "branch": branch}
        found: dict[str, dict[str, Any]] = {}
        calls = {}
        for name, load in ways.items():
            before, began = resident_bytes(), time.perf_counter()
            executable = load()
            found[name] = {"load_s": round(time.perf_counter() - began, 2)}
            calls[name] = call_of(engine, executable, spec)
            found[name]["bytes"] = resident_bytes() - before
        times: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(repeats + 1):
            for name, (call, _) in calls.items():
                began = time.perf_counter()
                call()
                if turn:  # the first is not counted
                    times[name].append((time.perf_counter() - began) * 1e3)
        for name, each in times.items():
            found[name] |= {"ms": round(statistics.median(each), 1), "all_ms": [round(one, 1) for one in each]}
            pairs = [one / base for one, base in zip(each, times["plain"], strict=True)]
            found[name]["ratio"] = round(statistics.median(pairs), 3)
    first = {name: next(iter(outputs.values())).read() for name, (_, outputs) in calls.items()}
    largest = float(np.abs(first["copies"]).max())
    return {
        "model": bundle.manifest.model,
        "size": bundle.manifest.shapes[0].size,
        "dtype": bundle.manifest.dtype,
        "rank": rank,
        "layers": len(factors),
        "changed_bytes": sum(weights[name].array.nbytes for name in factors),
        "weights_bytes": bundle.manifest.files[bundle.manifest.weights].bytes,
        "memory": memory,
        "threads": threads,
        "repeats": repeats,
        "apart": float(np.abs(first["copies"] - first["branch"]).max()) / largest,
        "changed": float(np.abs(first["copies"] - first["plain"]).max()) / largest,
        "ways": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rank", type=int, action="append", help="16 and 64 if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", choices=("shared", "fast"), default="shared")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    runs = [
        measured(asked.bundle, rank=rank, repeats=asked.repeats, memory=asked.memory, threads=asked.threads)
        for rank in asked.rank or (16, 64)
    ]
    load = os.getloadavg()
    result = {"machine": {**machine(), "load": [round(each, 2) for each in load]}, "runs": runs}
    write_atomically(asked.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
