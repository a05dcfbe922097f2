"""Whether a picture shows its items where the caption says: above, below, left, right, in a row, in a column.

The judge scores every pair at each place of a picture; an item lies at the middle of the places that show it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from training.classifier import PairClassifier, presence
from training.grammar import BACKGROUNDS, COLOURS, PAIR_INDEX, named_pairs

_LEAST_PX = 40  # of a patch; the smallest ring has some 450
_EDGE_PX = 2  # of soft edge that belongs to a patch
_PALETTE = np.array(
    [*COLOURS.values(), *BACKGROUNDS.values(), *(tuple(0.82 * part for part in tone) for tone in BACKGROUNDS.values())]
)
_PHRASES = {
    "left": re.compile(r"\bleft of\b"),
    "right": re.compile(r"\bright of\b"),
    "above": re.compile(r"\b(?:above|over)\b"),
    "below": re.compile(r"\b(?:below|under)\b"),
    "row": re.compile(r"\bin a row\b"),
    "column": re.compile(r"\bin a column\b"),
}
_ALONG = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1), "row": (0, 1), "column": (1, 1)}


def named_relation(caption: str) -> str | None:
    """The relation between several items that a caption names, or None: one item, or nothing said of their places."""
    if len(named_pairs(caption)) < 2:
        return None
    return next((name for name, phrase in _PHRASES.items() if phrase.search(caption)), None)


def item_places(
    classifier: PairClassifier, pictures: npt.NDArray[np.uint8], captions: Sequence[str]
) -> list[npt.NDArray[np.float64]]:
    """Where the items of each caption lie in its picture, uint8 [N, H, W, 3]: [items, 2] each, (x, y) in pixels.

    NaN where the picture does not show the item. Every patch of the item's colour is shown to the judge alone, on a
    plain ground; the item is the patch in which it is surest to see it.
    """
    return [_places(classifier, *pair) for pair in zip(pictures, captions, strict=True)]


def _places(classifier: PairClassifier, picture: npt.NDArray[np.uint8], caption: str) -> npt.NDArray[np.float64]:
    nearest = np.square(picture[:, :, None].astype(np.int32) - _PALETTE).sum(-1).argmin(-1)
    ground = np.median(picture[nearest >= len(COLOURS)], axis=0) if (nearest >= len(COLOURS)).any() else _PALETTE[-1]
    places = []
    for colour, shape in named_pairs(caption):
        patches, count = ndimage.label(nearest == tuple(COLOURS).index(colour), structure=np.ones((3, 3)))
        sizes = np.bincount(patches.ravel(), minlength=count + 1)
        masks = [patches == index for index in range(1, count + 1) if sizes[index] >= _LEAST_PX]
        if not masks:
            places.append((np.nan, np.nan))
            continue
        soft = [ndimage.binary_dilation(mask, iterations=_EDGE_PX)[..., None] for mask in masks]
        alone = np.stack([np.where(mask, picture, ground).astype(np.uint8) for mask in soft])
        seen = presence(classifier, alone)[:, PAIR_INDEX[colour, shape]].numpy()
        best = int(seen.argmax())
        y, x = ndimage.center_of_mass(masks[best])
        places.append((x, y) if seen[best] > 0.5 else (np.nan, np.nan))
    return np.array(places)


def relation_shown(places: npt.NDArray[np.float64], caption: str) -> bool | None:
    """Whether the items of `caption` lie as it says; None where it says nothing. An item that is missing is wrong.

    `places`: of one picture, from :func:`item_places`. Two items lie left of one another where they are
    further apart across than along, as training draws them.
    """
    relation = named_relation(caption)
    if relation is None:
        return None
    axis, sign = _ALONG[relation]
    steps = np.diff(places, axis=0)
    along, across = sign * steps[:, axis], np.abs(steps[:, 1 - axis])
    return bool((along > across).all())  # NaN compares false
