"""The C ABI as careless callers meet it: no handle, wrong sizes, small buffers; and what the library shows."""

from __future__ import annotations

import ctypes
import re
import subprocess
from ctypes import byref, c_size_t
from ctypes import c_void_p as Handle
from pathlib import Path

import pytest

from tests.cpp import library as c
from tests.cpp.library import STRUCTS, Failure, Library, Session
from tests.cpp.twins import Twins
from tgate_runtime.mini import place_of

INCLUDE = Path(__file__).parents[2] / "runtime/cpp/include"
HEADER = (INCLUDE / "tgate.h").read_text()
FUNCTIONS = re.findall(r"^TGATE_API [\w *]*?\*?(tgate_\w+)\(([^;]*)\);", HEADER, re.MULTILINE)


def test_the_header_lists_functions_and_the_library_has_them_alone(cpp_build: Path) -> None:
    names = {name for name, _ in FUNCTIONS}
    assert len(names) > 40
    shown = subprocess.run(
        ["nm", "-D", "--defined-only", cpp_build / "libtgate.so"], text=True, capture_output=True, check=True
    ).stdout.split("\n")
    symbols = {line.split()[-1] for line in shown if line and " A " not in line}
    assert {symbol.split("@")[0] for symbol in symbols} == names
    assert all(symbol.endswith("@@TGATE_0.1") for symbol in symbols)


@pytest.mark.parametrize("compiler", [("gcc", "-std=c11"), ("gcc", "-std=c99"), ("g++", "-std=c++17")])
def test_the_header_is_plain_c(tmp_path: Path, compiler: tuple[str, str]) -> None:
    source = tmp_path / ("t.c" if compiler[0] == "gcc" else "t.cpp")
    source.write_text(f'#include "tgate.h{"pp" if compiler[0] == "g++" else ""}"\nint main(void) {{ return 0; }}\n')
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Werror", "-fsyntax-only", f"-I{INCLUDE}"]
    subprocess.run([*compiler, *flags, source], check=True)


def test_structs_are_laid_out_as_this_side_has_them(tmp_path: Path) -> None:
    """Or no test here means anything."""
    fields = {f"tgate_{name}": [field for field, *_ in kind._fields_] for name, kind in STRUCTS.items()}
    lines = [f'printf("%zu\\n", sizeof({name}));' for name in fields]
    lines += [f'printf("%zu\\n", offsetof({name}, {field}));' for name, own in fields.items() for field in own]
    source, program = tmp_path / "t.c", tmp_path / "t"
    source.write_text(f'#include <stdio.h>\n#include "tgate.h"\nint main(void) {{ {" ".join(lines)} return 0; }}\n')
    subprocess.run(["gcc", "-std=c11", f"-I{INCLUDE}", source, "-o", program], check=True)
    told = [*map(int, subprocess.run([program], text=True, capture_output=True, check=True).stdout.split())]
    wanted = [ctypes.sizeof(kind) for kind in STRUCTS.values()]
    wanted += [getattr(kind, field).offset for kind in STRUCTS.values() for field, *_ in kind._fields_]
    assert told == wanted


@pytest.mark.parametrize(("name", "arguments"), FUNCTIONS)
def test_no_handle_at_all(library: Library, name: str, arguments: str) -> None:
    """Every function, all of its pointers NULL and its numbers 0."""
    function = getattr(library.c, name)
    takes = [argument.strip() for argument in arguments.split(",") if argument.strip() not in ("", "void")]
    values = [None if "*" in argument or "[" in argument else c_size_t(0) for argument in takes]
    got = function(*values)
    fails = re.search(rf"TGATE_API tgate_code {name}\(", HEADER)
    if fails and name != "tgate_error_code":
        assert got == c.ARGUMENT
        if takes[-1].startswith("tgate_error **"):
            error = Handle()
            assert function(*values[:-1], byref(error)) == c.ARGUMENT
            assert b"NULL" in library.c.tgate_error_text(error) or b"batch of no" in library.c.tgate_error_text(error)
            library.c.tgate_error_free(error)


@pytest.mark.parametrize("name", STRUCTS)
def test_sizes_of_structs(library: Library, name: str) -> None:
    kind = STRUCTS[name]
    initialise = getattr(library.c, f"tgate_{name}_init")
    room = (ctypes.c_byte * (ctypes.sizeof(kind) + 64))(*([0x55] * (ctypes.sizeof(kind) + 64)))
    for size in (0, 1, ctypes.sizeof(kind) + 1, ctypes.sizeof(kind) + 8, 2**63):
        assert initialise(byref(room), c_size_t(size)) == c.ARGUMENT
        assert set(room) == {0x55}
    for size in (8, 16, ctypes.sizeof(kind)):  # a shorter one is an older caller's
        assert initialise(byref(room), c_size_t(size)) == c.OK
        assert int.from_bytes(bytes(room)[:8], "little") == size
        assert set(bytes(room)[size:]) == {0x55}


