"""docs/gpu.md: what was measured on a GPU, and nothing else."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from benchmarks.gpu.aims import aims
from benchmarks.gpu.pack import keep
from benchmarks.gpu.report import PAGE, page, whole


def results(**changes: Any) -> dict[str, Any]:
    """As ``benchmarks.gpu.run`` saves them; the numbers are made up."""

    def loops(gated: float, ungated: float) -> dict[str, Any]:
        step = {"p50": 20.0, "p99": 21.0}
        plans = {
            name: {"ms": ms, "step_ms": step}
            for name, ms in (("gated", gated), ("guidance_stopped", 600.0), ("ungated", ungated))
        }
        return {"status": "ok", "plans": plans, "graphs": {"full": {"ms": 66.0, "tflop_per_s": 210.0}}}

    def check(worst: float | None) -> dict[str, Any]:
        return {"status": "ok", "worst": worst, "tolerance": 3e-2}

    return {
        "settings": {"device": "cuda", "gpu": "GPU X", "repeats": 5, "warm_ups": 1, "packages": {"torch": "9.9"}},
        "engines": {"ort-cuda": {"says": "ready"}, "aoti": {"says": "ready"}, "tensorrt": {"says": "not installed"}},
        "sections": {
            "sdxl/ort-cuda/check": check(1.5e-2),
            "sdxl/ort-cuda/loops": loops(500.0, 800.0),
            "sdxl/ort-cuda/open/first": {"status": "ok", "open_s": 60.0},
            "sdxl/ort-cuda/open/second": {"status": "ok", "open_s": 12.0},
            "sdxl/aoti/check": check(1e-3),
            "sdxl/aoti/loops": loops(700.0, 900.0),
            "sdxl/aoti/memory/one": {"status": "failed", "error": "out of memory"},
            "sdxl/peers": {"status": "ok", "ms": {"ort-cuda gated": 510.0, "ort-cuda ungated": 810.0, "tgate": 1020.0}},
            **changes,
        },
    }


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {aim["aim"].split(",")[0]: aim["verdict"] for aim in aims(found)}


def test_every_bar_is_judged() -> None:
    said = verdicts(results())
    assert said == {
        "worst step's error over what is allowed": "met",
        "25 gated steps of SDXL": "met",
        "gated over ungated": "met",  # 0.625
        "25 ungated steps of SDXL": "open",  # torch.compile was not there
        "device memory of SDXL's graphs over that of one": "open",
        "second opening": "missed",
        "99th percentile of an ungated step over its median": "met",
    }


@pytest.mark.parametrize("worst", [4e-2, None])
def test_one_engine_that_computes_something_else_is_a_missed_bar(worst: float | None) -> None:
    """Whichever is fastest; None is a step that is not finite."""
    check = {"status": "ok", "worst": worst, "tolerance": 3e-2}
    assert verdicts(results(**{"sdxl/aoti/check": check}))["worst step's error over what is allowed"] == "missed"


def test_the_page_shows_what_was_measured() -> None:
    told = page([("../benchmarks/results/gpu-x.json", results())])
    assert "Not measured" not in told
    for row in (
        "| 25 gated steps of SDXL, ms | 540 | 500 | met |",
        "| second opening, s | 10 | 12 | missed |",
        "| ort-cuda | 500 | 600 | 800 | 1.6 | 20 | 21 | 0.015 |",
        "| ort-cuda | full | 66 | 210 | 33 | 2 |",
        "| tgate | 1020 | 2 |",
        "- sdxl/aoti/memory/one: out of memory",
        "- tensorrt: not installed",
    ):
        assert row in told.splitlines(), row


def test_repeats_are_those_that_were_taken() -> None:
    """The settings are those of the run that ended the file."""
    found = results()
    assert "; 5 repeats after 1 to warm up." in page([("x", found)])
    found["sections"]["sdxl/ort-cuda/loops"]["plans"]["gated"]["runs_ms"] = [1.0] * 4
    found["sections"]["sdxl/peers"]["runs_ms"] = {"tgate": [1.0] * 3}
    assert "; 3 to 4 repeats after 1 to warm up." in page([("x", found)])


def test_results_of_a_cpu_are_no_results_of_a_gpu() -> None:
    found = results()
    found["settings"]["device"] = "cpu"
    assert "**Not measured.**" in page([("x", found)])
    assert "GPU X" not in page([("x", found)])
    assert set(verdicts(found).values()) == {"open"}


def test_the_page_is_what_the_results_say() -> None:
    assert PAGE.read_text("utf-8") == whole()


def test_packing_keeps_the_machine_code_of_one_architecture() -> None:
    """Two regions of kernels, with something else between them."""

    def kernel(kind: int, architecture: int, payload: bytes) -> bytes:
        header = struct.pack("<HHIQ", kind, 1, 64, len(payload)) + bytes(12) + struct.pack("<I", architecture)
        return header.ljust(64, b"h") + payload

    def region(*kernels: bytes) -> bytes:
        body = b"".join(kernels)
        return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body

    ptx, old, own = kernel(1, 90, b"P" * 24), kernel(2, 80, b"O" * 16), kernel(2, 90, b"K" * 32)
    data = bytearray(b"before--" + region(ptx, old, own) + bytes(8) + region(own, old) + b"after---" * 3)
    assert keep(data, 8, len(data) - 24, architecture=90) == 64
    assert bytes(data) == (
        b"before--"
        + region(ptx[:64] + bytes(24), old[:64] + bytes(16), own)
        + bytes(8)
        + region(own, old[:64] + bytes(16))
        + b"after---" * 3
    )
