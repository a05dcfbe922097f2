"""What options hold, and what is told of what they cannot."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tgate_cli import values
from tgate_runtime.generators import SEED_LIMIT


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (values.steps, "25", 25),
        (values.count_or_none, "0", 0),
        (values.seed, str(2**63 - 1), 2**63 - 1),
        (values.amount, "8GiB", 8 * 2**30),
        (values.number, "-0.5", -0.5),
        (values.pixels, "832x1216", (832, 1216)),
        (values.size_name, "832x1216", "832x1216"),
        (values.plan_file, "p.json", Path("p.json")),
        (values.batch, "1:4", (1, 4)),
        (values.batch, "3", (3, 3)),
    ],
)
def test_a_value(kind: Callable[[str], Any], text: str, value: Any) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (values.count, "0", "expected a whole number from 1"),
        (values.count, "1_0", "expected a whole number"),
        (values.count, "٣", "expected a whole number"),
        (values.seed, str(2**63), "expected a whole number from 0"),
        (values.port, "65536", "from 0 to 65535"),
        (values.amount, "8GB", "such as 900MiB or 8GiB"),
        (values.number, "inf", "expected a finite number"),
        (values.pixels, "832", "expected WIDTHxHEIGHT"),
        (values.plan_name, " ", "cannot be empty"),
        (values.plan_name, "a\x1bb", "all of them printable"),
        (values.plan_file, "p.txt", "ends in .json"),
    ],
)
def test_what_is_none(kind: Callable[[str], Any], text: str, says: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        kind(text)


def test_seeds_are_those_that_run_time_takes() -> None:
    assert values.SEED_LIMIT == SEED_LIMIT
