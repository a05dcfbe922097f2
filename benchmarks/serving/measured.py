"""The server's worker as it really runs, beside one request at a time and static batching of whole requests.

    python -m benchmarks.serving.measured BUNDLE… --output benchmarks/results/serving-measured.json

An open loop: requests arrive as a Poisson process, whether or not earlier ones are answered, for plans of several n, m
and k, and each policy gets the same ones, in turns, in one process, on one engine. A load of 1 is what one request at a
time can just serve; the last one has everybody arrive at once, which shows the throughput. Answered is a request whose
final latents are there: encoding prompts and decoding pictures cost each policy the same.

Static batching takes as many of the oldest requests of one plan as a call has room for, and runs them to the end. It
waits for company as long as it may, of the time-outs in :data:`TIMEOUTS` the one with which its own 99th percentile is
best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.loops import request
from tgate_engine.atomic import write_atomically
from tgate_engine.plan import Plan
from tgate_engine.plan_build import build_plan
from tgate_export.methods.base import Settings
from tgate_export.methods.tgate import Tgate
from tgate_runtime.generators import noise
from tgate_runtime.runner import advance
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_serve.handle import Handle
from tgate_serve.worker import Request, Worker

PLANS = (
    (0.5, Settings(steps=12, gate=6, self_interval=3)),
    (0.3, Settings(steps=16, gate=8, self_interval=2)),
    (0.2, Settings(steps=8, gate=4, self_interval=2)),
)
"""Shares of the requests, and what each asks for."""
TIMEOUTS = (0.0, 0.5)
"""How long static batching may wait for company, in mean times of one request alone."""
WARM_UP = 40
"""Requests before the first that counts: a worker learns what company costs, and calls are bound when first made."""
SATURATED = "all at once"


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request for one image, so many seconds after the start."""

    at_s: float
    plan: Plan
    seed: int


class Bench:
    """A session, its plans, and what one image of them takes alone."""

    def __init__(self, session: Session, rows: int, patience: int) -> None:
        self.session = session
        self.plans = [program(session, f"plan-{i}", asked) for i, (_, asked) in enumerate(PLANS)]
        self.shares = [share for share, _ in PLANS]
        self.most = max(shape.batch[1] for shape in session.shapes())
        self._start, rows_of = request(session.manifest, 1)
        self._rows: dict[str, Any] = {name: values[0] for name, values in rows_of.items()}
        self.shape = session.shapes()[0].latents
        self.state = State(session, self.plans, self.most)
        self.alone_s = [self._alone(plan) for plan in self.plans]
        self.mean_s = float(np.dot(self.alone_s, self.shares))
        self._worker = Worker(session, plans=self.plans, rows=rows, queue=10_000, patience=patience)
        self.worker(self.arrivals(0.9, WARM_UP, 0))
        self.static(self.arrivals(None, WARM_UP, 0), most=self.most, timeout_s=0.0)

    def _alone(self, plan: Plan) -> float:
        times = []
        for _ in range(6):
            begin = time.perf_counter()
            self._together([Arrival(at_s=0.0, plan=plan, seed=0)])
            times.append(time.perf_counter() - begin)
        return float(np.median(times[1:]))

    def arrivals(self, load: float | None, count: int, seed: int) -> list[Arrival]:
        """``count`` requests at a load; None is all at once. The same seed gives the same ones at every load."""
        rng = np.random.default_rng(seed)
        gaps, which = rng.exponential(size=count), rng.choice(len(self.plans), size=count, p=self.shares)
        times = np.zeros(count) if load is None else np.cumsum(gaps) * self.mean_s / load
        return [
            Arrival(at_s=float(t), plan=self.plans[p], seed=i)
            for i, (t, p) in enumerate(zip(times, which, strict=True))
        ]

    def _together(self, batch: Sequence[Arrival]) -> None:
        """A batch from its first step to its last."""
        for row, each in enumerate(batch):
            start = noise(each.seed, self.shape)
            self.state.begin(row, start, self._rows, guidance_scale=each.plan.guidance_scale, plan=each.plan)
        for _ in batch[0].plan.steps:
            advance(self.state, range(len(batch)))

    # --- the policies: when each request was answered, in seconds after the start -------------------

    def static(self, arrived: Sequence[Arrival], *, most: int, timeout_s: float) -> list[float]:
        """Batches of at most so many; 1 is one request at a time."""
        ends, begin, came = [0.0] * len(arrived), time.perf_counter(), 0
        queues: dict[str, list[int]] = {plan.name: [] for plan in self.plans}
        left = len(arrived)
        while left:
            now = time.perf_counter() - begin
            while came < len(arrived) and arrived[came].at_s <= now:
                queues[arrived[came].plan.name].append(came)
                came += 1
            ready = [
                (queue[0], name)
                for name, queue in queues.items()
                if queue and (len(queue) >= most or arrived[queue[0]].at_s + timeout_s <= now)
            ]
            if not ready:
                due = [arrived[queue[0]].at_s + timeout_s for queue in queues.values() if queue]
                time.sleep(max(0.0, min([*due, *(each.at_s for each in arrived[came : came + 1])]) - now))
                continue
            name = min(ready)[1]
            batch, queues[name] = queues[name][:most], queues[name][most:]
            self._together([arrived[index] for index in batch])
            for index in batch:
                ends[index] = time.perf_counter() - begin
            left -= len(batch)
        return ends

    def worker(self, arrived: Sequence[Arrival]) -> list[float]:
        """The server's worker: one for all runs, as a server has one for all its life."""
        conditioning = {name: values[np.newaxis] for name, values in self._rows.items()}
        asked: list[tuple[float, Handle]] = []
        begin = time.perf_counter()
        for each in arrived:
            time.sleep(max(0.0, each.at_s - (time.perf_counter() - begin)))
            wish = Request(conditioning=conditioning, seeds=[each.seed], plan=each.plan)
            asked.append((time.perf_counter() - begin, self._worker.submit(wish)))
        drawn = [(at_s, handle.result()) for at_s, handle in asked]
        return [at_s + each.waited_s + each.drawn_s for at_s, each in drawn]

    def counted(self) -> Counter[str]:
        """Calls of the worker so far, the steps of images in them, and the moves before them."""
        counts = self._worker.counts
        calls = Counter(calls=sum(counts.calls.values()), moves=counts.moves, moved_bytes=counts.moved_bytes)
        calls["steps"] = sum(images * number for (_, _, images), number in counts.calls.items())
        return calls

    def added(self) -> float:
        """What the worker has learned that an image adds to a call."""
        return next(iter(self._worker.added().values()))

    def close(self) -> None:
        """End the worker."""
        self._worker.close()


