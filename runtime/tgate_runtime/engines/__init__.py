"""The engines there are, and how one is opened. What an engine is: :mod:`tgate_runtime.engines.protocol`."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Unpack

from tgate_engine.errors import EngineError
from tgate_runtime.engines.protocol import Builder, Engine, EngineOptions, Options


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """An engine of :data:`ENGINES`: the file and class it is in, the extra that brings what it needs, what it runs on.

    ``needs``: the least version of each distribution that it may take, as that extra says; what is not installed may be
    there in another way, which importing it tells. ``builder``: the file and class of what builds for it where it
    cannot run; itself if empty.
    """

    name: str
    module: str
    cls: str
    extra: str
    runs_on: str
    needs: Mapping[str, str]
    builder: str = ""

    def open(self, options: EngineOptions) -> Engine:
        """Import the engine and settle its options. Raises :class:`EngineError` where it is missing or unfit here."""
        engine: Engine = self._make(self.module, self.cls, options)
        return engine

    def open_builder(self, options: EngineOptions) -> Builder:
        """The same of what builds for it."""
        if not self.builder:
            return self.open(options)
        module, _, cls = self.builder.rpartition(".")
        builder: Builder = self._make(module, cls, options)
        return builder

    def _make(self, module: str, cls: str, options: EngineOptions) -> Any:
        if self.runs_on == "CPU" and (options.device or options.architecture):
            raise EngineError(f"engine {self.name} runs on the CPU; leave out --device and --architecture")
        install = f"pip install 'tgate-engine[{self.extra}]'"
        for distribution, least in self.needs.items():
            version = _version(distribution)
            if version is not None and _numbers(version) < _numbers(least):
                raise EngineError(f"engine {self.name} needs {distribution} {least} or later, got {version}: {install}")
        try:
            return getattr(importlib.import_module(f"tgate_runtime.engines.{module}"), cls)(options)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("tgate_"):
                raise
            raise EngineError(f"engine {self.name} needs {error.name}, which is not installed: {install}") from None
        except (ImportError, OSError, AttributeError) as error:  # a library that is broken, or not the one it should be
            raise EngineError(
                f"engine {self.name} is installed, but does not load here ({_in_one_line(error)}): {install} "
                "--force-reinstall"
            ) from error


def _version(distribution: str) -> str | None:
    """What is installed of that name."""
    try:
        return str(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """A version for comparison: 2.13.0 of 2.13.0+cpu."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version.partition("+")[0]))


def _in_one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


ENGINES: Mapping[str, EngineEntry] = {
    entry.name: entry
    for entry in (
        EngineEntry(
            name="ort-cpu",
            module="ort",
            cls="OrtCpu",
            extra="cpu",
            runs_on="CPU",
            needs={"onnxruntime": "1.31", "protobuf": "6.31.1"},
        ),
        EngineEntry(
            name="ort-cuda",
            module="ort_cuda",
            cls="OrtCuda",
            extra="cuda",
            runs_on="NVIDIA GPU",
            needs={"onnx": "1.23", "onnx-ir": "1.1", "onnxruntime-gpu": "1.31", "protobuf": "6.31.1"},
            builder="ort_cuda.ahead.OrtCudaBuilder",
        ),
        EngineEntry(
            name="openvino",
            module="openvino",
            cls="OpenVino",
            extra="openvino",
            runs_on="CPU",
            needs={"openvino": "2026.2", "protobuf": "6.31.1"},
        ),
        EngineEntry(
            name="aoti",
            module="aoti",
            cls="Aoti",
            extra="aoti",
            runs_on="CPU, NVIDIA GPU",
            needs={"torch": "2.11", "onnx": "1.23", "protobuf": "6.31.1"},
        ),
        EngineEntry(
            name="tensorrt",
            module="tensorrt",
            cls="TensorRt",
            extra="tensorrt",
            runs_on="NVIDIA GPU",
            needs={
                "tensorrt-rtx-cu13": "1.7",
                "polygraphy": "0.53.6",
                "cuda-bindings": "13",
                "onnx": "1.23",
                "protobuf": "6.31.1",
            },
        ),
    )
}
"""The engines there are, by the name that ``Session.open(engine=...)`` takes."""


def open_engine(name: str, **options: Unpack[Options]) -> Engine:
    """The engine of that name. Raises :class:`EngineError` for an unknown one, one that is not installed, or options
    that it cannot follow."""
    if name not in ENGINES:
        raise EngineError(f"there is no engine {name!r}; the engines are {', '.join(ENGINES)}")
    return ENGINES[name].open(EngineOptions(**options))


def open_builder(name: str, **options: Unpack[Options]) -> Builder:
    """What compiles for the engine of that name ahead of time, whether or not that can run here. Raises as
    :func:`open_engine` does."""
    if name not in ENGINES:
        raise EngineError(f"there is no engine {name!r}; the engines are {', '.join(ENGINES)}")
    return ENGINES[name].open_builder(EngineOptions(**options))


def installed() -> list[dict[str, str]]:
    """What there is of each engine here: ``name``, ``runs_on``, ``version`` (empty where it is not installed), and
    ``says``: "ready", or in one line what is missing and what brings it."""
    rows = []
    for name, entry in ENGINES.items():
        version, says = "", "ready"
        try:
            engine = open_engine(name)
            version = engine.version
            engine.allocate((1,), "float32")  # an engine that can build anywhere may still have nothing to run on
        except EngineError as error:
            says = str(error)
        except Exception as error:  # whatever ails one engine, the others are still listed
            says = f"engine {name} failed ({_in_one_line(error)})"
        rows.append({"name": name, "runs_on": entry.runs_on, "version": version, "says": says})
    return rows
