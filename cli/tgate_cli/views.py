"""What commands show of their results: data in, lines out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from tgate_cli.command import LONGEST
from tgate_cli.inspect import shortened
from tgate_engine.errors import shown
from tgate_engine.plan_report import DIFFERENCES, Estimate

Row = Sequence[str]


def inspection(data: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Show what :func:`tgate_cli.inspect.describe` makes."""
    out = out or sys.stdout
    size = data["bytes"]
    guidance = {"classifier-free": "with guidance", "embedded": "with embedded guidance", "none": "without guidance"}
    frames = f"{data['frames']} frames of " if data["frames"] > 1 else ""
    _print(
        out,
        f"{data['model']} ({data['family']}), {frames}{_shapes(data['shapes'])}, {data['dtype']}, "
        f"{guidance[data['guidance']]}, licence {data['licence']}",
    )
    options = {"guidance rescaled by": data["guidance_rescale"], "CLIP layers skipped:": data["clip_skip"]}
    if any(options.values()):
        _print(out, ", ".join(f"{what} {value:g}" for what, value in options.items() if value))
    weights = _bytes(size["weights"]) if size["weights"] else "none"
    _print(out, f"on disk {_bytes(size['total'])}: weights {weights}, graphs {_bytes(size['graphs'])}")
    for oracle in dict.fromkeys(data["goldens"].values()):
        names = (name for name, recorder in data["goldens"].items() if recorder == oracle)
        _print(out, f"goldens {', '.join(names)}: recorded by {oracle or 'an unnamed oracle'}")
    for name, each in data["adapters"].items():
        _print(out, f"adapter {name}: {each['layers']} layers, rank {each['rank']}, {_bytes(each['bytes'])}")
    for name, graphs in data["controls"].items():
        each = ", ".join(f"{graph} {_macs(macs['all'])} MACs" for graph, macs in graphs.items())
        _print(out, f"ControlNet {name}: {each} a step at which it runs")
    for name, plan in data["plans"].items():
        _print(out, "")
        _plan(name, plan, "" if len(data["shapes"]) == 1 else f", {data['size']}", out)


def _plan(name: str, plan: Mapping[str, Any], size: str, out: TextIO) -> None:
    title = f"plan {name}: {facts(plan['settings'])}, {plan['sampler']}, guidance {plan['guidance_scale']:g}{size}"
    rows = [
        (
            str(step["index"]),
            step["phase"],
            step["graph"],
            f"{step['timestep']:.6g}",
            shortened(step["reads"]),
            shortened(step["writes"]),
            _macs(step["macs"]["paper"]),
            _macs(step["macs"]["all"]),
        )
        for step in plan["steps"]
    ]
    headers = ("step", "phase", "graph", "timestep", "reads", "writes", "paper MACs", "all MACs")
    table(title, headers, rows, right=(0, 3, 6, 7), out=out)
    for what in ("paper", "all"):
        own = plan["macs"][what]
        compared = [
            f"; {baseline} {_macs(other['macs'][what])}, {_ratio(other['macs'][what], own)} as many"
            for baseline, other in plan["baselines"].items()
        ]
        _print(out, f"{what} MACs {_macs(own)}{''.join(compared)}")
    for line in quality(plan["report"]):
        _print(out, line)
    _print(out, f"carries of one request for one image: {_bytes(plan['carry_bytes'])}")
    need = plan["memory"]
    _print(
        out,
        f"memory, as planned: weights {_bytes(need['weights'])}, buffers of a request {_bytes(need['request'])}, "
        f"scratch {_bytes(need['scratch'])}; together {_bytes(need['peak'])} where weights are shared, and "
        f"{_bytes(need['request'] + need['scratch'])} more for each further request at once",
    )


