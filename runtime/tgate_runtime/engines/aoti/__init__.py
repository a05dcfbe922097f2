"""AOTInductor: PyTorch compiles each graph to a shared library, for the CPU or for an NVIDIA GPU.

The libraries hold no weights. All of a session's graphs read one set of tensors: on the CPU, in the bundle's own
dtype, the weight file's pages themselves. A library is made once for a graph, a processor and a version of PyTorch,
with the machine's C++ compiler, and found again in the cache of :mod:`tgate_runtime.cache`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# OpenMP reads this when PyTorch is first loaded. Threads that spin at the end of every loop take the cores from the
# others at work: on 2 cores shared with another job, a small SDXL's step took 1400 ms instead of 24.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save

from tgate_engine.atomic import remove_tree
from tgate_engine.bundle import Bundle, sha256_of
from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import EngineError
from tgate_engine.graph import DENOISE, GraphSpec
from tgate_engine.underway import without_python
from tgate_runtime.engines.aoti import graph as graph_code
from tgate_runtime.engines.aoti import operators as operator_code
from tgate_runtime.engines.aoti.graph import OnnxModule, Weights, trace
from tgate_runtime.engines.compiled import entries, interface_key, ready_entries
from tgate_runtime.engines.protocol import Buffer, EngineOptions, OnBuild, check_buffers, fitted, matched, row_shape
from tgate_runtime.graph_check import read_graphs

_TORCH_DTYPE = {dtype.short: getattr(torch, name) for name, dtype in DTYPES.items()}
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
_LIBRARY, _CONSTANTS, _NAMES = "graph.so", "constants.safetensors", "weights.json"
_COMPILING = threading.Lock()
"""Inductor asks the process's environment where to work."""


class TorchBuffer:
    """A :class:`~tgate_runtime.engines.protocol.Buffer`: ``tensor``, on the engine's device."""

    def __init__(self, tensor: Any, dtype: str) -> None:
        """``tensor``: contiguous, of torch's dtype of that name."""
        self.tensor = tensor
        self.dtype = dtype
        self.shape: tuple[int, ...] = tuple(tensor.shape)
        self.address = int(tensor.data_ptr())

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: str, device: torch.device) -> TorchBuffer:
        """A buffer with memory of its own. Raises :class:`EngineError` where there is not so much."""
        try:
            return TorchBuffer(torch.zeros(shape, dtype=getattr(torch, dtype), device=device), dtype)
        except (RuntimeError, OverflowError, TypeError) as error:  # TypeError: of a size beyond 64 bits
            raise EngineError(
                f"there is no memory for a buffer of {dtype} {list(shape)} ({_first_line(error)[:200]}); ask for fewer "
                "images at once, or a smaller size"
            ) from None

    def rows(self, first: int, count: int) -> TorchBuffer:
        row_shape(self.shape, first, count)
        return TorchBuffer(self.tensor.narrow(0, first, count), self.dtype)

    def write(self, array: NDArray[Any]) -> None:
        fitted(array, self.shape, self.dtype)
        # A copy: NumPy's may be read-only, which torch warns of.
        self.tensor.copy_(torch.from_numpy(np.array(array)).view(self.tensor.dtype))

    def read(self) -> NDArray[Any]:
        host = self.tensor.cpu()
        bits = host.view(torch.uint16) if self.dtype == "bfloat16" else host
        array: NDArray[Any] = bits.numpy().copy()
        return array

    def copy(self, source: Buffer) -> None:
        self.tensor.copy_(matched(source, self).tensor)
        _wait_for(self.tensor.device)


