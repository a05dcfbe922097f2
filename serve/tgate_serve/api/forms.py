"""Bodies that are JSON or a form, as OpenAI's clients send those that may have a file."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from tgate_engine.errors import RequestError, shown
from tgate_runtime.picture import read_picture
from tgate_serve.api.errors import ApiError

T = TypeVar("T", bound=BaseModel)

_MOST_FIELDS = 64
_INSIDE = re.compile(r"(\w+)\[([\w.-]+)\]")
"""How a form names a field of an object."""
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)


async def asked_in(
    request: Request, schema: type[T], files: Sequence[str], most_bytes: int
) -> tuple[T, dict[str, bytes]]:
    """What a body asks for, and what is in the files that a form has, by their names, some of ``files``; of a list of
    one, as OpenAI's clients send it (``image[]``), that one.

    ``most_bytes``: of a form's field. Raises :class:`RequestValidationError` for what ``schema`` does not take, and
    :class:`ApiError` for a body that is neither, a field that is given twice, and a form that a page of another site
    sends.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            _check_site(request)
            form = request.form(max_files=len(files), max_fields=_MOST_FIELDS, max_part_size=most_bytes)
            async with form as parts:
                fields, contents = await _fields(parts.multi_items(), files)
            return schema.model_validate_strings(fields), contents
        if kind == "application/json":
            return schema.model_validate_json(await request.body()), {}
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None
    message = "the body must be JSON (Content-Type: application/json) or a form (multipart/form-data)"
    raise ApiError(400, message, code="invalid_json")


def data_in(url: str, name: str) -> bytes:
    """What is in a picture's data: URL. Raises :class:`ApiError` for another one: what it names may be on a network
    that this host alone reaches. ``name``: the parameter's."""
    start = _DATA_URL.match(url)
    if start is None:
        message = (
            f"{name}: URLs are not fetched, got '{shown(url, 60)}'; send the picture itself, as "
            "data:image/png;base64,... or as a form's file"
        )
        raise ApiError(400, message, code="invalid_value", param=name)
    try:
        return base64.b64decode(url[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        message = f"{name}: what follows ;base64, is not base64"
        raise ApiError(400, message, code="invalid_value", param=name) from None


def picture_in(
    content: bytes | None, name: str, read: Callable[[bytes, str], Image.Image] = read_picture
) -> Image.Image | None:
    """The picture of a file's content, decoded in the calling thread; None where there is none. Raises
    :class:`ApiError` for what is none. ``name``: the parameter's."""
    try:
        return None if content is None else read(content, name)
    except RequestError as error:
        raise ApiError(400, str(error), code="invalid_value", param=name) from None


async def _fields(
    parts: list[tuple[str, UploadFile | str]], files: Sequence[str]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Texts by name, those of objects by theirs, and the files' contents."""
    parts = [(name if isinstance(part, str) else name.removesuffix("[]"), part) for name, part in parts]
    names = [name for name, _ in parts]
    inside = {name: match for name in names if (match := _INSIDE.fullmatch(name))}
    objects = {match[1] for match in inside.values()}
    if twice := [name for name in names if names.count(name) > 1 or name in objects]:
        message = f"'{shown(twice[0])}' is given more than once; give it once"
        raise ApiError(400, message, code="invalid_value", param=shown(twice[0], 80))
    fields: dict[str, Any] = {}
    contents: dict[str, bytes] = {}
    for name, part in parts:
        if isinstance(part, str):
            if name in inside:
                fields.setdefault(inside[name][1], {})[inside[name][2]] = part
            else:
                fields[name] = part
        elif name in files:
            contents[name] = await part.read()
        else:
            known = " and ".join(filter(None, [", ".join(files[:-1]), files[-1]]))
            message = f"parameter '{shown(name)}' is a file, and {known} alone may be one; leave it out"
            raise ApiError(400, message, code="unknown_parameter", param=shown(name, 80))
    return fields, contents


def _check_site(request: Request) -> None:
    """Browsers send a form of any page to any server without asking it first; what they don't do for JSON."""
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise ApiError(403, "forms of other sites' pages are not taken; send JSON", code="host")
