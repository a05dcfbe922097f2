"""One copy of the weights in OpenVINO: graphs as branches of one model, beside what test_every_engine.py sees."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from tests.processor import needs_bfloat16
from tests.runtime.engines.small import WEIGHTS, manifest_of, offsets_of, outside, random_inputs, save, tensor
from tests.runtime.engines.test_openvino import inputs_of, outputs_of
from tgate_engine.bundle import Bundle
from tgate_engine.graph import BATCH, GraphSpec
from tgate_engine.manifest import Shape
from tgate_engine.step import STEP, STEP_ROW, TIMESTEP
from tgate_runtime.engines.openvino import OpenVino
from tgate_runtime.engines.protocol import EngineOptions

WIDTH, LAYERS = 1536, 4
CHANNELS, GROUPS, EPSILON = 8, 2, 1e-3


def bundle_of(folder: Path, graphs: Mapping[str, GraphSpec]) -> Bundle:
    shape = Shape(width=4, height=4, batch=(1, 1), latents=(1, 4, 4), constants={}, graphs=graphs)
    return Bundle(folder, manifest_of(folder, shape))


def resident_bytes() -> int:
    """Of this process, without the pages of files and what is freed."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) << 10


def chains(folder: Path, dtype: type[np.generic]) -> tuple[Bundle, Sequence[GraphSpec], int]:
    """Three graphs of products with the same weights, in other orders; and how many bytes those are in float32."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    names = [f"w.{number}" for number in range(LAYERS)]
    weights = {name: (rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)).astype(dtype) for name in names}
    save_file(weights, folder / WEIGHTS)
    kind, places, graphs = np.dtype(dtype).name, offsets_of(folder / WEIGHTS), {}
    for shift in range(3):
        order = names[shift:] + names[:shift]
        values = ["x", *(f"h.{number}" for number in range(1, LAYERS)), "y"]
        nodes = [helper.make_node("MatMul", [values[i], order[i]], [values[i + 1]]) for i in range(LAYERS)]
        own = [outside(name, *places[name], kind) for name in names]
        x, y = (tensor(name, 16, WIDTH, dtype=kind) for name in "xy")
        graphs[f"g{shift}"] = save(folder / f"g{shift}.onnx", nodes, [x], [y], own, batch=(1, 1))
    return bundle_of(folder, graphs), [*graphs.values()], LAYERS * WIDTH * WIDTH * 4


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (np.float32, "f32"),
        (np.float16, "f32"),
        pytest.param(np.float32, "bf16", marks=needs_bfloat16),
        pytest.param(np.float16, "bf16", marks=needs_bfloat16),
    ],
)
def test_weights_are_packed_once(tmp_path: Path, dtype: type[np.generic], precision: str) -> None:
    # In a process of its own: what earlier tests gave back would be taken first, and nothing would seem to grow.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        process.submit(packs_weights_once, tmp_path / "bundle", dtype, precision).result()


def packs_weights_once(folder: Path, dtype: type[np.generic], precision: str) -> None:
    bundle, graphs, whole = chains(folder, dtype)
    computed = whole if precision == "f32" else whole // 2
    grown = {}
    for memory in ("shared", "fast"):
        before = resident_bytes()
        loaded = OpenVino(EngineOptions(threads=1, precision=precision, memory=memory)).load(bundle, graphs)
        grown[memory] = resident_bytes() - before
        results = []
        for spec in graphs:
            outputs = outputs_of(spec, 1)
            loaded[spec.file].bind(inputs_of(spec, random_inputs(spec, 1)), outputs)()
            results.append(outputs["y"].read())
        if memory == "shared":
            wanted = results
        else:
            for got, want in zip(results, wanted, strict=True):
                apart = np.abs(got.astype(np.float64) - want).max() / np.abs(want).max()
                assert apart < (1e-5 if precision == "f32" and dtype is np.float32 else 2e-2)
        del loaded
    # One packed copy, and one in the precision of the computation where the file has it in another.
    copies = 1 if np.dtype(dtype).itemsize == 4 and precision == "f32" else 2
    assert grown["shared"] < (copies + 0.6) * computed
    assert grown["fast"] > 2.7 * computed


def test_sizes_and_normalisations(tmp_path: Path) -> None:
    """Graphs of two sizes, whose tensors share names alone, with group normalisation and an output that one has."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    rng = np.random.default_rng(1)
    own = {name: rng.standard_normal(CHANNELS).astype(np.float32) for name in ("scale", "bias")}
    own["kernel"] = rng.standard_normal((CHANNELS, CHANNELS, 1, 1)).astype(np.float32)
    save_file(own, folder / WEIGHTS)
    places, graphs = offsets_of(folder / WEIGHTS), {}
    for name, sides in (("wide", (2, 6)), ("high", (5, 3))):
        x, y, kept = (tensor(each, 2, CHANNELS, *sides) for each in ("x", "y", "kept"))
        nodes = [
            helper.make_node(
                "GroupNormalization", ["x", "scale", "bias"], ["kept"], num_groups=GROUPS, epsilon=EPSILON
            ),
            helper.make_node("Conv", ["kept", "kernel"], ["y"]),
        ]
        outputs = [y, kept] if name == "wide" else [y]
        initializers = [outside(each, *places[each]) for each in own]
        graphs[name] = save(folder / f"{name}.onnx", nodes, [x], outputs, initializers, batch=(1, 1))
    bundle = bundle_of(folder, graphs)
    loaded = OpenVino(EngineOptions(threads=1, precision="f32", memory="shared")).load(bundle, [*graphs.values()])
    for spec in (*graphs.values(), graphs["wide"]):
        values = random_inputs(spec, 1)
        taken = values["x"].astype(np.float64)
        grouped = taken.reshape(2, GROUPS, -1)
        centred = grouped - grouped.mean(-1, keepdims=True)
        normal = (centred / np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPSILON)).reshape(taken.shape)
        normed = normal * own["scale"][:, None, None] + own["bias"][:, None, None]
        want = {"kept": normed, "y": np.einsum("oc,nchw->nohw", own["kernel"][:, :, 0, 0].astype(np.float64), normed)}
        got = outputs_of(spec, 1)
        loaded[spec.file].bind(inputs_of(spec, values), got)()
        for name, buffer in got.items():
            np.testing.assert_allclose(buffer.read(), want[name], rtol=1e-4, atol=1e-5)


