"""What libtgate's ``ort-cuda`` takes from Python: a bundle's graphs, lowered, in a folder of the bundle's own.

Lowering takes ``onnx`` and ``onnx-ir``, which a host without Python has not. So ``tgate build`` does it where Python
is, and needs no GPU for it. What it writes is no part of the bundle: the manifest lists none of it, every engine but
libtgate's leaves it alone, and a copy without it works. It lies in the bundle's folder and not in the engine cache
because it goes where the bundle goes; unlike an entry of the cache it is no code, and libtgate checks it as it does the
bundle's graphs.

``engines/ort-cuda/lowered.json`` holds ``version``, and for each graph's file its digest in the manifest (``source``),
and ``lowered``: the graph with all of its ``outputs``, then with those alone that steps of the bundle's plans want. Of
each it has the digest of the file (``sha256``), which is also its name, and ``weights``: what it reads that does not
lie so in the weight file, by its name in the graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from tgate_engine.atomic import locked, write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import storage
from tgate_engine.errors import BundleError, EngineError, shown
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.onnx_form import Placed, check_graph
from tgate_engine.step import STEP_OUTPUTS
from tgate_runtime.engines.ort_cuda.limits import refuse_bfloat16
from tgate_runtime.engines.ort_cuda.log import failing
from tgate_runtime.engines.ort_cuda.lowering import VERSION, Lowered, lower
from tgate_runtime.engines.ort_cuda.lowering.laid import BEYOND, Laid
from tgate_runtime.engines.protocol import EngineOptions, OnBuild
from tgate_runtime.graph_check import ModelMessage, read_graphs
from tgate_runtime.weights import read_places

FOLDER = "engines/ort-cuda"
INDEX = "lowered.json"
_MOST_INDEX_BYTES = 32 << 20
Places = Mapping[str, Placed]


class OrtCudaBuilder:
    """A :class:`~tgate_runtime.engines.Builder`: lowers graphs, and runs none. Needs no GPU and no provider for one."""

    name = "ort-cuda"
    version = f"lowering {VERSION}"

    def __init__(self, options: EngineOptions) -> None:
        refuse_options(options)
        if options.memory is not None or options.device:
            raise EngineError(
                "graphs are lowered the same for every GPU and way to hold weights; leave out --memory and --device"
            )

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> dict[str, Path]:
        """The graphs, lowered, into the bundle's folder: the files there with all outputs, by the graphs' own. What
        lies there of other graphs of the bundle stays; what fits it no longer goes.

        Raises :class:`BundleError` for a graph that is not let through, and :class:`EngineError` for one that ONNX
        Runtime has no kernels for, or where nothing can be written there.
        """
        files, weights_file = read_graphs(bundle, graphs), bundle.manifest.weights
        places = read_places(bundle.file(weights_file)) if weights_file else {}
        with _writable(bundle) as folder, locked(bundle.path / MANIFEST_FILE):
            entries = _entries(bundle, folder)
            for done, spec in enumerate(graphs):
                if on_build is not None:
                    on_build(done, len(graphs), Path(spec.file).stem)
                refuse_bfloat16(files[spec.file], spec)
                made = [_lowered(files[spec.file], rest, bundle, places) for rest in _wanted(bundle, spec)]
                for data, entry in made:
                    write_atomically(folder / f"{entry['sha256']}.onnx", data)
                source = bundle.manifest.files[spec.file].sha256
                entries[spec.file] = {"source": source, "lowered": [entry for _, entry in made]}
            index = {"version": VERSION, "graphs": entries}
            write_atomically(folder / INDEX, json.dumps(index, indent=1, ensure_ascii=False).encode())
            kept = {f"{each['sha256']}.onnx" for entry in entries.values() for each in entry["lowered"]}
            for old in folder.glob("*.onnx"):
                if old.name not in kept:
                    old.unlink()
        if on_build is not None and graphs:
            on_build(len(graphs), len(graphs), Path(graphs[-1].file).stem)
        return {spec.file: folder / f"{entries[spec.file]['lowered'][0]['sha256']}.onnx" for spec in graphs}


def refuse_options(options: EngineOptions) -> None:
    """Raises :class:`EngineError` for what ``ort-cuda`` cannot follow."""
    if options.precision is not None:
        raise EngineError("ort-cuda computes in the dtype that the bundle was exported with; leave out --precision")
    if options.threads is not None:
        raise EngineError("ort-cuda computes on a GPU; leave out --threads")
    if options.architecture is not None:
        raise EngineError("ort-cuda brings kernels for every GPU that it knows; leave out --architecture")


def _wanted(bundle: Bundle, spec: GraphSpec) -> list[GraphSpec]:
    """A graph with all of its outputs, and with each set of them that a step of the bundle's plans wants."""
    names = {name for shape in bundle.manifest.shapes for name, each in shape.graphs.items() if each.file == spec.file}
    steps = [step for plan in bundle.manifest.plans.values() for step in plan.steps if step.graph in names]
    sets = {frozenset((*STEP_OUTPUTS, *step.writes)): None for step in steps}
    rest = [replace(spec, outputs=tuple(t for t in spec.outputs if t.name in wanted)) for wanted in sets]
    return [spec, *(each for each in rest if each != spec)]


