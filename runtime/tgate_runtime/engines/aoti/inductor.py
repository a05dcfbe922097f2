"""How Inductor is made to work: its settings, where it keeps its files, what becomes of them."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tgate_engine.errors import EngineError

LIBRARY = "graph.so"
_FLAGS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise small weights, and those that hold one number, would be written into the code as they are today.
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    # Otherwise the number of threads at the time of compiling would be written into the kernels.
    "cpp.dynamic_threads": True,
    # What is compiled becomes files, not an archive: its writer ends the process where a disk is full, and its reader
    # unpacks a library to /tmp each time.
    "aot_inductor.package": True,
    # They lie below /tmp, in a directory of a name that anybody can guess, and would be code of whoever made it first.
    "aot_inductor.precompile_headers": False,
}
# They only save time while compiling, and not every version of PyTorch knows each, which it would raise.
_HASTE: dict[str, Any] = {
    # The code around the kernels calls them and no more: optimising it takes most of the time and wins nothing.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
}
_COMPILING = threading.Lock()
"""Inductor asks the process's environment where to work."""


def flags(channels_last: bool) -> dict[str, Any]:
    """Inductor's settings. ``channels_last``: whether what convolutions read and give, on a GPU, has channels last."""
    known = {flag: value for flag, value in _HASTE.items() if hasattr(torch._inductor.config, flag)}
    # By itself Inductor decides by shapes and operations, and never for a batch that varies. Tuning is left as it is:
    # whatever tries more kernels out takes many times as long to compile.
    layout = {"force_layout_optimization": True} if channels_last else {}
    # More than one thread: only then are the kernels' loops written so that threads can share them.
    return {**_FLAGS, **known, **layout, "cpp.threads": max(2, os.cpu_count() or 1)}


@contextlib.contextmanager
def working_in(directory: Path) -> Iterator[None]:
    """Have Inductor, Triton and the compilers that they call keep their files there, and forget them afterwards.

    By default that is a directory of a name that anybody can guess, from which code is loaded. One thread at a time.
    """
    tempfile.gettempdir()  # or Python would take this for its own, and go on to when it is gone
    there = {name: str(directory) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")}
    with _COMPILING:
        before = {name: os.environ.get(name) for name in there}
        os.environ.update(there)
        torch._inductor.utils.clear_caches()  # what this process remembers lies in directories that are gone
        try:
            yield
        finally:
            torch._inductor.utils.clear_caches()
            # So do the processes that compile for Triton, which would want to go on writing there.
            if (workers := sys.modules.get("torch._inductor.async_compile")) is not None:
                workers.shutdown_compile_workers()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def start_compilers() -> None:
    """Start the processes that compile for Triton, on as many cores as there are; they take seconds, and until they are
    ready kernels are compiled here, one by one. To be called inside :func:`working_in`, which ends them."""
    from torch._inductor import async_compile

    async_compile.maybe_warm_pool()


def keep(files: Sequence[str], directory: Path) -> None:
    """Move what a graph needs to run, of what was made of it, into ``directory``: the library, and what it looks for
    beside it: the kernels for a GPU, and a list of the operators that it leaves to PyTorch, where there are any.

    Raises :class:`EngineError` for a library that does not use the process's C++ library but has its own: what both
    have made of locales then mixes, and loading it ends the process (seen on a GPU machine).
    """
    paths = [Path(file) for file in dict.fromkeys(files)]
    (library,) = (path for path in paths if path.suffix == ".so")
    if b"libstdc++.so" not in library.read_bytes():
        raise EngineError(
            "the C++ compiler links a C++ library of its own into what it makes, which cannot share a process with "
            "PyTorch's: install the shared one that belongs to it (libstdc++-dev), or set CXX to another compiler"
        )
    library.rename(directory / LIBRARY)
    for path in paths:
        if path.suffix not in (".so", ".cpp", ".json"):
            path.rename(directory / path.name)
        elif path.suffix == ".json" and path.with_suffix(".cpp") in paths:
            path.rename((directory / LIBRARY).with_suffix(".json"))


def check_compiler() -> None:
    """Raises :class:`EngineError` where there is no C++ compiler."""
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        raise EngineError("aoti compiles graphs with a C++ compiler and finds none: install g++ or set CXX") from error
