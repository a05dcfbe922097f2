"""Whole pictures of SD 1.5, from prompt to pixels, beside the pipelines that users would otherwise take on a CPU:
OpenVINO GenAI and stable-diffusion.cpp, each plain and with the caches that it has.

    pip install openvino-genai openvino-tokenizers stable-diffusion-cpp-python
    pip install --no-deps open_clip_torch
    python -m benchmarks.pipelines --work /tmp/pipelines

stable-diffusion.cpp is compiled as it is installed, for the machine's own processor: that wants g++ and CMake, and
takes what CMAKE_ARGS says. All pipelines draw with the same random weights, which take as long as trained ones: SD 1.5
as `tgate-export --weights random` has it, with CLIP's vocabulary out of open_clip, is written as a diffusers directory
(benchmarks/pipeline_files.py). stable-diffusion.cpp reads it as it is, our bundle is exported from it, and OpenVINO's
files are converted from it. All begin from the same noise and take the same steps of Euler's sampler, so that their
pictures can be compared, too.

Each round runs every process of ``PROCESSES``, in turn: it opens its pipeline, draws a picture of a few steps to warm
up, and then one picture in each of its ways. What is found is saved after each process; a run that was cut goes on
where it was. `python -m benchmarks.performance_page` tells it in docs/performance.md. Wants 14 GB of disk, and 20 GB of
memory.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.frugality import GIB, watched
from benchmarks.loops import one_line
from benchmarks.performance import machine
from tgate_engine.atomic import write_atomically
from tgate_runtime.generators import noise

PROMPT = "a large red circle above a small blue square"
NEGATIVE = "a photo of a crowd"
GUIDANCE = 7.5
PIXELS = 512
SEED = 7
GENERATOR = "torch-cuda"
"""What stable-diffusion.cpp draws by, too."""

SAMPLER = "euler"
WARM_UP_STEPS = 3
MOST_ANONYMOUS_BYTES = 20 * GIB
RESULTS = Path(__file__).parent / "results" / "pipelines.json"
VOCABULARY = ("open_clip_torch", "open_clip/bpe_simple_vocab_16e6.txt.gz")
PACKAGES = ("openvino", "onnxruntime", "openvino-genai", "openvino-tokenizers", "stable-diffusion-cpp-python")
REFERENCE = ("tgate openvino f32", "ungated")
"""What pictures are compared with."""

Picture = NDArray[np.uint8]
Draw = Callable[[int, Mapping[str, Any]], Picture]
"""A picture, [H, W, 3], in so many steps, with the options of one way."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """A pipeline, and how it is opened. ``ways``: what it draws, by name, with the options of each.

    ``kind``: a name of ``KINDS``. ``precision``: "f32", or "half" for one that computes in less, or keeps its weights
    in less: only those of one precision are compared.
    """

    kind: str
    precision: str
    options: Mapping[str, str]
    ways: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {"plain": {}})


OURS: Mapping[str, Mapping[str, Any]] = {"gated": {"gated": True}, "ungated": {"gated": False}}
CACHES: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "ucache": {"cache_mode": "ucache"},
    "spectrum": {"cache_mode": "spectrum"},
}
"""Of stable-diffusion.cpp, those that are for U-Nets, with the settings that they have by themselves."""

PROCESSES: Mapping[str, Process] = {
    "tgate openvino f32": Process(
        kind="ours", precision="f32", options={"engine": "openvino", "precision": "f32"}, ways=OURS
    ),
    "OpenVINO GenAI f32": Process(kind="genai", precision="f32", options={"precision": "f32"}),
    "tgate ort-cpu f32": Process(kind="ours", precision="f32", options={"engine": "ort-cpu"}, ways=OURS),
    "stable-diffusion.cpp f32": Process(kind="sdcpp", precision="f32", options={"wtype": "f32"}, ways=CACHES),
    "tgate openvino bf16": Process(
        kind="ours", precision="half", options={"engine": "openvino", "precision": "bf16"}, ways=OURS
    ),
    "OpenVINO GenAI bf16": Process(
        kind="genai", precision="half", options={"precision": "bf16"}, ways={"plain": {}, "TaylorSeer": {"cache": True}}
    ),
    "stable-diffusion.cpp f16": Process(kind="sdcpp", precision="half", options={"wtype": "f16"}, ways=CACHES),
}


def main() -> None:
    """Write the files, and run the rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the files go; those that are there are used")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", default=",".join(PROCESSES), metavar="A,B", help="some of them")
    parser.add_argument("--process", choices=PROCESSES, help=argparse.SUPPRESS)  # to be one of them
    args = parser.parse_args()
    if args.process is not None:
        write_atomically(args.output, json.dumps(drawn(args.process, args.work, args.steps, args.threads)).encode())
        return
    names = args.processes.split(",")
    if odd := [name for name in names if name not in PROCESSES]:
        parser.error(f"there is no {', '.join(odd)}; there are {', '.join(PROCESSES)}")
    if args.steps < 2 or args.rounds < 1:
        parser.error(f"--steps is at least 2 and --rounds 1, got {args.steps} and {args.rounds}")
    settings = settings_of(args.steps, args.threads)
    found: dict[str, Any] = {"settings": settings, "rounds": []}
    if args.output.exists():
        found = json.loads(args.output.read_text())
    if found["settings"] != settings:
        parser.error(f"{args.output} is of other settings or another machine; remove it, or take another --output")
    write_files(args.work, args.steps)
    for number in range(args.rounds):
        found["rounds"] += [{}] * (number == len(found["rounds"]))
        for name in names:
            if name in found["rounds"][number]:
                continue
            found["rounds"][number][name] = row = in_process(name, args.work, args.steps, args.threads)
            write_atomically(args.output, (json.dumps(found, indent=1) + "\n").encode())
            print(f"round {number + 1}, {name}: {json.dumps(row)}", flush=True)


