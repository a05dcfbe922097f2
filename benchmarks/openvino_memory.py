"""What graphs of one bundle hold in OpenVINO, all open together: each with packed weights of its own, or as branches of
one model with one packed copy.

    tgate-export --model sdxl --weights random --components denoiser --dtype fp16 --size 512x512 --output DIR
    python -m benchmarks.openvino_memory DIR --precision bf16 --output benchmarks/results/openvino-memory.json

Each way and precision has a process of its own, which opens the graphs and runs each on the same random inputs; it is
stopped before the machine runs out of memory. A graph's time is the best of ``--repeats`` calls. What two ways give is
compared.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.frugality import machine, watched
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import decode, encode
from tgate_runtime.engines.openvino import OpenVino
from tgate_runtime.engines.protocol import EngineOptions

WAYS = ("fast", "shared")
GRAPHS = ("full", "reuse_self", "reuse_cross")


def run(place: Path, names: Sequence[str], options: EngineOptions, repeats: int, output: Path) -> None:
    """Open the graphs, run each, and write what it took to ``output`` and what they gave beside it."""
    bundle = Bundle.open(place, check_digests=False)
    graphs = {name: bundle.manifest.shapes[0].graphs[name] for name in names}
    engine, began = OpenVino(options), time.perf_counter()
    loaded = engine.load(bundle, [*graphs.values()])
    found: dict[str, Any] = {"open_s": round(time.perf_counter() - began, 1), "ms": {}}
    rng, inputs, given = np.random.default_rng(0), {}, {}
    for name, spec in graphs.items():
        for tensor in spec.inputs:
            if tensor.name not in inputs:
                inputs[tensor.name] = engine.allocate(tensor.resolve(1), tensor.dtype)
                inputs[tensor.name].write(encode(rng.standard_normal(tensor.resolve(1)) / 4, tensor.dtype))
        outputs = {t.name: engine.allocate(t.resolve(1), t.dtype) for t in spec.outputs}
        call = loaded[spec.file].bind({t.name: inputs[t.name] for t in spec.inputs}, outputs)
        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            call()
            times.append((time.perf_counter() - began) * 1e3)
        found["ms"][name] = round(min(times[1:]), 1)
        given[name] = decode(outputs["output"].read(), next(t.dtype for t in spec.outputs if t.name == "output"))
    save_file(given, output.with_suffix(".safetensors"))
    output.write_text(json.dumps(found))


def measured(place: Path, names: Sequence[str], precision: str, repeats: int, threads: int | None) -> dict[str, Any]:
    """Each way's bytes, seconds and milliseconds, and how far what they give is apart, relative."""
    rows: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        for way in WAYS:
            output = Path(folder) / f"{way}.json"
            asked = [str(place), *("--graphs", ",".join(names)), *("--precision", precision), *("--memory", way)]
            asked += ["--repeats", str(repeats), *([] if threads is None else ["--threads", str(threads)])]
            command = [sys.executable, "-m", "benchmarks.openvino_memory", *asked, "--output", str(output)]
            usage = watched(command, output.with_suffix(".log"))
            rows[way] = {"peak_bytes": usage.anonymous_bytes, "others_cpu_s": usage.others_cpu_s}
            if usage.status:
                rows[way]["failed"] = usage.killed or output.with_suffix(".log").read_text()[-400:]
            else:
                rows[way] |= json.loads(output.read_text())
        files = [Path(folder) / f"{way}.safetensors" for way in WAYS]
        if all(file.is_file() for file in files):
            one, other = map(load_file, files)
            apart = {name: float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in names}
            rows["apart"] = apart
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.openvino_memory")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--graphs", default=",".join(GRAPHS), metavar="A,B")
    parser.add_argument("--precision", default="bf16", metavar="P,P")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory", choices=WAYS, help=argparse.SUPPRESS)  # to be one of the processes
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    names = args.graphs.split(",")
    if args.memory is not None:
        options = EngineOptions(precision=args.precision, memory=args.memory, threads=args.threads)
        return run(args.bundle, names, options, args.repeats, args.output)
    manifest = Bundle.open(args.bundle, check_digests=False).manifest
    settings = {
        "model": manifest.model,
        "size": manifest.shapes[0].size,
        "dtype": manifest.dtype,
        "weights_bytes": manifest.files[manifest.weights].bytes,
        "graphs": names,
        "repeats": args.repeats,
        "threads": args.threads,
        "load": [round(each, 2) for each in os.getloadavg()],
        "openvino": importlib.metadata.version("openvino"),
        **machine(),
    }
    rows = {
        precision: measured(args.bundle, names, precision, args.repeats, args.threads)
        for precision in args.precision.split(",")
    }
    write_atomically(args.output, (json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n").encode())
    print(json.dumps(rows, indent=1))
    return None


if __name__ == "__main__":
    main()
