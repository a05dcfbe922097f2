"""One bundle opened twice: in libtgate, and by the Python runtime on the same engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.cpp.library import Bundle, Library, Pool, Request, Session
from tgate_runtime import Pipeline
from tgate_runtime.pipeline import Result


class Twins:
    """``cpp`` and ``python`` draw the same, bit for bit, or a test fails."""

    def __init__(self, library: Library, path: Path, plans: Sequence[str] = (), **options: Any) -> None:
        self.path = path
        self.bundle = Bundle(library, path)
        options = {"threads": 1, **options}
        fields: Any = {key: value.encode() if isinstance(value, str) else value for key, value in options.items()}
        self.session = Session(self.bundle, plans=plans, **fields)
        self.python = Pipeline.open(path, plans=[*plans] or None, **options)

    def request(self, prompt: str | None = None, **asked: Any) -> Request:
        return Request(self.session, prompt=prompt, **asked)

    def pool(self, images: int, **asked: Any) -> Pool:
        return Pool(self.session, images, **asked)

    def draw(self, prompt: str | None = None, **asked: Any) -> NDArray[np.float32]:
        """Final latents [images, ...] in C++."""
        return self.request(prompt, **asked).run().latents()

    def wanted(self, prompt: str | None = None, *, images: int = 1, **asked: Any) -> Result:
        """The same in Python; keyword arguments are C++'s."""
        names = {"image_size": "size", "picture": "image", "tensors": "prompt_embeds"}
        return self.python(prompt, num_images=images, **{names.get(key, key): value for key, value in asked.items()})


def same(got: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Bit for bit."""
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    differing = int((got != wanted).sum())
    assert got.tobytes() == wanted.tobytes(), (
        f"{differing} of {got.size} differ, by {np.abs(got - wanted).max()} at most"
    )
