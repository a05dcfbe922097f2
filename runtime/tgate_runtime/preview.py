"""Pictures of unfinished latents, at little cost: where a trajectory is heading, by a small decoder or a linear map."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.errors import RequestError
from tgate_engine.graph import DECODE, PREVIEW
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Step
from tgate_engine.sampler import HISTORY
from tgate_runtime.decoder import decode
from tgate_runtime.session import Session
from tgate_runtime.state import State

_PLACES = 1024
"""Pairs of latents and a colour to fit on, at least: the map of 4 channels has 15 numbers, of 16 channels 51."""
_SPOT = 4
"""Latents from one random value to the next: an autoencoder knows smooth fields, and noise means little to it."""


class Previews:
    """Pictures of latents: the bundle's small decoder's where it has one (``--preview-decoder``), or else
    :class:`Colours`. Thread-safe."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._colours = Colours(session)

    def picture(self, latents: NDArray[np.float32], size: str | None = None) -> Image.Image:
        """Latents [C, h, w] of a size as a picture: of that size, or of h x w pixels where a linear map makes it.
        Raises as :func:`check_previews` does."""
        small = self._session.graph(PREVIEW, size)
        return self._colours.picture(latents) if small is None else decode(self._session, small, latents)[0]


class Colours:
    """A linear map from a place's latents to its colour, fitted to what a bundle's decoder makes of random fields.

    The fit costs a call of the decoder, or a few where latents are small, at the first preview. Thread-safe.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._map: NDArray[np.float32] | None = None  # [C + 1, 3], the last row for a constant 1

    def picture(self, latents: NDArray[np.float32]) -> Image.Image:
        """Latents [C, h, w] as a picture of h x w pixels. Raises as :func:`check_previews` does."""
        check_previews(self._session.manifest)
        with self._lock:
            if self._map is None:
                self._map = self._fitted()
        colours = _places(latents) @ self._map
        return Image.fromarray(np.clip(np.rint(colours), 0, 255).astype(np.uint8).reshape(*latents.shape[1:], 3))

    def _fitted(self) -> NDArray[np.float32]:
        decoder, shape = self._session.graph(DECODE), self._session.shapes()[0].latents
        assert decoder is not None  # check_previews() has seen it
        height, width = shape[1:]
        fields = [_field(seed, shape) for seed in range(math.ceil(_PLACES / (height * width)))]
        decoded = [decode(self._session, decoder, field)[0] for field in fields]
        colours = [np.asarray(image.resize((width, height), Image.Resampling.BOX), np.float32) for image in decoded]
        places = np.concatenate([_places(field) for field in fields])
        fitted, *_ = np.linalg.lstsq(places, np.concatenate(colours).reshape(-1, 3), rcond=None)
        return np.asarray(fitted, np.float32)


def check_previews(manifest: Manifest) -> None:
    """Raises :class:`RequestError` for a bundle that makes no pictures."""
    if manifest.graph(DECODE) is None and manifest.graph(PREVIEW) is None:
        raise RequestError("the bundle has no decoder (--components), which previews are fitted to; draw without them")
    if manifest.frames > 1 or len(manifest.shapes[0].latents) != 3:
        raise RequestError(f"{manifest.model} makes videos, and previews are of pictures; draw without them")


class Look:
    """The images of a call as they are after its step, while ``on_step`` looks at them."""

    def __init__(
        self, picture: Callable[[NDArray[np.float32]], Image.Image], state: State, rows: Sequence[int]
    ) -> None:
        """``picture``: of latents [...]."""
        self._picture = picture
        self._state: State | None = state
        self._rows = rows

    def latents(self) -> NDArray[np.float32]:
        """A copy, float32 [rows, ...]."""
        state = self._opened()
        return np.stack([state.latents(row) for row in self._rows])

    def pictures(self, remaining: Sequence[Step]) -> list[Image.Image]:
        """Of each image, the latents that ``remaining`` steps would end in if the network gave what it gave last."""
        state = self._opened()
        return [self._picture(end_of(state, row, remaining)) for row in self._rows]

    def over(self) -> None:
        """The next step begins."""
        self._state = None

    def _opened(self) -> State:
        if self._state is None:
            raise RequestError("a step's latents can be looked at until on_step returns; copy them there")
        return self._state


def end_of(state: State, row: int, remaining: Sequence[Step]) -> NDArray[np.float32]:
    """The latents [...] that an image would end in after the ``remaining`` steps of its plan if the network gave from
    now on what it gave last."""
    towards, given = ahead(remaining)
    latents, outputs = state.history(row)
    return (np.tensordot(towards, latents, 1) + np.tensordot(given, outputs, 1)).astype(np.float32)


def ahead(remaining: Sequence[Step]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The end of a trajectory whose network gives e_{i-1} from now on, as a combination of its past: the coefficients
    of x_i, x_{i-1}, x_{i-2}, x_{i-3}, and of e_{i-1}, e_{i-2}, e_{i-3}. ``remaining``: steps i, i + 1, … of its plan.

    Where the network predicts noise, and the sampler ends at none, this is its estimate of the clean latents. Noise
    that steps add is left out, as its mean is 0. Pure.
    """
    past = np.eye(2 * HISTORY + 1)  # what each quantity is of the seven that there are
    latents, outputs = [*past[: HISTORY + 1]], [*past[HISTORY + 1 :]]
    last = outputs[0]
    for step in remaining:
        outputs = [last, *outputs]
        following = np.dot(step.call.latents, latents) + np.dot(step.call.outputs, outputs)
        latents, outputs = [following, *latents[:HISTORY]], outputs[:HISTORY]
    return latents[0][: HISTORY + 1], latents[0][HISTORY + 1 :]


def _field(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Smooth random latents [C, h, w], of about the deviation that latents have."""
    channels, height, width = shape
    spots = (channels, max(2, height // _SPOT), max(2, width // _SPOT))
    values = np.random.default_rng(seed).standard_normal(spots, np.float32)
    return np.stack([np.asarray(Image.fromarray(v).resize((width, height), Image.Resampling.BICUBIC)) for v in values])


def _places(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    """Latents [C, h, w] as rows [h * w, C + 1], with a constant."""
    flat = latents.reshape(len(latents), -1).T
    return np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)
