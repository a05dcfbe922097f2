"""The server's own scheduler in a simulation, beside one request at a time and static batching of whole requests.

    python -m benchmarks.serving.simulate --output benchmarks/results/serving-simulated.json
    python -m benchmarks.serving.simulate --bundle mini

Requests arrive as a Poisson process, whether or not earlier ones are answered, in a mix of sizes and of plans of TGATE
with several n, m and k. A load of 1 is what one request at a time can just serve. Time is what a table says that each
call takes (:mod:`benchmarks.serving.tables`). Static batching waits for requests of one size and plan until a batch is
full, or until a time-out: of several the one with which its own p99 is best, 0 among them, which waits for nobody. Its
batches go by age; that the fullest go first, so that a rare kind waits for as long as there are full ones, is shown
beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.tables import FIXED_MS, Table, adding, measured, one_size, sdxl_h100
from tgate_engine.atomic import write_atomically
from tgate_export.methods.base import Settings, ungated
from tgate_export.methods.tgate import Tgate
from tgate_runtime.session import Session
from tgate_serve.scheduler import Job, Room, Scheduler

Mix = Sequence[tuple[float, Settings | None]]
"""Shares of the requests, and what each asks for; None is 25 steps ungated."""
PLANS: Mix = (
    (0.4, Settings(steps=25, gate=10, self_interval=5)),
    (0.2, Settings(steps=30, gate=12, self_interval=3)),
    (0.2, Settings(steps=20, gate=8, self_interval=2)),
    (0.1, Settings(steps=50, gate=20, self_interval=5)),
    (0.1, None),
)
ONE_PLAN: Mix = ((1.0, Settings(steps=25, gate=10, self_interval=5)),)
CASES = ("sdxl", "added 1.0", "added 0.5", "added 0.3", "one plan and size", "one plan and size, added 0.4")
"""SDXL's table, or that with another share that each further image adds to a call; the mix, or all requests alike."""
TIMEOUTS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""How long static batching may wait for company, in mean times of one request alone."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request for one image, at a time in ms."""

    at_ms: float
    size: str
    graphs: tuple[str, ...]


def arrivals(table: Table, *, load: float, count: int, seed: int, mix: Mix = PLANS) -> list[Arrival]:
    """``count`` requests at a load. The same seed gives the same requests at every load, nearer together or further."""
    rng = np.random.default_rng(seed)
    programs = [programs_of(settings) for _, settings in mix]
    sizes = list(table.sizes)
    gaps = rng.exponential(size=count)
    which = rng.choice(len(mix), size=count, p=[share for share, _ in mix])
    where = rng.choice(len(sizes), size=count, p=list(table.sizes.values()))
    times = np.cumsum(gaps) * mean_ms(table, mix) / load
    return [
        Arrival(at_ms=float(t), size=sizes[s], graphs=programs[p]) for t, p, s in zip(times, which, where, strict=True)
    ]


def programs_of(settings: Settings | None) -> tuple[str, ...]:
    """The graphs that a plan of those settings runs."""
    program = ungated(25) if settings is None else Tgate().program(settings)
    return tuple(call.graph for call in program)


def mean_ms(table: Table, mix: Mix = PLANS) -> float:
    """Of one request of the mix, alone."""
    return sum(
        share * at * alone_ms(table, size, programs_of(settings))
        for share, settings in mix
        for size, at in table.sizes.items()
    )


def alone_ms(table: Table, size: str, graphs: Sequence[str], images: int = 1) -> float:
    """Of a whole trajectory, of so many images together."""
    return sum(table.ms[size, graph, images] for graph in graphs)


def added(table: Table, size: str) -> float:
    """What a second image adds to a call for one, as a share of it: the mean of the graphs."""
    graphs = {graph for of, graph, _ in table.ms if of == size}
    return float(np.mean([table.ms[size, graph, 2] / table.ms[size, graph, 1] - 1 for graph in graphs]))


# --- the policies: when each request is answered, in ms -----------------------------------------


def one_at_a_time(table: Table, requests: Sequence[Arrival]) -> list[float]:
    """First come, first served."""
    now, ends = 0.0, []
    for each in requests:
        now = max(now, each.at_ms) + alone_ms(table, each.size, each.graphs)
        ends.append(now)
    return ends


