"""Pictures, videos, latents and embeddings on disk: checked before the work starts, written whole or not at all."""

from __future__ import annotations

import io
import itertools
import math
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load

from tgate_engine import atomic
from tgate_engine.atomic import write_atomically
from tgate_engine.errors import RequestError, shown
from tgate_engine.plain_files import read_plain
from tgate_engine.underway import unfinished
from tgate_runtime.parameters import Parameters
from tgate_runtime.picture import MOST_BYTES as PICTURE_BYTES
from tgate_runtime.picture import read_mask, read_picture
from tgate_runtime.record import Record
from tgate_runtime.stamps import HOLD, ffmetadata, read_notes, read_stamp, save_options

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


VIDEO_FORMATS = (".mp4", ".gif")
LATENTS_FORMAT = ".npy"
TENSOR_BYTES = 2**30
"""The most that is read of a file of embeddings or latents."""


def output_paths(output: Path, count: int, *, decoded: bool = True, video: bool = False) -> list[Path]:
    """Where ``count`` results go: ``output`` for one, ``<stem>-0<suffix>`` and so on for several.

    ``decoded``: pictures, or with ``video`` videos; otherwise latents. Raises :class:`RequestError` where the suffix
    is of another kind, the directory is not there, or something else than a file is in the way.
    """
    kind, suffixes = ("video", VIDEO_FORMATS) if video else ("picture", tuple(FORMATS))
    if not decoded:
        kind, suffixes = "latents", (LATENTS_FORMAT,)
    if output.suffix.lower() not in suffixes:
        why = "" if decoded else ": the bundle has no decoder (--components), so latents are all there is"
        raise RequestError(
            f"{output}: the suffix {output.suffix!r} is no {kind} format; use one of {', '.join(suffixes)}{why}"
        )
    check_writable(output.suffix)
    check_place(output)
    if count == 1:
        return [output]
    paths = [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]
    for path in paths:
        atomic.check_replaceable(path, RequestError)
    return paths


def check_writable(suffix: str) -> None:
    """Raises :class:`RequestError` where a library that writes such files is missing, which is better found before the
    work."""
    if suffix.lower() == ".mp4":
        _ffmpeg()


def holds_record(suffix: str) -> bool:
    """Whether a file of that suffix has room for what it was drawn from."""
    return FORMATS.get(suffix, suffix.removeprefix(".").upper()) in HOLD


@contextmanager
def new_files(stem: str, suffix: str, count: int) -> Iterator[list[Path]]:
    """``count`` files in the working directory that were not there, ``<stem>-0001<suffix>`` or the next numbers.

    They are made at once, empty, so that nobody else takes their names; an exception in the block removes them, and so
    does whoever ends the process there.
    """
    paths: list[Path] = []
    numbers = itertools.count(1)
    with ExitStack() as held:
        try:
            while len(paths) < count:
                path = Path(f"{stem}-{next(numbers):04}{suffix}")
                with suppress(FileExistsError):
                    path.touch(exist_ok=False)
                    paths.append(path)
                    held.enter_context(unfinished(path))
            yield paths
        except BaseException:
            for path in paths:
                path.unlink(missing_ok=True)
            raise


def check_place(path: Path) -> None:
    """Raises :class:`RequestError` where no file can be written, see :func:`tgate_engine.atomic.check_place`."""
    atomic.check_place(path, RequestError)


def save_picture(image: Image.Image, path: Path, record: Record | None = None) -> None:
    """Write ``image`` in the format of the path's suffix, and in it what it was drawn from, where the format has room
    for that (:data:`~tgate_runtime.stamps.HOLD`)."""
    write_atomically(path, picture_bytes(image, path.suffix, record))


def picture_bytes(
    image: Image.Image, suffix: str, record: Record | None = None, *, quality: int | None = None
) -> bytes:
    """What :func:`save_picture` writes. ``quality``: 0 to 100, of a format that has it; None is Pillow's choice."""
    content, kind = io.BytesIO(), FORMATS[suffix.lower()]
    chosen = {} if quality is None else {"quality": quality}
    image.save(content, kind, **chosen, **save_options(record, kind))
    return content.getvalue()


def save_video(frames: Sequence[Image.Image], path: Path, *, fps: int, record: Record | None = None) -> None:
    """Write frames as MP4 (H.264) or GIF, by the path's suffix, and in it what they were drawn from.

    GIF keeps times in hundredths of a second. Raises :class:`RequestError` where MP4 cannot be written.
    """
    try:
        content = video_bytes(frames, path.suffix, fps=fps, record=record)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    write_atomically(path, content)


