"""A denoising loop as a trace that Perfetto and chrome://tracing show: where the engine works, and where it waits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tgate_engine.atomic import write_atomically
from tgate_runtime.runner import StepDone

_ENGINE, _HOST = 1, 2


def write_trace(path: Path, title: str, begin_s: float, end_s: float, steps: Sequence[StepDone]) -> None:
    """Write a loop that lasted from ``begin_s`` to ``end_s`` of :func:`time.perf_counter` in Chrome's JSON format.

    One row holds the engine's calls, named after their graphs, with step, phase and carries; the other holds what
    the host did in between. Times are in microseconds from the loop's beginning. Raises :class:`OSError`.
    """
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": title}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": _ENGINE, "args": {"name": "engine"}},
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": _HOST, "args": {"name": "host"}},
    ]

    def span(name: str, row: int, begin: float, end: float, **notes: Any) -> None:
        times = {"ts": round((begin - begin_s) * 1e6, 3), "dur": round((end - begin) * 1e6, 3)}
        events.append({"ph": "X", "name": name, "pid": 1, "tid": row, **times, "args": notes})

    free_s = begin_s
    for done in steps:
        end = done.begin_s + done.elapsed_ms / 1e3
        span("before the step", _HOST, free_s, done.begin_s, step=done.index)
        notes = {"phase": done.step.phase, "reads": list(done.step.reads), "writes": list(done.step.writes)}
        span(done.step.graph, _ENGINE, done.begin_s, end, step=done.index, **notes)
        free_s = end
    span("after the last step", _HOST, free_s, end_s)
    write_atomically(path, (json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n").encode())
