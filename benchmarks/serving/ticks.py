"""What the scheduler costs at each tick, with many requests in flight.

python -m benchmarks.serving.ticks --output benchmarks/results/serving-ticks.json
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.simulate import PLANS, programs_of
from tgate_engine.atomic import write_atomically
from tgate_serve.scheduler import Job, Room, Scheduler

IN_FLIGHT = 256
SIZES = ("1024x1024", "832x1216", "768x768")
TICKS = 4000


def cost(most: int, added: float) -> dict[str, Any]:
    """Of deciding who runs, and of noting that they did, in microseconds; as many requests come as go."""
    rng = random.Random(1)
    programs = [programs_of(settings) for _, settings in PLANS]
    rooms = {size: Room(batches=((1, most),), rows=IN_FLIGHT, added=added) for size in SIZES}
    scheduler = Scheduler(rooms, queue=IN_FLIGHT)
    times = []
    for _ in range(TICKS):
        while scheduler.running + scheduler.waiting < IN_FLIGHT:
            job = Job(size=rng.choice(SIZES), graphs=rng.choice(programs), priority=rng.choice((0, 0, 0, 3)))
            scheduler.submit([job])
        begin = time.perf_counter()
        tick = scheduler.tick()
        assert tick is not None
        scheduler.advance(tick.tickets)
        times.append(time.perf_counter() - begin)
    mean, p99 = float(np.mean(times)) * 1e6, float(np.percentile(times, 99)) * 1e6
    return {"images_in_a_call": most, "added": added, "mean_us": mean, "p99_us": p99}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [cost(most, added) for most in (4, 8, 16) for added in (0.3, 0.9, 1.0)]
    for row in rows:
        print(json.dumps(row))
    if args.output:
        settings = {"in_flight": IN_FLIGHT, "sizes": SIZES, "ticks": TICKS, "plans": len(PLANS)}
        write_atomically(args.output, json.dumps({"settings": settings, "rows": rows}, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
