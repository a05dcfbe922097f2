"""A bundle's graphs, read and checked before any engine sees them.

Engines take what :func:`read_graphs` gives, and open no graph's file themselves where they can be given bytes; so what
was checked is what is used. OpenVINO alone has to be given a name: see its module.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from tgate_engine.bundle import Bundle
from tgate_engine.graph import GraphSpec
from tgate_engine.onnx_form import MODEL, check_graph, describe
from tgate_runtime.weights import read_places

_POOL = descriptor_pool.DescriptorPool()
_POOL.Add(describe(descriptor_pb2.FileDescriptorProto()))
ModelMessage: Any = message_factory.GetMessageClass(_POOL.FindMessageTypeByName(MODEL))
"""The class of protobuf messages that a graph's file is one of, with the fields of ``onnx_form.FORM``."""


def reading(bundle: Bundle, graphs: Iterable[GraphSpec], weights: Collection[str]) -> list[GraphSpec]:
    """Those of ``graphs`` that read some of those weights."""
    found = []
    for spec in graphs:
        model = ModelMessage.FromString(bundle.read(spec.file))
        if any(initializer.name in weights for initializer in model.graph.initializer):
            found.append(spec)
    return found


def read_graphs(bundle: Bundle, graphs: Sequence[GraphSpec]) -> dict[str, bytes]:
    """The ONNX files of ``graphs``, by their names: of the SHA-256 in the manifest, and each what
    :func:`~tgate_engine.onnx_form.check_graph` lets through.

    Raises :class:`~tgate_engine.errors.BundleError`.
    """
    weights_file = bundle.manifest.weights
    places = read_places(bundle.file(weights_file)) if weights_file else {}
    files = {}
    for spec in graphs:
        files[spec.file] = bundle.read(spec.file)
        check_graph(files[spec.file], ModelMessage(), spec, weights_file, places)
    return files