@needs_bfloat16
def test_in_bfloat16_each_branch_has_what_its_own_graph_makes_of_the_timestep(tmp_path: Path) -> None:
    """To more digits than bfloat16 has, in which 801 is 800. The parts' outputs have the same names in both graphs."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    save_file({"weight": np.ones((1, 4), np.float32)}, folder / WEIGHTS)
    place, graphs = offsets_of(folder / WEIGHTS)["weight"], {}
    for name, wave in (("first", "Cos"), ("second", "Sin")):
        nodes = [
            helper.make_node("Gather", [STEP, "column"], ["time"], axis=1),
            helper.make_node(wave, ["time"], ["waves"]),
            helper.make_node("MatMul", ["waves", "weight"], ["output"]),
        ]
        own = [numpy_helper.from_array(np.array([TIMESTEP]), "column"), outside("weight", *place)]
        step, output = tensor(STEP, BATCH, STEP_ROW), tensor("output", BATCH, 4)
        graphs[name] = save(folder / f"{name}.onnx", nodes, [step], [output], own)
    engine = OpenVino(EngineOptions(threads=1, precision="bf16", memory="shared"))
    loaded = engine.load(bundle_of(folder, graphs), [*graphs.values()])
    for name, function in (("first", np.cos), ("second", np.sin)):
        rows = np.zeros((2, STEP_ROW), np.float32)
        rows[:, TIMESTEP] = 801, 800
        got = outputs_of(graphs[name], 2)
        loaded[graphs[name].file].bind(inputs_of(graphs[name], {STEP: rows}), got)()
        np.testing.assert_allclose(got["output"].read()[:, 0], function(np.array([801.0, 800.0])), atol=0.01)
