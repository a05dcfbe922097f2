"""Scenes of one to three coloured shapes, and the captions that describe them.

A scene is data (`Scene`), drawn from a `random.Random`; a caption is one of several wordings of a scene.
Captions whose SHA-256 falls in a fixed residue class are held out: they are never used in training and
are the only captions the evaluation uses.
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 32),
    "yellow": (246, 216, 20),
    "green": (24, 138, 44),
    "blue": (32, 68, 214),
    "purple": (122, 30, 150),
    "white": (252, 252, 252),
    "black": (16, 16, 16),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES: dict[str, tuple[float, float]] = {"small": (16.0, 18.0), "medium": (21.0, 23.0), "large": (26.5, 28.5)}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (142, 142, 142),
    "beige": (208, 182, 138),
    "mint": (132, 196, 168),
    "lilac": (176, 156, 206),
}
TEXTURES: tuple[str, ...] = ("plain", "striped", "dotted", "checkered")
PAIRS: tuple[tuple[str, str], ...] = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
PAIR_INDEX: dict[tuple[str, str], int] = {pair: index for index, pair in enumerate(PAIRS)}

HELD_OUT_MODULUS = 16
_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_PREFIXES = ("", "", "", "a picture of ", "an image of ", "a drawing of ")
_RELATIONS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
}
_PLACES = {
    "centre": "in the centre",
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
}
_PLACE_PX = {"centre": (64, 64), "left": (34, 64), "right": (94, 64), "top": (64, 34), "bottom": (64, 94)}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One shape: `x_px`, `y_px` is its centre and `radius_px` the radius of its circumscribed circle."""

    colour: str
    shape: str
    size: str
    x_px: float
    y_px: float
    radius_px: float


@dataclass(frozen=True, kw_only=True)
class Scene:
    """`items` in the order in which a caption names them; `layout` is a place, a relation, "row" or "column"."""

    items: tuple[Item, ...]
    layout: str
    background: str
    texture: str
    texture_seed: int


def _fits(items: list[Item], size_px: int = 128) -> bool:
    for index, item in enumerate(items):
        margin = item.radius_px + 2
        if not (margin <= item.x_px <= size_px - margin and margin <= item.y_px <= size_px - margin):
            return False
        for other in items[:index]:
            gap = ((item.x_px - other.x_px) ** 2 + (item.y_px - other.y_px) ** 2) ** 0.5
            if gap < item.radius_px + other.radius_px + 2:
                return False
    return True


def _centres(layout: str, count: int, rng: random.Random) -> list[tuple[float, float]]:
    if count == 1:
        return [_PLACE_PX[layout]]
    if count == 2:
        near, far = (34.0, 94.0) if layout in ("left", "above") else (94.0, 34.0)
        drift = 64 + rng.uniform(-14, 14)
        first, second = drift, drift + rng.uniform(-8, 8)
        if layout in ("left", "right"):
            return [(near, first), (far, second)]
        return [(first, near), (second, far)]
    line = 64 + rng.uniform(-20, 20)
    along = [23.0, 64.0, 105.0]
    return [(a, line) for a in along] if layout == "row" else [(line, a) for a in along]


def draw_scene(rng: random.Random) -> Scene:
    """A random scene: 50 % one shape, 42 % two, 8 % three; different (colour, shape) pairs within a scene."""
    count = rng.choices((1, 2, 3), weights=(50, 42, 8))[0]
    layouts = {1: tuple(_PLACES), 2: tuple(_RELATIONS), 3: ("row", "column")}[count]
    layout = rng.choice(layouts)
    pairs = rng.sample(PAIRS, count)
    sizes = tuple(SIZES)[:1] if count == 3 else tuple(SIZES)
    while True:
        items = []
        for (colour, shape), (x, y) in zip(pairs, _centres(layout, count, rng), strict=True):
            size = rng.choice(sizes)
            items.append(
                Item(
                    colour=colour,
                    shape=shape,
                    size=size,
                    x_px=x + rng.uniform(-5, 5),
                    y_px=y + rng.uniform(-5, 5),
                    radius_px=rng.uniform(*SIZES[size]),
                )
            )
        if _fits(items):
            break
    return Scene(
        items=tuple(items),
        layout=layout,
        background=rng.choice(tuple(BACKGROUNDS)),
        texture=rng.choices(TEXTURES, weights=(7, 1, 1, 1))[0],
        texture_seed=rng.randrange(1 << 30),
    )


def _noun(item: Item, rng: random.Random, sized: bool) -> str:
    size = f"{item.size} " if sized and item.size != "medium" else ""
    return f"a {size}{item.colour} {item.shape}"


def _backdrop(scene: Scene, rng: random.Random) -> str:
    if rng.random() < 0.3:
        return ""
    texture = "" if scene.texture == "plain" and rng.random() < 0.6 else f"{scene.texture} "
    return f" on a {texture}{scene.background} {rng.choice(('background', 'background', 'backdrop'))}"


def write_caption(scene: Scene, rng: random.Random) -> str:
    """One of the wordings of `scene`. Sizes, places, relations and backgrounds may be left unsaid, never wrong."""
    sized = rng.random() < 0.65
    nouns = [_noun(item, rng, sized) for item in scene.items]
    if len(nouns) == 1:
        body = nouns[0] + (f" {_PLACES[scene.layout]}" if rng.random() < 0.5 else "")
    elif len(nouns) == 2:
        if rng.random() < 0.8:
            body = f"{nouns[0]} {rng.choice(_RELATIONS[scene.layout])} {nouns[1]}"
        else:
            body = f"{nouns[0]} {rng.choice(('and', 'next to'))} {nouns[1]}"
    else:
        body = f"{nouns[0]}, {nouns[1]} and {nouns[2]}" + (f" in a {scene.layout}" if rng.random() < 0.7 else "")
    return f"{rng.choice(_PREFIXES)}{body}{_backdrop(scene, rng)}"


def named_pairs(caption: str) -> list[tuple[str, str]]:
    """The (colour, shape) pairs of a caption in the order in which it names them."""
    pairs = [(match[1], match[2]) for match in _OBJECT.finditer(caption)]
    if not pairs:
        raise ValueError(f"no coloured shape in the caption {caption!r}; write it as in training/grammar.py")
    return pairs


def is_held_out(caption: str) -> bool:
    """True for the fixed sixteenth of all captions that training never sees."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "big") % HELD_OUT_MODULUS == 0


def training_caption(scene: Scene, rng: random.Random) -> str:
    """A wording of `scene` that is not held out; redraws until it finds one."""
    while True:
        caption = write_caption(scene, rng)
        if not is_held_out(caption):
            return caption


def held_out_scenes(count: int, seed: int) -> list[tuple[str, Scene]]:
    """`count` different held-out captions, each with the scene it was written for."""
    rng = random.Random(f"held-out-{seed}")
    found: dict[str, Scene] = {}
    while len(found) < count:
        scene = draw_scene(rng)
        caption = write_caption(scene, rng)
        if is_held_out(caption):
            found.setdefault(caption, scene)
    return list(found.items())


def vocabulary_words() -> list[str]:
    """Every word and punctuation mark that a caption can contain, in a fixed order."""
    text = " ".join(
        [*COLOURS, *SHAPES, *SIZES, *BACKGROUNDS, *TEXTURES, *_PREFIXES, *_PLACES.values(), *_RELATIONS]
        + [phrase for phrases in _RELATIONS.values() for phrase in phrases]
        + ["a and next to row column in on background backdrop"]
    )
    return sorted(set(text.split()))
