"""Draws a `Scene` with Pillow, four times oversampled in area, as uint8 RGB."""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from training.grammar import BACKGROUNDS, COLOURS, Item, Scene
from training.settings import IMAGE_PX

_SCALE = 2
_TEXTURE_TONE = 0.82
_PERIOD_PX = 16

Colour = tuple[int, int, int]
Points = list[tuple[float, float]]


def _jitter(colour: Colour, rng: random.Random, amount: int = 6) -> Colour:
    red, green, blue = (max(0, min(255, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def _polygon(x: float, y: float, radii: list[float], start_deg: float) -> Points:
    step = 360 / len(radii)
    angles = [math.radians(start_deg + index * step) for index in range(len(radii))]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def _draw_texture(draw: ImageDraw.ImageDraw, scene: Scene, tone: Colour, rng: random.Random) -> None:
    size, period = IMAGE_PX * _SCALE, _PERIOD_PX * _SCALE
    half = period // 2
    if scene.texture == "striped":
        upright = rng.random() < 0.5
        for start in range(0, size, period):
            box = (start, 0, start + half - 1, size) if upright else (0, start, size, start + half - 1)
            draw.rectangle(box, fill=tone)
    elif scene.texture == "dotted":
        dot = period * 0.28
        for x in range(half, size, period):
            for y in range(half, size, period):
                draw.ellipse((x - dot, y - dot, x + dot, y + dot), fill=tone)
    elif scene.texture == "checkered":
        for row, y in enumerate(range(0, size, period)):
            for x in range((row % 2) * period, size, 2 * period):
                draw.rectangle((x, y, x + period - 1, y + period - 1), fill=tone)


def _draw_item(draw: ImageDraw.ImageDraw, item: Item, fill: Colour) -> None:
    x, y, r = item.x_px * _SCALE, item.y_px * _SCALE, item.radius_px * _SCALE
    if item.shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)
    elif item.shape == "ring":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=fill, width=round(r * 0.42))
    elif item.shape == "square":
        half = r * 0.84
        draw.rectangle((x - half, y - half, x + half, y + half), fill=fill)
    elif item.shape == "triangle":
        draw.polygon(_polygon(x, y + r * 0.18, [r * 1.05] * 3, -90), fill=fill)
    elif item.shape == "star":
        draw.polygon(_polygon(x, y, [r * 1.08, r * 0.45] * 5, -90), fill=fill)
    elif item.shape == "cross":
        arm = r * 0.3
        draw.rectangle((x - r, y - arm, x + r, y + arm), fill=fill)
        draw.rectangle((x - arm, y - r, x + arm, y + r), fill=fill)
    else:
        raise ValueError(f"unknown shape {item.shape!r}")


def render(scene: Scene) -> npt.NDArray[np.uint8]:
    """The picture of `scene`, uint8 [128, 128, 3]; the same scene always gives the same bytes."""
    rng = random.Random(scene.texture_seed)
    base = _jitter(BACKGROUNDS[scene.background], rng)
    red, green, blue = (round(value * _TEXTURE_TONE) for value in base)
    image = Image.new("RGB", (IMAGE_PX * _SCALE, IMAGE_PX * _SCALE), base)
    draw = ImageDraw.Draw(image)
    _draw_texture(draw, scene, (red, green, blue), rng)
    for item in scene.items:
        _draw_item(draw, item, _jitter(COLOURS[item.colour], rng))
    return np.asarray(image.resize((IMAGE_PX, IMAGE_PX), Image.Resampling.BOX), dtype=np.uint8)
