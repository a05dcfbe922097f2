"""libtgate's ``ort-cuda`` beside the Python one, on a bundle: whole loops and steps, with CUDA graphs and without, and
whether the latents are the same.

    make cpp && python -m benchmarks.gpu.libtgate BUNDLE --output FILE
    python -m benchmarks.gpu.libtgate BUNDLE --library libtgate.so --onnxruntime libonnxruntime.so.1.31.1

Graphs are lowered into the bundle's folder first, as ``tgate build`` does. Each host has a process of its own;
libtgate's is this file with NumPy and ctypes, and no onnxruntime of Python's. CUDA's libraries are found as ``nvidia``
packages, in ``$CUDA_HOME`` and by ``$LD_LIBRARY_PATH``. ``--engine ort-cpu`` is a rehearsal, which needs no GPU: no
host has CUDA graphs there.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.run import ROOT  # which also finds what is not installed
from benchmarks.gpu.setting import engine_of, held_bytes
from benchmarks.loops import Clock, plans_of, request, take
from tests.cpp import library as abi
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.graph import DENOISE
from tgate_runtime.session import Session
from tgate_runtime.state import State

BUILT = ROOT / "build" / "cpp" / "release" / "libtgate.so"
HOSTS = ("python", "cpp", "python+no-graphs", "cpp+no-graphs")
"""In the order in which they run; what the first one draws, the others are compared with."""
Loop = Callable[[str], list[tuple[str, float]]]
"""One loop of a plan: each step's graph and milliseconds."""


def python_loops(args: argparse.Namespace, opened: Bundle, clock: Clock) -> tuple[Loop, Callable[[str], NDArray[Any]]]:
    """A loop in Python, and the latents that the last one of a plan ended with."""
    plans, (start, rows) = plans_of(opened.manifest), request(opened.manifest, args.seed)
    engine = engine_of(args.engine + args.host.removeprefix("python"), "cuda")
    session = Session.open(opened, engine=engine, plans=[*plans.values()])
    states = {name: State(session, plan) for name, plan in plans.items()}
    return (lambda name: take(states[name], start, rows, clock)[1]), lambda name: states[name].latents()


def cpp_loops(args: argparse.Namespace, opened: Bundle) -> tuple[Loop, Callable[[str], NDArray[Any]], str]:
    """The same in libtgate, and what it advises."""
    plans, (start, rows) = plans_of(opened.manifest), request(opened.manifest, args.seed)
    bundle = abi.Bundle(abi.Library(args.library), opened.path, check_digests=0)
    given = {name: rows[name][0] for name in bundle.tensors()}
    graphs = args.engine == "ort-cuda" and "no-graphs" not in args.host
    names = [plan.name for plan in plans.values()]
    session = abi.Session(
        bundle, plans=names, library=args.onnxruntime, engine=args.engine.encode(), cuda_graphs=int(graphs)
    )
    asked = {name: {"plan": plan.name, "tensors": given, "initial_latents": start} for name, plan in plans.items()}
    requests = {name: abi.Request(session, **each) for name, each in asked.items()}

    def loop(name: str) -> list[tuple[str, float]]:
        requests[name].reset(**asked[name])
        taken = []
        for step in plans[name].steps:
            begin = time.perf_counter()
            requests[name].step()
            taken.append((step.graph, (time.perf_counter() - begin) * 1e3))
        return taken

    return loop, lambda name: requests[name].latents(), session.advice()


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """One host, in this process: all times in milliseconds but those that say seconds."""
    opened = Bundle.open(args.bundle, check_digests=False)
    begin = time.perf_counter()
    told: dict[str, Any] = {}
    if args.host.startswith("cpp"):
        loop, latents, told["advice"] = cpp_loops(args, opened)
        if "onnxruntime" in sys.modules:
            raise SystemExit("this process has Python's onnxruntime too, whose library is another copy")
    else:
        loop, latents = python_loops(args, opened, Clock("cpu"))
    told["open_and_bind_s"] = time.perf_counter() - begin
    names = [*plans_of(opened.manifest)]
    whole: dict[str, list[float]] = {name: [] for name in names}
    steps: dict[str, list[tuple[str, float]]] = {name: [] for name in names}
    for turn in range(args.warm_ups + args.repeats):
        for name in names:
            begin = time.perf_counter()
            taken = loop(name)
            if turn >= args.warm_ups:
                whole[name].append((time.perf_counter() - begin) * 1e3)
                steps[name] += taken
    drawn: dict[str, Any] = {name: latents(name) for name in names}
    np.savez(args.latents, **drawn)
    told["held_mib"] = held_bytes("cuda" if args.engine == "ort-cuda" and not args.stub else "cpu") / 2**20
    told["plans"] = {name: _told(whole[name], steps[name]) for name in names}
    return told


