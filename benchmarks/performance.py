"""How fast gated plans are on each engine of this machine, against the same engine ungated and against its peers.

    python -m benchmarks.performance --case sd15 --work /tmp/performance --output benchmarks/results/performance.json

A case is exported on the spot. Each engine then runs three plans in turns in a process of its own (`tgate bench`):
gated, guidance stopped at m, and ungated; its memory is read after each graph has run. The peers take turns with one
engine in one process: diffusers eager, diffusers with torch.compile, and the `tgate` package, all in float32.
Every part is saved as it ends, so that a run can be cut and taken up again with ``--parts``. `python -m
benchmarks.performance_page` makes docs/performance.md of what is saved. Random weights take as long as trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory import proportional_bytes
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_runtime.benchmark import cpu_model
from tgate_runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is exported, and how often its loops are run: those of engines, and those of ``peers_of`` and its peers,
    OpenVINO with the network ``alone`` in that precision among them."""

    export: tuple[str, ...]
    repeats: int
    warm_ups: int = 0
    peers_of: str = "openvino bf16"
    peer_turns: int = 2
    alone: str = "bf16"


CASES: Mapping[str, Case] = {
    "mini-sdxl": Case(
        export=("--model", "mini-sdxl", "--steps", "25", "--m", "10", "--k", "5"), repeats=7, warm_ups=1, peer_turns=7
    ),
    "mini-pixart": Case(
        export=("--model", "mini-pixart", "--steps", "25", "--m", "10", "--k", "1"), repeats=7, warm_ups=1, peer_turns=7
    ),
    "sd15": Case(
        export=(
            *("--model", "sd15", "--weights", "random", "--components", "denoiser", "--no-verify"),
            *("--height", "256", "--width", "256", "--steps", "25", "--m", "10", "--k", "1"),
        ),
        repeats=3,
    ),
    "sdxl": Case(
        export=(
            *("--model", "sdxl", "--weights", "random", "--components", "denoiser", "--no-verify"),
            *("--height", "256", "--width", "256", "--steps", "25", "--m", "10", "--k", "5"),
        ),
        repeats=2,
        peers_of="ort-cpu shared",  # whose weights are mapped: three packed copies do not fit beside PyTorch's own
        peer_turns=1,
        alone="",
    ),
    "sdxl-512": Case(
        export=(
            *("--model", "sdxl", "--weights", "random", "--components", "denoiser", "--no-verify"),
            *("--height", "512", "--width", "512", "--steps", "25", "--m", "10", "--k", "5"),
        ),
        repeats=2,
    ),
}
RESULTS = Path(__file__).parent / "results" / "performance.json"
ENGINES: Mapping[str, tuple[str, ...]] = {
    "ort-cpu fast": ("--engine", "ort-cpu", "--memory", "fast"),
    "ort-cpu shared": ("--engine", "ort-cpu", "--memory", "shared"),
    "openvino f32": ("--engine", "openvino", "--precision", "f32"),
    "openvino bf16": ("--engine", "openvino", "--precision", "bf16"),
    "aoti f32": ("--engine", "aoti", "--precision", "f32"),
    "aoti bf16": ("--engine", "aoti", "--precision", "bf16"),
}


