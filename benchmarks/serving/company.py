"""Whether a picture depends on how many share its calls, by engine: alone, and in calls of two to the most there are.

python -m benchmarks.serving.company mini --engines ort-cpu,openvino --output benchmarks/results/company.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tgate_engine.atomic import write_atomically
from tgate_runtime.pipeline import Pipeline

PROMPTS = ("a green star", "a red circle above a blue square", "a small yellow triangle", "a white cross")


def compare(pipe: Pipeline) -> list[dict[str, Any]]:
    """One row for each number of images: the greatest difference of final latents, as a share of the greatest latent,
    and of pixels, in levels of 255, between company and alone."""
    most = min(len(PROMPTS), max(shape.batch[1] for shape in pipe.session.shapes()))
    seeds = list(range(most))
    alone = [pipe(prompt, seed=seed) for prompt, seed in zip(PROMPTS, seeds, strict=False)]
    rows = []
    for images in range(2, most + 1):
        together = pipe(list(PROMPTS[:images]), seed=seeds[:images])
        latents = np.stack([result.latents[0] for result in alone[:images]])
        levels = [
            np.abs(np.asarray(image, int) - np.asarray(result.images[0], int)).max()
            for image, result in zip(together.images, alone, strict=False)
        ]
        error = float(np.abs(together.latents - latents).max() / np.abs(latents).max())
        rows.append({"images": images, "latents": error, "pixel_levels": int(max(levels))})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--engines", default="ort-cpu,openvino")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    results = []
    for engine in args.engines.split(","):
        for precision in ("f32", "bf16") if engine == "openvino" else (None,):
            with Pipeline.open(args.bundle, engine=engine, precision=precision) as pipe:
                made = pipe.session.engine
                row = {
                    "model": pipe.session.manifest.model,
                    "engine": f"{made.name} {made.version}",
                    "precision": precision or "as exported",
                    "company": compare(pipe),
                }
            results.append(row)
            print(json.dumps(row), flush=True)
    if args.output:
        write_atomically(args.output, json.dumps(results, indent=1).encode() + b"\n")


if __name__ == "__main__":
    main()
