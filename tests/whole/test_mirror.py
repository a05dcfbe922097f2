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

TOGETHER = {
    "export/tgate_export/translatable.py": "tests/export/test_quick.py",
    "runtime/tgate_runtime/encoder.py": "tests/runtime/test_pipeline.py",
    "serve/tgate_serve/api/app.py": "tests/serve/test_guards.py",
    "serve/tgate_serve/api/errors.py": "tests/serve/test_images.py",
    "serve/tgate_serve/api/events.py": "tests/serve/test_status.py",
    "serve/tgate_serve/api/forms.py": "tests/serve/test_asked.py",
    "serve/tgate_serve/api/jobs.py": "tests/serve/test_videos.py",
    "serve/tgate_serve/api/openapi.py": "tests/serve/test_status.py",
    "serve/tgate_serve/api/pictures.py": "tests/serve/test_images.py",
    "serve/tgate_serve/api/schemas.py": "tests/serve/test_status.py",
    "serve/tgate_serve/api/service.py": "tests/serve/test_images.py",
    "serve/tgate_serve/bundles.py": "tests/serve/test_process.py",
    "serve/tgate_serve/choice.py": "tests/serve/test_images.py",
    "serve/tgate_serve/line.py": "tests/serve/test_scheduler.py",
    "serve/tgate_serve/metrics.py": "tests/serve/test_status.py",
    "serve/tgate_serve/model.py": "tests/serve/test_images.py",
    "serve/tgate_serve/places.py": "tests/serve/test_worker.py",
    "serve/tgate_serve/ray": "tests/serve/test_ray_parts.py",
    "serve/tgate_serve/server.py": "tests/serve/test_process.py",
    "cli/tgate_cli/serve.py": "tests/serve/test_process.py",
}
"""Modules, or a folder of them, that are tested by what they are parts of: a server by its answers, above all."""


def does_something(path: Path) -> bool:
    """Whether a module holds a function, or a class with one: errors and empty packages hold none."""
    return any(isinstance(node, ast.FunctionDef) for node in ast.walk(ast.parse(path.read_text("utf-8"))))


MODULES = [
    (package, path)
    for package in PLACES
    for path in sorted(package.rglob("*.py"))
    if does_something(path) and path != package / "__init__.py"  # what a package hands on is imported by every test
]


def test_what_is_tested_together_is_there() -> None:
    for name, test in TOGETHER.items():
        assert (ROOT / name).exists(), name
        assert (ROOT / test).is_file(), test


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
    names_of = (path.relative_to(ROOT).as_posix(), path.parent.relative_to(ROOT).as_posix())
    places += [ROOT / TOGETHER[name] for name in names_of if name in TOGETHER]
    assert [place for place in places if place.is_file()], f"none of {[str(p.relative_to(ROOT)) for p in places]}"