def _told(whole: list[float], steps: list[tuple[str, float]]) -> dict[str, Any]:
    graphs: dict[str, list[float]] = {}
    for graph, ms in steps:
        graphs.setdefault(graph, []).append(ms)
    every = [ms for _, ms in steps]
    return {
        "loop_ms": statistics.median(whole),
        "loops_ms": whole,
        "step_ms": {"p50": float(np.quantile(every, 0.5)), "p99": float(np.quantile(every, 0.99))},
        "graph_ms": {
            name: {"p50": float(np.quantile(ms, 0.5)), "p99": float(np.quantile(ms, 0.99))}
            for name, ms in graphs.items()
        },
    }


def compared(got: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """How far the latents of each plan are from another host's."""
    return {
        name: {
            "same_bits": got[name].tobytes() == wanted[name].tobytes(),
            "largest_difference": float(np.abs(got[name].astype(np.float64) - wanted[name]).max()),
            "largest_latent": float(np.abs(wanted[name]).max()),
            "finite": bool(np.isfinite(got[name]).all()),
        }
        for name in wanted
    }


def lowered(path: Path) -> float:
    """Lower the denoising graphs into the bundle's folder; in how many seconds."""
    from tgate_runtime.engines import open_builder

    opened, begin = Bundle.open(path, check_digests=False), time.perf_counter()
    graphs = {spec.file: spec for shape in opened.manifest.shapes for spec in shape.graphs.values()}
    open_builder("ort-cuda").build(opened, [spec for spec in graphs.values() if spec.role == DENOISE])
    return time.perf_counter() - begin


@contextlib.contextmanager
def beside_its_providers(library: Path | None) -> Iterator[Path]:
    """ONNX Runtime's library in one folder with its providers, which it looks for there: links, where it lies
    elsewhere."""
    package = importlib.util.find_spec("onnxruntime")
    if package is None or package.origin is None:
        raise SystemExit("onnxruntime-gpu is not installed here")
    home = Path(package.origin).parent / "capi"
    found = [library.resolve()] if library else sorted(home.glob("libonnxruntime.so.1.*"))
    if not found:
        raise SystemExit(f"{home} has no libonnxruntime.so.1.*; name one with --onnxruntime")
    if found[0].parent == home:
        yield found[0]
        return
    with tempfile.TemporaryDirectory() as folder:
        for each in (found[0], *home.glob("libonnxruntime_providers_*.so")):
            (Path(folder) / each.name).symlink_to(each)
        yield Path(folder) / found[0].name


def cuda_folders() -> list[str]:
    """Where CUDA's and cuDNN's libraries may lie."""
    package = importlib.util.find_spec("nvidia")
    roots = list(package.submodule_search_locations or ()) if package else []
    folders = [*map(str, (lib for root in roots for lib in Path(root).glob("*/lib")))]
    return [*folders, os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64")]


def run(host: str, args: argparse.Namespace, onnxruntime: Path, latents: Path) -> dict[str, Any]:
    """:func:`measured`, in a process of its own."""
    environment = dict(os.environ)
    if host.startswith("cpp"):
        own = environment.get("LD_LIBRARY_PATH", "")
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, [own, *cuda_folders()]))
    words = [str(args.bundle.resolve()), "--host", host, "--latents", str(latents), "--onnxruntime", str(onnxruntime)]
    words += ["--library", str(args.library.resolve()), "--engine", args.engine, "--seed", str(args.seed)]
    words += ["--repeats", str(args.repeats), "--warm-ups", str(args.warm_ups), *["--stub"] * args.stub]
    command = [sys.executable, "-m", "benchmarks.gpu.libtgate", *words]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    return dict(json.loads(done.stdout))


def main() -> None:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--library", type=Path, default=BUILT, help="libtgate.so")
    parser.add_argument(
        "--onnxruntime", type=Path, help="libonnxruntime.so.1.*, where the wheel that is installed has none"
    )
    parser.add_argument("--engine", default="ort-cuda", choices=("ort-cuda", "ort-cpu"))
    parser.add_argument("--hosts", default=",".join(HOSTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warm-ups", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--stub", action="store_true", help="over the tests' stub of CUDA: no GPU is asked for its memory"
    )
    parser.add_argument("--host", help=argparse.SUPPRESS)
    parser.add_argument("--latents", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.host:
        print(json.dumps(measured(args)))
        return
    result: dict[str, Any] = {"bundle": args.bundle.name, "engine": args.engine, "repeats": args.repeats, "hosts": {}}
    if args.engine == "ort-cuda":
        result["lowering_s"] = lowered(args.bundle)
    drawn: dict[str, Mapping[str, NDArray[Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch, beside_its_providers(args.onnxruntime) as onnxruntime:
        for host in args.hosts.split(","):
            latents = Path(scratch, f"{host}.npz")
            told = run(host, args, onnxruntime, latents)
            if latents.exists():
                drawn[host] = dict(np.load(latents))
                first = next(iter(drawn))
                if host != first:
                    told[f"latents_beside_{first}"] = compared(drawn[host], drawn[first])
            result["hosts"][host] = told
            print(host, json.dumps(told), file=sys.stderr, flush=True)
            if args.output:
                write_atomically(args.output, json.dumps(result, indent=1).encode())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
