"""Builds the stub for the ``onnxruntime-gpu`` that is installed: one shared object, under every name that is asked for.

What the provider's library leaves undefined, and what it looks up by name when it runs, is read from the library. What
``*.c`` here does not define is generated: a product is a line in the log, a descriptor is made and forgotten, and all
else says, when it is called, that the stub has no answer. So a newer provider needs new code only for what it asks.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
STUB = "libstub.so"
OPENED_WHEN_NEEDED = ("libcudnn.so.9", "libcufft.so.12")
"""What the provider opens by name while it runs, which its headers do not say."""

_NOT_SUPPORTED = {"cuda": 801, "cublas": 15, "cudnn": 3000, "cufft": 16, "curand": 999, "cu": 801}
"""The error of each library that says so."""

# What a function that nobody wrote does, by its name; the first that fits.
_ANSWERS = (
    (r"cublas(?!Lt)(?!\w*(Get|Set|Create|Destroy))", 'return stub_blas_launch(handle, "{name}");'),
    (r"cublasLtMatrixTransform$", 'return stub_blas_launch(handle, "{name}");'),
    (r"cudnn(?!Get)\w*(Forward|Training|Inference|Tensor)$", 'return stub_dnn_launch(handle, "{name}");'),
    (r"cudnnCreate\w*Descriptor$", "return (*(void **)handle = calloc(1, 8)) ? 0 : 4001;"),
    (r"cudnnDestroy\w*Descriptor$", "return free(handle), 0;"),
    (r"cudnnSet\w*Descriptor\w*$|cudnnSetConvolution", "return (void)handle, 0;"),
    ("", 'return (void)handle, stub_refuse("{name}", {error});'),
)


def provider() -> Path:
    """The library of ONNX Runtime's CUDA provider. Raises :class:`FileNotFoundError` where there is none."""
    spec = importlib.util.find_spec("onnxruntime")
    folders = (spec and spec.submodule_search_locations) or ["onnxruntime"]
    path = Path(folders[0]) / "capi" / "libonnxruntime_providers_cuda.so"
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: the stub stands under onnxruntime-gpu; make cuda-stub installs it")
    return path


def built(folder: Path) -> Path:
    """``folder``, with the stub in it under the names of CUDA's libraries: built unless it is newer than all that it
    is made of. Raises :class:`FileNotFoundError` where a tool is missing, and :class:`subprocess.CalledProcessError`
    where one fails."""
    library = provider()
    if missing := [tool for tool in ("gcc", "readelf", "nm") if not shutil.which(tool)]:
        raise FileNotFoundError(f"no {missing[0]} to build the stub of CUDA with; apt-get install gcc")
    sources = [*HERE.glob("*.c"), *HERE.glob("*.h"), Path(__file__)]
    stub = folder / STUB
    if stub.is_file() and all(stub.stat().st_mtime > source.stat().st_mtime for source in (library, *sources)):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    undefined = {name: version for name, version in _undefined(library) if version or name.startswith("cu")}
    for name in _looked_up(library):
        undefined.setdefault(name, "")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        work = Path(scratch)
        objects = [_compiled(source, work) for source in sorted(HERE.glob("*.c"))]
        unwritten = sorted(undefined.keys() - set(_defined(objects)))
        (work / "generated.c").write_text("".join(_generated(unwritten)))
        objects.append(_compiled(work / "generated.c", work))
        (work / "versions").write_text("".join(_versions(undefined)))
        out = work / STUB
        script = f"-Wl,--version-script={work / 'versions'}"
        subprocess.run(["gcc", "-shared", "-o", str(out), *map(str, objects), script, "-ldl", "-lpthread"], check=True)
        for name in {*_needed(library), *OPENED_WHEN_NEEDED}:
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(STUB)
        out.replace(stub)
    return folder


def _compiled(source: Path, work: Path) -> Path:
    target = work / f"{source.stem}.o"
    flags = ["-std=gnu11", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", f"-I{HERE}"]
    subprocess.run(["gcc", *flags, "-c", source, "-o", target], check=True)
    return target


def _read(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _undefined(library: Path) -> Iterator[tuple[str, str]]:
    """(name, version) of what the library takes from CUDA's; a version is the name of the library that has it."""
    for name, version in re.findall(r" UND (\w+)(?:@(\S+))?", _read("readelf", "--dyn-syms", "--wide", library)):
        if not version or version.startswith("libcu"):
            yield name, version


def _needed(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(libcu\S+)\]", _read("readelf", "--dynamic", "--wide", library))


def _looked_up(library: Path) -> Iterable[str]:
    """Names of functions among the library's texts: it looks them up when it needs them."""
    sections = _read("readelf", "--sections", "--wide", library)
    offset, size = re.findall(r" \.rodata +PROGBITS +\w+ (\w+) (\w+)", sections)[0]
    with library.open("rb") as file:
        file.seek(int(offset, 16))
        texts = file.read(int(size, 16))
    return {name.decode() for name in re.findall(rb"(?<!\w)((?:cudnn|cufft)[A-Z]\w+)\0", texts)}


def _defined(objects: Iterable[Path]) -> Iterable[str]:
    return re.findall(r"^\w+ T (\w+)$", _read("nm", "--defined-only", *objects), re.MULTILINE)


def _generated(names: Iterable[str]) -> Iterator[str]:
    yield '#include "stub.h"\n#include <stdlib.h>\n'
    yield from (f"int stub_{library}_launch(void *handle, const char *name);\n" for library in ("blas", "dnn"))
    for name in names:
        answer = next(answer for pattern, answer in _ANSWERS if re.match(pattern, name))
        error = next(error for prefix, error in _NOT_SUPPORTED.items() if name.lstrip("_").startswith(prefix))
        yield f"int {name}(void *handle) {{ {answer.format(name=name, error=error)} }}\n"


def _versions(undefined: dict[str, str]) -> Iterator[str]:
    for version in sorted({*undefined.values()} - {""}):
        names = sorted(name for name, own in undefined.items() if own == version)
        yield f"{version} {{ global: {'; '.join(names)}; }};\n"
    yield "STUB { global: *; };\n"
