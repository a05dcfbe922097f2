"""docs/performance.md and its pictures, from what `python -m benchmarks.performance` saved and, where that was run,
`python -m benchmarks.pipelines`.

python -m benchmarks.performance_page
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers import OPENVINO_ALONE
from benchmarks.pipelines import PACKAGES
from tgate_engine.atomic import write_atomically

ROOT = Path(__file__).parents[1]
PLANS = {"default": "gated", "guidance_stopped": "guidance stopped at m", "ungated": "ungated"}
GRAPHS = ("full", "reuse_self", "reuse_cross", "unguided")
INTRODUCTION = """# Performance

Made from [saved results](../benchmarks/results/performance.json) by `python -m benchmarks.performance_page`; nothing
here is written by hand but the words. `python -m benchmarks.performance` measures.

How to read it. Gated, guidance stopped at m, and ungated loops of one engine take turns in one process, so that a
machine that slows down slows all of them: trust the ratios before the milliseconds. *Faster* is the ungated loop's
time over this one's; *fewer MACs* is the limit that arithmetic sets, all multiply-accumulates counted from the
graphs; *of the limit* is one over the other, and what is lost below 100 % is the engine's. Every figure is of two to
seven turns, the first of a large model's among them, which are slower: a few per cent either way are noise. Most of
the saving is dropping guidance, as the row between shows. *Host* is what a step costs outside the engine's own call.
Memory is the process's proportional set size after one graph has run, and after three. *Open* is from nothing: with
aoti it holds the compiling, which a second opening finds done. *Load* is the machine's load average when the engine
was done: where it is well above the number of cores, other work slowed this engine, and its milliseconds are not to
be compared with the next one's.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/performance.json")
    parser.add_argument("--pipelines", type=Path, default=ROOT / "benchmarks/results/pipelines.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs/performance.md")
    args = parser.parse_args()
    found = json.loads(args.results.read_text())
    pictures = args.page.parent / "images"
    speedups(found, pictures / "performance-speedup.png")
    latencies(found, pictures / "performance-latency.png")
    memories(found, pictures / "performance-memory.png")
    beside = json.loads(args.pipelines.read_text()) if args.pipelines.exists() else None
    write_atomically(args.page, page(found, beside).encode())