def video_bytes(frames: Sequence[Image.Image], suffix: str, *, fps: int, record: Record | None = None) -> bytes:
    """What :func:`save_video` writes."""
    if suffix.lower() == ".gif":
        content = io.BytesIO()
        frames[0].save(
            content,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            duration=10 * round(100 / fps),
            loop=0,
            **save_options(record, "GIF"),
        )
        return content.getvalue()
    with tempfile.TemporaryDirectory() as folder, unfinished(Path(folder)):
        whole = Path(folder) / "video.mp4"
        try:
            writer = _ffmpeg().write_frames(
                str(whole), frames[0].size, fps=fps, macro_block_size=2, quality=8, ffmpeg_log_level="error"
            )
            writer.send(None)
            for frame in frames:
                writer.send(np.ascontiguousarray(frame).tobytes())
            writer.close()
            return (whole if record is None else _with_comment(whole, record)).read_bytes()
        except (OSError, RuntimeError, ValueError) as error:
            first = str(error).strip().partition("\n")[0]
            raise RequestError(f"the video could not be encoded ({first}); write a .gif instead") from None


def _with_comment(video: Path, record: Record) -> Path:
    """A copy of an MP4 with its record in it. The text comes from a file: an argument of ffmpeg is short, and everybody
    on the machine can read it. Raises :class:`RuntimeError`."""
    facts, copy = video.with_name("comment.txt"), video.with_name("commented.mp4")
    facts.write_text(ffmetadata(record), encoding="utf-8")
    inputs = ["-i", str(video), "-f", "ffmetadata", "-i", str(facts)]
    command = [
        _ffmpeg().get_ffmpeg_exe(),
        "-v",
        "error",
        *inputs,
        "-map",
        "0",
        "-map_metadata",
        "1",
        "-c",
        "copy",
        copy,
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return copy


def _ffmpeg() -> Any:
    try:
        import imageio_ffmpeg
    except ModuleNotFoundError:
        raise RequestError(
            "writing .mp4 needs imageio-ffmpeg, not installed: pip install 'tgate-engine[video]'; or write .gif"
        ) from None
    return imageio_ffmpeg


def load_picture(path: Path) -> Image.Image:
    """The picture of a file, as :func:`~tgate_runtime.picture.as_rgb` makes it. Raises :class:`RequestError` for a file
    that holds none, see :func:`~tgate_runtime.picture.read_picture`."""
    return read_picture(read_plain(path, PICTURE_BYTES, RequestError), str(path))


def load_mask(path: Path) -> Image.Image:
    """The mask of a file, as :func:`~tgate_runtime.picture.as_mask` makes it. Raises as :func:`load_picture` does."""
    return read_mask(read_plain(path, PICTURE_BYTES, RequestError), str(path))


def load_record(path: Path) -> Record:
    """What the picture or video of a file was drawn from. Raises :class:`RequestError`, see
    :func:`~tgate_runtime.stamps.read_stamp`."""
    return read_stamp(read_plain(path, PICTURE_BYTES, RequestError), str(path))


def load_notes(path: Path) -> Record | Parameters:
    """The record of a file, or what another program noted. Raises :class:`RequestError`, see
    :func:`~tgate_runtime.stamps.read_notes`."""
    return read_notes(read_plain(path, PICTURE_BYTES, RequestError), str(path))


def load_embeddings(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file. Raises :class:`RequestError` for a file that is none."""
    content = read_plain(path, TENSOR_BYTES, RequestError)
    try:
        return load(content)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RequestError(
            f"{path} is not a safetensors file of numbers NumPy has ({shown(error, 200)}); make it with `tgate embed`"
        ) from None


def save_array(array: NDArray[Any], path: Path) -> None:
    """Write ``array`` as .npy."""
    write_atomically(path, array_bytes(array))


def array_bytes(array: NDArray[Any]) -> bytes:
    """What :func:`save_array` writes."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def load_array(path: Path) -> NDArray[Any]:
    """The array of a .npy file, in this machine's byte order. Raises :class:`RequestError` for a file that holds none,
    or another number of bytes than its shape says."""
    content = read_plain(path, TENSOR_BYTES, RequestError)
    if content.startswith(b"PK"):
        raise RequestError(f"{path} holds several arrays (.npz); save one with numpy.save")
    try:
        return _parse_npy(content)
    except Exception as error:  # the header is a Python literal, parsed by Python's own parser
        raise RequestError(
            f"{path} is not an array in NumPy's .npy format ({shown(error, 200)}); save it with numpy.save"
        ) from None


def _parse_npy(content: bytes) -> NDArray[Any]:
    """Raises ValueError, and what NumPy raises. The header alone never makes room for an array."""
    file = io.BytesIO(content)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = readers[version](file)
    if dtype.kind not in "fiub":
        raise ValueError(f"an array of {shown(dtype)}, not of numbers")
    wanted, got = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if wanted != got:
        raise ValueError(f"{got} bytes of numbers, shape {list(shape)} of {dtype} takes {shown(wanted)}")
    flat = np.frombuffer(content, dtype, offset=file.tell())
    return flat.reshape(shape, order="F" if fortran else "C").astype(dtype.newbyteorder("="), order="C")
