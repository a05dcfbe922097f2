"""AOTInductor: PyTorch compiles each graph to a shared library, for the CPU or for an NVIDIA GPU.

The libraries hold no weights. All of a session's graphs read one set of tensors: on the CPU, in the bundle's own
dtype, the weight file's pages themselves. A library is made once for a graph, a processor and a version of PyTorch,
with the machine's C++ compiler, and found again in the cache of :mod:`tgate_runtime.cache`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# OpenMP reads this when PyTorch is first loaded. Threads that spin at the end of every loop take the cores from the
# others at work: on 2 cores shared with another job, a small SDXL's step took 1400 ms instead of 24.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec, multiple, resolve
from tgate_runtime import cache
from tgate_runtime.backends import EngineOptions, OnBuild, check_buffers, fitted
from tgate_runtime.backends.aoti import graph as graph_code
from tgate_runtime.backends.aoti import operators as operator_code
from tgate_runtime.backends.aoti.graph import OnnxModule, Weights, trace

_PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
_FLAGS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    # Otherwise small weights, and those that hold one number, would be written into the code as they are today.
    "always_keep_tensor_constants": True,
    "joint_graph_constant_folding": False,
    # Otherwise the number of threads at the time of compiling would be written into the kernels.
    "cpp.dynamic_threads": True,
}
# They only save time while compiling, and not every version of PyTorch knows each, which it would raise.
_HASTE: dict[str, Any] = {
    # The code around the kernels calls them and no more: optimising it takes most of the time and wins nothing.
    "aot_inductor.compile_wrapper_opt_level": "O0",
    "aot_inductor.enable_line_tables": False,
}
_PACKAGE, _CONSTANTS, _NAMES = "graph.pt2", "constants.safetensors", "weights.json"


class TorchBuffer:
    """A :class:`~tgate_runtime.backends.Buffer`: ``tensor``, on the engine's device."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: torch.device) -> None:
        self.tensor = torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        self.shape = shape
        self.dtype = dtype
        self.address = int(self.tensor.data_ptr())

    def write(self, array: NDArray[Any]) -> None:
        fitted(array, self.shape, self.dtype)
        # A copy: NumPy's may be read-only, which torch warns of.
        self.tensor.copy_(torch.from_numpy(np.array(array)).view(self.tensor.dtype))

    def read(self) -> NDArray[Any]:
        host = self.tensor.cpu()
        bits = host.view(torch.uint16) if self.dtype == "bfloat16" else host
        found: NDArray[Any] = bits.numpy().copy()
        return found