def quality(report: Mapping[str, Any] | None) -> list[str]:
    """What a plan's report says, a line each (:class:`tgate_engine.plan_report.PlanReport`, as JSON values)."""
    if report is None:
        return ["quality not measured; `tgate tune` does that"]
    metric, precision = report["metric"], f" in {report['precision']}" if report["precision"] else ""
    several = "prompt" if report["prompts"] == 1 else "prompts"
    threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}, " if report["threads"] else ""
    link = "beside" if metric in DIFFERENCES else "to"
    beside = ", ".join(f"{name.replace('_', ' ')} {_quality(name, of)}" for name, of in report["beside"].items())
    elsewhere = "".join(f", and those of {engine} {_quality(metric, of)}" for engine, of in report["elsewhere"].items())
    return [
        f"quality: {metric} {_quality(metric, report['quality'])}{f' ({beside})' if beside else ''} {link} the "
        f"ungated pictures of the same seeds, where those of other seeds have {_quality(metric, report['unrelated'])}"
        f"{elsewhere}; {report['images']} pictures of {report['prompts']} {several}",
        f"time of a picture: {report['measured_ms']:.1f} ms, {_ratio(report['ungated_ms'], report['measured_ms'])} as "
        f"fast as ungated (predicted {report['predicted_ms']:.1f} ms); {report['engine']} {report['engine_version']}"
        f"{precision}, {threads}{report['machine']}",
    ]


def _quality(metric: str, of: Mapping[str, float]) -> str:
    return Estimate(**of).told(metric)