def _lowered(data: bytes, spec: GraphSpec, bundle: Bundle, places: Places) -> tuple[bytes, dict[str, Any]]:
    """A graph's file with the outputs of ``spec``, lowered and seen to be what libtgate takes, and its entry."""
    with failing(f"{spec.file} cannot be lowered for CUDA; export the bundle again"):
        made: Lowered = lower(data, spec.output_names())
    laid = {name: each for name, each in made.weights.items() if each != Laid(name)}
    all_places = {**places, **{name: _place(each, places[each.source]) for name, each in laid.items()}}
    check_graph(made.data, ModelMessage(), spec, bundle.manifest.weights, all_places, lowered=True)
    weights = {
        name: {"source": each.source, "order": list(each.order), "dtype": all_places[name].dtype}
        for name, each in laid.items()
    }
    digest = hashlib.sha256(made.data).hexdigest()
    return made.data, {"outputs": [*spec.output_names()], "sha256": digest, "weights": weights}


def _place(laid: Laid, source: Placed) -> Placed:
    """What a lowered graph says of a weight that is laid so."""
    shape = tuple(source.shape[i] for i in laid.order) if laid.order else source.shape
    dtype = laid.dtype or source.dtype
    return replace(source, dtype=dtype, shape=shape, offset=BEYOND, length=prod(shape) * storage(dtype).itemsize)


def _entries(bundle: Bundle, folder: Path) -> dict[str, Any]:
    """What was built before and still fits the bundle; nothing of it where the index cannot be read."""
    try:
        with (folder / INDEX).open("rb") as file:
            index = json.loads(file.read(_MOST_INDEX_BYTES))
        entries = index["graphs"] if index["version"] == VERSION else {}
        return {
            file: entry
            for file, entry in entries.items()
            if file in bundle.manifest.files
            and bundle.manifest.files[file].sha256 == entry["source"]
            and all((folder / f"{each['sha256']}.onnx").is_file() for each in entry["lowered"])
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


@contextlib.contextmanager
def _writable(bundle: Bundle) -> Iterator[Path]:
    """The folder, made where it is missing, within the bundle's own and not by a link. Raises :class:`EngineError`
    where nothing can be written there."""
    folder = bundle.path / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.path.realpath(folder) != os.path.join(os.path.realpath(bundle.path), *FOLDER.split("/")):
            raise EngineError(f"{folder} leads out of the bundle; remove the link")
        yield folder
    except BundleError:
        raise
    except OSError as error:
        raise EngineError(
            f"{shown(str(folder))} cannot be written ({error.strerror or error}); build in a copy of the bundle that "
            "is yours"
        ) from None
