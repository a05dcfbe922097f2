"""Tests mirror the source: a module has a test file of its name, in the folder that stands for its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = {
    ROOT / "tgate_engine": ROOT / "tests" / "contract",
    ROOT / "export" / "tgate_export": ROOT / "tests" / "export",
    ROOT / "runtime" / "tgate_runtime": ROOT / "tests" / "runtime",
    ROOT / "serve" / "tgate_serve": ROOT / "tests" / "serve",
    ROOT / "cli" / "tgate_cli": ROOT / "tests" / "cli",
}


def does_something(path: Path) -> bool:
    """Whether a module holds a function, or a class with one: errors and empty packages hold none."""
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text("utf-8"))))


MODULES = [
    (package, path)
    for package in PLACES
    for path in sorted(package.rglob("*.py"))
    if does_something(path) and path != package / "__init__.py"  # what a package hands on is imported by every test
]


@pytest.mark.parametrize(
    ("package", "path"), [pytest.param(*item, id=item[1].relative_to(ROOT).as_posix()) for item in MODULES]
)
def test_a_module_has_a_test_of_its_name(package: Path, path: Path) -> None:
    folder = PLACES[package] / path.relative_to(package).parent
    if path.stem == "__init__":
        places = [folder / f"test_{path.parent.name}.py", folder.parent / f"test_{path.parent.name}.py"]
    else:  # parts of an engine lie beside it, some under its name: test_aoti_graph.py
        names = (path.stem, f"{path.parent.name}_{path.stem}")
        places = [place / f"test_{name}.py" for place in (folder, folder.parent) for name in names]
        if path.parent.parent.name == "engines":  # an engine's parts that mean nothing without it are tested with it
            places.append(folder.parent / f"test_{path.parent.name}.py")
    assert [place for place in places if place.is_file()], f"none of {[str(p.relative_to(ROOT)) for p in places]}"
