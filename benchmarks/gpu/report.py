"""docs/gpu.md from what ``benchmarks.gpu.run`` saved on GPUs.

    python -m benchmarks.gpu.report

Every ``benchmarks/results/gpu-*.json`` that was measured on a GPU has its part; without one the page says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.aims import Found, aims, memory_share, ms_of, text
from benchmarks.serving.tables import ROOFLINE_MS
from tgate_engine.atomic import write_atomically

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
HEAD = """# On a GPU

`python -m benchmarks.gpu.report` writes this page from what `benchmarks/gpu/run.py` saved
([what is measured, and how](../benchmarks/gpu/README.md)); nothing on it is typed by hand.
"""
NOTHING = """
**Not measured.** No GPU engine of this project has run on a GPU yet. What has run without one is in
[engines.md](engines.md#what-has-run-and-what-has-not).
"""


def page(found: Sequence[tuple[str, Found]]) -> str:
    """The page. ``found``: files of results, by their paths from ``docs``; those of a CPU are left out."""
    parts = [_part(path, each) for path, each in found if each["settings"]["device"] == "cuda"]
    return HEAD + ("\n".join(["", *parts]) if parts else NOTHING)


def stages(path: str, found: Found) -> str:
    """What a model's loops took as an engine's code went on, where the time of its graphs went, and what settings were
    tried: ``ort-cuda-<GPU>.json``."""
    lines = [
        f"### {found['model']} on {found['engine']}, as its code went on",
        "",
        f"[{path.rpartition('/')[2]}]({path})",
        "",
    ]
    plans, graphs = (list(found["stages"][0][key]) for key in ("loops_ms", "graphs_ms"))
    head = ("code", *(f"{name}, ms" for name in (*plans, *graphs)))
    rows = (
        (stage["what"], *(text(stage[key].get(name)) for key, names in _columns(plans, graphs) for name in names))
        for stage in found["stages"]
    )
    lines += _table(head, rows)
    profiled = [stage for stage in found["stages"] if "kernels" in stage]
    kinds = list(dict.fromkeys(kind for stage in profiled for g in stage["kernels"].values() for kind in g["kinds"]))
    lines += ["Kernels of one call, by PyTorch's profiler, in ms (launches):", ""]
    lines += _table(
        ("code", "graph", "all", *kinds),
        (
            (stage["what"], name, text(graph["ms"]), *(_kind(graph["kinds"].get(kind)) for kind in kinds))
            for stage in profiled
            for name, graph in stage["kernels"].items()
        ),
    )
    lines += [f"Settings of the provider, {found['tried_how']}:", ""]
    lines += _table(
        (
            "settings",
            "with",
            "gated, ms",
            *(f"{name}, ms" for name in found["tried"][0]["graphs_ms"]),
            "open and bind, s",
        ),
        (
            (
                row["settings"],
                str(row["with"]),
                text(row["gated_ms"]),
                *map(text, row["graphs_ms"].values()),
                text(row["open_and_bind_s"]),
            )
            for row in found["tried"]
        ),
    )
    return "\n".join(lines)


def hosts(path: str, found: Found) -> str:
    """libtgate beside Python: ``libtgate-<GPU>.json``."""
    lines = [f"### {found['bundle']} on {found['engine']}, from C++", "", f"[{path.rpartition('/')[2]}]({path})", ""]
    rows = []
    for name, host in found["hosts"].items():
        ms = [host["plans"][plan]["loop_ms"] for plan in ("gated", "guidance_stopped", "ungated")]
        step, beside = host["plans"]["gated"]["step_ms"], host.get("latents_beside_python", {}).get("gated", {})
        apart = beside["largest_difference"] / beside["largest_latent"] if beside else None
        rows.append(
            (name, *map(text, (*ms, step["p50"], step["p99"], host["open_and_bind_s"], host["held_mib"], apart)))
        )
    head = (
        "host",
        "gated, ms",
        "guidance stopped",
        "ungated",
        "step p50",
        "p99",
        "open and bind, s",
        "GPU memory, MiB",
    )
    lines += _table((*head, "latents apart from the first host's"), iter(rows))
    return "\n".join(lines)


def _part(path: str, found: Found) -> str:
    settings, done = found["settings"], found["sections"]
    models = dict.fromkeys(name.partition("/")[0] for name in done)
    engines = [name for name, facts in found["engines"].items() if facts["says"] == "ready"]
    lines = [f"## {settings['gpu']}" + (", small models" if settings.get("tiny") else ""), ""]
    facts = [f"[{path.rpartition('/')[2]}]({path})", *(f"{k} {v}" for k, v in settings.get("packages", {}).items())]
    lines += [f"{', '.join(facts)}; {_repeats(found)} repeats after {settings['warm_ups']} to warm up.", ""]
    if not settings.get("tiny"):  # they were set for the published sizes
        lines += _table(("aimed at", "at most", "got", ""), _aims(found))
    for model in models:
        lines += [f"### {model}", ""]
        lines += _table(
            ("engine", "gated, ms", "guidance stopped", "ungated", "ungated / gated", "step p50", "p99", "worst error"),
            (_loops(found, model, engine) for engine in engines),
        )
        lines += _table(
            ("engine", "graph", "ms", "TFLOP/s", "estimated before, ms", "over that"),
            (row for engine in engines for row in _graphs(done, model, engine)),
        )
        lines += _table(
            ("engine", "first opening, s", "second", "all graphs' memory over one's"),
            (_opens(done, model, engine) for engine in engines),
        )
        peers = done.get(f"{model}/peers", {})
        ours = next((ms for name, ms in peers.get("ms", {}).items() if name.endswith(" gated")), None)
        lines += _table(
            ("in turns, in one process", "ms", "over our gated loop"),
            ((name, text(ms), text(ms / ours if ours else None)) for name, ms in peers.get("ms", {}).items()),
        )
    failed = [f"- {name}: {data['error']}" for name, data in done.items() if data["status"] == "failed"]
    failed += [f"- {name}: {facts['says']}" for name, facts in found["engines"].items() if facts["says"] != "ready"]
    return "\n".join(lines + (["What did not run:", "", *failed, ""] if failed else []))


def _repeats(found: Found) -> str:
    """How often loops were taken: settings are the last run's, and a file may be several runs'."""
    taken = set()
    for section in found["sections"].values():
        taken |= {len(plan["runs_ms"]) for plan in section.get("plans", {}).values() if "runs_ms" in plan}
        taken |= {len(runs) for runs in section.get("runs_ms", {}).values()}
    least, most = min(taken, default=found["settings"]["repeats"]), max(taken, default=found["settings"]["repeats"])
    return str(most) if least == most else f"{least} to {most}"


def _aims(found: Found) -> Iterator[tuple[str, ...]]:
    for aim in aims(found):
        yield (aim["aim"], text(aim["at_most"]), text(aim["got"]), aim["verdict"])


def _columns(plans: Sequence[str], graphs: Sequence[str]) -> tuple[tuple[str, Sequence[str]], ...]:
    return (("loops_ms", plans), ("graphs_ms", graphs))


def _kind(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{text(found['ms'])} ({found['launches']:.0f})"


def _loops(found: Found, model: str, engine: str) -> tuple[str, ...]:
    done = found["sections"]
    times = [ms_of(found, model, engine, plan) for plan in ("gated", "guidance_stopped", "ungated")]
    steps = done.get(f"{model}/{engine}/loops", {}).get("plans", {}).get("gated", {}).get("step_ms", {})
    faster = times[2] / times[0] if times[0] and times[2] else None
    worst = done.get(f"{model}/{engine}/check", {}).get("worst")
    return (engine, *map(text, (*times, faster, steps.get("p50"), steps.get("p99"), worst)))


def _graphs(done: Mapping[str, Found], model: str, engine: str) -> Iterator[tuple[str, ...]]:
    graphs: Mapping[str, Mapping[str, float]] = done.get(f"{model}/{engine}/loops", {}).get("graphs", {})
    for name, own in graphs.items():
        limit = ROOFLINE_MS.get(name) if model == "sdxl" else None  # of an H100, at the size that is measured
        over = own["ms"] / limit if limit else None
        yield (engine, name, *map(text, (own["ms"], own["tflop_per_s"], limit, over)))


def _opens(done: Mapping[str, Found], model: str, engine: str) -> tuple[str, ...]:
    seconds = [done.get(f"{model}/{engine}/open/{way}", {}).get("open_s") for way in ("first", "second")]
    return (engine, *map(text, (*seconds, memory_share(done, model, engine))))


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]]) -> list[str]:
    """Markdown; nothing where there is no row that says anything."""
    told = [row for row in rows if any(cell not in ("-", "") for cell in row[1:])]
    if not told:
        return []
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *told)] + [""]


def saved(folder: Path = RESULTS) -> list[tuple[str, dict[str, Any]]]:
    """What lies in the folder of results, by path from ``docs``."""
    return _read(folder, "gpu-*.json")


def whole(folder: Path = RESULTS) -> str:
    """The page of all that lies there."""
    more = [stages(*each) for each in _read(folder, "ort-cuda-*.json")]
    more += [hosts(*each) for each in _read(folder, "libtgate-*.json")]
    return "\n".join([page(saved(folder)), *more])


def _read(folder: Path, pattern: str) -> list[tuple[str, Found]]:
    files = sorted(folder.glob(pattern), key=lambda file: file.stem)  # a model's file before that of the small ones
    return [(f"../benchmarks/results/{file.name}", json.loads(file.read_text("utf-8"))) for file in files]


def main() -> None:
    write_atomically(PAGE, whole().encode())
    print(PAGE.relative_to(ROOT))


if __name__ == "__main__":
    main()
