"""An installed libtgate, moved elsewhere, and a project of somebody else's that finds it both ways."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.cpp.library import onnxruntime_library
from tgate_runtime.mini import place_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "runtime/cpp/examples"
ENVIRONMENT = {**os.environ, "TGATE_ONNXRUNTIME": str(onnxruntime_library())}


def call(*words: object, **more: str) -> str:
    done = subprocess.run(
        [*map(str, words)], text=True, capture_output=True, check=False, env={**ENVIRONMENT, **more}, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def prefix(cpp_build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it was moved to after it was installed."""
    folder = tmp_path_factory.mktemp("install")
    call("cmake", "--install", cpp_build, "--prefix", folder / "first", "--strip")
    (folder / "first").rename(folder / "moved")
    return folder / "moved"


@pytest.fixture(scope="module")
def examples(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples, built outside of this tree by find_package."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(EXAMPLES, folder / "source")
    call("cmake", "-S", folder / "source", "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    call("cmake", "--build", folder / "build")
    return folder / "build"


def test_what_is_installed(prefix: Path) -> None:
    (library,) = prefix.glob("lib/**/libtgate.so.0.1.0")
    files = {str(path.relative_to(prefix)) for path in prefix.rglob("*") if path.is_file() and not path.is_symlink()}
    lib = library.parent.relative_to(prefix)
    assert files == {
        "bin/tgate-run",
        "include/tgate.h",
        "include/tgate.hpp",
        f"{lib}/libtgate.so.0.1.0",
        f"{lib}/pkgconfig/tgate.pc",
        *(f"{lib}/cmake/tgate/tgate{name}.cmake" for name in ("Config", "ConfigVersion", "Targets", "Targets-release")),
    }
    needs = {line.split(".")[0].strip() for line in call("ldd", library).splitlines()}
    assert not {"libpython", "libonnxruntime", "libpng", "libtorch"} & needs


def test_an_example_in_c_plus_plus(examples: Path, prefix: Path, tmp_path: Path) -> None:
    call(examples / "draw", place_of("mini"), "a green star", 7, tmp_path / "a.ppm")
    call(
        prefix / "bin/tgate-run",
        place_of("mini"),
        "--prompt",
        "a green star",
        "--seed",
        7,
        "--output",
        tmp_path / "b.png",
    )
    head, pixels = (tmp_path / "a.ppm").read_bytes().split(b"\n", 1)
    assert head == b"P6 128 128 255"
    assert Image.open(tmp_path / "b.png").tobytes() == pixels


def test_a_server_in_c(examples: Path) -> None:
    told = call(examples / "serve", place_of("mini"), *(f"a red circle {i}" for i in range(4))).splitlines()
    assert told[-1].startswith("4 requests in ")
    calls = int(told[-1].split()[3])
    assert calls == len(told) - 1
    assert calls < 4 * 25  # as many as it takes one after the other


def cpp_blocks(page: str) -> list[str]:
    return re.findall(r"^```cpp\n(.*?)^```$", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


def test_what_the_documentation_shows(prefix: Path, tmp_path: Path) -> None:
    """The whole program of the page draws; README's lines compile."""
    (program,) = cpp_blocks("docs/embedding.md")
    (lines,) = cpp_blocks("README.md")
    (tmp_path / "page.cpp").write_text(program)
    (tmp_path / "lines.cpp").write_text(f"#include <tgate.hpp>\nvoid draw() {{\n{lines}}}\n")
    (folder,) = prefix.glob("lib/**/pkgconfig")
    flags = call("pkg-config", "--cflags", "--libs", "tgate", PKG_CONFIG_PATH=str(folder)).split()
    library = next(flag[2:] for flag in flags if flag.startswith("-L"))
    strict = ["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    call("g++", *strict, "-Wno-unused-variable", "-fsyntax-only", tmp_path / "lines.cpp", *flags)
    call("g++", *strict, tmp_path / "page.cpp", "-o", tmp_path / "page", *flags, f"-Wl,-rpath,{library}")
    assert call(tmp_path / "page", place_of("mini")) == "128 x 128\n"


def test_pkg_config(prefix: Path, tmp_path: Path) -> None:
    (folder,) = prefix.glob("lib/**/pkgconfig")
    flags = call("pkg-config", "--cflags", "--libs", "tgate", PKG_CONFIG_PATH=str(folder)).split()
    library = next(flag[2:] for flag in flags if flag.startswith("-L"))
    program = tmp_path / "serve"
    call("gcc", "-std=c11", EXAMPLES / "serve.c", "-o", program, *flags, f"-Wl,-rpath,{library}")
    assert "2 requests" in call(program, place_of("mini"), "a", "b")