def static(table: Table, requests: Sequence[Arrival], *, timeout_ms: float, fullest_first: bool = False) -> list[float]:
    """Requests of one size and plan wait until a batch is full, or the first of them for ``timeout_ms``, and run to the
    end together. Of several batches that may run, the one whose first request is oldest; or, of the fullest, that."""
    queues: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    ends, now, came, left = [0.0] * len(requests), 0.0, 0, len(requests)
    while left:
        while came < len(requests) and requests[came].at_ms <= now:
            queues.setdefault((requests[came].size, requests[came].graphs), []).append(came)
            came += 1
        ready = [
            (-min(len(queue), table.most) if fullest_first else 0, queue[0], kind)
            for kind, queue in queues.items()
            if queue and (len(queue) >= table.most or requests[queue[0]].at_ms + timeout_ms <= now)
        ]
        if not ready:
            due = [requests[queue[0]].at_ms + timeout_ms for queue in queues.values() if queue]
            now = min([*due, *(each.at_ms for each in requests[came : came + 1])])
            continue
        _, _, (size, graphs) = min(ready)
        batch, queues[size, graphs] = queues[size, graphs][: table.most], queues[size, graphs][table.most :]
        now += alone_ms(table, size, graphs, len(batch))
        for index in batch:
            ends[index] = now
        left -= len(batch)
    return ends


def scheduled(
    table: Table, requests: Sequence[Arrival], *, rows: int, patience: int, sizes: list[int] | None = None
) -> list[float]:
    """The server's scheduler. ``sizes`` is given the images of each call."""
    rooms = {
        size: Room(batches=((1, table.most),), rows=rows, added=added(table, size) if table.most > 1 else 1.0)
        for size in table.sizes
    }
    scheduler = Scheduler(rooms, queue=len(requests), patience=patience)
    ends, now, came = [0.0] * len(requests), 0.0, 0
    while True:
        while came < len(requests) and requests[came].at_ms <= now:
            scheduler.submit([Job(size=requests[came].size, graphs=requests[came].graphs)])
            came += 1
        tick = scheduler.tick()
        if tick is None:
            if came == len(requests):
                return ends
            now = requests[came].at_ms
            continue
        now += table.ms[tick.size, tick.graph, len(tick.tickets)]
        if sizes is not None:
            sizes.append(len(tick.tickets))
        for ticket in scheduler.advance(tick.tickets):  # tickets count from 0, as requests do
            ends[ticket] = now


# --- figures ------------------------------------------------------------------------------------


