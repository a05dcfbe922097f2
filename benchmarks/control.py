"""What ControlNets cost a picture, and what stopping them at the gate changes in it.

    tgate-export --model sd15 --checkpoint DIR --controlnet edges=NET --output bundles/steered
    python -m benchmarks.control bundles/steered --output benchmarks/results/control.json

On ``ort-cpu`` with one thread. What is compared is drawn in turns in one process, and its time is that of the
processor, which a busy machine does not lengthen much; the machine's load is saved with the result. What pictures
differ by says something of trained networks alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.frugality import machine
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.control import control_graph, nets_in, nets_of
from tgate_engine.errors import RequestError
from tgate_runtime.control import Control, Controls
from tgate_runtime.pipeline import Pipeline

PROMPT = "a red circle"


def ways(nets: tuple[str, ...], image: Image.Image, *, gated: bool) -> dict[str, Controls | None]:
    """What is drawn in turns: without, and with one ControlNet or all of them, to the end or to the gate."""
    found: dict[str, Controls | None] = {"without": None, nets[0]: {nets[0]: Control(image=image)}}
    if len(nets) > 1:
        found["all"] = {net: Control(image=image) for net in nets}
    if gated:
        found[f"{nets[0]}, until the gate"] = {nets[0]: Control(image=image, until_gate=True)}
    return found


def measured(pipe: Pipeline, plan_name: str, repeats: int) -> dict[str, Any]:
    """Seconds of the processor for a request of each way, MACs of its loop, and how far its latents are from those of
    the ControlNet that goes on, over their largest."""
    manifest, plan = pipe.session.manifest, pipe.session.plan(plan_name)
    shape = manifest.shapes[0]
    nets = nets_in(shape.graphs)
    if not nets:
        raise RequestError("the bundle has no ControlNet; export it with --controlnet")
    rough = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image = Image.fromarray(rough).resize((shape.width, shape.height), Image.Resampling.BICUBIC)
    chosen = ways(nets, image, gated=plan.gate is not None)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    latents: dict[str, Any] = {}
    for turn in range(repeats + 1):  # the first one loads graphs and makes buffers
        for name, controls in chosen.items():
            begin = time.process_time()
            latents[name] = pipe(PROMPT, seed=1, plan=plan, controls=controls).latents
            if turn:
                times[name].append(time.process_time() - begin)
    loop = plan.macs(shape.graphs)[1]
    added = {
        net: [
            control_graph(shape.graphs, step.graph, net).macs.all if net in nets_of(shape.graphs[step.graph]) else 0
            for step in plan.steps
        ]
        for net in nets
    }
    results: dict[str, Any] = {}
    for name, controls in chosen.items():
        own = sum(
            sum(added[net][: plan.gate] if control.until_gate else added[net])
            for net, control in (controls or {}).items()
        )
        results[name] = {
            "cpu_s": statistics.median(times[name]),
            "runs_cpu_s": times[name],
            "times": statistics.median(times[name]) / statistics.median(times["without"]),
            "macs": loop + own,
            "macs_times": (loop + own) / loop,
            "apart": float(np.abs(latents[name] - latents[nets[0]]).max() / np.abs(latents[nets[0]]).max()),
        }
    return {"plan": plan.name, "steps": len(plan.steps), "gate": plan.gate, "ways": results}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--plan", action="append", help="repeatable; default and its first baseline if left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--weights", default="random", help="what they are, for whoever reads the result")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    with Pipeline.open(Bundle.open(args.bundle), threads=1) as pipe:
        manifest = pipe.session.manifest
        plans = args.plan or ["default", *manifest.plan("default").baselines[:1]]
        result = {
            "machine": {**machine(), "threads": 1, "load": [round(each, 2) for each in os.getloadavg()]},
            "model": manifest.model,
            "weights": args.weights,
            "weights_bytes": manifest.files[manifest.weights].bytes,
            "size": manifest.sizes[0],
            "dtype": manifest.dtype,
            "plans": [measured(pipe, plan, args.repeats) for plan in plans],
        }
    write_atomically(args.output, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
