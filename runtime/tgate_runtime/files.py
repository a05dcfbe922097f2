"""Pictures and latents on disk: checked before the work starts, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.bundle import write_atomically
from tgate_engine.errors import RequestError

FORMATS = {
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
}


def picture_paths(output: Path, count: int) -> list[Path]:
    """Where ``count`` pictures go: ``output`` for one, ``<stem>-0<suffix>`` and so on for several.

    Raises :class:`RequestError` where the suffix is no picture format, or the directory is not there.
    """
    if output.suffix.lower() not in FORMATS:
        raise RequestError(
            f"{output}: the suffix {output.suffix!r} is no picture format; use one of {', '.join(FORMATS)}"
        )
    check_place(output)
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def check_place(path: Path) -> None:
    """Raises :class:`RequestError` where no file can be written: its directory is missing, or it is one."""
    if not path.parent.is_dir():
        raise RequestError(f"{path}: there is no directory {path.parent}; make it first")
    if path.is_dir():
        raise RequestError(f"{path} is a directory; name a file in it")


def save_picture(image: Image.Image, path: Path) -> None:
    """Write ``image`` in the format of the path's suffix."""
    content = io.BytesIO()
    image.save(content, FORMATS[path.suffix.lower()])
    write_atomically(path, content.getvalue())


def save_array(array: NDArray[Any], path: Path) -> None:
    """Write ``array`` as .npy."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    write_atomically(path, content.getvalue())


def load_array(path: Path) -> NDArray[Any]:
    """The array of a .npy file. Raises :class:`RequestError` for a file that holds none."""
    if not path.is_file():
        raise RequestError(f"{path}: there is no such file")
    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise RequestError(f"{path} is not an array in NumPy's .npy format ({error})") from None
    if not isinstance(found, np.ndarray):
        raise RequestError(f"{path} holds several arrays (.npz); save one with numpy.save")
    return found