def main() -> None:
    """Export, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the bundle goes; one that is there is used")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON to add to")
    parser.add_argument("--parts", default=",".join([*ENGINES, "peers"]), help="engines, and peers")
    parser.add_argument("--role", choices=("memory", "peers"), help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    case, bundle = CASES[args.case], args.work / args.case
    if odd := [part for part in args.parts.split(",") if part not in (*ENGINES, "peers")]:
        parser.error(f"there is no {', '.join(odd)}; there are {', '.join(ENGINES)} and peers")
    if args.role == "memory":
        print(json.dumps(memory(bundle, args.engine)))
        return
    if args.role == "peers":
        print(json.dumps(peers(bundle, case)))
        return
    if not (bundle / "manifest.json").exists():
        _run("tgate_cli.main", "export_main", *case.export, "--output", str(bundle), "--quiet")
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    parts = found.setdefault(args.case, {})
    parts["export"] = " ".join(case.export)
    for part in args.parts.split(","):
        if part in ENGINES:
            timing = ("--repeats", str(case.repeats), "--warm-ups", str(case.warm_ups))
            data = _run("tgate_cli.main", "main", "bench", str(bundle), *ENGINES[part], *timing, "--json", "--quiet")
            data["memory"] = _role(args, "memory", "--engine", part)
        else:
            data = _role(args, "peers")
        parts[part] = {**data, "taken_on": machine()}
        write_atomically(args.output, (json.dumps(found, indent=1) + "\n").encode())
        print(f"{args.case}, {part}: saved", flush=True)


def machine() -> dict[str, Any]:
    """What the milliseconds depend on, and what else was running."""
    flags = Path("/proc/cpuinfo").read_text().partition("\nflags")[2].partition("\n")[0].split()
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return {"cpu": cpu_model(), "isa": wide, "cores": os.cpu_count(), "load": os.getloadavg()[0]}


def memory(bundle_path: Path, engine_name: str) -> dict[str, Any]:
    """The proportional set size of this process, in bytes, before a graph is open and after each has run once."""
    from tgate_runtime.engines import open_engine

    bundle = Bundle.open(bundle_path, check_digests=False)
    options = _options(engine_name)
    engine = open_engine(options.pop("engine"), **options)
    held = {"before": proportional_bytes()}
    kept = []
    for name in three(bundle):
        spec = bundle.manifest.shapes[0].graphs[name]
        executable = engine.load(bundle, [spec])[spec.file]
        inputs = {t.name: engine.allocate(t.resolve(1), t.dtype) for t in spec.inputs}
        outputs = {t.name: engine.allocate(t.resolve(1), t.dtype) for t in spec.outputs}
        call = executable.bind(inputs, outputs)
        call()
        kept.append((executable, call))
        held[name] = proportional_bytes()
    return held


def three(bundle: Bundle) -> tuple[str, ...]:
    """Three graphs that the bundle's own plan and those that it is compared with use: they are compiled by then."""
    used = bundle.manifest.plan("default").graphs()
    return "full", "reuse_self" if "reuse_self" in used else "unguided", "reuse_cross"


def peers(bundle_path: Path, case: Case) -> dict[str, Any]:
    """The case's engine and what users would otherwise take, in turns."""
    from benchmarks.peers import compare
    from tgate_export.job import ExportSettings

    bundle = Bundle.open(bundle_path, check_digests=False)
    manifest, shape = bundle.manifest, bundle.manifest.shapes[0]
    session = Session.open(bundle, plans=["default", "ungated"], **_options(case.peers_of))
    settings = ExportSettings(
        model=manifest.model,
        weights="random" if "random" in case.export else "checkpoint",
        components=("denoiser",),
        height=shape.height,
        width=shape.width,
    )
    found = compare(session, case.peers_of, settings, openvino=case.alone, repeats=case.peer_turns)
    return {**found, "engine_version": session.engine.version}


def _options(engine: str) -> dict[str, Any]:
    """The arguments of one of ``ENGINES``, as ``Session.open`` takes them."""
    words = ENGINES[engine]
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}


def _role(args: argparse.Namespace, role: str, *more: str) -> Any:
    """One role in a process of its own: the last line that it prints."""
    command = [sys.executable, "-m", "benchmarks.performance", "--case", args.case, "--work", str(args.work)]
    done = subprocess.run([*command, "--role", role, *more], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(module: str, function: str, *arguments: str) -> Any:
    """A command line of this project in a process of its own; its JSON, if it prints any."""
    code = f"import sys; from {module} import {function}; sys.exit({function}(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if "--json" in arguments else None


if __name__ == "__main__":
    main()
