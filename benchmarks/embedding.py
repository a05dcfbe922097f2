"""What libtgate saves a host over the Python runtime, on the same engine and one thread: time outside the engine in a
step, a cold process to its first picture (digests checked), and resident memory.

    make cpp-test && python -m benchmarks.embedding --output benchmarks/results/embedding.json

Both are run in turns, each in processes of its own. On a quiet machine: its load is saved with the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from benchmarks.frugality import machine, watched
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.conditioning import half_names
from tgate_runtime.generators import noise
from tgate_runtime.mini import place_of
from tgate_runtime.runner import run
from tgate_runtime.session import Session
from tgate_runtime.state import State

BUILD = Path(__file__).parents[1] / "build/cpp/test"
PROMPT = "a large red circle above a small blue square"
ROUNDS = 5  # of a walk of the plan in each process; the first one is not counted
TURNS = 5
STEP_BOUND_US = 5.0
"""What a step may cost the C++ host at the median, in microseconds."""
_MIB = 2**20


def onnxruntime_library() -> Path:
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    return library


def python_step(path: Path, plan: str) -> Mapping[str, float]:
    """Nanoseconds that a step takes outside the engine's call in Python, in this process."""
    with Session.open(path, plans=[plan], threads=1) as session:
        chosen, shape = session.plan(plan), session.shapes()[0]
        state = State(session, chosen)
        specs = {t.name: t for spec in shape.graphs.values() for t in spec.inputs}
        names = [name for name in half_names(session.manifest.conditioning) if name in specs]
        given = {name: noise(1, specs[name].resolve(1)) for name in names}
        outside, inside = [], []
        for walk in range(ROUNDS):
            steps = run(state, latents=noise(2, (1, *shape.latents)), conditioning=given, guidance_scale=4.0)
            for _ in range(len(chosen.steps) - 1):
                begin = time.perf_counter_ns()
                done = next(steps)
                whole = time.perf_counter_ns() - begin
                if walk and done.index:  # the first item of a walk begins the image too
                    inside.append(done.elapsed_ms * 1e6)
                    outside.append(whole - done.elapsed_ms * 1e6)
            steps.close()
    return {
        "median": statistics.median(outside),
        "p99": float(np.quantile(outside, 0.99)),
        "inside": statistics.median(inside),
    }


def cpp_step(path: Path, plan: str) -> Mapping[str, float]:
    words = [BUILD / "probe-step_cost", path, onnxruntime_library(), plan, 1, ROUNDS]
    told = json.loads(subprocess.run([*map(str, words)], capture_output=True, text=True, check=True).stdout)
    found = told["outside_ns"]
    return {
        "median": found["median"],
        "p99": found["p99"],
        "inside": told["inside_ns_median"],
        "allocations": told["allocations"],
    }


def steps(path: Path, plan: str) -> dict[str, Any]:
    """Both hosts' cost of a step, in turns."""
    rows: dict[str, list[Mapping[str, float]]] = {"cpp": [], "python": []}
    for _ in range(TURNS):
        rows["cpp"].append(cpp_step(path, plan))
        command = [sys.executable, "-m", "benchmarks.embedding", "--step", str(path), plan]
        rows["python"].append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    return {
        host: {
            "outside_us_median": statistics.median(row["median"] for row in each) / 1e3,
            "outside_us_p99": statistics.median(row["p99"] for row in each) / 1e3,
            "inside_us_median": statistics.median(row["inside"] for row in each) / 1e3,
        }
        | ({"allocations": max(row["allocations"] for row in each)} if host == "cpp" else {})
        for host, each in rows.items()
    }


def cold(path: Path, folder: Path) -> dict[str, Any]:
    """A process from its start to the picture on disk, in turns: seconds and resident memory."""
    os.environ["TGATE_ONNXRUNTIME"] = str(onnxruntime_library())
    output = folder / "out.png"
    words = ["--seed", "7", "--threads", "1", "--quiet", "--output", str(output)]
    commands: Mapping[str, Sequence[str]] = {
        "cpp": [str(BUILD / "tools/tgate-run"), str(path), "--prompt", PROMPT, *words],
        "python": [str(Path(sys.executable).parent / "tgate"), "generate", str(path), PROMPT, *words],
    }
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(TURNS):
        for name, command in commands.items():
            output.unlink(missing_ok=True)
            usage = watched(command, folder / "log")
            if usage.status or not output.is_file():
                raise SystemExit(f"{name} failed: {(folder / 'log').read_text()}")
            rows[name].append((usage.wall_s, usage.rss_bytes / _MIB))
    medians = {
        name: {
            "wall_s": round(statistics.median(wall for wall, _ in each), 3),
            "rss_mib": round(statistics.median(rss for _, rss in each), 1),
        }
        for name, each in rows.items()
    }
    ratios = [python[0] / cpp[0] for cpp, python in zip(rows["cpp"], rows["python"], strict=True)]
    return {**medians, "python_over_cpp": round(statistics.median(ratios), 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, action="append", help="besides mini, which ships")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--step", nargs=2, metavar=("BUNDLE", "PLAN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(python_step(Path(args.step[0]), args.step[1])))
        return
    result: dict[str, Any] = {
        "settings": {"threads": 1, "rounds": ROUNDS, "turns": TURNS, "engine": f"ort-cpu {onnxruntime.__version__}"},
        "machine": {**machine(), "load_at_start": os.getloadavg()[0]},
        "step_bound_us": STEP_BOUND_US,
        "bundles": {},
    }
    for path in [place_of("mini"), *(args.bundle or [])]:
        model = Bundle.open(path).manifest.model
        with tempfile.TemporaryDirectory() as folder:
            row = {
                "step": {plan: steps(path, plan) for plan in ("default", "ungated")},
                "cold": cold(path, Path(folder)),
            }
        result["bundles"][model] = row
        print(json.dumps({model: row}, indent=2))
    if args.output:
        write_atomically(args.output, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
