"""A bundle's graph, rewritten for the kernels that ONNX Runtime has on CUDA: the same numbers from far fewer launches.

A bundle stays neutral: this happens to a graph's bytes when they are loaded, after they were checked, and nothing of
it is kept, but for libtgate (:mod:`~tgate_runtime.engines.ort_cuda.ahead`). Each file here is one rewrite. Each is told
by shapes, and by what the kernel that it wants takes; what it does not know, or the kernel would refuse, stays as it
was.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass

from tgate_runtime.engines.ort_cuda.lowering.attentions import lower_attentions
from tgate_runtime.engines.ort_cuda.lowering.carries import lower_carries
from tgate_runtime.engines.ort_cuda.lowering.convolutions import lower_convolutions
from tgate_runtime.engines.ort_cuda.lowering.edits import CONTRIB
from tgate_runtime.engines.ort_cuda.lowering.feed_forwards import lower_feed_forwards
from tgate_runtime.engines.ort_cuda.lowering.group_norms import lower_group_norms
from tgate_runtime.engines.ort_cuda.lowering.laid import LAID, Laid
from tgate_runtime.engines.ort_cuda.lowering.layouts import settle_layouts
from tgate_runtime.engines.ort_cuda.lowering.residuals import lower_residuals
from tgate_runtime.engines.ort_cuda.lowering.shapes import fix_shapes, know_shapes
from tgate_runtime.engines.ort_cuda.lowering.skips import lower_skips
from tgate_runtime.engines.ort_cuda.lowering.sums import lower_sums

PASSES = (
    fix_shapes,
    lower_group_norms,
    lower_convolutions,
    settle_layouts,
    lower_skips,
    lower_feed_forwards,
    lower_carries,
    lower_residuals,
    lower_sums,
    lower_attentions,
)
"""In this order: layouts settle what the two before them leave between NCHW and NHWC, and skips are seen in NHWC;
carries leave a bias to residuals, and residuals leave to sums what no normalization follows."""

VERSION = 2
"""Of what :func:`lower` makes: raised with every change of it, so that libtgate does not take graphs of another one
that ``tgate build`` has left in a bundle. ``runtime/cpp/src/contract/lowered.cpp`` has the same."""


@dataclass(frozen=True)
class Lowered:
    """``data``: the graph's file, its inputs and outputs as they were. ``weights``: where each initializer that lies
    outside the graph comes from, by its name in the graph."""

    data: bytes
    weights: Mapping[str, Laid]


def lower(data: bytes, outputs: Collection[str] | None = None) -> Lowered:
    """The graph of an ONNX file's bytes, which :func:`~tgate_runtime.graph_check.read_graphs` has let through.

    ``outputs``: which of its outputs are wanted, if not all; what only the others need is left out. Where no rewrite
    changes anything, ``data`` comes back as it is.
    """
    proto = onnx.load_model_from_string(data)
    model = ir.from_proto(proto)
    ends = {value.name: value.shape for value in (*model.graph.inputs, *model.graph.outputs)}
    know_shapes(model.graph, proto)
    changes = 0
    if outputs is not None and (unwanted := [v for v in model.graph.outputs if v.name not in outputs]):
        for value in unwanted:
            model.graph.outputs.remove(value)
        RemoveUnusedNodesPass()(model)
        changes = len(unwanted)
    if changes + sum(rewrite(model.graph) for rewrite in PASSES):
        CommonSubexpressionEliminationPass()(model)
        RemoveUnusedNodesPass()(model)
        if any(node.domain == CONTRIB for node in model.graph):
            model.graph.opset_imports[CONTRIB] = 1
        for node in model.graph:
            for value in node.outputs:
                value.shape = None  # the engine infers them; names of dimensions here mean nothing to it
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = ends[value.name]
        data = ir.to_proto(model).SerializeToString()
    external = [
        value for value in model.graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)
    ]
    return Lowered(data, {str(value.name): value.meta.get(LAID) or Laid(str(value.name)) for value in external})
