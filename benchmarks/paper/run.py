"""Draws, judges and saves what docs/paper.md is made of, row by row."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paper import ageing, trajectories
from benchmarks.paper.convergence import convergence
from benchmarks.paper.eager import GUIDANCE, STEPS, Eager, Kept, Rule
from benchmarks.paper.sweep import sweep
from benchmarks.quality import draw
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_export.methods.base import settings_of
from tgate_runtime.benchmark import cpu_model
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.tuning.quality import psnr
from training.classifier import load_classifier
from training.evaluate import Pictures, evaluation_captions, score_pictures
from training.frechet import features, frechet, true_renders

SEED = 1000
OTHER_SEED = 500_000
_RENDERS = 2000

Draws = Iterator[tuple[str, Callable[[], Pictures]]]


class Results:
    """A JSON file of rows that hold for one set of settings; written after every row."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self._path = path
        before = json.loads(path.read_text()) if path.is_file() else {}
        self._found = before if before.get("settings") == settings else {"settings": settings}

    def section(self, name: str) -> dict[str, Any]:
        """What is there of a section, to be added to."""
        section: dict[str, Any] = self._found.setdefault(name, {})
        return section

    def save(self) -> None:
        """Write all of it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, (json.dumps(self._found, indent=1) + "\n").encode())


class Judged:
    """Pictures to a row: scores, Fréchet distance to true renders, and how near they are to the section's first."""

    def __init__(self, captions: list[str]) -> None:
        self._captions = captions
        self._judge = load_classifier()
        self._true = features(self._judge, true_renders(_RENDERS))

    def row(self, pictures: Pictures, first: Pictures) -> dict[str, Any]:
        row: dict[str, Any] = asdict(score_pictures(self._captions, pictures, self._judge))
        row["frechet"] = round(frechet(features(self._judge, pictures), self._true), 5)
        row["psnr_db"] = round(float(np.mean(list(map(psnr, pictures, first)))), 2)
        return row


def judge_all(results: Results, section: str, draws: Draws, judged: Judged) -> None:
    """Add the rows of ``draws`` that are missing; the first is drawn again where others are missing."""
    rows = results.section(section)
    first: Pictures | None = None
    for name, one in draws:
        if first is None or name not in rows:
            pictures = one()
            first = pictures if first is None else first
            rows[name] = judged.row(pictures, first)
            results.save()
        print(f"{section}: {name}: {rows[name]['all_objects']:.1%}, {rows[name]['frechet']:.4f}", flush=True)


def eager_draws(eager: Eager, captions: list[str], batch: int) -> Draws:
    """The trajectories of figures 3 and A1 and of tables A1 and A5, the standard one first."""
    pictures = _drawer(eager, captions, batch)
    yield "S", partial(pictures, trajectories.standard)
    yield "S, other seeds", partial(pictures, trajectories.standard, seed=OTHER_SEED)
    yield "no guidance", partial(pictures, trajectories.without_guidance)
    for m in (5, 10, 15):
        yield f"SF cross m={m}", partial(pictures, trajectories.prompt_first(m))
        yield f"SL cross m={m}", partial(pictures, trajectories.prompt_last(m))
    for m, k in ((10, 3), (10, 5), (15, 3), (15, 5)):
        kept = Kept(eager)
        yield f"SF self m={m} k={k}", partial(pictures, trajectories.self_cached_last(m, k, kept), kept=kept)
        yield f"SL self m={m} k={k}", partial(pictures, trajectories.self_cached_first(m, k, kept), kept=kept)


def ageing_draws(eager: Eager, captions: list[str], batch: int, m: int) -> Draws:
    """What to add to the prompt's half after step m, the standard trajectory first."""
    pictures = _drawer(eager, captions, batch)
    yield "S", partial(pictures, trajectories.standard)
    yield "guidance stopped", partial(pictures, ageing.guidance_stopped(m))
    for way, age in ageing.WAYS.items():
        yield way, partial(pictures, ageing.Aged(m, age))
    for refresh in ageing.REFRESHES:
        rule = ageing.Aged(m, ageing.WAYS["constant in noise"], refresh)
        yield f"constant in noise, every {refresh}th anew", partial(pictures, rule)
        later = sum(map(rule.computes_both, range(STEPS)))  # as many halves, spent on a later gate
        yield f"constant in noise, m={later}", partial(pictures, ageing.Aged(later, ageing.WAYS["constant in noise"]))


def _drawer(eager: Eager, captions: list[str], batch: int) -> Callable[..., Pictures]:
    def pictures(rule: Rule, *, seed: int = SEED, kept: Kept | None = None) -> Pictures:
        with ExitStack() as stack:
            if kept is not None:
                stack.enter_context(kept.attached("self"))
            starts = range(0, len(captions), batch)
            return np.concatenate([eager.draw(captions[i : i + batch], seed + i, rule) for i in starts])

    return pictures


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=tuple(GUIDANCE), required=True)
    parser.add_argument("--bundle", type=Path, required=True, help="of that model, with text encoder and decoder")
    parser.add_argument("--captions", type=int, default=250)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    captions, bundle = evaluation_captions(args.captions), Bundle.open(args.bundle)
    manifest = bundle.manifest
    if manifest.model != args.model:
        raise SystemExit(f"{args.bundle} is a bundle of {manifest.model}, not of {args.model}")
    eager = Eager(args.model)
    settings = {
        "model": args.model,
        "weights_sha256": manifest.files[manifest.weights].sha256,
        "captions": args.captions,
        "seed": SEED,
        "steps": STEPS,
        "sampler": manifest.plan("default").sampler.name,
        "guidance_scale": GUIDANCE[args.model],
        "renders": _RENDERS,
        "cpu": cpu_model(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "diffusers", "onnxruntime")},
    }
    results = Results(args.output, settings)
    if not results.section("convergence"):
        results.section("convergence").update(convergence(eager, captions, SEED, args.batch))
        results.save()
    judged = Judged(captions)
    judge_all(results, "trajectories", eager_draws(eager, captions, args.batch), judged)
    gate = settings_of(manifest.plan("default").settings).gate
    judge_all(results, "ageing", ageing_draws(eager, captions, args.batch, gate), judged)
    plans = sweep(bundle)
    with Pipeline.open(bundle, engine="ort-cpu", plans=[*plans.values()], threads=1) as pipe:
        draws = ((name, partial(draw, pipe, plan, captions, SEED, args.workers)) for name, plan in plans.items())
        judge_all(results, "sweep", draws, judged)


if __name__ == "__main__":
    main()
