"""The layers hold: export and run time know the contract, the server knows run time, the command line knows all, and
nothing looks up."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACT, EXPORT, RUN_TIME, SERVE, CLI = "tgate_engine", "tgate_export", "tgate_runtime", "tgate_serve", "tgate_cli"
PACKAGES = {
    CONTRACT: ROOT / "tgate_engine",
    EXPORT: ROOT / "export" / "tgate_export",
    RUN_TIME: ROOT / "runtime" / "tgate_runtime",
    SERVE: ROOT / "serve" / "tgate_serve",
    CLI: ROOT / "cli" / "tgate_cli",
}

CONTRACT_LIBRARIES = frozenset({"numpy", "safetensors"}) | sys.stdlib_module_names
RUN_TIME_LIBRARIES = CONTRACT_LIBRARIES | {"PIL", "google", "imageio_ffmpeg", "tokenizers"}  # google.protobuf
ENGINE_LIBRARIES: dict[str, frozenset[str]] = {
    "ort": frozenset({"onnxruntime"}),
    "ort_cuda": frozenset({"onnx", "onnx_ir", "onnxruntime"}),
    "openvino": frozenset({"openvino"}),
    "aoti": frozenset({"onnx", "torch"}),
    "tensorrt": frozenset({"cuda", "onnx", "polygraphy", "tensorrt", "tensorrt_rtx"}),
}
"""What the folder, or the one file, of each engine in ``tgate_runtime.engines`` may import besides: its own library."""

JUDGES: dict[str, frozenset[str]] = {
    "tgate_runtime.tuning.clip": frozenset({"torch", "transformers"}),
    "tgate_runtime.tuning.lpips": frozenset({"lpips", "torch"}),
    "tgate_runtime.tuning.quality": frozenset({"skimage"}),
    "tgate_runtime.tuning.reward": frozenset({"torch", "transformers"}),
    "tgate_runtime.tuning.weights": frozenset({"torch"}),
}
"""The same of what compares pictures, inside the function that needs it."""

WEB_LIBRARIES: dict[str, frozenset[str]] = {
    "api": frozenset({"fastapi", "pydantic", "pydantic_core", "starlette"}),
    "metrics": frozenset({"prometheus_client"}),
    "ray": frozenset({"click", "fastapi", "prometheus_client", "pydantic", "ray", "starlette"}),
    "server": frozenset({"uvicorn"}),
}
"""The same of parts of ``tgate_serve``."""

BUILD_LIBRARIES = frozenset(
    {"accelerate", "diffusers", "huggingface_hub", "onnx", "onnx_ir", "onnxscript", "torch", "transformers"}
)


# --- what a file imports ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Module:
    """A Python file by the name it is imported by, such as ``tgate_runtime.engines.aoti.graph``."""

    name: str
    is_package: bool

    @property
    def layer(self) -> str:
        return self.name.partition(".")[0]

    @property
    def engine(self) -> str:
        """The engine that it belongs to, or nothing."""
        match self.name.split("."):
            case ["tgate_runtime", "engines", engine, *_]:
                return engine
        return ""


@dataclass(frozen=True, kw_only=True)
class Import:
    """A name that is imported: a module, or a name in one; deferred if only a call, or a type checker, comes to it."""

    name: str
    line: int
    deferred: bool

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def module(path: Path) -> Module:
    package, root = next(item for item in PACKAGES.items() if path.is_relative_to(item[1]))
    is_package = path.stem == "__init__"
    parts = path.relative_to(root).with_suffix("").parts
    return Module(name=".".join([package, *(parts[:-1] if is_package else parts)]), is_package=is_package)


def imports(tree: ast.AST, of: Module, *, deferred: bool = False) -> Iterator[Import]:
    """Every import below `tree`. A name put together when it runs ends in a star, ``engines.*``."""
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                source = absolute(node, of)
                names = [source if alias.name == "*" else f"{source}.{alias.name}" for alias in node.names]
            case ast.Call(func=function, args=[argument, *_]) if is_import_function(function):
                names = [pattern(argument)]
        for name in names:
            yield Import(name=name, line=node.lineno, deferred=deferred)  # type: ignore[attr-defined]
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        yield from imports(node, of, deferred=deferred or is_function or is_typing_only)


def is_import_function(function: ast.expr) -> bool:
    return ast.unparse(function).rpartition(".")[2] in {"import_module", "__import__"}


def absolute(node: ast.ImportFrom, of: Module) -> str:
    """What ``from …`` names, counted from the top."""
    if not node.level:
        return node.module or ""
    parts = of.name.split(".")
    base = parts[: len(parts) - node.level + of.is_package]
    return ".".join([*base, node.module] if node.module else base)


def pattern(argument: ast.expr) -> str:
    """The argument of ``import_module``, with a star for what is not known before it runs."""
    match argument:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return f"{text}*"
    return "*"


# --- what a layer may import --------------------------------------------------------------------


PROGRAM = f"{CONTRACT}.__main__"
"""``python -m tgate_engine``, the name that people install: it starts the command line, which that distribution always
brings along. It is the one file of the contract that may look up, since nothing imports it."""


def contract(of: Module, imported: Import) -> bool:
    """The standard library, numpy and safetensors, whether deferred or not."""
    if of.name == PROGRAM and imported.name == f"{CLI}.entry.tgate":
        return True
    return imported.package in CONTRACT_LIBRARIES | {CONTRACT}


def export(_: Module, imported: Import) -> bool:
    """Any library, the contract, and none of the floors beside and above."""
    return imported.package not in {RUN_TIME, SERVE, CLI} and not imported.package.endswith("*")


def run_time(of: Module, imported: Import) -> bool:
    """The contract and libraries that a production host has; an engine's folder besides the engine's own library."""
    judges = JUDGES.get(of.name, frozenset()) if imported.deferred else frozenset()
    own = ENGINE_LIBRARIES.get(of.engine, frozenset()) | judges
    return imported.package in RUN_TIME_LIBRARIES | own | {CONTRACT, RUN_TIME}


def serve(of: Module, imported: Import) -> bool:
    """The contract, run time, and what those may import; what speaks HTTP also the libraries for that, and the rest is
    not to know that there is any."""
    web = next((names for part, names in WEB_LIBRARIES.items() if of.name.startswith(f"{SERVE}.{part}")), frozenset())
    return imported.package in CONTRACT_LIBRARIES | web | {"PIL", CONTRACT, RUN_TIME, SERVE}


def cli(_: Module, imported: Import) -> bool:
    """Everything; what not every host has, inside the command that needs it."""
    return imported.deferred or imported.package in CONTRACT_LIBRARIES | {CONTRACT, CLI}


LAYERS: dict[str, Callable[[Module, Import], bool]] = {
    CONTRACT: contract,
    EXPORT: export,
    RUN_TIME: run_time,
    SERVE: serve,
    CLI: cli,
}


def violations(of: Module, source: str) -> list[str]:
    """One line for each import in `source` that its layer forbids."""
    return [
        f"{of.name}:{imported.line} imports {imported.name}"
        for imported in imports(ast.parse(source), of)
        if not LAYERS[of.layer](of, imported)
    ]


FILES = [path for root in PACKAGES.values() for path in sorted(root.rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_layer_allows(path: Path) -> None:
    assert violations(module(path), path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tgate_engine.plan", "import torch"),
        ("tgate_engine.plan", "def f():\n    import tgate_runtime.runner"),
        ("tgate_engine.plan", "def f():\n    import rich"),
        ("tgate_engine.plan", "if TYPE_CHECKING:\n    from tgate_export.build import Job"),
        ("tgate_engine.plan", "from tgate_cli import views"),
        ("tgate_engine.plan", "from tgate_cli.main import main"),
        ("tgate_engine.__main__", "from tgate_cli import views"),
        ("tgate_engine.plan", "import importlib\ndef f(name):\n    importlib.import_module(name)"),
        ("tgate_export.build", "def f():\n    from tgate_runtime.session import Session"),
        ("tgate_export.build", "from tgate_cli.display import Lines"),
        ("tgate_export.build", "import importlib\nimportlib.import_module(f'tgate_{name}')"),
        ("tgate_runtime.runner", "try:\n    import torch.nn as nn\nexcept ImportError:\n    pass"),
        ("tgate_runtime.runner", "import importlib\nonnx = importlib.import_module('onnx.helper')"),
        ("tgate_runtime.runner", "def f():\n    import onnxruntime"),
        ("tgate_runtime.runner", "def f():\n    from tgate_cli import views"),
        ("tgate_runtime.engines.ort", "from tgate_export.graphs import trace"),
        ("tgate_runtime.engines.tensorrt.build", "import torch"),
        ("tgate_runtime.engines.aoti", "import transformers"),
        ("tgate_runtime.engines", "import onnx"),
        ("tgate_runtime.tuning.quality", "import skimage"),
        ("tgate_runtime.tuning.search", "def f():\n    import skimage"),
        ("tgate_runtime.tuning.clip", "import torch"),
        ("tgate_runtime.tuning.accuracy", "def f():\n    import torch"),
        ("tgate_runtime.runner", "def f():\n    from tgate_serve import scheduler"),
        ("tgate_export.build", "from tgate_serve.scheduler import Job"),
        ("tgate_serve.worker", "def f():\n    from tgate_export.methods import tgate"),
        ("tgate_serve.worker", "from tgate_cli import views"),
        ("tgate_serve.worker", "import onnxruntime"),
        ("tgate_serve.worker", "import fastapi"),
        ("tgate_serve.api.app", "import uvicorn"),
        ("tgate_serve.api.app", "from ray import serve"),
        ("tgate_cli.main", "from tgate_export import build"),
        ("tgate_cli.main", "import rich"),
    ],
)
def test_a_forbidden_import_is_seen(name: str, source: str) -> None:
    assert len(violations(Module(name=name, is_package=False), source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("tgate_engine.__main__", "from tgate_cli.entry import tgate"),
        ("tgate_engine.plan", "import json, numpy.typing\nfrom tgate_engine.errors import PlanError"),
        ("tgate_export.build", "import torch\nfrom tgate_engine.plan import Plan"),
        ("tgate_runtime.runner", "from . import session\nimport tgate_engine.plan, tokenizers"),
        ("tgate_runtime.engines", "def f(name):\n    importlib.import_module(f'tgate_runtime.engines.{name}')"),
        ("tgate_runtime.engines.ort", "import onnxruntime"),
        ("tgate_runtime.tuning.quality", "def f():\n    from skimage.metrics import structural_similarity"),
        ("tgate_runtime.tuning.clip", "def f():\n    import torch, transformers"),
        ("tgate_runtime.engines.aoti.graph", "import onnx\nfrom torch import Tensor"),
        ("tgate_runtime.engines.tensorrt.build", "from onnx import helper\nimport_module('polygraphy.config')"),
        ("tgate_serve.worker", "from tgate_runtime.state import State\nfrom tgate_engine.plan import Plan"),
        ("tgate_cli.main", "if TYPE_CHECKING:\n    from tgate_runtime.session import Session"),
        ("tgate_cli.views", "def f():\n    import rich.table\n    from tgate_runtime import pipeline"),
    ],
)
def test_an_allowed_import_is_let_through(name: str, source: str) -> None:
    assert violations(Module(name=name, is_package=False), source) == []


def test_nothing_imports_the_program(sources: dict[Module, str]) -> None:
    assert [name for name, imported in import_graph(sources).items() if PROGRAM in imported] == []


# --- no two files import each other -------------------------------------------------------------

Graph = Mapping[str, Iterable[str]]
"""The modules that each module imports, by name."""


def targets(imported: str, modules: Collection[str]) -> set[str]:
    """The modules of ours that an import names: ``a.b`` for the module, or for the name b in module ``a``.

    The packages above a module are run before it, but that is not what it names, and so no edge.
    """
    if imported.endswith("*"):
        return {name for name in modules if name.startswith(imported[:-1])} if imported != "*" else set()
    return next(({name} for name in (imported, imported.rpartition(".")[0]) if name in modules), set())


def import_graph(sources: Mapping[Module, str]) -> dict[str, set[str]]:
    """Who imports whom, deferred imports and those for a type checker among them."""
    names = {of.name for of in sources}
    return {
        of.name: set().union(*(targets(imported.name, names) for imported in imports(ast.parse(source), of)))
        for of, source in sources.items()
    }


def strays(sources: Mapping[Module, str]) -> list[str]:
    """Imports from modules of ours that are not there: what the graph would not see."""
    names = {of.name for of in sources}
    return [
        f"{of.name}:{imported.line} imports {imported.name}"
        for of, source in sources.items()
        for imported in imports(ast.parse(source), of)
        if imported.package in PACKAGES and not targets(imported.name, names)
    ]


def cycles(graph: Graph) -> list[list[str]]:
    """The groups of modules that reach one another: strongly connected components (Tarjan), and self-imports."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
            if other in stack:
                lowest[name] = min(lowest[name], lowest[other])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1 or name in graph[name]:
                groups.append(sorted(group))

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return sorted(groups)