class _AotiCall:
    """A :class:`~tgate_runtime.engines.protocol.Call`.

    The library reads the inputs where they lie, but returns its outputs in memory of its own: those that are bound
    are copied into their buffers, which for a small SDXL is under a hundredth of a step.
    """

    def __init__(self, graph: AotiExecutable, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
        self._graph = graph
        self._inputs = [inputs[name].tensor for name in graph.spec.input_names()]
        self._outputs = [outputs[name].tensor if name in outputs else None for name in graph.spec.output_names()]
        self.addresses = {name: buffer.address for name, buffer in (*inputs.items(), *outputs.items())}

    def __call__(self) -> None:
        try:
            with without_python():  # the loader keeps Python's lock
                results = self._graph.library.run([_aligned(tensor) for tensor in self._inputs])
            for buffer, result in zip(self._outputs, results, strict=True):
                if buffer is not None:
                    buffer.copy_(result)
            _wait_for(self._inputs[0].device)
        except Exception as error:  # RuntimeError, and classes of CUDA's own
            raise EngineError(f"graph {self._graph.spec.file} failed in AOTInductor: {_first_line(error)}") from error


def _aligned(tensor: Any) -> Any:
    """The tensor, copied where a kernel for a GPU could not read it: they were compiled for whole buffers, which begin
    at a multiple of 16 bytes, and read so many at a time; a view of some rows may begin elsewhere."""
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


def _wait_for(device: torch.device) -> None:
    """Until what was queued on that device is done."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


class AotiExecutable:
    """A :class:`~tgate_runtime.engines.protocol.Executable`: a loaded library, and the constants that it reads."""

    def __init__(self, spec: GraphSpec, library: Any, constants: dict[str, Any]) -> None:
        self.spec = spec
        self.library = library
        self.constants = constants  # the library holds addresses; this holds the memory

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _AotiCall:
        check_buffers(self.spec, inputs, outputs)  # the library trusts its caller, and would read beyond a buffer's end
        return _AotiCall(self, inputs, outputs)


class Aoti:
    """The ``aoti`` engine: on the GPU if PyTorch has one, else on the CPU.

    ``precision``: "bf16" (or, on a GPU, "f16") computes a float32 bundle's products in that dtype, with one rounded
    copy of their weights for all graphs; None keeps the bundle's own. "f16" leaves the graphs around the denoiser
    alone: text encoders and decoders overflow in it. ``threads`` is PyTorch's setting for the whole process.
    """

    name = "aoti"
    version = str(torch.__version__)

    def __init__(self, options: EngineOptions) -> None:
        if options.memory == "fast":
            raise EngineError("aoti always keeps one copy of the weights for all graphs; leave out --memory fast")
        if options.architecture is not None:
            raise EngineError("aoti compiles for the machine it runs on; leave out --architecture")
        self.options = replace(options, memory="shared")
        self.device = torch.device("cpu")
        visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if options.device >= max(visible, 1):  # without a GPU, device 0 is the CPU
            raise EngineError(f"there is no GPU {options.device}; PyTorch sees {visible}")
        if visible:
            self.device = torch.device("cuda", options.device)
            # For the process: by default cuDNN convolves with 10 bits of mantissa, and float32 must mean float32.
            torch.backends.cudnn.allow_tf32 = False
        elif options.precision == "f16":
            raise EngineError("aoti computes in f16 on a GPU alone, and PyTorch sees none; take --precision bf16")
        if options.threads is not None:
            torch.set_num_threads(options.threads)

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> dict[str, Path]:
        return self._entries(bundle, graphs, self._weights(bundle), on_build)

    def load(
        self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None
    ) -> dict[str, AotiExecutable]:
        weights = self._weights(bundle)
        places = self._entries(bundle, graphs, weights, on_build, build=self.options.build)
        return {spec.file: self._load(bundle, spec, weights, places[spec.file]) for spec in graphs}

    def allocate(self, shape: tuple[int, ...], dtype: str) -> TorchBuffer:
        return TorchBuffer.zeros(shape, dtype, self.device)

    def _compute(self, bundle: Bundle, spec: GraphSpec) -> torch.dtype | None:
        """What the graph's products are narrowed to; None keeps the bundle's dtype."""
        precision = _TORCH_DTYPE[self.options.precision] if self.options.precision else None
        own = getattr(torch, bundle.manifest.dtype)
        if precision in (None, own):
            return None
        if own != torch.float32:
            raise EngineError(
                f"{bundle.path} was exported in {bundle.manifest.dtype}, which aoti does not convert; leave out "
                "--precision, or export with --dtype fp32"
            )
        return None if precision == torch.float16 and spec.role != DENOISE else precision

    def _key(self, bundle: Bundle, spec: GraphSpec, weights: Weights) -> dict[str, Any]:
        structure = json.dumps(weights.structure(), sort_keys=True).encode()
        return {
            "engine": self.name,
            "translation": _translation(),
            "torch": self.version,
            "device": _device_key(self.device),
            "graph": sha256_of(bundle.file(spec.file)),  # what is compiled, whatever the manifest says of it
            "weights": hashlib.sha256(structure).hexdigest(),
            **interface_key(spec),
            "compute": str(self._compute(bundle, spec)),
            "flags": self.flags(),
        }

    def flags(self) -> dict[str, Any]:
        """Inductor's settings."""
        known = {flag: value for flag, value in _HASTE.items() if hasattr(torch._inductor.config, flag)}
        # More than one thread: only then are the kernels' loops written so that threads can share them.
        return {**_FLAGS, **known, "cpp.threads": max(2, os.cpu_count() or 1)}

    def _weights(self, bundle: Bundle) -> Weights:
        return Weights(bundle.file(bundle.manifest.weights), self.device)

    def _entries(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        weights: Weights,
        on_build: OnBuild | None,
        *,
        build: bool = True,
    ) -> dict[str, Path]:
        """The cache's entries of those graphs. Those that are missing are compiled, or, without ``build``, an error."""
        specs = {spec.file: spec for spec in graphs}
        keys = {file: self._key(bundle, spec, weights) for file, spec in specs.items()}
        if not build:
            return ready_entries(keys, self.name, bundle.path)
        return entries(keys, lambda file, directory: self._compile(bundle, specs[file], weights, directory), on_build)

    def _compile(self, bundle: Bundle, spec: GraphSpec, weights: Weights, directory: Path) -> None:
        _check_compiler()
        module = OnnxModule(read_graphs(bundle, [spec])[spec.file], spec, weights, self._compute(bundle, spec))
        work = directory / "work"
        work.mkdir(0o700)
        try:
            with warnings.catch_warnings(), torch.no_grad(), _working_in(work):
                warnings.simplefilter("ignore")
                program = trace(module, self.device)
                arguments, named = program.example_inputs
                files = torch._inductor.aot_compile(
                    program.module(check_guards=False), arguments, named, options=self.flags()
                )
                _keep(files, directory)
        except EngineError:
            raise
        except Exception as error:  # PyTorch raises many kinds
            raise EngineError(
                f"AOTInductor of PyTorch {self.version} cannot compile {spec.file}: {_first_line(error)}"
            ) from error
        finally:
            remove_tree(work)
        constants = {name: tensor for name, tensor in module.named_buffers() if name not in module.weight_names}
        # Written here: safetensors has classes of its own for what goes wrong with a disk.
        (directory / _CONSTANTS).write_bytes(save({name: tensor.cpu() for name, tensor in constants.items()}))
        (directory / _NAMES).write_text(json.dumps(module.weight_names))

    def _load(self, bundle: Bundle, spec: GraphSpec, weights: Weights, entry: Path) -> AotiExecutable:
        compute = self._compute(bundle, spec)
        try:
            library = self._open(entry)
            constants = {name: t.to(self.device) for name, t in load_file(entry / _CONSTANTS).items()}
            names = json.loads((entry / _NAMES).read_text())
            for name, (stored, narrow) in names.items():
                constants[name] = weights.tensor(stored, compute if narrow else None)
            used = {own: constants[name] for own, name in library.get_constant_names_to_original_fqns().items()}
            # The library takes the addresses; with user_managed=False it would copy every tensor.
            library.update_constant_buffer(used, use_inactive=False, validate_full_updates=True, user_managed=True)
        except Exception as error:
            raise EngineError(
                f"AOTInductor of PyTorch {self.version} cannot load {spec.file}: {_first_line(error)}"
            ) from error
        return AotiExecutable(spec, library, used)

    def _open(self, entry: Path) -> Any:
        """The library of an entry, loaded from where it lies, with the kernels for a GPU that lie beside it."""
        runners, path = torch._C._aoti, str(entry / _LIBRARY)
        if self.device.type == "cpu":
            return runners.AOTIModelContainerRunnerCpu(path, 1)
        return runners.AOTIModelContainerRunnerCuda(path, 1, str(self.device), str(entry))


@contextlib.contextmanager
def _working_in(directory: Path) -> Iterator[None]:
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
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def _keep(files: Sequence[str], directory: Path) -> None:
    """Move what a graph needs to run, of what was made of it, into ``directory``: the library, and the kernels for a
    GPU that it looks for beside it, by the names that they have."""
    paths = [Path(file) for file in files]
    (library,) = (path for path in paths if path.suffix == ".so")
    library.rename(directory / _LIBRARY)
    for path in paths:
        if path.suffix not in (".so", ".cpp", ".json"):
            path.rename(directory / path.name)


def _translation() -> str:
    """The digest of the code that makes modules of graphs and entries of modules."""
    files = (__file__, graph_code.__file__, operator_code.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _device_key(device: torch.device) -> dict[str, Any]:
    """What code compiled for this device relies on."""
    features = torch.cpu.get_capabilities()
    key = {"cpu": sorted(name for name, has in features.items() if has is True), "type": device.type}
    if device.type == "cuda":
        key |= {"gpu": torch.cuda.get_device_name(device), "sm": list(torch.cuda.get_device_capability(device))}
        key["cuda"] = torch.version.cuda
    return key


def _check_compiler() -> None:
    from torch._inductor import cpp_builder

    try:
        cpp_builder.get_cpp_compiler()
    except Exception as error:
        raise EngineError("aoti compiles graphs with a C++ compiler and finds none: install g++ or set CXX") from error


def _first_line(error: BaseException) -> str:
    """The first line that says something, without the banner of PyTorch's own traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
