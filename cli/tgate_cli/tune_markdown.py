"""What ``tgate tune`` found, in Markdown, short enough for a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tgate_cli.tune_data import facts_of, verdict
from tgate_engine.errors import shown
from tgate_engine.plan_report import Estimate

_MEANT = re.compile(r"([\\`*_\[\]<>#|~&])")
"""What Markdown, or what shows it, might take for more than a letter."""


def markdown(data: Mapping[str, Any]) -> str:
    """A heading, the verdict, the front as a table with the chosen plan in bold, and what it holds for, folded."""
    metric = data["report"]["metric"]
    front = [
        [
            text if point["plan"] != data["chosen"] else f"**{text}**"
            for text in (
                _plain(point["plan"]),
                f"{point['predicted_ms']:.1f}",
                f"{point['faster']:.2f}×",
                Estimate(**point["quality"]).told(metric),
            )
        ]
        for point in data["front"]
    ]
    lines = [
        f"### tgate tune: {_plain(data['model'])}",
        "",
        _plain(verdict(data)),
        "",
        f"The plans that none is both faster and better than, of {data['tried']} that were drawn to the end out of "
        f"{data['plans']}; times are predicted:",
        "",
        *_table(("plan", "picture ms", "faster", f"{metric} (95 %)"), front, "lrrr"),
        "",
        "<details><summary>What this holds for</summary>",
        "",
        *_table(("", ""), [[_plain(word), _plain(value)] for word, value in facts_of(data["report"])], "ll"),
        "",
        "</details>",
    ]
    return "\n".join(lines) + "\n"


def _table(headers: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> list[str]:
    rule = ["---:" if side == "r" else "---" for side in sides]
    return [f"| {' | '.join(cells)} |" for cells in (headers, rule, *rows)]


def _plain(text: object) -> str:
    """A stranger's text, which stays a text and one line."""
    return _MEANT.sub(r"\\\1", shown(text, 300))