@pytest.fixture(scope="module")
def sources() -> dict[Module, str]:
    return {module(path): path.read_text(encoding="utf-8") for path in FILES}


def test_every_import_of_ours_names_a_file(sources: dict[Module, str]) -> None:
    assert strays(sources) == []


def test_an_import_of_a_file_that_is_gone_is_seen() -> None:
    files = {Module(name="tgate_engine.a", is_package=False): "", Module(name="tgate_engine", is_package=True): ""}
    source = (
        "import json\nfrom tgate_engine import VERSION, a\nfrom tgate_engine.a import x\nfrom tgate_engine.b import y"
    )
    files[Module(name="tgate_cli.c", is_package=False)] = source
    assert strays(files) == ["tgate_cli.c:4 imports tgate_engine.b.y"]


def test_no_two_files_import_each_other(sources: dict[Module, str]) -> None:
    assert cycles(import_graph(sources)) == []


def graph_of(**sources: str) -> dict[str, set[str]]:
    """The import graph of package ``p``: a file for each argument, ``top`` its own."""
    files = {Module(name=f"p.{name}", is_package=False): source for name, source in sources.items() if name != "top"}
    return import_graph({Module(name="p", is_package=True): sources.get("top", ""), **files})


@pytest.mark.parametrize(
    ("files", "group"),
    [
        ({"a": "import p.b", "b": "from p import a"}, ["p.a", "p.b"]),
        ({"a": "from p.b import *", "b": "def f():\n    from p.a import other"}, ["p.a", "p.b"]),
        ({"a": "if TYPE_CHECKING:\n    from p.b import T", "b": "from . import a"}, ["p.a", "p.b"]),
        ({"a": "from .b import x", "b": "from .c import y", "c": "from p.a import z"}, ["p.a", "p.b", "p.c"]),
        ({"top": "from p.a import name", "a": "from p import OTHER"}, ["p", "p.a"]),
        ({"top": "def f(n):\n    import_module(f'p.{n}')", "a": "from p import Protocol"}, ["p", "p.a"]),
        ({"a": "from p.a import name"}, ["p.a"]),
    ],
)
def test_a_cycle_is_seen(files: dict[str, str], group: list[str]) -> None:
    assert cycles(graph_of(**files)) == [group]


@pytest.mark.parametrize(
    "files",
    [
        {"a": "from p import b, c", "b": "import p.c", "c": "import json"},
        {"top": "from p.a import name", "a": "from p.b import name", "b": ""},
    ],
)
def test_what_runs_one_way_is_no_cycle(files: dict[str, str]) -> None:
    assert cycles(graph_of(**files)) == []


# --- run time alone -----------------------------------------------------------------------------

RUN_TIME_ALONE = """
import sys

FORBIDDEN = set(sys.argv[1:])

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"run time asked for {name}", name=name)
        return None

sys.meta_path.insert(0, Forbid())
import tgate_runtime.runner, tgate_runtime.pipeline, tgate_cli.main
loaded = {name.partition(".")[0] for name in sys.modules}
sys.exit(f"loaded: {sorted(loaded & FORBIDDEN)}" if loaded & FORBIDDEN else 0)
"""


def test_run_time_needs_no_build_library(tmp_path: Path) -> None:
    forbidden = sorted(BUILD_LIBRARIES - {"huggingface_hub"})  # `tokenizers` depends on huggingface_hub
    done = subprocess.run(
        [sys.executable, "-c", RUN_TIME_ALONE, *forbidden, "tgate_export"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
