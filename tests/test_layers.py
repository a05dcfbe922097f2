"""The layers hold: export and run time know the contract, and nothing else knows across."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "tgate_engine": ROOT / "tgate_engine",
    "tgate_export": ROOT / "export" / "tgate_export",
    "tgate_runtime": ROOT / "runtime" / "tgate_runtime",
}
MODULES = [path for package in PACKAGES.values() for path in sorted(package.rglob("*.py"))]

BUILD_LIBRARIES = frozenset(
    {"accelerate", "diffusers", "huggingface_hub", "onnx", "onnx_ir", "onnxscript", "torch", "transformers"}
)
CONTRACT_MAY_IMPORT = frozenset({"numpy", "safetensors", "tgate_engine"}) | sys.stdlib_module_names
CLI_MAY_DEFER = frozenset({"tgate_export", "tgate_runtime"})
COMPILERS_MAY_IMPORT = {
    "backends/aoti/__init__.py": {"torch"},
    "backends/tensorrt/build.py": {"onnx"},
    "backends/aoti/graph.py": {"onnx", "torch"},
    "backends/aoti/operators.py": {"onnx", "torch"},
}
SHOWN_WITH_RICH = frozenset({"report.py", "views.py"})


@dataclass(frozen=True, kw_only=True)
class Import:
    """A top-level package that a module imports; deferred if that happens inside a function only."""

    package: str
    line: int
    deferred: bool


def imports(tree: ast.AST, *, deferred: bool = False) -> Iterator[Import]:
    """Every absolute import below `tree`. A relative one can't leave its package, so it is left out."""
    for node in ast.iter_child_nodes(tree):
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom(module=str(module), level=0):
                names = [module]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(module)), *_],
            ):
                names = [module]
        for name in names:
            yield Import(package=name.partition(".")[0], line=node.lineno, deferred=deferred)  # type: ignore[attr-defined]
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing_only = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        yield from imports(node, deferred=deferred or is_function or is_typing_only)


def allowed(package: str, module: str, found: Import) -> bool:
    """Whether file `module` of `package` may hold the import `found`."""
    if package == "tgate_engine":
        by_cli = module == "cli.py" and found.package in CLI_MAY_DEFER
        for_show = module in SHOWN_WITH_RICH and found.package == "rich"
        return (found.deferred and (by_cli or for_show)) or found.package in CONTRACT_MAY_IMPORT
    if package == "tgate_export":
        return found.package != "tgate_runtime"
    forbidden = BUILD_LIBRARIES - COMPILERS_MAY_IMPORT.get(module.removeprefix("tgate_runtime/"), set())
    return found.package != "tgate_export" and found.package not in forbidden


def violations(package: str, module: str, source: str) -> list[str]:
    """One line for each import in `source` that its layer forbids."""
    return [
        f"{package}/{module}:{found.line} imports {found.package}"
        for found in imports(ast.parse(source))
        if not allowed(package, module, found)
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_layer_allows(path: Path) -> None:
    package, root = next(item for item in PACKAGES.items() if path.is_relative_to(item[1]))
    module = path.relative_to(root).as_posix()
    assert violations(package, module, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("tgate_engine", "plan.py", "import torch"),
        ("tgate_engine", "plan.py", "def f():\n    import tgate_runtime.runner"),
        ("tgate_engine", "plan.py", "def f():\n    import rich"),
        ("tgate_engine", "views.py", "import rich"),
        ("tgate_engine", "cli.py", "from tgate_export import build"),
        ("tgate_engine", "cli.py", "def f():\n    import torch"),
        ("tgate_export", "build.py", "def f():\n    from tgate_runtime.session import Session"),
        ("tgate_runtime", "runner.py", "try:\n    import torch.nn as nn\nexcept ImportError:\n    pass"),
        ("tgate_runtime", "runner.py", "import importlib\nonnx = importlib.import_module('onnx.helper')"),
        ("tgate_runtime", "backends/ort.py", "from tgate_export.graphs import trace"),
    ],
)
def test_a_forbidden_import_is_seen(package: str, module: str, source: str) -> None:
    assert len(violations(package, module, source)) == 1


@pytest.mark.parametrize(
    ("package", "module", "source"),
    [
        ("tgate_engine", "plan.py", "import json, numpy.typing\nfrom tgate_engine.errors import PlanError"),
        ("tgate_engine", "cli.py", "def f():\n    from tgate_runtime import pipeline"),
        ("tgate_engine", "views.py", "def f():\n    import rich.table"),
        ("tgate_export", "build.py", "import torch\nfrom tgate_engine.plan import Plan"),
        ("tgate_runtime", "runner.py", "from . import session\nimport tgate_engine.plan, onnxruntime"),
    ],
)
def test_an_allowed_import_is_let_through(package: str, module: str, source: str) -> None:
    assert violations(package, module, source) == []


RUN_TIME_ALONE = """
import sys

FORBIDDEN = set(sys.argv[1:])

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in FORBIDDEN:
            raise ModuleNotFoundError(f"run time asked for {name}", name=name)
        return None

sys.meta_path.insert(0, Forbid())
import tgate_runtime.runner, tgate_runtime.pipeline, tgate_engine.cli
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
