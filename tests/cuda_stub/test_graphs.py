"""What CUDA's provider makes of the embedded models' graphs: where nodes run, what is captured, copied and launched."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.cuda_stub.build import HERE
from tests.cuda_stub.conftest import Bound, Opened
from tests.cuda_stub.counted import COLUMNS, bound, counted
from tests.cuda_stub.log import Kind, of, recorded
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import DTYPES
from tgate_engine.graph import DENOISE
from tgate_engine.step import STEP_ROW
from tgate_runtime.engines.ort_cuda import OrtCuda
from tgate_runtime.engines.protocol import EngineOptions
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.weights import Weight, map_weights

MODELS = ("mini", "mini-sdxl")
DOCS = HERE.parents[1] / "docs" / "engines.md"

Opening = Callable[[str], Opened]
Binding = Callable[[str, str], Bound]


def denoising(own: Opened) -> list[str]:
    names = [name for name, spec in own.specs.items() if spec.role == DENOISE]
    assert {"full", "reuse_self", "reuse_cross"} <= {*names}
    return names


def whole_numbers(model: Any) -> set[str]:
    """The nodes of a graph whose every output is of int64: sizes."""
    model = onnx.shape_inference.infer_shapes(model)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    return {node.name for node in model.graph.node if all(types.get(name) == TensorProto.INT64 for name in node.output)}


@pytest.mark.parametrize("model", MODELS)
def test_a_denoising_graph_runs_on_the_gpu(model: str, opened: Opening) -> None:
    """By ONNX Runtime's own word. The CPU reckons with sizes, before a capture: nothing else, and no tensor goes there
    and back."""
    own = opened(model)
    for name in denoising(own):
        nodes = {"CPUExecutionProvider": [], "CUDAExecutionProvider": []}  # type: dict[str, list[Any]]
        for part in own.graphs[name].session(own.specs[name].output_names()).get_provider_graph_assignment_info():
            nodes[part.ep_name] += part.get_nodes()
        model_file = onnx.load_model_from_string(own.engine.lowered(own.bundle.read(own.specs[name].file)).data)
        on_the_cpu = {node.name for node in nodes["CPUExecutionProvider"]} - {""}
        assert on_the_cpu <= whole_numbers(model_file), name
        # A GroupNormalization that is left is taken apart into nodes without names, two of them for sizes.
        unnamed = Counter(node.op_type for node in nodes["CPUExecutionProvider"] if not node.name)
        groups = sum(node.op_type == "GroupNormalization" for node in model_file.graph.node)
        assert unnamed == Counter(Div=groups, Concat=groups), name
        assert len(nodes["CUDAExecutionProvider"]) > 100
        assert not [node for part in nodes.values() for node in part if node.op_type.startswith("Memcpy")], name


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_uploaded_once(model: str, opened: Opening) -> None:
    """What goes to the device while all graphs are loaded is the weights' file, and a few constants; what stays there
    is no more."""
    own = opened(model)
    weights = own.bundle.file(own.bundle.manifest.weights).stat().st_size
    uploaded = sum(event.size_bytes for event in of(own.loading, Kind.COPY) if event.across)
    assert 0.99 * weights < uploaded < 1.05 * weights
    with recorded() as events:
        fast = OrtCuda(EngineOptions(memory="fast")).load(own.bundle, tuple(own.specs.values()))
    assert len(fast) == len(own.graphs)
    assert sum(event.size_bytes for event in of(events, Kind.COPY) if event.across) > 1.5 * weights


@pytest.mark.parametrize("memory", ["shared", "fast"])
def test_weights_in_place_of_the_files_go_there_alone(opened: Opening, memory: Literal["shared", "fast"]) -> None:
    """As adapters change them. What else a graph reads is shared with those that were loaded before, or, where each
    has its own, uploaded as it would be without."""
    own = opened("mini-sdxl")
    spec = own.specs["full"]
    mapped = map_weights(own.bundle.file(own.bundle.manifest.weights))
    read = {each.source for each in own.engine.lowered(own.bundle.read(spec.file)).weights.values()}
    large = [name for name in sorted(read) if mapped[name].array.size > 1000]
    instead = {name: Weight(mapped[name].dtype, mapped[name].array * 2) for name in large[::3]}
    changed = sum(weight.array.nbytes for weight in instead.values())
    assert changed > 100_000
    engine = own.engine if memory == "shared" else OrtCuda(EngineOptions(memory="fast"))
    uploaded, loaded = [], []
    for weights in (None, instead):
        with recorded() as events:
            loaded.append(engine.load(own.bundle, (spec,), instead=weights))
        uploaded.append(sum(event.size_bytes for event in of(events, Kind.COPY) if event.across))
    plain, adapted = uploaded
    assert len(loaded) == 2  # and both are still there
    if memory == "shared":
        assert 0.99 * changed < adapted < 1.1 * changed
        assert plain < 0.1 * changed
    else:
        assert changed < adapted < 1.01 * plain


@pytest.mark.parametrize("model", MODELS)
def test_each_call_is_captured_whole(model: str, opened: Opening, once_bound: Binding) -> None:
    for name in denoising(opened(model)):
        events = once_bound(model, name).binding
        kinds = [event.kind for event in events]
        begin, end = kinds.index(Kind.CAPTURE), kinds.index(Kind.CAPTURED)
        assert {event.kind for event in events[begin + 1 : end]} <= {Kind.LAUNCH, Kind.COPY, Kind.SET}
        assert all(event.captured for event in events[begin + 1 : end])
        assert events[end].size_bytes == end - begin - 1 > 100
        assert not of(events, Kind.BROKEN, Kind.REFUSED)
        assert not any(event.across for event in of(events, Kind.COPY) if event.captured)
        assert Counter(e.name for e in of(events[:begin], Kind.LAUNCH)) == {
            name: 2 * times for name, times in Counter(e.name for e in of(events[begin:end], Kind.LAUNCH)).items()
        }


@pytest.mark.parametrize("model", MODELS)
def test_a_call_is_one_launch(model: str, opened: Opening, once_bound: Binding) -> None:
    """Nothing is allocated, copied or waited for but the end."""
    for name in denoising(opened(model)):
        once = once_bound(model, name)
        with recorded() as events:
            once.call()
        assert [event.kind for event in events] == [Kind.REPLAY, Kind.WAIT]
        assert events[0].size_bytes == of(once.binding, Kind.CAPTURED)[0].size_bytes


def test_a_step_uploads_its_row_of_numbers(bundle_of: Callable[[str], Path]) -> None:
    """A second request binds nothing anew: each step is the row, one launch, and one copy of latents on the device."""
    steps: list[int] = []
    with Pipeline.open(bundle_of("mini"), engine="ort-cuda") as pipeline:

        def draw() -> None:
            pipeline("a red circle", seed=1, on_step=lambda progress: steps.append(progress.done))

        draw()
        count = len(steps)
        with recorded() as events:
            draw()
    assert len(steps) == 2 * count > 10
    replays = [at for at, event in enumerate(events) if event.kind == Kind.REPLAY]
    assert len(replays) == count
    assert not of(events, Kind.CAPTURE)
    for before, after in pairwise(replays):
        between = events[before + 1 : after]
        copies = of(between, Kind.COPY)
        assert {event.kind for event in between} == {Kind.COPY, Kind.WAIT}
        assert [event.size_bytes for event in copies if event.across] == [4 * STEP_ROW]
        assert sum(not event.across for event in copies) <= 3
        assert len(of(between, Kind.WAIT)) == 1 + len(copies)


def test_a_session_s_graphs_go_with_it(bundle_of: Callable[[str], Path]) -> None:
    """And not before: CUDA's provider does nothing where it is told that one is no longer wanted."""
    bundle = Bundle.open(bundle_of("mini"))
    engine = OrtCuda(EngineOptions())
    spec = bundle.manifest.shapes[0].graphs["reuse_cross"]
    loaded = engine.load(bundle, [spec])
    with recorded() as binding:
        call, _ = bound(engine, loaded[spec.file], spec)
    with recorded() as releasing:
        session = loaded[spec.file].session(spec.output_names())
        session.release_captured_graph(int(call._run_options.get_run_config_entry("gpu_graph_id")))
    assert not of(releasing, Kind.RELEASE)
    with recorded() as dropping:
        del call, loaded, session
    nodes = of(binding, Kind.CAPTURED)[0].size_bytes
    assert [event.size_bytes for event in of(dropping, Kind.RELEASE)] == [nodes]