class _AotiCall:
    """A :class:`~tgate_runtime.backends.Call`.

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
            found = self._graph.loader.boxed_run(list(self._inputs))
            for buffer, output in zip(self._outputs, found, strict=True):
                if buffer is not None:
                    buffer.copy_(output)
            if self._inputs[0].is_cuda:
                torch.cuda.current_stream(self._inputs[0].device).synchronize()
        except Exception as error:  # RuntimeError, and classes of CUDA's own
            raise EngineError(f"graph {self._graph.spec.file} failed in AOTInductor: {_first_line(error)}") from error


class AotiExecutable:
    """A :class:`~tgate_runtime.backends.Executable`: a loaded library, and the constants that it reads."""

    def __init__(self, spec: GraphSpec, batch: tuple[int, int], loader: Any, constants: dict[str, Any]) -> None:
        self.spec = spec
        self.loader = loader
        self.constants = constants  # the library holds addresses; this holds the memory
        self._batch = batch

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _AotiCall:
        check_buffers(self.spec.file, self.spec, inputs, outputs)
        self._check_shapes({**inputs, **outputs})
        return _AotiCall(self, inputs, outputs)

    def _check_shapes(self, buffers: Mapping[str, Any]) -> None:
        """The library trusts its caller: a buffer that is too small would be read beyond its end."""
        batch = 0
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            if tensor.name not in buffers:
                continue
            shape = buffers[tensor.name].shape
            for size, dim in zip(shape, tensor.shape, strict=False):
                if isinstance(dim, str):
                    batch = batch or size // multiple(dim)
            if shape != resolve(tensor.shape, batch) or not (batch == 0 or self._batch[0] <= batch <= self._batch[1]):
                raise EngineError(
                    f"graph {self.spec.file}: {tensor.name} is {list(tensor.shape)} for {self._batch[0]} to "
                    f"{self._batch[1]} images, got a buffer of {list(shape)}"
                )


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

    def build(self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None) -> dict[str, Path]:
        return self._built(bundle, graphs, self._weights(bundle), on_build)

    def load(self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None) -> dict[str, AotiExecutable]:
        weights = self._weights(bundle)
        missing = [name for name in graphs if cache.find(self._key(bundle, name, weights)) is None]
        if missing and not self.options.build:
            raise EngineError(
                f"graphs {', '.join(missing)} of {bundle.path} are not compiled for this machine and PyTorch "
                f"{self.version}: tgate build {bundle.path} --engine aoti"
            )
        entries = self._built(bundle, graphs, weights, on_build)
        return {name: self._load(bundle, name, weights, entry) for name, entry in entries.items()}

    def allocate(self, shape: tuple[int, ...], dtype: str) -> TorchBuffer:
        return TorchBuffer(shape, dtype, self.device)

    def _compute(self, bundle: Bundle, graph: str) -> torch.dtype | None:
        """What the graph's products are narrowed to; None keeps the bundle's dtype."""
        wanted = _PRECISIONS[self.options.precision] if self.options.precision else None
        own = getattr(torch, bundle.manifest.dtype)
        if wanted in (None, own):
            return None
        if own != torch.float32:
            raise EngineError(
                f"{bundle.path} was exported in {bundle.manifest.dtype}, which aoti does not convert; leave out "
                "--precision, or export with --dtype fp32"
            )
        around = (bundle.manifest.text, bundle.manifest.image, bundle.manifest.decoder)
        return None if wanted == torch.float16 and graph in around else wanted

    def _key(self, bundle: Bundle, graph: str, weights: Weights) -> dict[str, Any]:
        spec = bundle.manifest.graphs[graph]
        structure = json.dumps(weights.structure(), sort_keys=True).encode()
        return {
            "engine": self.name,
            "translation": _translation(),
            "torch": self.version,
            "device": _device_key(self.device),
            "graph": bundle.manifest.files[spec.file].sha256,
            "weights": hashlib.sha256(structure).hexdigest(),
            "inputs": [[tensor.name, tensor.dtype, list(tensor.shape)] for tensor in spec.inputs],
            "batch": list(bundle.manifest.batch),
            "compute": str(self._compute(bundle, graph)),
            "flags": self.flags(),
        }

    def flags(self) -> dict[str, Any]:
        """Inductor's settings."""
        known = {flag: value for flag, value in _HASTE.items() if hasattr(torch._inductor.config, flag)}
        # More than one thread: only then are the kernels' loops written so that threads can share them.
        return {**_FLAGS, **known, "cpp.threads": max(2, os.cpu_count() or 1)}

    def _weights(self, bundle: Bundle) -> Weights:
        return Weights(bundle.file(bundle.manifest.weights), self.device)

    def _built(
        self, bundle: Bundle, graphs: Sequence[str], weights: Weights, on_build: OnBuild | None
    ) -> dict[str, Path]:
        """The cache's entries of those graphs; what is not there is compiled."""
        keys = {name: self._key(bundle, name, weights) for name in graphs}
        found = {name: cache.find(key) for name, key in keys.items()}
        missing = [name for name, entry in found.items() if entry is None]
        for done, name in enumerate(missing):
            if on_build is not None:
                on_build(done, len(missing), name)
            found[name] = self._compile(bundle, name, weights, keys[name])
        if missing and on_build is not None:
            on_build(len(missing), len(missing), missing[-1])
        return {name: entry for name, entry in found.items() if entry is not None}

    def _compile(self, bundle: Bundle, graph: str, weights: Weights, key: Mapping[str, Any]) -> Path:
        spec, compute = bundle.manifest.graphs[graph], self._compute(bundle, graph)
        _check_compiler()

        def build(stage: Path) -> None:
            module = OnnxModule(bundle.file(spec.file), spec, weights, compute)
            try:
                with warnings.catch_warnings(), torch.no_grad():
                    warnings.simplefilter("ignore")
                    program = trace(module, bundle.manifest.batch, self.device)
                    torch._inductor.aoti_compile_and_package(
                        program, package_path=str(stage / _PACKAGE), inductor_configs=self.flags()
                    )
            except EngineError:
                raise
            except Exception as error:  # PyTorch raises many kinds
                raise EngineError(
                    f"AOTInductor of PyTorch {self.version} cannot compile {spec.file}: {_first_line(error)}"
                ) from error
            constants = {name: tensor for name, tensor in module.named_buffers() if name not in module.weight_names}
            save_file({name: tensor.cpu() for name, tensor in constants.items()}, stage / _CONSTANTS)
            (stage / _NAMES).write_text(json.dumps(module.weight_names))

        return cache.find_or_build(key, build)

    def _load(self, bundle: Bundle, graph: str, weights: Weights, entry: Path) -> AotiExecutable:
        spec, compute = bundle.manifest.graphs[graph], self._compute(bundle, graph)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = torch._inductor.aoti_load_package(
                    str(entry / _PACKAGE), device_index=-1 if self.device.index is None else self.device.index
                )
            constants = {name: t.to(self.device) for name, t in load_file(entry / _CONSTANTS).items()}
            names = json.loads((entry / _NAMES).read_text())
            for name, (stored, narrow) in names.items():
                constants[name] = weights.tensor(stored, compute if narrow else None)
            used = {name: constants[name] for name in model.get_constant_fqns()}
            # The library takes the addresses; with user_managed=False it would copy every tensor.
            model.load_constants(used, check_full_update=True, user_managed=True)
        except Exception as error:
            raise EngineError(
                f"AOTInductor of PyTorch {self.version} cannot load {spec.file}: {_first_line(error)}"
            ) from error
        return AotiExecutable(spec, bundle.manifest.batch, model.loader, used)


def _translation() -> str:
    """The digest of the code that makes modules of graphs and entries of modules."""
    files = (__file__, graph_code.__file__, operator_code.__file__)
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _device_key(device: torch.device) -> dict[str, Any]:
    """What code compiled for this device relies on."""
    features = torch.cpu.get_capabilities()
    found = {"cpu": sorted(name for name, has in features.items() if has is True), "type": device.type}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "sm": list(torch.cuda.get_device_capability(device))}
        found["cuda"] = torch.version.cuda
    return found


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
