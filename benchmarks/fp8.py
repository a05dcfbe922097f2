"""What FP8 would cost in pictures, simulated on the CPU before any GPU sees it.

    python -m benchmarks.fp8 BUNDLE --output benchmarks/results/fp8-simulated-mini-sdxl.json

BUNDLE is of an embedded model, in float32, with its goldens. In the denoising graphs, every product of activations and
a weight is computed as an FP8 kernel with scales per tensor computes it: both are divided by their scale, rounded to
E4M3 with saturation, and multiplied; sums and all else stay in float32. A weight's scale is its largest absolute
value / 448. Activations have static scales, one for each layer: their largest absolute value over the replayed
goldens / 448. Attention's own products, convolutions, text encoder and decoder are left as they are. What is not
simulated: sums that are shorter than float32, as tensor cores may keep them, and what lies between in 16 bits.

Both ways draw the same held-out captions from the same noise, by the ungated and the default plan, and one classifier
judges them (training/evaluate.py). How far activations of whole trajectories go beyond the goldens' is saved as well.
Saved after every part, and what a file of the same settings holds is not drawn again; so it may be stopped, and says
how many captions it has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.quality import conditions, draw
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_engine.graph import DENOISE, GraphSpec
from tgate_engine.plan import Plan
from tgate_runtime.engines.ort import OrtCpu, OrtExecutable, find_weights
from tgate_runtime.engines.protocol import Call, EngineOptions, Instead, OnBuild
from tgate_runtime.graph_check import read_graphs
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.tuning.quality import interval, psnr
from tgate_runtime.verify import verify
from tgate_runtime.weights import Weight, map_weights
from training.evaluate import Pictures, evaluation_captions, score_pictures
from training.grammar import draw_scene, training_caption

LARGEST = 448.0
"""The largest number of E4M3 (``float8_e4m3fn``, which has no infinity)."""
PLANS = ("ungated", "default")
PART = 25  # captions between two savings
POINT = 0.01
"""Of accuracy: what FP8 may cost at most to be worth having by default."""

TRAJECTORIES, TRAJECTORIES_SEED = 3, 7
"""How many captions that training saw show what the goldens' ranges leave out."""

Weights = Mapping[str, Weight]
Maxima = Mapping[str, float]
"""By the name of a layer's weight, the largest absolute value that its activations had."""


# --- graphs -------------------------------------------------------------------------------------


def linear_layers(graph: ir.Graph, weights: Weights) -> Iterator[tuple[ir.Node, ir.Value, str]]:
    """Every product of a value with a matrix of the weight file: the node, the value, and the weight's name.

    Raises :class:`BundleError` for a Gemm, which export does not write.
    """
    for node in graph:
        if node.op_type == "Gemm":
            raise BundleError(f"node {node.name} is a Gemm, and how to simulate it is not written here")
        if node.op_type == "MatMul":
            value, weight = node.inputs
            name = weight.name if weight is not None and weight.is_initializer() else None
            if value is not None and name is not None and name in weights:
                yield node, value, name


def rounded_weight(array: NDArray[np.float32]) -> tuple[NDArray[Any], np.float32]:
    """``array`` in E4M3 and its scale, by which that is to be multiplied. One of zeros has scale 1."""
    scale = scale_of(float(np.abs(array).max(initial=0.0)))
    return np.clip(array / scale, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn), scale


def scale_of(largest: float) -> np.float32:
    """The scale of a tensor whose largest absolute value is ``largest``."""
    return np.float32(largest / LARGEST) if largest else np.float32(1)


