"""``POST /v1/images/generations``: pictures of a prompt, whole or as they form."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.types import Receive, Scope, Send

from tgate_engine.errors import shown
from tgate_serve.api.controls import controls_in
from tgate_serve.api.errors import ApiError, api_error
from tgate_serve.api.events import Completed, Event, Failed, Kind, PartialImage, Queued, StepTaken, event_stream
from tgate_serve.api.forms import data_in, picture_in
from tgate_serve.api.pictures import all_encoded, encoded, report
from tgate_serve.api.schemas import CancelAnswer, Format, ImageAsked, ImagesAnswer, Picture, PicturesAsked
from tgate_serve.api.service import Served, Service, identity_of, unless_gone
from tgate_serve.handle import Drawn, Step
from tgate_serve.model import Drawing, Wish

log = logging.getLogger("tgate")
router = APIRouter(tags=["images"])

_BEAT_S = 1.0
"""How often a stream looks at the queue, and says that it lives, while there is nothing else to tell."""


@router.post(
    "/v1/images/generations",
    response_model=ImagesAnswer,
    responses={200: {"content": event_stream()}},
)
async def generate(asked: ImageAsked, request: Request, response: Response, service: Served) -> Any:
    """Draw pictures of a prompt. A client that hangs up calls its request off.

    With ``stream`` the answer is server-sent events: ``image_generation.partial_image``, and at the end
    ``image_generation.completed`` for each picture; with ``stream_steps`` also ``image_generation.queued`` and
    ``image_generation.step``.
    """
    check_asked(asked)
    identity = identity_of(request, "img")
    model = service.model(asked.model, video=False)
    beside = None
    if asked.ip_adapter_image is not None:
        content = data_in(asked.ip_adapter_image.image_url, "ip_adapter_image")
        beside = await service.encoding(partial(picture_in, content, "ip_adapter_image"))
    began_s = time.monotonic()
    controls = await service.encoding(partial(controls_in, asked.controls)) if asked.controls else None
    partials = asked.partial_images or 0
    wish = Wish(
        prompt=asked.prompt,
        images=asked.n or 1,
        partials=partials,
        decoder=asked.decoder,
        controls=controls,
        ip_adapter_image=beside,
        ip_adapter_scale=asked.ip_adapter_scale,
        **asked.common(),
    )
    drawing = await service.submit(model, wish)
    user = "" if asked.user is None else f" for user '{shown(asked.user)}'"
    log.info("%s: %d of plan %s by %s%s", identity, wish.images, drawing.plan.name, model.name, user)
    response.headers["X-Request-Id"] = identity
    return await answered(service, request, drawing, identity, asked, "image_generation", began_s)


async def answered(
    service: Service,
    request: Request,
    drawing: Drawing,
    identity: str,
    asked: PicturesAsked,
    kind: Kind,
    began_s: float,
) -> ImagesAnswer | Response:
    """The answer of a request, as a stream of events of a kind where that is asked for, or whole."""
    form, quality = asked.output_format or "png", asked.output_compression
    if asked.stream:
        steps = bool(asked.stream_steps)
        told = _told(service, drawing, identity, form, quality, kind=kind, steps=steps, began_s=began_s)
        return _Stream(service, drawing, identity, told)
    return await _whole(service, request, drawing, identity, form, quality, began_s)


async def _whole(
    service: Service,
    request: Request,
    drawing: Drawing,
    identity: str,
    form: Format,
    quality: int | None,
    began_s: float,
) -> ImagesAnswer:
    """The answer of a request once all its pictures are there. Whoever hangs up calls it off."""
    with service.under_way(drawing.handle, identity):
        drawn = await unless_gone(request, drawing.handle.drawn())
        texts, decode_s = await service.decoding(lambda: all_encoded(drawing, drawn, form, quality))
    _observe(service, drawing, drawn, decode_s, began_s)
    return ImagesAnswer(
        id=identity,
        created=int(time.time()),
        output_format=form,
        size=drawn.size,
        data=[Picture(b64_json=text, seed=seed) for text, seed in zip(texts, drawn.seeds, strict=True)],
        tgate=report(drawing, drawn, list(drawing.handle.steps()), decode_s),
    )


@router.delete("/v1/images/generations/{identity}", response_model=CancelAnswer)
async def cancel(identity: str, service: Served) -> Any:
    """Call a request off that is under way, by the ``X-Request-Id`` that its stream began with."""
    service.cancel(identity)
    return CancelAnswer(id=identity)


def check_asked(asked: PicturesAsked) -> None:
    """Parameters that mean something only beside others are refused without them. Raises :class:`ApiError`."""
    if not asked.stream:
        for name in ("partial_images", "stream_steps"):
            if getattr(asked, name):
                message = f"{name} has no effect without stream: true"
                raise ApiError(400, message, code="unknown_parameter", param=name)
    if asked.output_compression is not None and (asked.output_format or "png") == "png":
        message = "output_compression has no effect on png; say output_format jpeg or webp"
        raise ApiError(400, message, code="unknown_parameter", param="output_compression")


def _observe(service: Service, drawing: Drawing, drawn: Drawn, decode_s: float, began_s: float) -> None:
    request_s = time.monotonic() - began_s
    service.metrics.drawn(drawing.model.name, queue_s=drawn.waited_s, decode_s=decode_s, request_s=request_s)


# --- streams ------------------------------------------------------------------------------------


class _Stream(StreamingResponse):
    """The events of a request. Whoever stops reading calls it off."""

    def __init__(self, service: Service, drawing: Drawing, identity: str, events: AsyncIterator[Event | None]) -> None:
        headers = {"X-Request-Id": identity, "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_written(events), media_type="text/event-stream", headers=headers)
        self._service, self._drawing, self._identity = service, drawing, identity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._service.under_way(self._drawing.handle, self._identity):
            await super().__call__(scope, receive, send)


async def _written(events: AsyncIterator[Event | None]) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            yield b": waiting\n\n" if event is None else _sse(event)
    except Exception as error:  # the answer has begun: what went wrong is an event, as OpenAI's clients read it
        yield _sse(Failed(error=api_error(error).trouble()))


async def _told(
    service: Service,
    drawing: Drawing,
    identity: str,
    form: Format,
    quality: int | None,
    *,
    kind: Kind,
    steps: bool,
    began_s: float,
) -> AsyncIterator[Event | None]:
    """Events, and None where nothing has happened for a while."""
    common: dict[str, Any] = {"created_at": int(time.time()), "output_format": form, "size": drawing.size}
    partials = [0] * len(drawing.seeds)
    taken: list[Step] = []
    ahead = None
    async for step in _beating(drawing.handle.steps_async()):
        if step is None:
            if steps and not taken and (now := drawing.model.worker.ahead(drawing.handle)) != ahead:
                ahead = now
                yield Queued(**_named(kind, "queued"), id=identity, ahead=ahead)
            else:
                yield None
            continue
        taken.append(step)
        if steps:
            yield _step(step, identity, kind)
        if step.towards is not None:
            text = await service.decoding(partial(_look, drawing, step, form, quality))
            index = partials[step.image]
            named = {**_named(kind, "partial_image"), **common}
            yield PartialImage(**named, b64_json=text, partial_image_index=index, image_index=step.image)
            partials[step.image] += 1
    drawn = await drawing.handle.drawn()
    texts, decode_s = await service.decoding(lambda: all_encoded(drawing, drawn, form, quality))
    _observe(service, drawing, drawn, decode_s, began_s)
    told = report(drawing, drawn, taken, decode_s)
    for image, (text, seed) in enumerate(zip(texts, drawn.seeds, strict=True)):
        named = {**_named(kind, "completed"), **common}
        yield Completed(**named, b64_json=text, image_index=image, seed=seed, tgate=told)


def _look(drawing: Drawing, step: Step, form: Format, quality: int | None) -> str:
    return encoded(drawing.partial(step), form, quality)


def _step(step: Step, identity: str, kind: Kind) -> StepTaken:
    return StepTaken(
        **_named(kind, "step"),
        id=identity,
        image_index=step.image,
        step=step.index,
        graph=step.graph,
        done=step.done,
        total=step.total,
        company=step.company,
        elapsed_ms=round(step.elapsed_ms, 3),
    )


def _named(kind: Kind, what: str) -> dict[str, Any]:
    return {"type": f"{kind}.{what}"}


async def _beating(steps: AsyncIterator[Step]) -> AsyncIterator[Step | None]:
    """The same steps, and None at once and whenever nothing has come for :data:`_BEAT_S`."""
    yield None
    coming: asyncio.Task[Step] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(steps))
            done, _ = await asyncio.wait({coming}, timeout=_BEAT_S)
            if not done:
                yield None
                continue
            try:
                step = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield step
    finally:
        if coming is not None:
            coming.cancel()
            with suppress(asyncio.CancelledError, StopAsyncIteration):
                await coming


def _sse(event: Event) -> bytes:
    return format_sse_event(data_str=event.model_dump_json(), event=event.type)