@pytest.mark.parametrize(("model", "how"), [("mini", "without tensor cores"), ("mini-sdxl", "on tensor cores")])
def test_convolutions_in_16_bits_have_tensor_cores(model: str, how: str, opened: Opening) -> None:
    """``mini`` is in float32, where they would mean TF32. cuDNN offers both ways, that on tensor cores first."""
    own = opened(model)
    names = [name for spec in own.specs if spec != "text_encoder" for name in launched(own, spec)]
    own_names = {name for name in names if name.startswith("cuDNN ")}
    assert own_names - {"cuDNN attention"} == {f"cuDNN {how}"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_in_bfloat16_a_resize_has_no_kernel(dtype: str) -> None:
    """Which is why the engine refuses a U-Net in it."""
    number = DTYPES[dtype].onnx
    x, y = (helper.make_tensor_value_info(name, number, [1, 4, size, size]) for name, size in (("x", 8), ("y", 16)))
    twice = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "twice")
    graph = helper.make_graph([helper.make_node("Resize", ["x", "", "twice"], ["y"])], "g", [x], [y], [twice])
    data = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10).SerializeToString()
    if dtype == "float16":
        load(data)
    else:
        with pytest.raises(Exception, match=r"Provider type for Resize node .+ is not set"):
            load(data)


def load(data: bytes) -> None:
    onnxruntime.InferenceSession(data, providers=["CUDAExecutionProvider", "CPUExecutionProvider"], enable_fallback=0)


def launched(own: Opened, name: str) -> Iterable[str]:
    return counted(own.engine, own.graphs[name], own.specs[name]).names


@pytest.mark.parametrize("model", MODELS)
def test_the_documentation_s_table_is_what_is_counted(model: str, opened: Opening) -> None:
    own = opened(model)
    rows = re.findall(rf"^\| `{model}` \| `(\w+)` \|(.*)\|$", DOCS.read_text(), re.MULTILINE)
    written = {name: tuple(int(number.replace(",", "")) for number in row.split("|")) for name, row in rows}
    got = {name: counted(own.engine, own.graphs[name], spec) for name, spec in own.specs.items()}
    assert written == {name: tuple(getattr(own, column) for column in COLUMNS) for name, own in got.items()}
