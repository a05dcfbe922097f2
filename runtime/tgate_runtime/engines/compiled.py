"""What engines that compile ahead of time share: each graph's entry in the engine cache, made where it is missing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tgate_engine.errors import EngineError
from tgate_engine.graph import GraphSpec, TensorSpec
from tgate_runtime import cache
from tgate_runtime.engines.protocol import OnBuild

Keys = Mapping[str, Mapping[str, Any]]
"""What each graph's entry is made from, by the graph's file."""


def interface_key(spec: GraphSpec) -> dict[str, Any]:
    """What of a graph's spec shapes its entry: inputs and outputs in their order, which is that of their memory where
    they are called by place, and the batches that it is compiled for."""

    def listed(tensors: Sequence[TensorSpec]) -> list[list[Any]]:
        return [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in tensors]

    return {"inputs": listed(spec.inputs), "outputs": listed(spec.outputs), "batch": list(spec.batch)}


def entries(keys: Keys, compile_into: Callable[[str, Path], None], on_build: OnBuild | None) -> dict[str, Path]:
    """The cache's entries, by the graphs' files; ``compile_into(file, directory)`` fills those that are missing.

    Raises as :func:`tgate_runtime.cache.find_or_build` does.
    """
    places = {file: cache.find(key) for file, key in keys.items()}
    missing = [file for file, place in places.items() if place is None]
    for done, file in enumerate(missing):
        if on_build is not None:
            on_build(done, len(missing), Path(file).stem)
        places[file] = cache.find_or_build(keys[file], functools.partial(compile_into, file))
    if missing and on_build is not None:
        on_build(len(missing), len(missing), Path(missing[-1]).stem)
    return {file: place for file, place in places.items() if place is not None}


def ready_entries(keys: Keys, engine: str, bundle: Path) -> dict[str, Path]:
    """The cache's entries, by the graphs' files. Raises :class:`EngineError` where one is missing."""
    places = {file: cache.find(key) for file, key in keys.items()}
    if missing := [file for file, place in places.items() if place is None]:
        raise EngineError(
            f"{bundle} has graphs that engine {engine} has not compiled for this machine and version yet: "
            f"{', '.join(missing)}; run tgate build {bundle} --engine {engine}"
        )
    return {file: place for file, place in places.items() if place is not None}