def figures(requests: Sequence[Sequence[Arrival]], ends: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Percentiles of the seconds to an answer, the means of several runs, and the last of each run; and answers per
    second, from the tenth percent of all answers to the ninetieth."""
    each = []
    for arrived, ended in zip(requests, ends, strict=True):
        seconds = (np.array(ended) - [request.at_ms for request in arrived]) / 1e3
        ordered = np.sort(ended)
        first, last = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.9))
        rate = 0.8 * len(ordered) / (last - first) * 1e3
        each.append([*np.percentile(seconds, (50, 95, 99)), rate])
    p50, p95, p99, rate = np.mean(each, axis=0)
    runs = [float(run[2]) for run in each]
    return {"p50_s": float(p50), "p95_s": float(p95), "p99_s": float(p99), "per_s": float(rate), "p99_s_of_runs": runs}


def compare(
    table: Table,
    *,
    loads: Sequence[float],
    count: int,
    seeds: Sequence[int],
    rows: int,
    patience: int,
    mix: Mix = PLANS,
    jobs: int = 1,
) -> list[dict[str, Any]]:
    """One row for each load: what each policy makes of the same arrivals. ``jobs``: loads at once."""
    at = partial(compared, table, count=count, seeds=seeds, rows=rows, patience=patience, mix=mix)
    made = []
    with ProcessPoolExecutor(jobs) as pool:
        for row in pool.map(at, loads) if jobs > 1 else map(at, loads):
            print(line(row), flush=True)
            made.append(row)
    return made


def compared(
    table: Table, load: float, *, count: int, seeds: Sequence[int], rows: int, patience: int, mix: Mix
) -> dict[str, Any]:
    """A row of :func:`compare`."""
    runs = [arrivals(table, load=load, count=count, seed=seed, mix=mix) for seed in seeds]
    by_age, by_fill = (
        [
            {
                "timeout_ms": ms,
                **figures(runs, [static(table, run, timeout_ms=ms, fullest_first=fullest) for run in runs]),
            }
            for ms in (share * mean_ms(table, mix) for share in TIMEOUTS)
        ]
        for fullest in (False, True)
    )
    best, fullest_first = (min(rivals, key=lambda rival: rival["p99_s"]) for rivals in (by_age, by_fill))
    fill: list[int] = []
    scheduler = figures(runs, [scheduled(table, run, rows=rows, patience=patience, sizes=fill) for run in runs])
    above = [ours > theirs for ours, theirs in zip(scheduler["p99_s_of_runs"], best["p99_s_of_runs"], strict=True)]
    return {
        "load": load,
        "one_at_a_time": figures(runs, [one_at_a_time(table, run) for run in runs]),
        "static": best,
        "static_most_per_s": max(rival["per_s"] for rival in by_age),
        "static_half_a_request": by_age[1],
        "static_fullest_first": fullest_first,
        "scheduler": {**scheduler, "images_per_call": float(np.mean(fill)), "runs_above_static": sum(above)},
    }


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    told = []
    for name in ("one_at_a_time", "static", "static_half_a_request", "scheduler"):
        each = row[name]
        told.append(f"{name} {each['p50_s']:.2f}/{each['p95_s']:.2f}/{each['p99_s']:.2f} s, {each['per_s']:.3f}/s")
    return f"load {row['load']}: " + "; ".join(told)


def case(name: str, most: int, fixed_ms: float) -> tuple[Table, Mix]:
    """One of :data:`CASES`."""
    table = sdxl_h100(most, fixed_ms)
    if "added" in name:
        table = adding(table, float(name.split()[-1]))
    return (one_size(table), ONE_PLAN) if "one plan" in name else (table, PLANS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="measure the calls of this bundle, in place of SDXL's computed ones")
    parser.add_argument("--case", action="append", choices=CASES, help="all of them where none is given")
    parser.add_argument("--loads", default="0.3,0.5,0.7,0.8,0.9,1.0,1.1,1.2,1.5")
    parser.add_argument("--count", type=int, default=6000, help="requests of each run")
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--most", type=int, default=4, help="images in a call")
    parser.add_argument("--fixed-ms", type=float, default=FIXED_MS)
    parser.add_argument("--rows", type=int, help="images of each size in flight; twice --most where not given")
    parser.add_argument("--patience", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="loads at once")
    parser.add_argument("--output", type=Path, help="a file that keeps its other cases")
    args = parser.parse_args()
    if args.bundle:
        with Session.open(args.bundle, threads=1) as session:
            cases = {"bundle": (measured(session), PLANS)}
    else:
        cases = {name: case(name, args.most, args.fixed_ms) for name in args.case or CASES}
    for name, (table, mix) in cases.items():
        print(name, flush=True)
        settings = {
            "table": table.name,
            "origin": table.origin,
            "ms": {" ".join(map(str, key)): ms for key, ms in table.ms.items()},
            "sizes": dict(table.sizes),
            "most": table.most,
            "mix": [{"share": share, "plan": str(asked) if asked else "25 steps ungated"} for share, asked in mix],
            "alone_ms": mean_ms(table, mix),
            "count": args.count,
            "seeds": list(range(1, args.runs + 1)),
            "rows": args.rows or 2 * table.most,
            "patience": args.patience,
        }
        rows = compare(
            table,
            loads=[float(load) for load in args.loads.split(",")],
            count=args.count,
            seeds=settings["seeds"],
            rows=settings["rows"],
            patience=args.patience,
            mix=mix,
            jobs=args.jobs,
        )
        if args.output:
            saved = json.loads(args.output.read_text("utf-8"))["cases"] if args.output.exists() else {}
            saved[name] = {"settings": settings, "rows": rows}
            write_atomically(args.output, json.dumps({"cases": saved}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
