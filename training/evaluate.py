"""Scores pictures against held-out captions: does the first object named have the right colour and shape?

`score` takes captions and any callable that turns captions into pictures, so that every runtime of this
project is judged by the same 500 captions and the same classifier.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from training.classifier import PairClassifier, load_classifier, presence
from training.grammar import PAIR_INDEX, PAIRS, held_out_scenes, named_pairs
from training.relations import item_places, relation_shown
from training.settings import IMAGE_PX

EVALUATION_SEED = 1

Pictures = npt.NDArray[np.uint8]
Generate = Callable[[list[str]], Pictures]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Shares of pictures, 0 to 1; `low` and `high` bound `first_object` at 95 % (Wilson's interval).

    `relations`: of the captions that say how their items lie, the share whose picture shows all of them and so.
    """

    captions: int
    first_object: float
    low: float
    high: float
    first_colour: float
    first_shape: float
    all_objects: float
    one_object: float
    several_objects: float
    relations: float


def evaluation_captions(count: int = 500) -> list[str]:
    """The first `count` held-out captions; always the same ones."""
    return [caption for caption, _ in held_out_scenes(count, EVALUATION_SEED)]


def _wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return middle - half, middle + half


def score_pictures(captions: list[str], pictures: Pictures, classifier: PairClassifier | None = None) -> Score:
    """Judge `pictures`, uint8 [N, 128, 128, 3], one per caption.

    `first_object` is the headline: the pair named first is judged present (> 0.5). `first_colour` and
    `first_shape` ask only that some pair with that colour, or that shape, is present.
    """
    if pictures.shape != (len(captions), IMAGE_PX, IMAGE_PX, 3) or pictures.dtype != np.uint8:
        raise ValueError(
            f"got pictures {pictures.dtype} {pictures.shape}, wanted uint8 "
            f"{(len(captions), IMAGE_PX, IMAGE_PX, 3)}: one per caption, channels last"
        )
    judge = classifier or load_classifier()
    shown = (presence(judge, pictures) > 0.5).numpy()
    places = item_places(judge, pictures, captions)
    related = [relation_shown(*pair) for pair in zip(places, captions, strict=True)]
    first: list[bool] = []
    colour: list[bool] = []
    shape: list[bool] = []
    every: list[bool] = []
    single: list[bool] = []
    several: list[bool] = []
    for row, caption in enumerate(captions):
        pairs = named_pairs(caption)
        hit = bool(shown[row, PAIR_INDEX[pairs[0]]])
        first.append(hit)
        (single if len(pairs) == 1 else several).append(hit)
        colour.append(any(shown[row, i] for i, pair in enumerate(PAIRS) if pair[0] == pairs[0][0]))
        shape.append(any(shown[row, i] for i, pair in enumerate(PAIRS) if pair[1] == pairs[0][1]))
        every.append(all(shown[row, PAIR_INDEX[pair]] for pair in pairs))
    low, high = _wilson(sum(first), len(first))

    def share(hits: list[bool]) -> float:
        return round(sum(hits) / max(1, len(hits)), 4)

    return Score(
        captions=len(captions),
        first_object=share(first),
        low=round(low, 4),
        high=round(high, 4),
        first_colour=share(colour),
        first_shape=share(shape),
        all_objects=share(every),
        one_object=share(single),
        several_objects=share(several),
        relations=share([right for right in related if right is not None]),
    )


def score(captions: list[str], generate: Generate, batch: int = 25) -> Score:
    """Generate pictures for `captions` in batches with `generate` and judge them."""
    parts = [generate(captions[start : start + batch]) for start in range(0, len(captions), batch)]
    return score_pictures(captions, np.concatenate(parts))