def in_fp8(data: bytes, weights: Weights, maxima: Maxima) -> bytes:
    """A graph's ONNX file whose linear layers compute in FP8; its inputs and outputs stay as they were.

    Raises :class:`BundleError` for a layer whose activations nobody has seen.
    """
    model = ir.from_proto(onnx.load_model_from_string(data))
    graph = model.graph
    rounded: dict[tuple[ir.Value, np.float32], ir.Value] = {}
    matrices: dict[str, tuple[ir.Value, np.float32]] = {}
    for number, (node, value, name) in enumerate([*linear_layers(graph, weights)]):
        if name not in maxima:
            raise BundleError(f"no golden runs the layer of {name}; export the bundle with its goldens")
        scale = scale_of(maxima[name])
        if (value, scale) not in rounded:  # queries, keys and values read one tensor
            quotient = _before(graph, node, "Div", [value, _constant(graph, f"fp8.scale.{len(rounded)}", scale)])
            rounded[value, scale] = _in_e4m3(graph, node, quotient)
        if name not in matrices:
            codes, own = rounded_weight(weights[name].array)
            matrices[name] = _constant(graph, f"fp8.weight.{len(matrices)}", codes.astype(np.float32)), own
        matrix, own = matrices[name]
        product = _before(graph, node, "MatMul", [rounded[value, scale], matrix])
        both = _constant(graph, f"fp8.both.{number}", np.float32(scale * own))
        node.op_type = "Mul"  # so the layer's result keeps its name, and who reads it
        node.replace_input_with(0, product)
        node.replace_input_with(1, both)
    return ir.to_proto(model).SerializeToString()


def with_maxima(data: bytes, weights: Weights) -> tuple[bytes, list[str]]:
    """A graph's ONNX file that gives the largest absolute value of every linear layer's activations and nothing else,
    and the names of the layers' weights in the order of the outputs."""
    model = ir.from_proto(onnx.load_model_from_string(data))
    graph, names = model.graph, list[str]()
    layers = list(linear_layers(graph, weights))
    graph.outputs.clear()
    for _, value, name in layers:
        sizes = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", [sizes.outputs[0]], attributes={"keepdims": 0})
        graph.extend([sizes, largest])
        output = largest.outputs[0]
        output.name, output.type = f"fp8.largest.{len(names)}", ir.TensorType(ir.DataType.FLOAT)
        output.shape = ir.Shape([])
        graph.outputs.append(output)
        names.append(name)
    return ir.to_proto(model).SerializeToString(), names


