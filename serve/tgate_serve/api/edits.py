"""``POST /v1/images/edits``: pictures that begin from one in place of noise, all of it or what a mask says."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from tgate_engine.errors import shown
from tgate_runtime.picture import read_mask
from tgate_serve.api.controls import controls_in
from tgate_serve.api.errors import ApiError
from tgate_serve.api.events import event_stream
from tgate_serve.api.forms import asked_in, data_in, picture_in
from tgate_serve.api.images import answered, check_asked
from tgate_serve.api.schemas import EditAsked, ImagesAnswer
from tgate_serve.api.service import Served, Service, identity_of
from tgate_serve.model import Drawing, Model, Wish

log = logging.getLogger("tgate")
router = APIRouter(tags=["images"])

FILES = ("image", "mask", "ip_adapter_image")
"""What a form may have as files, and JSON as objects with a data: URL."""

_SCHEMA = "#/components/schemas/"
_BODY = {"application/json": "EditAsked", "multipart/form-data": "EditForm"}
"""What :mod:`~tgate_serve.api.openapi` adds to the document."""


@router.post(
    "/v1/images/edits",
    response_model=ImagesAnswer,
    responses={200: {"content": event_stream()}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": {"$ref": _SCHEMA + name}} for kind, name in _BODY.items()},
        }
    },
)
async def edit(request: Request, response: Response, service: Served) -> Any:
    """Draw pictures that begin from one. A client that hangs up calls its request off.

    With ``stream`` the answer is server-sent events, those of ``/v1/images/generations`` under names that begin with
    ``image_edit``.
    """
    began_s = time.monotonic()
    asked, files = await asked_in(request, EditAsked, FILES, service.limits.body_bytes)
    for name in FILES:
        if (reference := getattr(asked, name)) is not None:
            files[name] = data_in(reference.image_url, name)
    check_asked(asked)
    model = service.model(asked.model, video=False)
    _check(model, files)
    identity = identity_of(request, "img")
    drawing = await service.encoding(partial(_submit, service, model, asked, files, began_s))
    user = "" if asked.user is None else f" for user '{shown(asked.user)}'"
    log.info("%s: %d edits of plan %s by %s%s", identity, len(drawing.seeds), drawing.plan.name, model.name, user)
    response.headers["X-Request-Id"] = identity
    return await answered(service, request, drawing, identity, asked, "image_edit", began_s)


def _check(model: Model, files: dict[str, bytes]) -> None:
    if not model.edits:
        message = f"{model.name} has no encoder, and so begins from no picture; ask at /v1/images/generations"
        raise ApiError(400, message, code="invalid_value", param="model")
    if "image" not in files:
        message = 'an edit begins from image: a form\'s file, or in JSON {"image_url": "data:image/png;base64,..."}'
        raise ApiError(400, message, code="invalid_value", param="image")


def _submit(service: Service, model: Model, asked: EditAsked, files: dict[str, bytes], came_s: float) -> Drawing:
    wish = Wish(
        prompt=asked.prompt,
        picture=picture_in(files["image"], "image"),
        mask=picture_in(files.get("mask"), "mask", read_mask),
        strength=asked.strength,
        ip_adapter_image=picture_in(files.get("ip_adapter_image"), "ip_adapter_image"),
        ip_adapter_scale=asked.ip_adapter_scale,
        images=asked.n or 1,
        partials=asked.partial_images or 0,
        decoder=asked.decoder,
        controls=controls_in(asked.controls),
        **asked.common(),
    )
    service.check(model, wish)
    return model.submit(wish, came_s)
