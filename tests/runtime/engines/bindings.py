"""TensorRT's own Python bindings without TensorRT: what they have is real, what it does is not there.

A registry has the bindings, and not the library that they are for. So they are loaded over one of the same name in
which every function makes nothing, and :class:`Like` stands for the objects that only the library can make: it has
what their class has, and takes what its signature takes.
"""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGE = "tensorrt_bindings"
_AGAIN = ("polygraphy", "tgate_runtime.engines.tensorrt")
"""What asks at import which TensorRT there is, and so has to be imported anew."""


def loaded(folder: Path) -> Any:
    """The bindings. Skips where they are not installed, or nothing that builds the library in their place."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("TensorRT's bindings are not installed: make setup")
    if missing := [tool for tool in ("gcc", "readelf") if not shutil.which(tool)]:
        pytest.skip(f"no {missing[0]} to build the stub of TensorRT with")
    module = Path(spec.submodule_search_locations[0]) / "tensorrt.so"
    symbols = _read("readelf", "--dyn-syms", "--wide", module)
    names = re.findall(r"GLOBAL +DEFAULT +UND (\w+)$", symbols, re.MULTILINE)
    source = folder / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in names))
    for library in re.findall(r"\(NEEDED\).*\[(libnv\S+)\]", _read("readelf", "--dynamic", "--wide", module)):
        out = folder / library
        flags = ["-shared", "-fPIC", "-w", f"-Wl,-soname,{library}"]
        subprocess.run(["gcc", *flags, "-o", out, source], check=True)
        ctypes.CDLL(str(out), ctypes.RTLD_GLOBAL)  # found by that name from now on
    return importlib.import_module(PACKAGE)


def _read(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def in_place_of_rtx(bindings: Any) -> Iterator[Any]:
    """The engine's package, imported anew with ``bindings`` as TensorRT; all is put back afterwards."""
    engines = importlib.import_module("tgate_runtime.engines")
    importlib.import_module("tgate_runtime.engines.tensorrt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", bindings)
        patch.setattr(engines, "tensorrt", None)
        for name in [name for name in sys.modules if name.startswith(_AGAIN)]:
            patch.delitem(sys.modules, name)
        try:
            yield importlib.import_module("tgate_runtime.engines.tensorrt")
        finally:
            for name in [name for name in sys.modules if name.startswith(_AGAIN)]:
                del sys.modules[name]


class Like:
    """Stands for an object of a class of the bindings. What that class does not have is an :class:`AttributeError`,
    and arguments that none of a method's signatures take a :class:`TypeError`.

    ``answers``: what properties are and methods give, by "Class.name", a function of the arguments where it is one;
    a method without an answer gives another stand-in where it makes an object, else True. ``calls``: collects what is
    called, with its arguments, and what is set.
    """

    def __init__(self, cls: Any, answers: Mapping[str, Any], calls: list[tuple[str, tuple[Any, ...]]]) -> None:
        self.__dict__.update(_cls=cls, _answers=answers, _calls=calls)

    @property
    def __class__(self) -> Any:
        return self._cls

    @__class__.setter
    def __class__(self, cls: Any) -> None:  # as the engine makes an attention layer of a layer
        self.__dict__["_cls"] = cls

    def __getattr__(self, name: str) -> Any:
        kind, key = inspect.getattr_static(self._cls, name, None), f"{self._cls.__name__}.{name}"
        if kind is None:
            raise AttributeError(f"{self._cls.__name__} has no {name}")
        answer = self._answers.get(key)
        if isinstance(kind, property):
            made = self._made(kind.fget.__doc__ or "")
            return self.__dict__.setdefault(f"set {name}", made) if answer is None else answer
        method = getattr(self._cls, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            signature = fitting(method.__doc__, self, *args, **kwargs)
            self._calls.append((key, (*args, *kwargs.values())))
            if callable(answer):
                return answer(*args, **kwargs)
            return self._made(signature) if answer is None else answer

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        kind = inspect.getattr_static(self._cls, name, None)
        if name == "__class__":
            object.__setattr__(self, name, value)
        elif not isinstance(kind, property) or kind.fset is None:
            raise AttributeError(f"{self._cls.__name__} has no {name} that can be set")
        else:
            self._calls.append((f"{self._cls.__name__}.{name}", (value,)))
            self.__dict__[f"set {name}"] = value

    def __iter__(self) -> Iterator[Any]:
        """A network's layers, as indexing it gives them."""
        if not hasattr(self._cls, "__getitem__"):
            raise TypeError(f"{self._cls.__name__} cannot be indexed")
        return map(self.get_layer, range(self.num_layers))

    def _made(self, signature: str) -> Any:
        result = re.search(rf"-> {PACKAGE}\.\w+\.(\w+)$", signature.strip().split("\n")[0])
        made = getattr(sys.modules[PACKAGE], result[1], None) if result else None
        return True if made is None else Like(made, self._answers, self._calls)


def fitting(text: str | None, *args: Any, **kwargs: Any) -> str:
    """Which of the signatures that a docstring of pybind11 begins with takes those arguments."""
    for line in (text or "").splitlines():
        if match := re.fullmatch(r"(?:\d+\. )?\w+(\(.*\) -> .*)", line.strip()):
            names = re.findall(r"[(,] ?(\w+): ", match[1])
            least = len(names) - match[1].count(" = ")
            if least <= len(args) + len(kwargs) <= len(names) and kwargs.keys() <= set(names[len(args) :]):
                return match[1]
    raise TypeError(f"no signature takes {len(args)} arguments and {sorted(kwargs)}: {text}")


def maker(cls: Any, answers: Mapping[str, Any], calls: list[tuple[str, tuple[Any, ...]]]) -> Any:
    """What takes the place of a class that the engine makes objects of: gives stand-ins for them."""

    def make(*args: Any, **kwargs: Any) -> Like:
        made = Like(cls, answers, calls)
        fitting(cls.__init__.__doc__, made, *args, **kwargs)
        calls.append((cls.__name__, (*args, *kwargs.values())))
        return made

    return make


def named(module: ModuleType) -> Iterator[str]:
    """Each name that the sources of a package take of ``trt``, such as ``"BuilderFlag.TF32"``."""
    for file in sorted(Path(str(module.__file__)).parent.glob("*.py")):
        yield from re.findall(r"\btrt\.([A-Z]\w+(?:\.[A-Z]\w*)?)", file.read_text())
