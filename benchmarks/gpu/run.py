"""Every engine of a machine with an NVIDIA GPU, checked and measured, with what users would otherwise take beside it.

    python -m benchmarks.gpu.run                                  # on the GPU machine
    python -m benchmarks.gpu.run --resume --budget-s 570          # again and again, where commands are cut
    python -m benchmarks.gpu.run --device cpu --tiny              # all of it, small, anywhere

README.md beside this file says what each section is. Each is made in a process of its own and saved as it ends.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), str(ROOT / "export"), str(ROOT / "runtime"), str(ROOT / "cli")]
sys.path += [path for path in PATHS if path not in sys.path]  # nothing need be installed but engines

from benchmarks.gpu.aims import aims, memory_share, ms_of, text  # noqa: E402
from benchmarks.gpu.sections import SECTIONS  # noqa: E402
from benchmarks.gpu.setting import CASES, Setting  # noqa: E402
from benchmarks.loops import one_line  # noqa: E402
from tgate_engine.atomic import write_atomically  # noqa: E402

MODELS = {False: "sdxl,pixart-alpha", True: "mini-sdxl,mini-pixart"}
ENGINES = {"cuda": "ort-cuda,ort-cuda+no-graphs,aoti,tensorrt", "cpu": "ort-cpu,openvino,aoti"}
TINY_CPU_ENGINES = "ort-cpu,openvino"  # aoti compiles for most of a minute a graph there
PARTS = ("open", "check", "loops", "memory", "kernels", "peers")
NEVER = float("inf")

Found = dict[str, Any]


class BudgetSpent(Exception):
    """The time is up: what was not saved is left to ``--resume``."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One entry of the results: its name, and the section that makes it."""

    name: str
    section: str
    setting: Setting