def diffusers_generator(
    folder: Path,
    *,
    steps: int,
    guidance: float,
    seed: int,
    stop_guidance_at: int | None = None,
    gate: int | None = None,
    self_interval: int = 1,
) -> Generate:
    """Eager pictures from a pipeline directory, on the CPU in float32.

    With `stop_guidance_at`, steps from that one on run the conditional half alone; PixArt's pipeline has no way
    to say so, and raises ValueError. With `gate`, the `tgate` package drives the pipeline: cross-attention is
    reused from step `gate` on and self-attention is computed every `self_interval` steps before it. Picture
    number i of all calls starts from the noise of seed `seed + i`, so generators can be compared picture by
    picture. Not thread-safe.
    """
    from diffusers import DiffusionPipeline, PixArtAlphaPipeline

    if gate is not None and stop_guidance_at is not None:
        raise ValueError(f"gate={gate} already ends guidance; leave out stop_guidance_at={stop_guidance_at}")
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)  # the class of model_index.json
    pixart = isinstance(pipe, PixArtAlphaPipeline)
    pipe.set_progress_bar_config(disable=True)
    call: Callable[..., Any] = pipe.__call__
    extra: dict[str, Any] = {"clean_caption": False, "use_resolution_binning": False} if pixart else {}
    if gate is not None:
        from tgate import TgatePixArtAlphaLoader, TgateSDXLLoader

        call = (TgatePixArtAlphaLoader if pixart else TgateSDXLLoader)(pipe).tgate
        extra |= {"gate_step": gate, "sp_interval": self_interval}
    if stop_guidance_at is not None:
        if pixart:
            raise ValueError("PixArtAlphaPipeline cannot stop guidance; benchmarks/quality.py draws that row")
        names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

        def stop(pipeline: Any, step: int, _: int, state: dict[str, Any]) -> dict[str, Any]:
            if step + 1 == stop_guidance_at:
                pipeline._guidance_scale = 0.0
                state.update({name: state[name].chunk(2)[-1] for name in names})
            return state

        extra |= {"callback_on_step_end": stop, "callback_on_step_end_tensor_inputs": names}
    done = 0

    def generate(captions: list[str]) -> Pictures:
        nonlocal done
        generators = [torch.Generator().manual_seed(seed + done + i) for i in range(len(captions))]
        done += len(captions)
        images = call(
            prompt=captions,
            negative_prompt=[""] * len(captions),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=IMAGE_PX,
            width=IMAGE_PX,
            generator=generators,
            output_type="np",
            **extra,
        ).images
        return np.asarray((images * 255).round().clip(0, 255).astype(np.uint8))

    return generate


def save_row(path: Path, name: str, result: Score, settings: dict[str, object]) -> None:
    """Add or replace the row `name` of the JSON table at `path`."""
    table = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    table["rows"][name] = {"score": asdict(result), "settings": settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="pipeline directory")
    parser.add_argument("--out", type=Path, required=True, help="JSON table to add the row to")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--stop-guidance-at", type=int, default=None, help="first step without guidance")
    parser.add_argument("--gate", type=int, default=None, help="first step that reuses cross-attention")
    parser.add_argument("--self-interval", type=int, default=1, help="self-attention interval before the gate")
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    schedule = {
        "steps": arguments.steps,
        "guidance": arguments.guidance,
        "seed": arguments.seed,
        "stop_guidance_at": arguments.stop_guidance_at,
        "gate": arguments.gate,
        "self_interval": arguments.self_interval,
    }
    name = "ungated"
    if arguments.stop_guidance_at is not None:
        name = f"guidance stopped at {arguments.stop_guidance_at}"
    if arguments.gate is not None:
        interval = f", k={arguments.self_interval}" if arguments.self_interval > 1 else ""
        name = f"gated (m={arguments.gate}{interval})"
    started = time.monotonic()
    result = score(evaluation_captions(arguments.captions), diffusers_generator(arguments.model, **schedule))
    elapsed = {"elapsed_s": round(time.monotonic() - started, 1), "threads": arguments.threads}
    fixed = {"runtime": "diffusers" if arguments.gate is None else "tgate 1.0.0 on diffusers", "precision": "float32"}
    save_row(arguments.out, name, result, {**fixed, **schedule, **elapsed, "scheduler": "DPM-Solver++ order 2"})
    print(name, json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