def program(session: Session, name: str, asked: Settings) -> Plan:
    """A plan over the first calls of the bundle's own sampler: what they draw is nothing, and takes as long."""
    calls, own = Tgate().program(asked), session.plan("default")
    return build_plan(
        name,
        calls,
        sampler=replace(own.sampler, steps=len(calls), calls=own.sampler.calls[: len(calls)]),
        guidance_scale=own.guidance_scale,
        graphs=session.shapes()[0].graphs,
        carries=session.manifest.carries,
        settings={},
    )


def figures(arrived: Sequence[Arrival], ends: Sequence[float]) -> dict[str, float]:
    """Percentiles of the seconds to an answer, and answers per second, from the tenth percent of all to the
    ninetieth."""
    seconds = np.array(ends) - [each.at_s for each in arrived]
    ordered = np.sort(ends)
    first, last = (ordered[int(share * (len(ordered) - 1))] for share in (0.1, 0.9))
    p50, p95, p99 = (float(each) for each in np.percentile(seconds, (50, 95, 99)))
    return {"p50_s": p50, "p95_s": p95, "p99_s": p99, "per_s": float(0.8 * len(ordered) / (last - first))}


def compare(bench: Bench, *, loads: Sequence[float | None], count: int, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each load. The policies take turns, seed by seed, and begin with another one each time."""
    rows = []
    for load in loads:
        runs: dict[str, list[dict[str, float]]] = {}
        before = bench.counted()
        for seed in seeds:
            arrived = bench.arrivals(load, count, seed)
            named = {
                "one_at_a_time": partial(bench.static, arrived, most=1, timeout_s=0.0),
                **{
                    f"static {share}": partial(bench.static, arrived, most=bench.most, timeout_s=share * bench.mean_s)
                    for share in TIMEOUTS
                },
            }
            named["scheduler"] = partial(bench.worker, arrived)
            turn = seed % len(named)
            for name in [*named][turn:] + [*named][:turn]:
                runs.setdefault(name, []).append(figures(arrived, named[name]()))
        mean = {name: {key: float(np.mean([each[key] for each in of])) for key in of[0]} for name, of in runs.items()}
        best = min((name for name in mean if name.startswith("static")), key=lambda name: mean[name]["p99_s"])
        counted = bench.counted() - before
        row: dict[str, Any] = {
            "load": load or SATURATED,
            "one_at_a_time": mean["one_at_a_time"],
            "static": {"timeout": float(best.split()[1]), **mean[best]},
            "static_most_per_s": max(each["per_s"] for name, each in mean.items() if name.startswith("static")),
            "scheduler": {
                **mean["scheduler"],
                "images_per_call": counted["steps"] / counted["calls"],
                "moves_per_step": counted["moves"] / counted["steps"],
                "moved_bytes_per_step": counted["moved_bytes"] / counted["steps"],
                "added": bench.added(),
            },
            "runs": runs,
        }
        rows.append(row)
        told = [
            f"{name} {row[name]['p50_s']:.2f}/{row[name]['p95_s']:.2f}/{row[name]['p99_s']:.2f} s, "
            f"{row[name]['per_s']:.2f}/s"
            for name in ("one_at_a_time", "static", "scheduler")
        ]
        print(f"load {row['load']}: {'; '.join(told)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE")
    parser.add_argument("--loads", default="0.5,0.7,0.9,inf", help="inf is all at once")
    parser.add_argument("--count", type=int, default=150, help="requests of each run")
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8, help="images in flight")
    parser.add_argument("--patience", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    loads = [None if load == "inf" else float(load) for load in args.loads.split(",")]
    seeds = list(range(1, args.runs + 1))
    results = []
    for bundle in args.bundles:
        with Session.open(bundle, threads=args.threads) as session:
            bench = Bench(session, args.rows, args.patience)
            print(f"{session.manifest.model}: a request alone takes {bench.mean_s:.3f} s", flush=True)
            settings = {
                "model": session.manifest.model,
                "engine": f"{session.engine.name} {session.engine.version}",
                "threads": args.threads,
                "cores": os.cpu_count(),
                "machine": platform.machine(),
                "load_average_before": os.getloadavg()[0],
                "mix": [
                    {"share": share, "plan": str(asked), "alone_s": alone}
                    for (share, asked), alone in zip(PLANS, bench.alone_s, strict=True)
                ],
                "most": bench.most,
                "rows": args.rows,
                "patience": args.patience,
                "count": args.count,
                "seeds": seeds,
            }
            rows = compare(bench, loads=loads, count=args.count, seeds=seeds)
            bench.close()
            results.append({"settings": settings, "rows": rows})
            if args.output:
                write_atomically(args.output, json.dumps(results, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
