"""What is aimed at on a GPU, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MOST_LOOP_MS = 2 * 270.0
"""Twice the compute limit of 25 gated steps of SDXL on an H100, at 790 TFLOP/s."""
MOST_GATED = 0.68
"""Of the ungated loop's time."""
MOST_MEMORY = 1.15
"""Of one graph's, for all of them."""
MOST_OPEN_S = 10.0
"""The second opening, which finds the engine cache filled."""
MOST_P99 = 1.1
"""Of the median step of the same graph mix."""

Found = dict[str, Any]


def aims(found: Found) -> list[Found]:
    """What was aimed at on a GPU, for SDXL: met, missed, or open where it was not measured there. All but the first
    line is about the engine whose gated loop is the fastest."""
    done: Mapping[str, Found] = found["sections"] if found["settings"]["device"] == "cuda" else {}
    there = {"sections": done}
    times = {name: ms for name in found["engines"] if (ms := ms_of(there, "sdxl", name, "gated")) is not None}
    best = min(times, key=lambda name: times[name]) if times else ""
    ungated = ms_of(there, "sdxl", best, "ungated")
    peers = done.get("sdxl/peers", {}).get("ms", {})
    ours = next((ms for name, ms in peers.items() if name.endswith(" ungated")), None)
    step = done.get(f"sdxl/{best}/loops", {}).get("plans", {}).get("ungated", {}).get("step_ms", {})
    checks = {name: done.get(f"sdxl/{name}/check", {}) for name in found["engines"]}
    # The worst error over what is allowed, of every engine that was checked; one that is not finite is missed.
    shares = [
        float("inf") if check["worst"] is None else check["worst"] / check["tolerance"]
        for check in checks.values()
        if check.get("status") == "ok"
    ]
    rows: list[tuple[str, float | None, float | None]] = [
        ("worst step's error over what is allowed, of every engine", max(shares, default=None), 1.0),
        ("25 gated steps of SDXL, ms", times.get(best), MOST_LOOP_MS),
        ("gated over ungated", times[best] / ungated if best and ungated else None, MOST_GATED),
        ("25 ungated steps of SDXL, ms, beside torch.compile's", ours, peers.get("torch.compile")),
        ("device memory of SDXL's graphs over that of one", memory_share(done, "sdxl", best), MOST_MEMORY),
        ("second opening, s", done.get(f"sdxl/{best}/open/second", {}).get("open_s"), MOST_OPEN_S),
        ("99th percentile of an ungated step over its median", _share(step.get("p99"), step.get("p50")), MOST_P99),
    ]
    return [
        {"aim": aim, "got": got, "at_most": most, "engine": best, "verdict": _verdict(got, most)}
        for aim, got, most in rows
    ]


def ms_of(found: Mapping[str, Any], model: str, engine: str, plan: str) -> float | None:
    """The median loop of a plan, where it was measured."""
    plans: Mapping[str, Found] = found["sections"].get(f"{model}/{engine}/loops", {}).get("plans", {})
    return plans.get(plan, {}).get("ms")


def memory_share(done: Mapping[str, Found], model: str, engine: str) -> float | None:
    """What all graphs hold over what one does."""
    return _share(*(done.get(f"{model}/{engine}/memory/{way}", {}).get("bytes") for way in ("all", "one")))


def text(number: float | None) -> str:
    """For a table: three digits, or a dash."""
    return "-" if number is None else f"{number:.3g}" if number < 100 else f"{number:.0f}"


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _verdict(got: float | None, most: float | None) -> str:
    return "open" if got is None or most is None else "met" if got <= most else "missed"
