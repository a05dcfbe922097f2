"""What an export takes: seconds and memory, each in a process of its own, beside the limits set for SDXL.

    python -m benchmarks.frugality --work /tmp/frugality --output benchmarks/results/frugality.json

Wants 6 GB of disk in ``--work`` at a time, for SDXL's random weights in float16. Other jobs slow an export down, so
their processor time during it is recorded too.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tgate_engine.atomic import write_atomically

MODELS: Mapping[str, Sequence[str]] = {"sdxl": ("--m", "10", "--k", "5"), "pixart-alpha": (), "svd": ()}
"""What is exported, with its method settings; the models' own where there are none."""

WEIGHTS: Mapping[str, Sequence[str]] = {
    "none": ("--weights", "none"),
    "random": ("--weights", "random", "--dtype", "fp16"),
}

LIMITS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("sdxl", "none"): {"wall_s": 120, "gib": 2},
    ("sdxl", "random"): {"wall_s": 120, "gib": 3},
}
"""By model and weights. Memory means the peak resident set."""

GIB = 2**30
SAMPLE_S = 0.02
LEAST_FREE_BYTES = GIB
PACKAGES = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a process took. ``rss_bytes``: its peak as the kernel counts it, mapped files included.

    ``anonymous_bytes`` and ``file_bytes``: the peaks, by sampling, of what is its own and of what is mapped from
    files (which the kernel may drop). ``others_cpu_s``: the processor time that everything else on the machine took
    meanwhile. ``killed``: why it was stopped; empty if it was not.
    """

    status: int
    wall_s: float
    cpu_s: float
    others_cpu_s: float
    rss_bytes: int
    anonymous_bytes: int
    file_bytes: int
    killed: str = ""


def watched(command: Sequence[str], log: Path, *, most_anonymous_bytes: int | None = None) -> Usage:
    """Run ``command`` to its end, its output in ``log``; stop it before the machine runs out of memory."""
    anonymous = file = 0
    killed = ""
    before, start = _busy_s(), time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")  # if something must go, let it be this
            while True:
                pid, status, used = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    break
                found = _memory(process.pid)
                anonymous, file = max(anonymous, found.get("RssAnon", 0)), max(file, found.get("RssFile", 0))
                if not killed and psutil.virtual_memory().available < LEAST_FREE_BYTES:
                    killed = "the machine ran out of memory"
                    process.kill()
                if not killed and most_anonymous_bytes is not None and anonymous > most_anonymous_bytes:
                    killed = f"more than {most_anonymous_bytes / GIB:.1f} GiB of its own"
                    process.kill()
                time.sleep(SAMPLE_S)
        except BaseException:
            process.kill()
            raise
    process.returncode = os.waitstatus_to_exitcode(status)
    wall_s, cpu_s = time.perf_counter() - start, used.ru_utime + used.ru_stime
    return Usage(
        status=process.returncode,
        wall_s=round(wall_s, 2),
        cpu_s=round(cpu_s, 2),
        others_cpu_s=round(max(0.0, _busy_s() - before - cpu_s), 2),
        rss_bytes=used.ru_maxrss * 1024,
        anonymous_bytes=anonymous,
        file_bytes=file,
        killed=killed,
    )


def machine() -> dict[str, Any]:
    """The settings that a measurement depends on besides its own."""
    cpuinfo = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), ""),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": os.environ.get("OMP_NUM_THREADS", "the libraries' own choice"),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def product(entry: str, *arguments: str) -> list[str]:
    """The command that runs ``tgate`` (``main``) or ``tgate-export`` (``export_main``) in a new process."""
    code = f"import sys; from tgate_cli.main import {entry}; sys.exit({entry}(sys.argv[1:]))"
    return [sys.executable, "-c", code, *arguments]


def exported(model: str, weights: str, work: Path) -> dict[str, Any]:
    """One export, measured; its bundle is gone afterwards."""
    bundle = work / f"{model}-{weights}"
    shutil.rmtree(bundle, ignore_errors=True)
    arguments = ("--model", model, *MODELS[model], *WEIGHTS[weights])
    log = work / f"{model}-{weights}.log"
    usage = watched(product("export_main", *arguments, "--output", str(bundle), "--quiet"), log)
    bundle_bytes = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    shutil.rmtree(bundle, ignore_errors=True)
    row: dict[str, Any] = {
        "command": f"tgate-export {' '.join(arguments)}",
        "model": model,
        "dtype": "float16" if weights == "random" else "float32",
        **asdict(usage),
        "bundle_bytes": bundle_bytes,
        "limits": {},
    }
    if usage.status:
        row["error"] = log.read_text("utf-8", "replace").strip()[-500:]
    taken = {"wall_s": usage.wall_s, "gib": usage.rss_bytes / GIB}
    for name, limit in LIMITS.get((model, weights), {}).items():
        row["limits"][name] = {"limit": limit, "taken": round(taken[name], 3), "left": round(limit - taken[name], 3)}
    return row


def shown(row: Mapping[str, Any]) -> str:
    """A row in one line, and one more for each limit."""
    memory = ", ".join(f"{row[f'{kind}_bytes'] / GIB:.2f} GiB {kind}" for kind in ("rss", "anonymous", "file"))
    lines = [f"{row['command']}: {row['wall_s']} s ({row['cpu_s']} s of processor time), peaks {memory}"]
    lines += [f"  status {row['status']}: {row['error']}"] if row["status"] else []
    for name, entry in row["limits"].items():
        verdict = "within" if entry["left"] >= 0 else "MISSED"
        lines.append(f"  {name}: {entry['taken']:.2f} of {entry['limit']}, {entry['left']:+.2f} left: {verdict}")
    return "\n".join(lines)


def main() -> None:
    """Export, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the bundles go until they are measured")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS), help="some of them, with commas between")
    parser.add_argument("--weights", default=",".join(WEIGHTS), help="likewise")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"settings": machine(), "rows": []}
    for model in args.models.split(","):
        for weights in args.weights.split(","):
            row = exported(model, weights, args.work)
            result["rows"].append(row)
            print(shown(row), flush=True)
            write_atomically(args.output, (json.dumps(result, indent=1) + "\n").encode())


def _memory(pid: int) -> dict[str, int]:
    """The sizes in /proc/PID/status, in bytes; nothing once the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return {}
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(count) * 1024 for name, count, _ in fields}


def _busy_s() -> float:
    """Processor time that the whole machine has spent on processes, of all cores together."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


if __name__ == "__main__":
    main()