def test_structs_that_nobody_initialised(library: Library) -> None:
    path = str(place_of("mini")).encode()
    for size in (0, 7, 1000, 2**64 - 1):
        options, handle = c.BundleOptions(), Handle()
        options.size = size
        with pytest.raises(Failure, match="fill it with its init function") as failure:
            library.call("bundle_open", path, byref(options), byref(handle))
        assert failure.value.code == c.ARGUMENT
        assert handle.value is None


def test_an_older_callers_shorter_struct(library: Library) -> None:
    """It ends after the seed: everything behind is at its default."""
    twins = Twins(library, place_of("mini"), ["default"])
    options, handle = c.RequestOptions(), Handle()
    end = c.RequestOptions.prompt.offset + 8
    library.c.tgate_request_options_init(byref(options), c_size_t(end))
    options.prompt, options.seed = b"a red circle", 3
    options.negative_ids = ctypes.cast(1, ctypes.POINTER(c.Ids))  # beyond its end: not looked at
    library.call("request_create", twins.session.handle, byref(options), byref(handle))
    library.call("request_run", handle)
    library.c.tgate_request_free(handle)


def test_buffers_that_are_too_small(library: Library) -> None:
    request = Twins(library, place_of("mini"), ["default"]).request("a red circle")
    count = library.c.tgate_request_latents_count(request.handle)
    latents = (ctypes.c_float * count)()
    pixels = (ctypes.c_uint8 * (128 * 128 * 3))()
    for function, image, buffer, room, says in (
        ("request_latents", 0, latents, count - 1, f"latents are {count} numbers, got room for {count - 1}"),
        ("request_latents", 1, latents, count, "the request has 1 images, got number 1"),
        ("request_latents", 2**64 - 1, latents, count, "the request has 1 images"),
        ("request_decode", 0, pixels, 128 * 128 * 3 - 1, "a picture takes 49152 bytes, got room for 49151"),
        ("request_decode", 1, pixels, 128 * 128 * 3, "the request has 1 images, got number 1"),
    ):
        with pytest.raises(Failure, match=says) as failure:
            library.call(function, request.handle, c_size_t(image), buffer, c_size_t(room))
        assert failure.value.code == c.ARGUMENT


def test_handles_may_be_freed_in_any_order(library: Library) -> None:
    twins = Twins(library, place_of("mini"), ["default"])
    pool = twins.pool(2)
    requests = [twins.request("a red circle", pool=pool, seed=i) for i in range(2)]
    twins.bundle.close()
    twins.session.close()
    pool.close()
    for request in requests:
        request.run()
        request.decode()
        request.close()


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        ({"engine": b"tensorrt"}, c.ENGINE, "use ort-cpu or ort-cuda"),
        ({"memory": b"most"}, c.ENGINE, "one of shared, fast"),
        ({"threads": -1}, c.ENGINE, "threads must be 0"),
        ({"threads": 2**31 - 1}, c.ENGINE, "threads must be 0"),
        ({"device": 1}, c.ENGINE, "ort-cpu has no device"),
        ({"plans": ["none"]}, c.BUNDLE, "no plan 'none'"),
        ({"plans": ["/nowhere/none.json"]}, c.PLAN, "no such plan file"),
        ({"sizes": ["1x1"]}, c.BUNDLE, "no size 1x1"),
        ({"engine": b"ort-cuda"}, c.ENGINE, "ort-cuda finds no GPU"),
    ],
)
def test_what_a_session_refuses(library: Library, options: dict[str, object], code: int, says: str) -> None:
    bundle = c.Bundle(library, place_of("mini"))
    with pytest.raises(Failure, match=says) as failure:
        Session(bundle, **options)  # type: ignore[arg-type]
    assert failure.value.code == code
    assert "\n" not in str(failure.value)


def test_another_library(library: Library, tmp_path: Path) -> None:
    """One that is not there, is none, or comes beside the one in use."""
    bundle = c.Bundle(library, place_of("mini"))
    other = tmp_path / "libonnxruntime.so"
    other.write_bytes(b"none")
    with pytest.raises(Failure, match=r"cannot be loaded.*TGATE_ONNXRUNTIME"):
        Session(bundle, library=tmp_path / "nothing.so")
    with pytest.raises(Failure, match="cannot be loaded"):
        Session(bundle, library=other)
    in_use = Session(bundle)
    with pytest.raises(Failure, match="this process has loaded ONNX Runtime from"):
        Session(bundle, library=tmp_path / "nothing.so")
    assert re.fullmatch(r"ort-cpu 1\.\d+\.\d+", in_use.engine())
