"""Records in files of pictures and videos: as JSON, and in the text that other programs read.

That text, ``parameters``, has the form of AUTOMATIC1111's web UI: the prompt's lines, ``Negative prompt: …``, and a
last line of ``Name: value`` pairs. It is for people and their tools; where there is no JSON, it is read for a prompt.
"""

from __future__ import annotations

import io
import json
import logging
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from tgate_engine.errors import RequestError, shown
from tgate_runtime.parameters import Parameters, parse_parameters
from tgate_runtime.picture import READ
from tgate_runtime.record import MOST_BYTES, Record, parse_record

log = logging.getLogger("tgate")

HOLD = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "MP4")
"""Formats of files that hold a record: Pillow's names, and MP4."""
PARAMETERS, JSON = "parameters", "tgate"
"""Of PNG's text chunks. In EXIF they are the user's comment and the maker's note; GIF and MP4 have one comment, where
the JSON is the last of the text's pairs."""

_MOST_JPEG_EXIF = 65_533 - 2
_UNICODE, _MAKER = b"UNICODE\0", b"tgate\0"
_PAIR = re.compile(rf', {JSON}: ("(?:[^"\\]|\\.)*")\s*\Z')
_SAMPLERS: Mapping[str, tuple[str, str]] = {
    "ddim": ("DDIM", ""),
    "deis": ("DEIS", ""),
    "dpmpp_2m": ("DPM++ 2M", ""),
    "dpmpp_2m_karras": ("DPM++ 2M", "Karras"),
    "dpmpp_3m": ("DPM++ 3M", ""),
    "euler": ("Euler", ""),
    "euler_a": ("Euler a", ""),
    "lcm": ("LCM", ""),
    "lms": ("LMS", ""),
    "pndm": ("PLMS", ""),
    "scm": ("SCM", ""),
    "unipc": ("UniPC", ""),
}
"""What the web UI calls our samplers and their noise levels."""


def parameters(record: Record) -> str:
    """The record in the web UI's form, for any reader of that; values with commas, colons or lines are JSON strings."""
    return _text(record, {})


def comment(record: Record) -> str:
    """The same with the JSON in it, for a format with one comment."""
    return _text(record, {JSON: _json(record)})


def save_options(record: Record | None, kind: str) -> dict[str, Any]:
    """What Pillow's ``save`` takes to write a record into a file of format ``kind``; nothing for those that hold none.

    A record too long for a JPEG is left out, with a warning in the log ``tgate``.
    """
    if record is None or kind not in HOLD:
        return {}
    if kind == "PNG":
        chunks = PngInfo()
        chunks.add_text(PARAMETERS, _without_nul(parameters(record)))
        chunks.add_text(JSON, _json(record))
        return {"pnginfo": chunks}
    if kind == "GIF":
        return {"comment": comment(record).encode()}
    exif = _exif(record)
    if kind == "JPEG" and len(exif) > _MOST_JPEG_EXIF:
        exif = _exif(record, text=False)
    if kind == "JPEG" and len(exif) > _MOST_JPEG_EXIF:
        log.warning("a JPEG has room for %d bytes of what it was drawn from: nothing is noted", _MOST_JPEG_EXIF)
        return {}
    return {"exif": exif}


def read_stamp(content: bytes, name: str) -> Record:
    """The record in a file's ``content``; no pixel is decoded. ``name``: what errors call it.

    Raises :class:`RequestError` for a file in another format than those of :data:`HOLD`, one that is damaged before its
    pixels begin, one without a record, and a record that is none.
    """
    record = read_notes(content, name)
    if isinstance(record, Parameters):
        raise _nothing(name)
    return record


def read_notes(content: bytes, name: str) -> Record | Parameters:
    """The record in a file's ``content``; where there is none, the :class:`Parameters` that another program noted.

    Raises as :func:`read_stamp` does, and as :func:`~tgate_runtime.parameters.parse_parameters` does.
    """
    if content[4:8] == b"ftyp":
        said = _text_of(_mp4_comment(content))
        text: str | bytes = _of_comment(said)
    else:
        text, said = _of_picture(content, name)
    if text:
        return parse_record(text, name)
    found = parse_parameters(said, name) if len(said) <= MOST_BYTES else None
    if found is None:
        raise _nothing(name)
    return found


def _nothing(name: str) -> RequestError:
    return RequestError(
        f"{name} holds no record of what it was drawn from: it was saved without one (--no-metadata), by another "
        f"program, or in a format without room for it; {', '.join(HOLD)} have it"
    )


