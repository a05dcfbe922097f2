"""The server's own scheduler in a simulation, beside one request at a time and static batching of whole requests.

    python -m benchmarks.serving.simulate --output benchmarks/results/serving-simulated.json
    python -m benchmarks.serving.simulate --bundle mini

Requests arrive as a Poisson process, whether or not earlier ones are answered, in a mix of sizes and of plans of TGATE
with several n, m and k. A load of 1 is what one request at a time can just serve. Time is what a table says that each
call takes (:mod:`benchmarks.serving.tables`). Static batching waits for requests of one size and plan until a batch is
full, or until a time-out: of several the one with which its own p99 is best, 0 among them, which waits for nobody.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.tables import FIXED_MS, Table, measured, sdxl_h100
from tgate_engine.atomic import write_atomically
from tgate_export.methods.base import Settings, ungated
from tgate_export.methods.tgate import Tgate
from tgate_runtime.session import Session
from tgate_serve.scheduler import Job, Room, Scheduler

PLANS = (
    (0.4, Settings(steps=25, gate=10, self_interval=5)),
    (0.2, Settings(steps=30, gate=12, self_interval=3)),
    (0.2, Settings(steps=20, gate=8, self_interval=2)),
    (0.1, Settings(steps=50, gate=20, self_interval=5)),
    (0.1, None),
)
"""Shares of the requests, and what each asks for; None is 25 steps ungated."""
TIMEOUTS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""How long static batching may wait for company, in mean times of one request alone."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request for one image, at a time in ms."""

    at_ms: float
    size: str
    graphs: tuple[str, ...]


def arrivals(table: Table, *, load: float, count: int, seed: int) -> list[Arrival]:
    """``count`` requests at a load. The same seed gives the same requests at every load, nearer together or further."""
    rng = np.random.default_rng(seed)
    programs = [programs_of(settings) for _, settings in PLANS]
    sizes = list(table.sizes)
    gaps = rng.exponential(size=count)
    which = rng.choice(len(PLANS), size=count, p=[share for share, _ in PLANS])
    where = rng.choice(len(sizes), size=count, p=list(table.sizes.values()))
    times = np.cumsum(gaps) * mean_ms(table) / load
    return [
        Arrival(at_ms=float(t), size=sizes[s], graphs=programs[p]) for t, p, s in zip(times, which, where, strict=True)
    ]


def programs_of(settings: Settings | None) -> tuple[str, ...]:
    """The graphs that a plan of those settings runs."""
    program = ungated(25) if settings is None else Tgate().program(settings)
    return tuple(call.graph for call in program)


def mean_ms(table: Table) -> float:
    """Of one request of the mix, alone."""
    return sum(
        share * at * alone_ms(table, size, programs_of(settings))
        for share, settings in PLANS
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


def static(table: Table, requests: Sequence[Arrival], *, timeout_ms: float) -> list[float]:
    """Requests of one size and plan wait until a batch is full, or the first of them for ``timeout_ms``, and run to the
    end together. Of several batches that may run, the one whose first request is oldest."""
    queues: dict[tuple[str, tuple[str, ...]], list[int]] = {}
    ends, now, came, left = [0.0] * len(requests), 0.0, 0, len(requests)
    while left:
        while came < len(requests) and requests[came].at_ms <= now:
            queues.setdefault((requests[came].size, requests[came].graphs), []).append(came)
            came += 1
        ready = [
            (queue[0], kind)
            for kind, queue in queues.items()
            if queue and (len(queue) >= table.most or requests[queue[0]].at_ms + timeout_ms <= now)
        ]
        if not ready:
            due = [requests[queue[0]].at_ms + timeout_ms for queue in queues.values() if queue]
            now = min([*due, *(each.at_ms for each in requests[came : came + 1])])
            continue
        _, (size, graphs) = min(ready)
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


def figures(requests: Sequence[Sequence[Arrival]], ends: Sequence[Sequence[float]]) -> dict[str, float]:
    """Percentiles of the seconds to an answer, the means of several runs; and answers per second, from the tenth
    percent of all answers to the ninetieth."""
    each = []
    for arrived, ended in zip(requests, ends, strict=True):
        seconds = (np.array(ended) - [request.at_ms for request in arrived]) / 1e3
        ordered = np.sort(ended)
        first, last = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.9))
        rate = 0.8 * len(ordered) / (last - first) * 1e3
        each.append([*np.percentile(seconds, (50, 95, 99)), rate])
    p50, p95, p99, rate = np.mean(each, axis=0)
    return {"p50_s": float(p50), "p95_s": float(p95), "p99_s": float(p99), "per_s": float(rate)}


def compare(
    table: Table, *, loads: Sequence[float], count: int, seeds: Sequence[int], rows: int, patience: int
) -> list[dict[str, Any]]:
    """One row for each load: what each policy makes of the same arrivals."""
    compared = []
    for load in loads:
        runs = [arrivals(table, load=load, count=count, seed=seed) for seed in seeds]
        fill: list[int] = []
        rivals = [
            {
                "timeout_ms": share * mean_ms(table),
                **figures(runs, [static(table, run, timeout_ms=share * mean_ms(table)) for run in runs]),
            }
            for share in TIMEOUTS
        ]
        scheduler = [scheduled(table, run, rows=rows, patience=patience, sizes=fill) for run in runs]
        compared.append(
            {
                "load": load,
                "one_at_a_time": figures(runs, [one_at_a_time(table, run) for run in runs]),
                "static": min(rivals, key=lambda rival: rival["p99_s"]),
                "static_most_per_s": max(rival["per_s"] for rival in rivals),
                "static_half_a_request": rivals[1],
                "scheduler": {**figures(runs, scheduler), "images_per_call": float(np.mean(fill))},
            }
        )
        print(line(compared[-1]), flush=True)
    return compared


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    told = []
    for name in ("one_at_a_time", "static", "static_half_a_request", "scheduler"):
        each = row[name]
        told.append(f"{name} {each['p50_s']:.2f}/{each['p95_s']:.2f}/{each['p99_s']:.2f} s, {each['per_s']:.3f}/s")
    return f"load {row['load']}: " + "; ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="measure the calls of this bundle, in place of SDXL's computed ones")
    parser.add_argument("--loads", default="0.3,0.5,0.7,0.9,1.0,1.5")
    parser.add_argument("--count", type=int, default=8000, help="requests of each run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--most", type=int, default=4, help="images in a call")
    parser.add_argument("--fixed-ms", type=float, default=FIXED_MS)
    parser.add_argument("--rows", type=int, help="images of each size in flight; four times --most where not given")
    parser.add_argument("--patience", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.bundle:
        with Session.open(args.bundle, threads=1) as session:
            table = measured(session)
    else:
        table = sdxl_h100(args.most, args.fixed_ms)
    settings = {
        "table": table.name,
        "origin": table.origin,
        "ms": {" ".join(map(str, key)): ms for key, ms in table.ms.items()},
        "sizes": dict(table.sizes),
        "most": table.most,
        "mix": [{"share": share, "plan": str(asked) if asked else "25 steps ungated"} for share, asked in PLANS],
        "alone_ms": mean_ms(table),
        "count": args.count,
        "seeds": list(range(1, args.runs + 1)),
        "rows": args.rows or 4 * table.most,
        "patience": args.patience,
    }
    rows = compare(
        table,
        loads=[float(load) for load in args.loads.split(",")],
        count=args.count,
        seeds=settings["seeds"],
        rows=settings["rows"],
        patience=args.patience,
    )
    if args.output:
        write_atomically(args.output, json.dumps({"settings": settings, "rows": rows}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
