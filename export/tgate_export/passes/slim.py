"""Notes for people, taken out of a graph that only engines read."""

from __future__ import annotations

import onnx_ir as ir


def slim(model: ir.Model) -> None:
    """Leave only what an engine needs: short names, no notes, no shapes of inner values (engines infer them).

    Inputs, outputs and initializers keep their names, types and shapes: the manifest and the weight file know them
    by those. Nothing that reads inner shapes works after it, so it comes last, when the graph is written.
    """
    graph = model.graph
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    count = 0
    for i, node in enumerate(graph):
        node.name = f"n{i}"
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
            if value not in kept:
                value.name, value.shape, value.type = f"v{count}", None, None
                count += 1
    for value in kept:
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    graph.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None
