"""The paper's multiply-accumulates, from graphs exported without weights.

    python -m benchmarks.macs --work /tmp/macs --output benchmarks/results/macs.json --table docs/macs.md

Every model is exported with ``tgate-export --weights none``, every row of the paper's tables becomes a plan (``tgate
plan``), and ``tgate inspect --json`` gives the totals. Takes some minutes; bundles in ``--work`` are used again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tgate_engine.atomic import write_atomically

TABLES = Path(__file__).parents[1] / "tests" / "data" / "paper_tables.json"
MODELS: Mapping[str, Sequence[str]] = {
    "SD 1.5": ("--model", "sd15"),
    "SD 2.1": ("--model", "sd21"),
    "SDXL": ("--model", "sdxl"),
    "SVD": ("--model", "svd"),
    "PixArt-alpha": ("--model", "pixart-alpha"),
    "Open-Sora-Plan": ("--model", "opensora"),
    "SDXL, LCM": ("--model", "lcm-sdxl"),
    "PixArt-alpha, LCM": ("--model", "lcm-pixart"),
    "SDXL, guidance stopped": ("--model", "sdxl"),
    "PixArt-alpha, guidance stopped": ("--model", "pixart-alpha", "--m", "10"),
    "SDXL, DeepCache": ("--model", "sdxl", "--method", "deepcache", "--cache-branch", "1"),
    "SDXL, DeepCache and TGATE": (
        *("--model", "sdxl", "--method", "tgate+deepcache", "--m", "13"),
        *("--cache-branch", "1"),
    ),
    "SD 2.1, 768": ("--model", "sd21"),
    "SD 2.1, 1024": ("--model", "sd21", "--height", "1024", "--width", "1024"),
    "SD 2.1, 2048": ("--model", "sd21", "--height", "2048", "--width", "2048"),
}
"""The paper's names, and how each is exported."""


def main() -> None:
    """Export, count, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="where the bundles go")
    parser.add_argument("--output", type=Path, required=True, help="JSON of every row")
    parser.add_argument("--table", type=Path, help="the same as Markdown")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    rows = [counted(row, args.work) for row in json.loads(TABLES.read_text())["rows"]]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, (json.dumps({"rows": rows}, indent=1) + "\n").encode())
    if args.table is not None:
        write_atomically(args.table, markdown(rows).encode())


def counted(row: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """``row`` with the engine's count, in tera-MACs, and its distance from the paper's."""
    bundle = exported(row["model"], work)
    if "graph" in row:
        macs = inspected(bundle)["shapes"][0]["graphs"][row["graph"]]["macs"]
    else:
        name = planned(row, bundle)
        macs = inspected(bundle)["plans"][name]["macs"]
    engine = macs["paper"] / 1e12
    print(f"{row['model']}: {row['tera_macs']} in the paper, {engine:.3f} here", flush=True)
    return {
        **row,
        "engine_tera_macs": round(engine, 4),
        "engine_tera_macs_with_attention": round(macs["all"] / 1e12, 4),
        "difference": round(engine / row["tera_macs"] - 1, 5),
    }


def exported(model: str, work: Path) -> Path:
    """The bundle of one of :data:`MODELS`, made if it is not there."""
    bundle = work / "-".join(part.strip("-") for part in MODELS[model])
    if not bundle.exists():
        _run("export_main", *MODELS[model], "--weights", "none", "--dtype", "fp16", "--output", str(bundle), "--quiet")
    return bundle


def planned(row: Mapping[str, Any], bundle: Path) -> str:
    """The name of the row's plan in the bundle, added if it is not there."""
    plans = inspected(bundle)["plans"]
    if "c" in row:
        told = plans["default"]["settings"]
        assert (told["n"], told.get("m"), told["c"]) == (row["n"], row["m"], row["c"]), row
        return "default"
    if row["m"] is None or row["model"].endswith("guidance stopped"):
        name = "ungated" if row["m"] is None else "guidance_stopped"
        told = plans[name]["settings"]
        assert (told["n"], told.get("m")) == (row["n"], row["m"]), row
        return name
    name = f"m{row['m']}-k{row['k']}"
    if name not in plans:
        settings = ("--m", str(row["m"]), "--k", str(row["k"]), "--steps", str(row["n"]))
        _run("main", "plan", str(bundle), "--name", name, *settings, "--quiet")
    return name


def inspected(bundle: Path) -> dict[str, Any]:
    """``tgate inspect --json`` of a bundle."""
    found: dict[str, Any] = json.loads(_run("main", "inspect", str(bundle), "--json", "--quiet"))
    return found


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a page for readers."""
    lines = [
        "# The paper's arithmetic",
        "",
        "Multiply-accumulates of one result, in tera: the paper's (Tables 1 to 5 and A6 of arXiv 2404.02747v3; linear",
        "and convolution layers only) beside the engine's, counted in the exported graphs of the published",
        "configurations, and the engine's with the two attention products. Written by `python -m benchmarks.macs`;",
        "a test checks it. Where a row differs by more than 0.5 %, the last column says why.",
        "",
        "Table 4's Adaptive Guidance is guidance that stops at m: plan `guidance_stopped` of an export with `--m 10`.",
        "Table 5 names neither m, the interval of DeepCache nor its branch; its two figures are those of",
        "`--cache-interval 3 --cache-branch 1`, and of m = 13 with TGATE.",
        "",
        "| table | model | n | m | k | paper | engine | difference | with attention | |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row["table"],
            row["model"],
            row["n"],
            row["m"] or "–",
            row["k"],
            f"{row['tera_macs']:g}",
            f"{row['engine_tera_macs']:.3f}",
            f"{row['difference']:+.2%}",
            f"{row['engine_tera_macs_with_attention']:.3f}",
            row.get("why_not", ""),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])


def _run(entry: str, *arguments: str) -> str:
    """One command of the product, in a process of its own."""
    code = f"import sys; from tgate_cli.main import {entry}; sys.exit({entry}(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr.strip() or f"{entry} {' '.join(arguments)} failed")
    return done.stdout


if __name__ == "__main__":
    main()