def _of_picture(content: bytes, name: str) -> tuple[str | bytes, str]:
    """Our JSON, and the text for other programs; each empty where there is none."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(content), formats=READ) as image:
            if image.format == "PNG":
                return str(image.info.get(JSON, "")), str(image.info.get(PARAMETERS, ""))
            if image.format == "GIF":
                said = _text_of(image.info.get("comment", b""))
                return _of_comment(said), said
            tags = image.getexif().get_ifd(ExifTags.IFD.Exif)
            note, user = (tags.get(tag, b"") for tag in (ExifTags.Base.MakerNote, ExifTags.Base.UserComment))
    except UnidentifiedImageError:
        raise RequestError(f"{name} is not a picture that can be read: it is none of {', '.join(READ)}") from None
    except Exception as error:  # Pillow raises what it stumbles over
        raise RequestError(
            f"{name} is not a picture that can be read ({type(error).__name__}: {shown(error, 200)})"
        ) from None
    is_ours = isinstance(note, bytes) and note.startswith(_MAKER)
    is_text = isinstance(user, bytes) and user.startswith(_UNICODE)
    said = user.removeprefix(_UNICODE).decode("utf-16-be", "replace") if is_text else ""
    return note.removeprefix(_MAKER) if is_ours else b"", said


def _text_of(comment: bytes) -> str:
    """A comment as text; empty where it is none."""
    try:
        return comment.decode()
    except ValueError:
        return ""


def _of_comment(text: str) -> str:
    """The JSON that is the last pair of a comment; empty where there is none."""
    try:
        pair = _PAIR.search(text)
        return str(json.loads(pair[1])) if pair else ""
    except ValueError:
        return ""


def _json(record: Record) -> str:
    return json.dumps(record.to_json(), ensure_ascii=False)


def _text(record: Record, more: Mapping[str, str]) -> str:
    sampler, schedule = _SAMPLERS.get(record.plan.sampler, (record.plan.sampler, ""))
    pairs = {
        "Steps": record.plan.steps,
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": f"{record.guidance_scale:g}",
        "Seed": record.seed,
        "Size": record.size,
        "Model hash": record.bundle[:10],
        "Model": record.model,
        "Version": f"tgate-engine {record.version}",
        **more,
    }
    lines = [record.prompt or ""]
    if record.negative_prompt:
        lines.append(f"Negative prompt: {record.negative_prompt}")
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in pairs.items() if value != ""))
    return "\n".join(lines).lstrip("\n")


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if re.search('[,:"\n\r]', value) else value


def _without_nul(text: str) -> str:
    """No text chunk holds a NUL."""
    return text.replace("\0", " ")


def _exif(record: Record, *, text: bool = True) -> bytes:
    exif = Image.Exif()
    tags = exif.get_ifd(ExifTags.IFD.Exif)
    if text:
        tags[ExifTags.Base.UserComment] = _UNICODE + parameters(record).encode("utf-16-be")
    tags[ExifTags.Base.MakerNote] = _MAKER + _json(record).encode()
    return exif.tobytes()


# --- MP4 ----------------------------------------------------------------------------------------


def ffmetadata(record: Record) -> str:
    """A metadata file for ffmpeg that sets a video's comment."""
    escaped = re.sub(r"([=;#\\\n])", r"\\\1", _without_nul(comment(record)))
    return f";FFMETADATA1\ncomment={escaped}\n"


def _mp4_comment(content: bytes) -> bytes:
    """The comment of an MP4's metadata, moov/udta/meta/ilst/©cmt/data; empty where there is none, or boxes are cut."""
    box = memoryview(content)
    # A meta box counts a version and flags before its boxes, a data box its type and a locale before its bytes.
    for name, skip in ((b"moov", 0), (b"udta", 0), (b"meta", 4), (b"ilst", 0), (b"\xa9cmt", 0), (b"data", 8)):
        found = next((inner for kind, inner in _boxes(box) if kind == name), None)
        if found is None:
            return b""
        box = found[skip:]
    return bytes(box)


def _boxes(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, what it holds) of the boxes in one, until one does not fit."""
    at = 0
    while at + 8 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, at)
        head = 8
        if size == 1 and at + 16 <= len(content):
            (size,), head = struct.unpack_from(">Q", content, at + 8), 16
        size = size or len(content) - at  # 0: up to the end
        if size < head or at + size > len(content):
            return
        yield kind, content[at + head : at + size]
        at += size
