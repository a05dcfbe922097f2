"""The embedded models on ``ort-cuda`` over the stub: loaded once, each graph bound once."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import pytest

from tests.cuda_stub.build import HERE, STUB
from tests.cuda_stub.counted import bound
from tests.cuda_stub.log import Event, library, recorded
from tgate_engine.bundle import Bundle
from tgate_engine.graph import GraphSpec
from tgate_runtime.engines.ort_cuda import OrtCuda
from tgate_runtime.engines.protocol import EngineOptions
from tgate_runtime.mini import MODELS, assemble

EXPORTED = HERE.parents[1] / "build" / "cuda_stub"
"""Where ``make cuda-stub`` puts the bundles that are not embedded: exporting takes torch, which is not here."""


@dataclass(frozen=True)
class Opened:
    """A bundle's graphs by name, as the engine loaded them, and what that asked of the GPU."""

    bundle: Bundle
    engine: OrtCuda
    specs: Mapping[str, GraphSpec]
    graphs: Mapping[str, Any]
    loading: list[Event]


@dataclass(frozen=True)
class Bound:
    """A call of one image, its buffers by name, and what binding it asked of the GPU."""

    call: Any
    buffers: Mapping[str, Any]
    binding: list[Event]


def pytest_configure() -> None:
    try:
        library()
    except OSError:
        raise pytest.UsageError(f"{STUB} is not loaded; make cuda-stub runs these tests over it") from None


@contextlib.contextmanager
def assignments_recorded() -> Iterator[None]:
    """Sessions made meanwhile remember which provider has which node."""
    make = onnxruntime.SessionOptions

    def options() -> Any:
        made = make()
        made.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return made

    with mock.patch.object(onnxruntime, "SessionOptions", options):
        yield


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a bundle: ``mini``, or one that was exported."""

    def get(name: str) -> Path:
        if name == "mini":
            folder = tmp_path_factory.mktemp("mini")
            assemble(MODELS / "mini", folder)
            return folder
        assert (EXPORTED / name).is_dir(), f"make cuda-stub exports {name}"
        return EXPORTED / name

    return functools.cache(get)


@pytest.fixture(scope="session")
def opened(bundle_of: Callable[[str], Path]) -> Callable[[str], Opened]:
    def get(name: str) -> Opened:
        bundle = Bundle.open(bundle_of(name))
        engine = OrtCuda(EngineOptions())
        specs = bundle.manifest.shapes[0].graphs
        with assignments_recorded(), recorded() as events:
            files = engine.load(bundle, tuple(specs.values()))
        return Opened(bundle, engine, specs, {graph: files[spec.file] for graph, spec in specs.items()}, events)

    return functools.cache(get)


@pytest.fixture(scope="session")
def once_bound(opened: Callable[[str], Opened]) -> Callable[[str, str], Bound]:
    def get(name: str, graph: str) -> Bound:
        own = opened(name)
        with recorded() as events:
            call, buffers = bound(own.engine, own.graphs[graph], own.specs[graph])
        return Bound(call, buffers, events)

    return functools.cache(get)
