"""docs/paper.md and its pictures, from what `python -m benchmarks.paper.run` saved.

python -m benchmarks.paper.page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgate_engine.atomic import write_atomically

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"
MODELS = ("mini-pixart", "mini-sdxl")
INTRODUCTION = """# The paper's findings, on models that we own

Made from saved results (`benchmarks/results/paper-*.json`) by `python -m benchmarks.paper.page`; `python -m
benchmarks.paper.run` measures. The paper looks at Stable Diffusion, SDXL and PixArt-α on photographs. These are the
two embedded models, which draw coloured shapes, looked at in the same way: its figures 2, 3, A1 and A4, its tables 1,
2, 6 and A1 to A5. {captions} captions that training never saw, {steps} steps of DPM-Solver++ 2M unless a row says
otherwise, the same noise in every row. A table that a model lacks was not drawn yet: the first command goes on.

*All objects right*: the judge sees every object that the caption names. *Relations right*: of the captions that say
how objects lie, those whose picture shows them so. *Fréchet distance*: to {renders} true renders, over the judge's
features in place of Inception's; smaller is nearer, and only rows of one model compare. *PSNR*: to the first row's
picture of the same seed. The 95 % interval of a share of 90 % is ±{wide} points wide: shares within it of one another
are not known to differ.
"""
FOUND = """## What holds, and what does not

- The prompt matters first. Without it before step 10, a quarter of `mini-sdxl`'s pictures and one in eight of
  `mini-pixart`'s lose an object; without it from step 10 on none of `mini-sdxl`'s do, and one in fourteen of
  `mini-pixart`'s, whose gate is at 15.
- Cross-attention settles, but to no fixed point: at the end its outputs still change by 2 % a step.
- Self-attention computed every third step leaves the objects as right on either side of the gate. By PSNR a step that
  reuses it early moves a picture more than one late: the paper finds the opposite on photographs.
- At the paper's m the method costs no share that 60 or 100 captions can tell, k included. At m = 5 it does
  for `mini-pixart`, which falls from 96 % to 84 %; `mini-sdxl` goes from 100 % to 97 %, two captions of 60.
- Guidance that is dropped at the gate is most of what gating changes, in PSNR. Its last difference kept is worth 1 to
  2 dB, and computed anew at every fifth step 12.
- Fréchet distance tells guidance more than faults: the less of it, the smaller the distance, also where a third of the
  pictures lack an object. Only rows of the same guidance compare.
"""
HEAD = "| {first} | all objects right | relations right | Fréchet distance | PSNR, dB |\n|---|---|---|---|---|"


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=ROOT / "docs/paper.md")
    args = parser.parse_args()
    found = {model: json.loads((RESULTS / f"paper-{model}.json").read_text()) for model in MODELS}
    curves(found, args.page.parent / "images/paper-convergence.png")
    write_atomically(args.page, page(found).encode())


def page(found: Mapping[str, Any]) -> str:
    """The whole page as Markdown."""
    settings = found[MODELS[0]]["settings"]
    counts = [found[model]["settings"]["captions"] for model in MODELS]
    captions = " and ".join(f"{count} (`{model}`)" for count, model in zip(counts, MODELS, strict=True))
    wide = " and ".join(f"{100 * 1.96 * (0.9 * 0.1 / count) ** 0.5:.0f}" for count in counts)
    words = INTRODUCTION.format(captions=captions, steps=settings["steps"], renders=settings["renders"], wide=wide)
    lines = [words, FOUND, "## How fast cross-attention settles (figures 2 and A4)\n"]
    lines += ["![how much cross-attention changes from step to step](images/paper-convergence.png)\n"]
    for model in MODELS:
        lines.append(_settling(model, found[model]["convergence"]))
    lines.append("\n## The prompt only first, or only last (equations 4 and 5, figure 3, tables A1 to A4)\n")
    lines.append(
        "S^F keeps the prompt for the first m steps and goes on with the null text; S^L begins with the null text and\n"
        "has the prompt from step m on.\n"
    )
    lines += _tables(found, "trajectories", "trajectory", lambda name: " self " not in name)
    lines.append("## Self-attention cached last, or first (figure A1, table A5)\n")
    lines.append("S^F computes self-attention every k-th step from step m on, S^L every k-th step before it.\n")
    lines += _tables(found, "trajectories", "trajectory", lambda name: name == "S" or " self " in name)
    lines.append("## What to add after guidance has stopped\n")
    lines.append(
        "`guidance_delta` adds the last difference of both halves to every later step. What ages it best, and is it\n"
        "worth computing both halves again now and then? After each such row comes one that spends as many halves on\n"
        "a later gate.\n"
    )
    lines += _tables(found, "ageing", "after the gate", lambda name: True)
    lines.append("## m and k; guidance, steps and samplers (tables 1, 2 and 6)\n")
    lines.append("The paper's method, drawn by the engine (`ort-cpu`, float32).\n")
    lines += _tables(found, "sweep", "plan", lambda name: True)
    return "\n".join(lines)


def _settling(model: str, found: Mapping[str, Any]) -> str:
    """In a sentence: by which step the change has fallen to a half and to a fifth of its largest."""
    curve = found["relative"]
    top = max(curve)

    def below(share: float) -> str:
        after = [i for i in range(len(curve)) if max(curve[i:]) <= share * top]
        return f"from step {after[0] + 1} on" if after else "never"

    return (
        f"- `{model}`: the change, relative to what there is, is largest at step {curve.index(top) + 1} ({top:.0%}),\n"
        f"  stays below half of that {below(0.5)}, below a fifth {below(0.2)}; at the end it is {curve[-1]:.0%}."
    )


def _tables(found: Mapping[str, Any], section: str, first: str, takes: Any) -> list[str]:
    lines = []
    for model in MODELS:
        rows = [_row(name, row) for name, row in found[model].get(section, {}).items() if takes(name)]
        if not rows:
            continue
        lines += [f"`{model}`:\n", HEAD.format(first=first), *rows]
        lines.append("")
    return lines


def _row(name: str, row: Mapping[str, float]) -> str:
    label = name.replace("SF ", "S^F ").replace("SL ", "S^L ")
    near = "same" if row["psnr_db"] > 58 else f"{row['psnr_db']:.1f}"
    return f"| {label} | {row['all_objects']:.1%} | {row['relations']:.1%} | {row['frechet']:.3f} | {near} |"


def curves(found: Mapping[str, Any], picture: Path) -> None:
    """Figure 2 beside figure A4: the mean change with its deviation, and each module's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(MODELS), 2, figsize=(9, 6), dpi=90, sharex=True)
    for row, model in zip(axes, MODELS, strict=True):
        curve = found[model]["convergence"]
        steps = range(1, len(curve["all"]) + 1)
        low = [mean - apart for mean, apart in zip(curve["all"], curve["deviation"], strict=True)]
        high = [mean + apart for mean, apart in zip(curve["all"], curve["deviation"], strict=True)]
        row[0].plot(steps, curve["all"])
        row[0].fill_between(steps, low, high, alpha=0.2)
        row[0].set(title=f"{model}: all modules", ylabel="L2 distance to the step before")
        for values in curve["modules"].values():
            row[1].plot(steps, values, linewidth=1)
        row[1].set(title=f"{model}: each module")
        for each in row:
            each.grid(visible=True, alpha=0.3)
            each.set_ylim(bottom=0)
    for each in axes[-1]:
        each.set_xlabel("step")
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main()
