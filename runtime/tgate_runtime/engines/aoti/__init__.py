"""AOTInductor: PyTorch compiles each graph to a shared library, for the CPU or for an NVIDIA GPU.

The libraries hold no weights. All of a session's graphs read one set of tensors: on the CPU, in the bundle's own
dtype, the weight file's pages themselves. A library is made once for a graph, a processor and a version of PyTorch,
with the machine's C++ compiler, and found again in the cache of :mod:`tgate_runtime.cache`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from tgate_engine.graph import DENOISE, GraphSpec, Role
from tgate_engine.underway import without_python
from tgate_runtime.engines.aoti import graph as graph_code
from tgate_runtime.engines.aoti import inductor as inductor_code
from tgate_runtime.engines.aoti import operators as operator_code
from tgate_runtime.engines.aoti.cuda import Gpu
from tgate_runtime.engines.aoti.graph import OnnxModule, Read, Weights, trace
from tgate_runtime.engines.aoti.inductor import LIBRARY, check_compiler, flags, keep, start_compilers, working_in
from tgate_runtime.engines.compiled import entries, interface_key, ready_entries
from tgate_runtime.engines.protocol import (
    Buffer,
    EngineOptions,
    Instead,
    OnBuild,
    check_buffers,
    fitted,
    matched,
    row_shape,
)
from tgate_runtime.graph_check import read_graphs

_TORCH_DTYPE = {dtype.short: getattr(torch, name) for name, dtype in DTYPES.items()}
_CONSTANTS, _READS = "constants.safetensors", "weights.json"


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
        if self.tensor.is_cuda:
            torch.cuda.current_stream(self.tensor.device).synchronize()


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
        self._recorded: Any = None
        if graph.gpu is not None and graph.captured:
            batch = graph.spec.batch_of({name: buffer.shape for name, buffer in inputs.items()})
            with self._failing():
                known = batch in graph.rehearsed
                self._recorded = graph.gpu.captured(self._run, None if known else self._rehearse)
                graph.rehearsed.add(batch)

    def __call__(self) -> None:
        gpu = self._graph.gpu
        with self._failing(), contextlib.nullcontext() if gpu is None else gpu.turn():
            if self._recorded is None:
                self._run()
            else:
                self._recorded.replay()

    def _results(self) -> list[Any]:
        with without_python():  # the loader keeps Python's lock
            # What is copied here is copied again at each replay: it lies in memory that was made while capturing.
            results: list[Any] = self._graph.library.run([_aligned(tensor) for tensor in self._inputs])
        return results

    def _run(self) -> None:
        for buffer, result in zip(self._outputs, self._results(), strict=True):
            if buffer is not None:
                buffer.copy_(result)

    def _rehearse(self) -> None:
        """All that :meth:`_run` does, but to buffers that nobody reads: rows of these may be at work."""
        for result in self._results():
            torch.empty(result.shape, dtype=result.dtype, device=result.device).copy_(result)

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # RuntimeError, and classes of CUDA's own
            raise EngineError(f"graph {self._graph.spec.file} failed in AOTInductor: {_first_line(error)}") from error


def _aligned(tensor: Any) -> Any:
    """The tensor, copied where a kernel for a GPU could not read it: they were compiled for whole buffers, which begin
    at a multiple of 16 bytes, and read so many at a time; a view of some rows may begin elsewhere."""
    return tensor.clone() if tensor.is_cuda and tensor.data_ptr() % 16 else tensor


class AotiExecutable:
    """A :class:`~tgate_runtime.engines.protocol.Executable`: a loaded library, and the constants that it reads.

    ``gpu``: where it runs, or None for the CPU; there its calls are ``captured`` or not. ``rehearsed``: the batches
    that it has run with before.
    """

    def __init__(
        self, spec: GraphSpec, library: Any, constants: dict[str, Any], gpu: Gpu | None, *, captured: bool
    ) -> None:
        self.spec = spec
        self.library = library
        self.constants = constants  # the library holds addresses; this holds the memory
        self.gpu = gpu
        self.captured = captured
        self.rehearsed: set[int] = set()

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _AotiCall:
        check_buffers(self.spec, inputs, outputs)  # the library trusts its caller, and would read beyond a buffer's end
        return _AotiCall(self, inputs, outputs)


class Aoti:
    """The ``aoti`` engine: on the GPU if PyTorch has one, else on the CPU.

    ``precision``: "bf16" (or, on a GPU, "f16") computes a float32 bundle's products in that dtype, with one rounded
    copy of their weights for all graphs; None keeps the bundle's own. "f16" leaves the graphs around the denoiser
    alone: text encoders and decoders overflow in it. ``threads`` is PyTorch's setting for the whole process.

    ``captured``: the roles of graphs whose calls become CUDA graphs on a GPU. Those around the denoiser run once for
    each request.
    """

    name = "aoti"
    version = str(torch.__version__)
    captured: Collection[Role] = (DENOISE,)

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
            # For the process: by default cuDNN convolves with 10 bits of mantissa, and float32 must mean float32. What
            # Triton multiplies goes by the same settings.
            torch.backends.cudnn.allow_tf32 = False
            torch.backends.cuda.matmul.allow_tf32 = False
        elif options.precision == "f16":
            raise EngineError("aoti computes in f16 on a GPU alone, and PyTorch sees none; take --precision bf16")
        if options.threads is not None:
            torch.set_num_threads(options.threads)

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> dict[str, Path]:
        return self._entries(bundle, graphs, self._weights(bundle), on_build)

    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> dict[str, AotiExecutable]:
        weights = self._weights(bundle, instead)
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

    def _channels_last(self, bundle: Bundle, spec: GraphSpec) -> bool:
        """Whether convolutions read and give images with their channels last: in 16 bits, cuDNN has its fast kernels
        for that order alone, and turns images and weights round before and after each where they lie otherwise."""
        dtype: torch.dtype = self._compute(bundle, spec) or getattr(torch, bundle.manifest.dtype)
        return self.device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)

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
            "flags": flags(self._channels_last(bundle, spec)),
        }

    def _weights(self, bundle: Bundle, instead: Instead | None = None) -> Weights:
        return Weights(bundle.file(bundle.manifest.weights), self.device, instead)

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
        check_compiler()
        data, compute, channels_last = (
            read_graphs(bundle, [spec])[spec.file],
            self._compute(bundle, spec),
            self._channels_last(bundle, spec),
        )
        module = OnnxModule(data, spec, weights, compute, channels_last=channels_last)
        work = directory / "work"
        work.mkdir(0o700)
        try:
            with warnings.catch_warnings(), torch.no_grad(), working_in(work):
                warnings.simplefilter("ignore")
                if self.device.type == "cuda":
                    start_compilers()
                program = trace(module, self.device)
                arguments, named = program.example_inputs
                files = torch._inductor.aot_compile(
                    program.module(check_guards=False), arguments, named, options=flags(channels_last)
                )
                keep(files, directory)
        except EngineError:
            raise
        except Exception as error:  # PyTorch raises many kinds
            raise EngineError(
                f"AOTInductor of PyTorch {self.version} cannot compile {spec.file}: {_first_line(error)}"
            ) from error
        finally:
            remove_tree(work)
            if self.device.type == "cuda":
                torch.cuda.empty_cache()  # of what kernels were tried out on
        constants = {name: tensor for name, tensor in module.named_buffers() if name not in module.reads}
        # Written here: safetensors has classes of its own for what goes wrong with a disk.
        (directory / _CONSTANTS).write_bytes(save({name: tensor.cpu() for name, tensor in constants.items()}))
        reads = {name: [*read, module.get_buffer(name).stride()] for name, read in module.reads.items()}
        (directory / _READS).write_text(json.dumps(reads))

    def _load(self, bundle: Bundle, spec: GraphSpec, weights: Weights, entry: Path) -> AotiExecutable:
        compute = self._compute(bundle, spec)
        try:
            library = self._open(entry)
            constants = {name: t.to(self.device) for name, t in load_file(entry / _CONSTANTS).items()}
            for name, (*read, strides) in json.loads((entry / _READS).read_text()).items():
                constants[name] = _laid(Read(*read).of(weights, compute), strides)
            used = {own: constants[name] for own, name in library.get_constant_names_to_original_fqns().items()}
            # The library takes the addresses; with user_managed=False it would copy every tensor.
            library.update_constant_buffer(used, use_inactive=False, validate_full_updates=True, user_managed=True)
        except Exception as error:
            raise EngineError(
                f"AOTInductor of PyTorch {self.version} cannot load {spec.file}: {_first_line(error)}"
            ) from error
        return AotiExecutable(spec, library, used, self._gpu, captured=spec.role in self.captured)

    def _open(self, entry: Path) -> Any:
        """The library of an entry, loaded from where it lies, with the kernels for a GPU that lie beside it."""
        runners, path = torch._C._aoti, str(entry / LIBRARY)
        if self.device.type == "cpu":
            return runners.AOTIModelContainerRunnerCpu(path, 1)
        # For one thread: otherwise each run ends with an event that it asks for later, which a captured one has not.
        return runners.AOTIModelContainerRunnerCuda(path, 1, str(self.device), str(entry), True)

    @functools.cached_property
    def _gpu(self) -> Gpu | None:
        return Gpu(self.device) if self.device.type == "cuda" else None


def _laid(tensor: Any, strides: Sequence[int]) -> Any:
    """The tensor, whose strides are what a library was compiled for: its kernels do not look."""
    if list(tensor.stride()) != list(strides):
        raise ValueError(f"a weight has strides {list(tensor.stride())}, not {list(strides)}; remove the engine cache")
    return tensor


def _translation() -> str:
    """The digest of the code that makes modules of graphs and entries of modules."""
    files = (__file__, graph_code.__file__, inductor_code.__file__, operator_code.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _device_key(device: torch.device) -> dict[str, Any]:
    """What code compiled for this device relies on."""
    features = torch.cpu.get_capabilities()
    key = {"cpu": sorted(name for name, has in features.items() if has is True), "type": device.type}
    if device.type == "cuda":
        key |= {"gpu": torch.cuda.get_device_name(device), "sm": list(torch.cuda.get_device_capability(device))}
        key["cuda"] = torch.version.cuda
    return key


def _first_line(error: BaseException) -> str:
    """The first line that says something, without the banner of PyTorch's own traces."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