def tuning(data: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Show what ``tgate tune`` found."""
    out = out or sys.stdout
    report = data["report"]
    rows = [
        (
            "→" if point["plan"] == data["chosen"] else "",
            point["plan"],
            f"{point['predicted_ms']:.1f}",
            _ratio(data["ungated_ms"], point["predicted_ms"]),
            _quality(report["metric"], point["quality"]),
        )
        for point in data["front"]
    ]
    more = "better" if report["metric"] in DIFFERENCES else "nearer"
    title = (
        f"plans that none is both faster and {more} than; {data['tried']} of {data['plans']} were drawn to the end, "
        f"{report['images']} pictures each"
    )
    headers = ("", "plan", "picture ms", "faster", f"{report['metric']} (95 %)")
    table(title, headers, rows, right=(2, 3, 4), out=out)
    _print(out, "")
    for line in quality(report):
        _print(out, line)
    error = data["prediction_error"]
    _print(out, f"predicted over measured: plan {error['plan']:+.1%}, ungated {error['ungated']:+.1%}")
    _print(out, f"{data['bundle']}: plan {data['plan']}, {facts(report['settings'])}; {data['report_file']}")


def _shapes(shapes: Sequence[Mapping[str, Any]]) -> str:
    """What was exported: ``1024×1024 (1 or 2 to 4 at once), 832×1216 (1 at once)``."""
    batches: dict[str, list[str]] = {}
    for shape in shapes:
        least, most = shape["batch"]
        batch = str(least) if least == most else f"{least} to {most}"
        batches.setdefault(f"{shape['width']}×{shape['height']}", []).append(batch)
    return ", ".join(f"{size} ({' or '.join(several)} at once)" for size, several in batches.items())


def facts(settings: Mapping[str, Any]) -> str:
    """A plan's settings for a reader: ``tgate, n=25, m=10``. Texts stand alone."""
    known = {name: value for name, value in settings.items() if value is not None}
    return ", ".join(value if isinstance(value, str) else f"{name}={value}" for name, value in known.items())


def models(known: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Show the models of ``tgate-export``: ``known`` maps names to `tgate_export.families.Model`."""
    rows = [
        (
            name,
            model.facts.name,
            str(model.steps),
            str(model.gate),
            str(model.self_interval),
            str(model.warm_up),
            model.sampler,
            f"{model.guidance_scale:g}",
            " + ".join([model.checkpoint, *model.elsewhere.values()]),
            model.licence,
        )
        for name, model in known.items()
    ]
    headers = ("model", "family", "n", "m", "k", "w", "sampler", "guidance", "checkpoint", "licence of the weights")
    out = out or sys.stdout
    table("models", headers, rows, right=(2, 3, 4, 5, 7), out=out)
    for name, model in known.items():
        if model.tuned_facts is not None:
            words = facts(model.tuned_facts)
            print(f"{name}: where no part of a plan is named, its default is {words}: `tgate tune` found it", file=out)


def engines(entries: Sequence[Mapping[str, str]], out: TextIO | None = None) -> None:
    """Show what :func:`tgate_runtime.engines.installed` lists."""
    rows = [(e["name"], e["runs_on"], e["version"] or "-", e["says"]) for e in entries]
    table("engines", ("engine", "runs on", "version", "here"), rows, out=out or sys.stdout)


def benchmark(data: Mapping[str, Any], out: TextIO | None = None) -> None:
    """Show what :func:`tgate_runtime.benchmark.bench` measured."""
    out = out or sys.stdout
    s = data["settings"]
    threads = "the engine's own number of" if s["threads"] is None else s["threads"]
    computes = f" in {s['precision']}" if s["precision"] else ""
    _print(
        out,
        f"{s['model']}, {s['size'].replace('x', '×')}, {s['dtype']}, batch {s['batch']}; {s['engine']} "
        f"{s['engine_version']}{computes}, memory {s['memory']}, {threads} threads, {s['cpu']}; opened in "
        f"{data['open_s']:.1f} s; medians of {s['repeats']}",
    )
    calls = [
        (
            name,
            f"{graph['ms']:.2f}",
            _macs(graph["macs"]["all"]),
            f"{graph['gmacs_per_s']:.1f}" if graph["macs"]["all"] else "",
        )
        for name, graph in data["graphs"].items()
    ]
    table("one call", ("graph", "ms", "all MACs", "GMAC/s"), calls, right=(1, 2, 3), out=out)
    _print(out, f"for comparison, NumPy multiplies float32 matrices at {data['sgemm_gmacs_per_s']:.1f} GMAC/s here")
    _print(out, "")
    base = next((plan for name, plan in data["plans"].items() if name != s["plan"]), None)
    rows: list[Row] = []
    for name, plan in data["plans"].items():
        faster, macs = "-", "-"
        if base is not None:
            faster, macs = _ratio(base["ms"], plan["ms"]), _ratio(base["macs"]["all"], plan["macs"]["all"])
        outside = f"{100 * plan['outside_engine']:.1f} %"
        step = f"{plan['step_ms']['p50']:.1f} / {plan['step_ms']['p99']:.1f}"
        rows.append((name, f"{plan['ms']:.1f}", f"{plan['picture_ms']:.1f}", step, faster, macs, outside))
    headers = ("plan", "loop ms", "picture ms", "step ms p50 / p99", "faster", "fewer MACs", "outside the engine")
    table(f"plan {s['plan']}: {facts(s['plan_settings'])}", headers, rows, right=(1, 2, 3, 4, 5, 6), out=out)


def table(title: str, headers: Row, rows: Sequence[Row], *, right: Sequence[int] = (), out: TextIO) -> None:
    """A table: drawn by rich at a terminal where it is installed, aligned plain text elsewhere.

    ``right``: columns that hold numbers.
    """
    headers, *rows = [[shown(cell, LONGEST) for cell in row] for row in (headers, *rows)]
    if out.isatty() and _rich_table(shown(title, LONGEST), headers, rows, right, out):
        return
    widths = [max(len(row[i]) for row in (headers, *rows)) for i in range(len(headers))]
    _print(out, title)
    for row in (headers, *rows):
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        _print(out, "  ".join(cells).rstrip())


def _rich_table(title: str, headers: Row, rows: Sequence[Row], right: Sequence[int], out: TextIO) -> bool:
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    drawn = Table(
        title=Text(title, no_wrap=True),
        title_justify="left",
        header_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for i, header in enumerate(headers):
        drawn.add_column(header, justify="right" if i in right else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*map(Text, row))
    console = Console(file=out)
    # A terminal that breaks a long line is easier to read than a table that squeezes every cell.
    widest = console.measure(drawn, options=console.options.update(max_width=1000)).maximum
    console.width = max(console.width, widest)
    console.print(drawn)
    return True


def _print(out: TextIO, text: str) -> None:
    out.write(f"{shown(text, LONGEST)}\n")


def _macs(count: float) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= scale:
            return f"{count / scale:.4g} {unit}"
    return f"{count:g}"


def _bytes(count: int) -> str:
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def _ratio(more: float, less: float) -> str:
    return f"{more / less:.2f}×" if less else "-"