def page(found: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> str:
    """The whole page as Markdown. ``beside``: whole pictures beside other pipelines."""
    lines = [INTRODUCTION, "![speed-up against the limit](images/performance-speedup.png)\n"]
    lines.append("![milliseconds of each graph](images/performance-latency.png)\n")
    lines.append("![memory with one graph and with three](images/performance-memory.png)\n")
    for parts in found.values():
        engines = engines_of(parts)
        first = next(iter(engines.values()), None)
        if first is None:
            continue
        s, on = first["settings"], first["taken_on"]
        rules = ", ".join(f"{name}={s['plan_settings'][name]}" for name in ("n", "m", "k"))
        lines.append(f"## {s['model']}, {s['size'].replace('x', '×')}, {rules}\n")
        isa = f" ({', '.join(on['isa'])})" if on.get("isa") else ""
        lines.append(
            f"`tgate-export {parts['export']}`, on {on['cores']} cores of {on['cpu']}{isa}; batch {s['batch']}.\n"
        )
        lines += [*table(engines), "", *graph_table(engines), ""]
        lines += [f"{name}: {data['note']}.\n" for name, data in engines.items() if "note" in data]
        if "peers" in parts:
            lines += [*peer_table(parts["peers"]), ""]
    if beside is not None:
        lines += pipelines(beside)
    return "\n".join(lines).rstrip() + "\n"


def table(engines: Mapping[str, Any]) -> list[str]:
    """One row for each engine and plan."""
    rows = ["| engine | plan | loop, s | faster | fewer MACs | of the limit | step p50 / p99, ms | host, ms a step |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for name, data in engines.items():
        base = data["plans"]["ungated"]
        for plan, title in PLANS.items():
            if plan not in data["plans"]:
                continue
            p = data["plans"][plan]
            faster, fewer = base["ms"] / p["ms"], base["macs"]["all"] / p["macs"]["all"]
            steps = f"{p['step_ms']['p50']:.1f} / {p['step_ms']['p99']:.1f}"
            ratios = f"{faster:.2f}× | {fewer:.2f}× | {100 * faster / fewer:.0f} %"
            host = f"{p['outside_engine_ms_per_step']:.3f}"
            rows.append(f"| {name} | {title} | {p['ms'] / 1e3:.2f} | {ratios} | {steps} | {host} |")
    return rows


def graph_table(engines: Mapping[str, Any]) -> list[str]:
    """Milliseconds of each graph, and memory."""
    columns = ("engine", "full, ms", *GRAPHS[1:], "open, s", "memory, one graph", "three graphs", "load")
    rows = [f"| {' | '.join(columns)} |", "|---|---|---|---|---|---|---|---|---|"]
    for name, data in engines.items():
        times = [data["graphs"].get(graph) for graph in GRAPHS]
        cells = [f"{time['ms']:.1f}" if time else "-" for time in times]
        held = data["memory"]
        sizes = [f"{held[graph] / 2**30:.2f} GiB" for graph in ("full", "reuse_cross")]
        load = f"{data['taken_on']['load']:.1f}"
        rows.append(f"| {name} | {' | '.join(cells)} | {data['open_s']:.1f} | {' | '.join(sizes)} | {load} |")
    return rows


def peer_table(peers: Mapping[str, Any]) -> list[str]:
    """Whole loops beside diffusers and the paper's package, in turns."""
    base = min(peers["runs_ms"]["diffusers eager"])
    rows = [f"Beside its peers, in turns: PyTorch {peers['torch']}, {peers['dtype']}, {peers['threads']} threads; the"]
    rows += ["median and the fastest of all turns. *Faster* compares the fastest, since other work on the machine only"]
    rows += ["ever adds. *First loop* has compiling in it.\n"]
    rows += ["| | turns | median, s | fastest, s | faster than eager | first loop, s |", "|---|---|---|---|---|---|"]
    for name, turns in peers["runs_ms"].items():
        least, first = min(turns), peers["first_s"].get(name)
        times = f"{statistics.median(turns) / 1e3:.2f} | {least / 1e3:.2f} | {base / least:.1f}×"
        rows.append(f"| {name} | {len(turns)} | {times} | {f'{first:.0f}' if first else '-'} |")
    alone = peers["runs_ms"].get(OPENVINO_ALONE)
    if alone:
        gated = min(peers["runs_ms"][f"{peers['engine']} gated"])
        rows.append(f"\n{peers['engine']} gated is {min(alone) / gated:.2f} times as fast as {OPENVINO_ALONE}.")
    return rows + [f"\n{name} failed: {said}" for name, said in peers["failed"].items()]


def pipelines(found: Mapping[str, Any]) -> list[str]:
    """Whole pictures beside other pipelines, and where those are ahead."""
    s, rounds = found["settings"], found["rounds"]
    seconds = {key: turns for key, turns in _turns(found).items() if turns}
    isa = f" ({', '.join(s['isa'])})" if s["isa"] else ""
    versions = ", ".join(f"{name} {s[name]}" for name in PACKAGES)
    busiest = max(row["others_cpu_s"] / row["wall_s"] for each in rounds for row in each.values())
    lines = [
        "## Whole pictures, beside other pipelines\n",
        f"`python -m benchmarks.pipelines` ([what it saved](../benchmarks/results/pipelines.json)): SD 1.5 with the "
        f"same random weights in all, from prompt to pixels, {s['pixels']} × {s['pixels']}, {s['steps']} steps of "
        f"{s['sampler']}, guidance {s['guidance_scale']}; gated is m={s['m']}, k={s['k']}. On {s['cores']} cores of "
        f"{s['cpu']}{isa}, {s['threads']} threads; {versions}. Processes take turns, {len(rounds)} of each, and draw "
        f"after a warm-up; meanwhile other work took at most {busiest:.2f} of a core. *Times ours* is a picture's time "
        "over that of tgate openvino gated in the same precision, of the medians and, in brackets, the least and the "
        "most of the rounds. *Holds* is the peak of a process's own memory, and with what it maps of files. *Apart* is "
        "the root mean square of a picture's differences from tgate openvino f32 ungated, in levels of 255: what is "
        "near 0 does the same work.\n",
        "| precision | pipeline | | picture, s | times ours | opens in, s | holds, GiB | apart |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, way), turns in sorted(seconds.items(), key=lambda item: _precision(found, item[0][0])):
        own = [each[name] for each in rounds if name in each]
        opens = statistics.median(row["open_s"] for row in own if "open_s" in row)
        holds = max(row["anonymous_bytes"] for row in own) / 2**30
        mapped = max(row["anonymous_bytes"] + row["file_bytes"] for row in own) / 2**30
        told = next(row["ways"][way] for row in own if "s" in row.get("ways", {}).get(way, {}))
        cells = [_precision(found, name), name, way, f"{statistics.median(turns.values()):.1f}"]
        cells += [_times_ours(found, seconds, name, way), f"{opens:.1f}", f"{holds:.1f} / {mapped:.1f}"]
        lines.append(f"| {' | '.join([*cells, str(told.get('apart', '-'))])} |")
    return [*lines, "", *_ahead(found, seconds), *_said(found), ""]


def _turns(found: Mapping[str, Any]) -> dict[tuple[str, str], dict[int, float]]:
    """Seconds of each pipeline's way, by round."""
    turns: dict[tuple[str, str], dict[int, float]] = {}
    for name, process in found["settings"]["processes"].items():
        for way in process["ways"]:
            every = enumerate(each.get(name, {}).get("ways", {}).get(way, {}).get("s") for each in found["rounds"])
            turns[name, way] = {number: s for number, s in every if s is not None}
    return turns


def _precision(found: Mapping[str, Any], name: str) -> str:
    return str(found["settings"]["processes"][name]["precision"])


def _own(found: Mapping[str, Any], precision: str) -> str:
    """Our process that the others of a precision are compared with."""
    return next(name for name in found["settings"]["processes"] if _precision(found, name) == precision)


def _times_ours(found: Mapping[str, Any], seconds: Mapping[tuple[str, str], Any], name: str, way: str) -> str:
    ours = seconds.get((_own(found, _precision(found, name)), "gated"))
    if ours is None:
        return "-"
    turns = seconds[name, way]
    each = [turns[number] / ours[number] for number in turns if number in ours]
    ratio = statistics.median(turns.values()) / statistics.median(ours.values())
    return f"{ratio:.2f}× ({min(each):.2f} to {max(each):.2f})" if each else f"{ratio:.2f}×"


def _ahead(found: Mapping[str, Any], seconds: Mapping[tuple[str, str], Any]) -> Iterator[str]:
    """Where other pipelines are ahead of ours: faster, opened sooner, or smaller."""
    processes, medians = found["settings"]["processes"], {k: statistics.median(v.values()) for k, v in seconds.items()}
    rows = {name: [each[name] for each in found["rounds"] if "open_s" in each.get(name, {})] for name in processes}
    for precision in dict.fromkeys(process["precision"] for process in processes.values()):
        own = _own(found, precision)
        others = [n for n, p in processes.items() if p["precision"] == precision and p["kind"] != "ours" and rows[n]]
        if not rows[own] or not others:
            continue
        won = []
        for plan in ("gated", "ungated"):
            if (own, plan) not in medians:
                continue
            base = medians[own, plan]
            faster = [f"{n} {w} ({base / s:.2f}×)" for (n, w), s in medians.items() if n in others and s < base]
            won.append(f"faster than {own} {plan} {_are(faster)}")
        opens = {name: statistics.median(row["open_s"] for row in rows[name]) for name in (own, *others)}
        sooner = [
            f"{name} ({opens[name]:.1f} s beside {opens[own]:.1f})" for name in others if opens[name] < opens[own]
        ]
        held = {name: max(row["anonymous_bytes"] for row in rows[name]) / 2**30 for name in (own, *others)}
        smaller = [f"{n} ({held[n]:.1f} GiB beside {held[own]:.1f})" for n in others if held[n] < held[own]]
        won += [f"opened sooner {_are(sooner)}", f"with less memory of their own {_are(smaller)}"]
        yield f"Where they are ahead, {precision}: {'; '.join(won)}.\n"


def _are(names: list[str]) -> str:
    return f"are {', '.join(names)}" if len(names) > 1 else f"is {names[0]}" if names else "is none"


def _said(found: Mapping[str, Any]) -> Iterator[str]:
    """What pipelines said of the calls of their ways, in the first round; what changed nothing, and what failed."""
    for name, row in found["rounds"][0].items():
        if "failed" in row:
            yield f"{name} failed: {row['failed'].strip().splitlines()[-1]}\n"
        for way, told in row.get("ways", {}).items():
            if "failed" in told:
                yield f"{name} {way} failed: {told['failed']}\n"
            if told.get("same_as"):
                yield f"{name} {way} draws the picture of {told['same_as'][0]} to the bit: it does nothing here.\n"
            if counts := [line for line in told.get("said", ()) if "skipp" in line or "calls of" in line]:
                yield f"{name} {way} says: {'; '.join(counts)}.\n"


def speedups(found: Mapping[str, Any], picture: Path) -> None:
    """Bars of each engine's speed-up, and the limit that MACs set."""
    import matplotlib.pyplot as plt

    cases = {case: engines_of(parts) for case, parts in found.items() if engines_of(parts)}
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.4), dpi=100, squeeze=False)
    for axis, (case, engines) in zip(axes[0], cases.items(), strict=True):
        places = range(len(engines))
        axis.bar(places, [data["speedup"] for data in engines.values()], color="#4878a8")
        axis.axhline(next(iter(engines.values()))["mac_ratio"], color="#c44", linestyle="--", label="limit by MACs")
        axis.set_xticks(places, list(engines), rotation=40, ha="right", fontsize=8)
        axis.set(title=case, ylabel="ungated / gated")
        axis.legend(fontsize=8, loc="lower right")
    _save(figure, picture)


def latencies(found: Mapping[str, Any], picture: Path) -> None:
    """Bars of each graph's milliseconds, by engine."""
    import matplotlib.pyplot as plt

    cases = {case: engines_of(parts) for case, parts in found.items() if engines_of(parts)}
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.4), dpi=100, squeeze=False)
    for axis, (case, engines) in zip(axes[0], cases.items(), strict=True):
        graphs = [g for g in ("full", "reuse_self", "reuse_cross") if g in next(iter(engines.values()))["graphs"]]
        width = 0.8 / len(graphs)
        for number, graph in enumerate(graphs):
            places = [place + number * width for place in range(len(engines))]
            axis.bar(places, [data["graphs"][graph]["ms"] for data in engines.values()], width, label=graph)
        axis.set_xticks(
            [place + 0.3 for place in range(len(engines))], list(engines), rotation=40, ha="right", fontsize=8
        )
        axis.set(title=case, ylabel="ms a step")
        axis.legend(fontsize=8)
    _save(figure, picture)


