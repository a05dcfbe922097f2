"""What export writes is held to the list that run time holds every graph to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tgate_engine.errors import BundleError, ExportError
from tgate_engine.graph import GraphSpec
from tgate_engine.onnx_form import MODEL, Placed, check_graph, describe
from tgate_export.graphs import TracedGraph, WeightRef
from tgate_export.weights import WEIGHTS_FILE, Placement

_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(describe(descriptor_pb2.FileDescriptorProto()))
_MODEL = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(MODEL))


def check_written(path: Path, spec: GraphSpec, graph: TracedGraph, placements: Mapping[WeightRef, Placement]) -> None:
    """Raises :class:`ExportError` for a graph that run time would refuse, as an operator that is not in the list."""
    places = {
        place.name: Placed(ref.dtype, ref.shape, place.offset, place.length)
        for ref, place in ((ref, placements[ref]) for ref in graph.weights.values())
    }
    try:
        check_graph(path.read_bytes(), _MODEL(), spec, WEIGHTS_FILE, places)
    except BundleError as error:
        raise ExportError(
            f"this model cannot be exported, since no engine would be given its graph: {str(error).partition(';')[0]}"
        ) from error
