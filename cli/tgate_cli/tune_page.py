"""What ``tgate tune`` found, as a page of one file: it asks the network for nothing, and holds its pictures."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_cli.tune_data import facts_of, verdict
from tgate_engine.errors import shown
from tgate_engine.plan_report import Estimate, told

if TYPE_CHECKING:
    from tgate_runtime.tuning.measure import Pair
    from tgate_runtime.tuning.quality import Pixels

TEMPLATE = Path(__file__).with_name("tune_page.html")
MOST_SIDE = 384
"""Pixels of a picture's longer side on the page: it is to be compared, not kept."""
WIDTH, HEIGHT = 760, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 20, 48
"""Of the drawing of the front, and the margins that its axes take, in CSS pixels."""
TICKS = 5
MOST_PROMPT = 300


def page(data: Mapping[str, Any], pairs: Sequence[Pair]) -> str:
    """The page in HTML. ``data``: of :func:`tgate_cli.tune_data.data_of`. Needs Jinja2 and Pillow.

    Whatever a prompt or a name holds stays text, and the page forbids itself scripts and every request.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text("utf-8"))
    report = data["report"]
    graphs = list(dict.fromkeys(step["graph"] for plan in data["timeline"].values() for step in plan))
    return template.render(
        model=shown(data["model"], MOST_PROMPT),
        verdict=verdict(data),
        metric=report["metric"],
        data=data,
        chart=_chart(data),
        rows=[{**point, "quality": Estimate(**point["quality"]).told(report["metric"])} for point in data["front"]],
        timelines=_timelines(data["timeline"], graphs),
        graphs=graphs,
        pairs=[_figure(pair, report["metric"]) for pair in pairs],
        facts=facts_of(report),
    )


def _figure(pair: Pair, metric: str) -> dict[str, Any]:
    return {
        "prompt": shown(pair.prompt, MOST_PROMPT),
        "seed": pair.seed,
        "worth": told(metric, pair.value),
        "ungated": _picture(pair.ungated),
        "tuned": _picture(pair.tuned),
    }


def _picture(pixels: Pixels) -> str:
    """A picture, or the middle frame of a video, as the address of an <img>."""
    from PIL import Image

    image = Image.fromarray(pixels[len(pixels) // 2] if pixels.ndim == 4 else pixels)
    image.thumbnail((MOST_SIDE, MOST_SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _timelines(plans: Mapping[str, Sequence[Mapping[str, Any]]], graphs: Sequence[str]) -> list[dict[str, Any]]:
    """Each plan's steps, as shares in percent of what the longest plan takes."""
    longest = max(math.fsum(step["ms"] for step in steps) for steps in plans.values())
    return [
        {
            "plan": name,
            "ms": math.fsum(step["ms"] for step in steps),
            "steps": [
                {**step, "number": i, "colour": graphs.index(step["graph"]) % 6, "share": 100 * step["ms"] / longest}
                for i, step in enumerate(steps)
            ],
        }
        for name, steps in plans.items()
    ]


def _chart(data: Mapping[str, Any]) -> dict[str, Any]:
    """Places of the front's points, bounds and ticks, in CSS pixels from the upper left corner."""
    report, goal, front = data["report"], data["goal"], data["front"]
    points = sorted(front, key=lambda point: point["plan"] == data["chosen"])  # drawn last, over the others
    floor = report["unrelated"]
    levels = [bound for point in points for bound in (point["quality"]["low"], point["quality"]["high"])]
    levels += [floor["mean"], *([goal["budget"]] if "budget" in goal else [])]
    times = [data["ungated_ms"], *(point["predicted_ms"] for point in points)]
    x, ms_ticks = _axis(times, LEFT, WIDTH - RIGHT)
    y, levels_ticks = _axis(levels, HEIGHT - BOTTOM, TOP)
    bottom, top = sorted((HEIGHT - BOTTOM, TOP), reverse=True)
    band = [min(max(y(floor[bound]), top), bottom) for bound in ("high", "low")]
    return {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
        "points": [
            {
                "name": point["plan"],
                "chosen": point["plan"] == data["chosen"],
                "x": x(point["predicted_ms"]),
                "y": y(point["quality"]["mean"]),
                "low": y(point["quality"]["low"]),
                "high": y(point["quality"]["high"]),
                "told": f"{point['predicted_ms']:.1f} ms, {Estimate(**point['quality']).told(report['metric'])}",
            }
            for point in points
        ],
        "x_ticks": [(x(tick), f"{tick:g}") for tick in ms_ticks],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in levels_ticks],
        "ungated": x(data["ungated_ms"]),
        "floor": {"y": band[0], "height": max(band[1] - band[0], 1.0)},
        "budget": y(goal["budget"]) if "budget" in goal else None,
        "limit": x(data["ungated_ms"] / goal["speedup"]) if "speedup" in goal else None,
    }


def _axis(values: Sequence[float], first: float, last: float) -> tuple[Any, list[float]]:
    """A map of numbers to places between ``first`` and ``last``, and the round numbers among them."""
    low, high = min(values), max(values)
    around = 0.06 * (high - low) or max(abs(high), 1.0) * 0.06
    low, high = low - around, high + around
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    ticks = [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return lambda value: round(first + (value - low) / (high - low) * (last - first), 1), ticks