def memories(found: Mapping[str, Any], picture: Path) -> None:
    """Bars of what a process holds with one graph, and with three, by engine."""
    import matplotlib.pyplot as plt

    cases = {case: engines_of(parts) for case, parts in found.items() if engines_of(parts)}
    figure, axes = plt.subplots(1, len(cases), figsize=(4.2 * len(cases), 3.4), dpi=100, squeeze=False)
    for axis, (case, engines) in zip(axes[0], cases.items(), strict=True):
        for number, (graph, title) in enumerate((("full", "one graph"), ("reuse_cross", "three graphs"))):
            places = [place + number * 0.4 for place in range(len(engines))]
            axis.bar(places, [data["memory"][graph] / 2**30 for data in engines.values()], 0.4, label=title)
        axis.set_xticks(
            [place + 0.2 for place in range(len(engines))], list(engines), rotation=40, ha="right", fontsize=8
        )
        axis.set(title=case, ylabel="proportional set size, GiB")
        axis.legend(fontsize=8)
    _save(figure, picture)


def engines_of(parts: Mapping[str, Any]) -> dict[str, Any]:
    """The engines among a case's parts."""
    return {name: part for name, part in parts.items() if isinstance(part, dict) and "plans" in part}


def _save(figure: Any, picture: Path) -> None:
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main()