def settings_of(steps: int, threads: int) -> dict[str, Any]:
    """What the seconds depend on."""
    on = {name: value for name, value in machine().items() if name != "load"}
    request = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "guidance_scale": GUIDANCE, "pixels": PIXELS}
    plan = {"steps": steps, "m": gate_of(steps), "k": 1, "sampler": SAMPLER, "seed": SEED, "generator": GENERATOR}
    processes = {name: asdict(process) for name, process in PROCESSES.items()}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {**request, **plan, "threads": threads, **on, **versions, "processes": processes}


def gate_of(steps: int) -> int:
    """The gate step: the paper's 10 of 25, in proportion."""
    return max(1, steps * 2 // 5)


def write_files(work: Path, steps: int) -> None:
    """The checkpoint, and what is made of it, where it is not there already."""
    from benchmarks import pipeline_files as files

    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        package, table = VOCABULARY
        place = Path(str(importlib.metadata.distribution(package).locate_file(table)))
        files.write_checkpoint(checkpoint, place, SAMPLER)
    if not (work / "bundle").exists():
        files.write_bundle(work / "bundle", checkpoint, PIXELS, SAMPLER, steps, gate_of(steps))
    if not (work / "openvino").exists():
        files.write_openvino(work / "openvino", checkpoint, PIXELS)


def in_process(name: str, work: Path, steps: int, threads: int) -> dict[str, Any]:
    """One process, watched: what it found, and what it took."""
    result, log = work / "row.json", work / f"{name.replace(' ', '-')}.log"
    result.unlink(missing_ok=True)
    asked = ["--process", name, "--work", str(work), "--steps", str(steps), "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks.pipelines", *asked, "--output", str(result)]
    load = round(os.getloadavg()[0], 2)
    usage = watched(command, log, most_anonymous_bytes=MOST_ANONYMOUS_BYTES)
    row: dict[str, Any] = {"load": load, "others_cpu_s": usage.others_cpu_s, "wall_s": usage.wall_s}
    # What is its own cannot be dropped by the system, as what is mapped from a file can.
    row |= {"anonymous_bytes": usage.anonymous_bytes, "file_bytes": usage.file_bytes}
    if usage.status:
        return {**row, "failed": usage.killed or log.read_text(errors="replace")[-400:]}
    return {**row, **json.loads(result.read_text())}


def drawn(name: str, work: Path, steps: int, threads: int) -> dict[str, Any]:
    """Open one pipeline, warm it up, and draw a picture in each of its ways: seconds of each, and how far it is from
    the reference, where that is drawn already. A way that fails is left out, with what it said."""
    process, said = PROCESSES[name], list[str]()
    began = time.perf_counter()
    draw = KINDS[process.kind](work, process.options, threads, said.append)
    row: dict[str, Any] = {"open_s": round(time.perf_counter() - began, 2)}
    began = time.perf_counter()
    draw(min(WARM_UP_STEPS, steps), next(iter(process.ways.values())))
    row |= {"warm_up_s": round(time.perf_counter() - began, 2), "ways": {}}
    pictures: dict[str, Picture] = {}
    reference = work / f"reference-{steps}.npy"
    for way, options in process.ways.items():
        said.clear()
        began = time.perf_counter()
        try:
            picture = draw(steps, options)
        except Exception as error:
            row["ways"][way] = {"failed": one_line(error)}
            continue
        told = row["ways"][way] = {"s": round(time.perf_counter() - began, 3), **judged(picture, pictures)}
        pictures[way] = picture
        if (name, way) == REFERENCE:
            np.save(reference, picture)
        elif reference.exists():
            told["apart"] = apart(picture, np.load(reference))
        if said:
            told["said"] = list(said)
    return row


def judged(picture: Picture, others: Mapping[str, Picture]) -> dict[str, Any]:
    """How much its levels spread, 0 for a picture of one colour, as what is not finite becomes; and which ways drew the
    same to the bit."""
    if picture.shape != (PIXELS, PIXELS, 3) or picture.dtype != np.uint8:
        raise ValueError(f"a picture of {picture.dtype} {picture.shape}, wanted uint8 {(PIXELS, PIXELS, 3)}")
    same = [way for way, other in others.items() if np.array_equal(picture, other)]
    return {"spread": round(float(picture.std()), 2), **({"same_as": same} if same else {})}


def apart(picture: Picture, other: Picture) -> float:
    """The root mean square of the differences of two pictures, in levels of 0 to 255."""
    return round(float(np.sqrt(np.square(picture.astype(np.float64) - other).mean())), 3)


def ours(work: Path, options: Mapping[str, Any], threads: int, say: Callable[[str], None]) -> Draw:
    """This project's own."""
    from tgate_export.plans import add_plan
    from tgate_runtime.pipeline import Pipeline

    made: dict[int, dict[str, Any]] = {}

    def plans_of(steps: int) -> dict[str, Any]:
        if steps not in made:
            made[steps] = add_plan(work / "bundle", name="gated", m=gate_of(steps), steps=steps, save=False)
        return made[steps]

    pipe = Pipeline.open(work / "bundle", check_digests=False, threads=threads, **options)

    def draw(steps: int, way: Mapping[str, Any]) -> Picture:
        plans = plans_of(steps)
        ungated = next(name for name in plans["gated"].baselines if name.endswith("ungated"))
        # A plan that the bundle holds already is not made again: its name stands for it.
        plan = plans["gated"] if way["gated"] else plans.get(ungated, ungated)
        asked: dict[str, Any] = {"negative_prompt": NEGATIVE, "guidance_scale": GUIDANCE}
        asked |= {"seed": SEED, "generator": GENERATOR}
        return np.asarray(pipe(PROMPT, plan=plan, **asked).images[0])

    return draw


def genai(work: Path, options: Mapping[str, Any], threads: int, say: Callable[[str], None]) -> Draw:
    """OpenVINO GenAI's, with its shapes fixed before it is compiled, as its documentation advises."""
    import openvino as ov
    import openvino_genai

    class Noise(openvino_genai.Generator):
        """Ours, in place of its own."""

        def next(self) -> float:
            raise NotImplementedError

        def randn_tensor(self, shape: Any) -> Any:
            first, *one = shape
            return ov.Tensor(np.stack([noise(SEED, tuple(one), generator=GENERATOR)] * first))

    folder = work / "openvino"
    pipe = openvino_genai.Text2ImagePipeline(folder)
    euler = openvino_genai.Scheduler.Type.EULER_DISCRETE
    pipe.set_scheduler(openvino_genai.Scheduler.from_config(folder / "scheduler" / "scheduler_config.json", euler))
    pipe.reshape(1, PIXELS, PIXELS, GUIDANCE)
    hints = {"INFERENCE_PRECISION_HINT": options["precision"], "PERFORMANCE_HINT": "LATENCY"}
    pipe.compile("CPU", **hints, INFERENCE_NUM_THREADS=threads)
    asked = {"negative_prompt": NEGATIVE, "guidance_scale": GUIDANCE, "height": PIXELS, "width": PIXELS}

    def draw(steps: int, way: Mapping[str, Any]) -> Picture:
        cache = {"taylorseer_config": openvino_genai.TaylorSeerCacheConfig()} if way.get("cache") else {}
        given = pipe.generate(PROMPT, num_inference_steps=steps, generator=Noise(), **asked, **cache)
        calls = len(pipe.get_performance_metrics().raw_metrics.unet_inference_durations)
        say(f"{calls} calls of the network in {steps} steps")
        return np.array(given.data)[0]

    return draw


def sdcpp(work: Path, options: Mapping[str, Any], threads: int, say: Callable[[str], None]) -> Draw:
    """stable-diffusion.cpp's, by its Python binding."""
    import stable_diffusion_cpp as sd

    def heard(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", errors="replace").strip()
        if any(word in line for word in ("skipp", "not supported", "completed", "decoded")):
            say(line)

    model = sd.StableDiffusion(
        model_path=str(work / "checkpoint"), n_threads=threads, vae_decode_only=True, verbose=True, **options
    )
    hearing = sd.sd_log_callback(heard)
    sd.sd_set_log_callback(hearing, ctypes.c_void_p(0))
    size = {"width": PIXELS, "height": PIXELS}

    def draw(steps: int, way: Mapping[str, Any]) -> Picture:
        _ = hearing  # lives as long as it may be called
        asked = {"sample_method": SAMPLER, "scheduler": "discrete", "sample_steps": steps, "cfg_scale": GUIDANCE}
        return np.asarray(model.generate_image(PROMPT, NEGATIVE, seed=SEED, **size, **asked, **way)[0].convert("RGB"))

    return draw


KINDS: Mapping[str, Callable[[Path, Mapping[str, Any], int, Callable[[str], None]], Draw]] = {
    "ours": ours,
    "genai": genai,
    "sdcpp": sdcpp,
}


if __name__ == "__main__":
    main()