def _in_e4m3(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """``value`` rounded to the nearest number of E4M3, to the even one of two, in arithmetic of float32.

    ONNX Runtime's Cast to E4M3 and back gives the same and takes six times as long. Normal numbers keep 4 bits by
    Veltkamp's splitting; below them a large number is added and taken away, whose last bit is E4M3's smallest step.
    """

    def of(operator: str, *inputs: ir.Value) -> ir.Value:
        return _before(graph, node, operator, inputs)

    def constant(name: str, wanted: float) -> ir.Value:
        return graph.initializers.get(f"fp8.{name}") or _constant(graph, f"fp8.{name}", np.float32(wanted))

    held = of("Clip", value, constant("least", -LARGEST), constant("largest", LARGEST))
    split = of("Mul", held, constant("split", 2.0**20 + 1))
    normal = of("Sub", split, of("Sub", split, held))
    large = constant("large", 1.5 * 2.0**14)
    small = of("Sub", of("Add", held, large), large)
    is_small = of("Less", of("Abs", held), constant("smallest_normal", 2.0**-6))
    return of("Where", is_small, small, normal)


def _before(graph: ir.Graph, node: ir.Node, operator: str, inputs: Sequence[ir.Value]) -> ir.Value:
    new = ir.node(operator, inputs)
    graph.insert_before(node, new)
    return new.outputs[0]


def _constant(graph: ir.Graph, name: str, array: Any) -> ir.Value:
    values = np.asarray(array)
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(values.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


# --- engines ------------------------------------------------------------------------------------


class Fp8(OrtCpu):
    """``ort-cpu`` on one thread whose denoising graphs compute their linear layers in FP8. What a bundle holds is
    checked before anything is rewritten, and stays as it is."""

    def __init__(self, maxima: Maxima) -> None:
        super().__init__(EngineOptions(threads=1))
        self._maxima = maxima

    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> dict[str, OrtExecutable]:
        assert not instead, "simulated without adapters"
        files, weights = read_graphs(bundle, graphs), map_weights(bundle.file(bundle.manifest.weights))
        for spec in graphs:
            if spec.role == DENOISE:
                files[spec.file] = in_fp8(files[spec.file], weights, self._maxima)
        return {spec.file: self.load_graph(files[spec.file], bundle.path, spec) for spec in graphs}


class Observing(OrtCpu):
    """``ort-cpu`` on one thread, and beside every call of a denoising graph a second one that looks at the activations
    of its linear layers. ``maxima``: what was seen so far. One call at a time."""

    def __init__(self) -> None:
        super().__init__(EngineOptions(threads=1))
        self.maxima: dict[str, float] = {}

    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> dict[str, OrtExecutable]:
        assert not instead, "simulated without adapters"
        files, weights = read_graphs(bundle, graphs), map_weights(bundle.file(bundle.manifest.weights))
        loaded = super().load(bundle, graphs, on_build)
        for spec in graphs:
            if spec.role == DENOISE:
                options = self._session_options()
                find_weights(options, bundle.path)
                data, names = with_maxima(files[spec.file], weights)
                probe = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
                loaded[spec.file] = _Observed(loaded[spec.file], self._look(probe, names))
        return loaded

    def _look(self, probe: ort.InferenceSession, names: Sequence[str]) -> Callable[[Mapping[str, Any]], None]:
        taken = {node.name for node in probe.get_inputs()}

        def look(inputs: Mapping[str, Any]) -> None:
            largest = probe.run(None, {name: buffer.read() for name, buffer in inputs.items() if name in taken})
            for name, one in zip(names, largest, strict=True):
                self.maxima[name] = max(self.maxima.get(name, 0.0), float(one))

        return look


class _Observed(OrtExecutable):
    def __init__(self, executable: OrtExecutable, look: Callable[[Mapping[str, Any]], None]) -> None:
        self._executable, self._look = executable, look

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Any:
        return _ObservedCall(self._executable.bind(inputs, outputs), lambda: self._look(inputs))


class _ObservedCall:
    def __init__(self, call: Call, look: Callable[[], None]) -> None:
        self._call, self._look = call, look
        self.addresses = call.addresses

    def __call__(self) -> None:
        self._look()
        self._call()


def calibrate(bundle: Bundle) -> dict[str, float]:
    """The largest absolute value of every linear layer's activations over the bundle's goldens, which are replayed.

    Raises :class:`BundleError` where it has none, or one does not come out as it was recorded.
    """
    engine = Observing()
    checked = verify(bundle, engine=engine)
    if not checked or not engine.maxima:
        raise BundleError(f"{bundle.path} has no goldens to calibrate on; export it without --no-verify")
    if odd := [golden.name for golden in checked if not golden.ok]:
        raise BundleError(f"{bundle.path}: golden {odd[0]} does not come out as recorded; export the bundle again")
    return engine.maxima


def beyond(bundle: Bundle, maxima: Maxima, plans: Sequence[Plan]) -> dict[str, Any]:
    """How far activations go beyond ``maxima``, where FP8 saturates, when whole trajectories of captions that training
    saw are drawn: of how many layers they do, and the most, as a multiple."""
    rng, engine = random.Random(TRAJECTORIES_SEED), Observing()
    captions = [training_caption(draw_scene(rng), rng) for _ in range(TRAJECTORIES)]
    with Pipeline.open(bundle, engine=engine, plans=plans) as pipe:
        for plan in plans:
            draw(pipe, plan, captions, TRAJECTORIES_SEED, 1)
    times = [engine.maxima[name] / largest if largest else 1.0 for name, largest in maxima.items()]
    return {
        "captions": captions,
        "layers": len(times),
        "layers_beyond": sum(one > 1 for one in times),
        "most": round(max(times), 3),
    }


# --- measuring ----------------------------------------------------------------------------------


def judged(captions: list[str], pictures: Pictures) -> list[bool]:
    """For each picture, whether the object that its caption names first is there, in its colour and shape."""
    pairs = zip(captions, pictures, strict=True)
    return [score_pictures([caption], picture[None]).first_object == 1 for caption, picture in pairs]


def summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row's captions so far: accuracies, what FP8 loses with its 95 % interval (paired), and the mean PSNR."""
    count = row["captions"]
    plain, simulated = ({*row[f"wrong_{way}"]} for way in ("float32", "fp8"))
    lost = [float((i in simulated) - (i in plain)) for i in range(count)]
    low, high = interval(lost)
    return {
        "float32": round(1 - len(plain) / count, 4),
        "fp8": round(1 - len(simulated) / count, 4),
        "lost": round(float(np.mean(lost)), 4),
        "lost_low": round(low, 4),
        "lost_high": round(high, 4),
        "wrong_in_fp8_alone": len(simulated - plain),
        "wrong_in_float32_alone": len(plain - simulated),
        "within_one_point": float(np.mean(lost)) <= POINT,
    }


def measure(bundle: Bundle, output: Path, *, count: int, seed: int) -> None:
    """Draw ``count`` captions in parts, both ways by both plans, and save after each part."""
    manifest = bundle.manifest
    if manifest.dtype != "float32":
        raise BundleError(f"{bundle.path} is in {manifest.dtype}; export it with --dtype fp32")
    maxima = calibrate(bundle)
    plans = {name: manifest.plan(name) for name in PLANS}
    captions = evaluation_captions(count)
    with ExitStack() as stack:
        pipes = {
            way: stack.enter_context(Pipeline.open(bundle, engine=engine, plans=[*plans.values()]))
            for way, engine in (("float32", OrtCpu(EngineOptions(threads=1))), ("fp8", Fp8(maxima)))
        }
        settings = conditions(pipes["float32"], plans, count, seed, 1) | {
            "plans": {name: plan.settings for name, plan in plans.items()},
            "calibration": sorted(manifest.goldens),
            "format": "float8_e4m3fn",
            "linear_layers": len(maxima),
            "maxima_sha256": hashlib.sha256(json.dumps(maxima, sort_keys=True).encode()).hexdigest(),
        }
        settings = json.loads(json.dumps(settings))
        before = json.loads(output.read_text()) if output.is_file() else {}
        result = before if before.get("settings") == settings else {"settings": settings, "rows": {}}
        if "beyond" not in result:
            result["beyond"] = beyond(bundle, maxima, [*plans.values()])
            _save(output, result)
        for first in range(0, count, PART):
            part = captions[first : first + PART]
            for name, plan in plans.items():
                row = result["rows"].setdefault(
                    name, {"captions": 0, "psnr": 0.0, "wrong_float32": [], "wrong_fp8": []}
                )
                if row["captions"] > first:
                    continue
                drawn = {way: draw(pipe, plan, part, seed + first, 1) for way, pipe in pipes.items()}
                for way, pictures in drawn.items():
                    row[f"wrong_{way}"] += [first + i for i, hit in enumerate(judged(part, pictures)) if not hit]
                near = sum(map(psnr, drawn["fp8"], drawn["float32"]))
                row["psnr"] = (row["psnr"] * row["captions"] + near) / (row["captions"] + len(part))
                row["captions"] += len(part)
                row |= summary(row)
                _save(output, result)
                print(f"{name}, {row['captions']} captions: {summary(row)}, {row['psnr']:.1f} dB", flush=True)


def _save(output: Path, result: Mapping[str, Any]) -> None:
    write_atomically(output, (json.dumps(result, indent=1) + "\n").encode())


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1000)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    measure(Bundle.open(args.bundle), args.output, count=args.captions, seed=args.seed)


if __name__ == "__main__":
    main()
