"""What options hold: numbers, sizes, names, each told in one line where it is none."""

from __future__ import annotations

import argparse
import contextlib
import math
import re
from pathlib import Path

from tgate_engine.adapter import check_adapter_name
from tgate_engine.control import check_control_name
from tgate_engine.errors import RequestError, shown
from tgate_engine.reader import MOST_LETTERS, is_word

MOST = 10_000
"""Images, frames, turns: more is a slip of the finger, and would be counted out in memory."""
MOST_PIXELS = 16_384
SEED_LIMIT = 2**63
"""As at run time, which is not imported for it."""


def whole(text: str, least: int, most: int) -> int:
    """A number of the digits 0 to 9 alone, which int() is not so strict about."""
    if re.fullmatch("[0-9]{1,19}", text) and least <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got '{shown(text, 40)}'")


def steps(text: str) -> int:
    """Of a trajectory, from 1."""
    return steps_or_none(text, 1)


def steps_or_none(text: str, least: int = 0) -> int:
    """The same from 0, or another ``least``."""
    from tgate_engine.sampler import MOST_STEPS

    return whole(text, least, MOST_STEPS)


def port(text: str) -> int:
    """Of TCP; 0 takes a free one."""
    return whole(text, 0, 65535)


def amount(text: str) -> int:
    """Bytes, such as 900MiB or 8GiB."""
    match = re.fullmatch("([0-9]{1,9})(MiB|GiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 900MiB or 8GiB, got '{shown(text, 40)}'")
    return int(match[1]) * (2**20 if match[2] == "MiB" else 2**30)


def count(text: str) -> int:
    """From 1."""
    return whole(text, 1, MOST)


def count_or_none(text: str) -> int:
    """From 0."""
    return whole(text, 0, MOST)


def side(text: str) -> int:
    """Pixels of a picture's side."""
    return whole(text, 1, MOST_PIXELS)


def seed(text: str) -> int:
    """Of a picture's noise."""
    return whole(text, 0, SEED_LIMIT - 1)


def number(text: str) -> float:
    """Any number that is finite."""
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a finite number, got '{shown(text, 40)}'")


def pixels(text: str) -> tuple[int, int]:
    """(width, height) of WIDTHxHEIGHT."""
    match = re.fullmatch("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, such as 1024x768, got '{shown(text, 40)}'")
    return side(match[1]), side(match[2])


def size_name(text: str) -> str:
    """A size as a bundle calls it."""
    width, height = pixels(text)
    return f"{width}x{height}"


def plan_name(text: str) -> str:
    """What a plan may be called."""
    if not text.strip():
        raise argparse.ArgumentTypeError("a plan's name cannot be empty")
    if not is_word(text):
        raise argparse.ArgumentTypeError(
            f"a plan's name is at most {MOST_LETTERS} characters, all of them printable, got '{shown(text)}'"
        )
    return text


def adapter_name(text: str) -> str:
    """What an adapter may be called."""
    try:
        return check_adapter_name(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def lora(text: str) -> tuple[str, float]:
    """An adapter's name, and its scale: ``NAME`` or ``NAME:SCALE``."""
    name, colon, scale = text.partition(":")
    return adapter_name(name), number(scale) if colon else 1.0


def control_picture(text: str) -> tuple[str, Path]:
    """A ControlNet's name, and the file of its picture: ``NAME=FILE``."""
    name, file = _of_control(text, "NAME=FILE")
    return name, Path(file)


def control_scale(text: str) -> tuple[str, float]:
    """A ControlNet's name, and its scale: ``NAME=SCALE``."""
    name, scale = _of_control(text, "NAME=SCALE")
    return name, number(scale)


def control_span(text: str) -> tuple[str, tuple[float, float]]:
    """A ControlNet's name, and the part of the way at which it runs: ``NAME=START:END``."""
    name, span = _of_control(text, "NAME=START:END")
    start, colon, end = span.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"expected NAME=START:END, such as canny=0:0.6, got '{shown(text, 80)}'")
    return name, (number(start), number(end))


def control_name(text: str) -> str:
    """What a ControlNet may be called."""
    try:
        return check_control_name(text)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _of_control(text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value:
        raise argparse.ArgumentTypeError(f"expected {form}, got '{shown(text, 80)}'")
    return control_name(name), value


def plan_file(text: str) -> Path:
    """Where a plan is written that belongs to no bundle."""
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"a plan file's name ends in .json, by which --plan knows it, got '{shown(text)}'"
        )
    return Path(text)


def html_file(text: str) -> Path:
    """Where a page is written."""
    return _named(text, ".html", "a page's")


def markdown_file(text: str) -> Path:
    """Where a report in Markdown is written."""
    return _named(text, ".md", "a report's")


def _named(text: str, ending: str, whose: str) -> Path:
    if not text.endswith(ending):
        raise argparse.ArgumentTypeError(f"{whose} name ends in {ending}, got '{shown(text)}'")
    return Path(text)


def batch(text: str) -> tuple[int, int]:
    """(least, most) of N or LEAST:MOST."""
    least, colon, most = text.partition(":")
    return count(least), count(most if colon else least)