def main(arguments: list[str] | None = None) -> None:
    """Measure what is wanted and not there yet, or be one section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="embedded models, few steps, two repeats")
    parser.add_argument("--models", help=f"some of {', '.join(CASES)}, with commas between")
    parser.add_argument(
        "--engines", help="likewise, with ways after +: ort-cuda+fast, ort-cuda+no-graphs, openvino+bf16"
    )
    parser.add_argument("--sections", default=",".join(PARTS), help="likewise")
    bundles = Path(tempfile.gettempdir()) / "tgate-gpu"
    parser.add_argument("--bundles", type=Path, default=bundles, help="bundles by model; what is not there is exported")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-<device>.json")
    parser.add_argument("--resume", action="store_true", help="leave out what the output holds")
    parser.add_argument("--retry", action="store_true", help="with --resume: but not what failed or was missing")
    parser.add_argument("--budget-s", type=float, default=NEVER, help="stop after this many seconds")
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile-mode", help="of the peer torch.compile; default: max-autotune, tiny: default")
    parser.add_argument("--child", nargs=3, metavar=("SECTION", "SETTING", "RESULT"), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(*args.child)
        return
    args.models = args.models or MODELS[args.tiny]
    args.engines = args.engines or (TINY_CPU_ENGINES if args.tiny and args.device == "cpu" else ENGINES[args.device])
    for given, known in ((args.models, tuple(CASES)), (args.sections, PARTS)):
        if odd := [name for name in given.split(",") if name not in known]:
            parser.error(f"there is no {', '.join(odd)}; there are {', '.join(known)}")
    args.bundles.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + args.budget_s
    setting = Setting(
        model="",
        device=args.device,
        bundles=str(args.bundles.resolve()),
        repeats=args.repeats or (2 if args.tiny else 5),
        seed=args.seed,
        compile_mode=args.compile_mode or ("default" if args.tiny else "max-autotune"),
    )
    machine = _made(Step(name="machine", section="machine", setting=setting), NEVER)
    if machine["status"] != "ok":
        raise SystemExit(f"this machine cannot be described: {machine['error']}; --device cpu needs no GPU")
    settings = {name: value for name, value in machine.items() if name not in ("status", "took_s")}
    name = re.sub(r"[^a-z0-9]+", "-", str(settings.get("gpu", settings["cpu"])).lower()).strip("-")
    output = args.output or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    found: Found = (
        json.loads(output.read_text()) if args.resume and output.exists() else {"engines": {}, "sections": {}}
    )
    found["settings"] = {**settings, "device": args.device, "tiny": args.tiny, "warm_ups": setting.warm_ups}
    found["settings"] |= {"repeats": setting.repeats, "seed": setting.seed, "compile_mode": setting.compile_mode}
    for engine in args.engines.split(","):  # each in its own process: one that breaks it is missing, no more
        said = _made(Step(name=f"probe-{engine}", section="probe", setting=replace(setting, engine=engine)), NEVER)
        found["engines"][engine] = {"version": said.get("version", ""), "says": said.get("says") or said["error"]}
    output.parent.mkdir(parents=True, exist_ok=True)

    def keep(name: str, data: Found) -> None:
        found["sections"][name] = {**data, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        found["aims"] = aims(found)
        write_atomically(output, (json.dumps(found, indent=1) + "\n").encode())
        print(f"{name}: {data['status']} {data.get('error', '')}".rstrip(), flush=True)

    try:
        for model in args.models.split(","):
            for step in _steps(replace(setting, model=model), args.engines.split(","), args.sections.split(","), found):
                there = found["sections"].get(step.name)
                again = args.retry and there is not None and there["status"] != "ok"
                if not (args.resume and there is not None) or again or _lacks(step):
                    keep(step.name, _made(step, deadline))
    except BudgetSpent:
        print("the time is up; --resume goes on from here", flush=True)
    print(table(found), flush=True)


def _steps(setting: Setting, engines: list[str], wanted: list[str], found: Found) -> Iterator[Step]:
    """The steps of one model, each asked for when those before it are made: a later one depends on their results."""
    model, done = setting.model, found["sections"]
    yield Step(name=f"{model}/bundle", section="bundle", setting=setting)
    if "check" in wanted:
        yield Step(name=f"{model}/reference", section="reference", setting=setting)
    for engine in engines:
        own = replace(setting, engine=engine)
        ways = {"open": ("first", "second"), "memory": ("one", "all")}
        for part in (part for part in wanted if part != "peers"):
            for way in ways.get(part, ("",)):
                name = f"{model}/{engine}/{part}" + (f"/{way}" if way else "")
                section = {"open": "opening"}.get(part, part)
                if found["engines"][engine]["says"] != "ready":
                    section = "missing: " + found["engines"][engine]["says"]
                elif done[f"{model}/bundle"]["status"] != "ok":
                    section = "skipped: there is no bundle"
                elif part == "kernels" and setting.device == "cpu":
                    section = "skipped: kernels are a GPU's"
                elif part == "check" and done[f"{model}/reference"]["status"] != "ok":
                    section = f"skipped: there is no reference: {done[f'{model}/reference'].get('error', '')}"
                yield Step(name=name, section=section, setting=replace(own, graphs=way) if way else own)
    if "peers" in wanted:
        times = {engine: ms for engine in engines if (ms := ms_of(found, model, engine, "gated")) is not None}
        ready = [engine for engine in engines if found["engines"][engine]["says"] == "ready"]
        best = min(times, key=lambda engine: times[engine]) if times else (ready or [""])[0]
        section = "peers" if best and done[f"{model}/bundle"]["status"] == "ok" else "skipped: no engine and bundle"
        yield Step(name=f"{model}/peers", section=section, setting=replace(setting, engine=best))


def _lacks(step: Step) -> bool:
    """Whether a file that the results speak of is gone, as on a machine that was lent again."""
    path = Path(step.setting.bundles) / step.setting.model / "manifest.json"
    needed = {"bundle": path, "reference": step.setting.reference_file}.get(step.section)
    return needed is not None and not needed.exists()


def _made(step: Step, deadline: float) -> Found:
    """The entry of a step: what its section gave, or one line that says why not."""
    status, _, why = step.section.partition(": ")
    if why:
        return {"status": status, "error": why}
    root, begin = Path(step.setting.bundles), time.monotonic()
    if begin > deadline:
        raise BudgetSpent
    environment = {"TGATE_CACHE": str(root / "engines"), "TORCHINDUCTOR_CACHE_DIR": str(root / "inductor")}
    environment |= {"CUDA_VISIBLE_DEVICES": ""} if step.setting.device == "cpu" else {}
    environment["PYTHONPATH"] = os.pathsep.join([*PATHS, os.environ.get("PYTHONPATH", "")])
    result, log = root / "result.json", root / f"{step.name.replace('/', '-')}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.run", "--child", step.section]
    command += [json.dumps(asdict(step.setting)), str(result)]
    left = None if deadline == NEVER else deadline - begin
    try:
        with log.open("wb") as out:
            environment = {**os.environ, **environment}
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=out, timeout=left, check=False)
    except subprocess.TimeoutExpired:
        raise BudgetSpent from None
    data: Found = json.loads(result.read_text()) if result.exists() else {}
    if not data:
        said = log.read_text("utf-8", "replace").strip().splitlines()
        data = {"status": "failed", "error": f"ended with {done.returncode}: {said[-1][:300] if said else ''}"}
    return {**data, "took_s": round(time.monotonic() - begin, 2)}


def child(section: str, setting: str, result: str) -> None:
    """Be one section: its values, or its error in one line, go to ``result``."""
    import traceback

    try:
        data = {"status": "ok", **SECTIONS[section](Setting(**json.loads(setting)))}
    except Exception as error:
        traceback.print_exc()  # for the log
        status = "skipped" if isinstance(error, ModuleNotFoundError) else "failed"
        data = {"status": status, "error": one_line(error)}
    write_atomically(Path(result), json.dumps(data).encode())


# --- what comes of it -----------------------------------------------------------------------------


def table(found: Found) -> str:
    """The results for a reader: one line for each engine and peer of a model, and one for each aim."""
    done = found["sections"]
    head = (
        "model",
        "engine",
        "gated ms",
        "stopped",
        "ungated",
        "faster",
        "step p50",
        "p99",
        "error",
        "open s",
        "again",
    )
    lines: list[tuple[str, ...]] = [(*head, "memory")]
    for model in dict.fromkeys(name.partition("/")[0] for name in done):
        for engine, facts in found["engines"].items():
            own = {part: done.get(f"{model}/{engine}/{part}", {}) for part in ("check", "loops")}
            times = [ms_of(found, model, engine, plan) for plan in ("gated", "guidance_stopped", "ungated")]
            faster = times[2] / times[0] if times[0] and times[2] else None
            steps = own["loops"].get("plans", {}).get("gated", {}).get("step_ms", {})
            opens = [done.get(f"{model}/{engine}/open/{way}", {}).get("open_s") for way in ("first", "second")]
            numbers = [*times, faster, steps.get("p50"), steps.get("p99"), own["check"].get("worst"), *opens]
            if facts["says"] == "ready":
                texts = [text(number) for number in (*numbers, memory_share(done, model, engine))]
                lines.append((model, engine, *texts))
            else:
                lines.append((model, engine, f"missing: {facts['says']}"))
        for peer, ms in done.get(f"{model}/peers", {}).get("ms", {}).items():
            lines.append((model, f"in turns: {peer}", text(ms)))
    widths = [max(len(line[i]) for line in lines if i < len(line) and len(line) != 3) for i in range(len(lines[0]))]
    widths[1] = max(len(line[1]) for line in lines)
    told = ["  ".join(each.ljust(width) for each, width in zip(line, widths, strict=False)).rstrip() for line in lines]
    told += [f"{name}: {data['status']}: {data['error']}" for name, data in done.items() if data["status"] == "failed"]
    for aim in found.get("aims", []):
        told.append(f"{aim['verdict']}: {aim['aim']}: {text(aim['got'])}, at most {text(aim['at_most'])} wanted")
    return "\n".join(told)


if __name__ == "__main__":
    main()
