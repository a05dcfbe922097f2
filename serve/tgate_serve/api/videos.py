"""``/v1/videos``: videos of a prompt or of a picture, which are drawn while nobody waits."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from tgate_engine.errors import RequestError, shown
from tgate_runtime.files import check_writable, picture_bytes, video_bytes
from tgate_runtime.picture import read_picture
from tgate_runtime.record import Record
from tgate_serve.api.errors import ApiError
from tgate_serve.api.forms import asked_in, data_in
from tgate_serve.api.jobs import Job, Jobs, Made
from tgate_serve.api.pictures import report
from tgate_serve.api.schemas import (
    ContentAsked,
    VideoAnswer,
    VideoAsked,
    VideoDeleted,
    VideoError,
    VideoFormat,
    VideosAnswer,
    VideosAsked,
)
from tgate_serve.api.service import Served, Service, new_identity
from tgate_serve.model import Drawing, Model, Wish

log = logging.getLogger("tgate")
router = APIRouter(tags=["videos"])

MEDIA_TYPES: dict[VideoFormat, str] = {"mp4": "video/mp4", "gif": "image/gif"}
_THUMBNAIL = "image/webp"
_PART_BYTES = 2**18
"""A file is sent in parts, since a slow reader has so long for each."""

_SCHEMA = "#/components/schemas/"
_BODY = {"application/json": "VideoAsked", "multipart/form-data": "VideoForm"}
"""What :mod:`~tgate_serve.api.openapi` adds to the document."""


@router.post(
    "/v1/videos",
    response_model=VideoAnswer,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {kind: {"schema": {"$ref": _SCHEMA + name}} for kind, name in _BODY.items()},
        }
    },
)
async def create(request: Request, service: Served) -> Any:
    """Have a video drawn. The answer comes once its prompt or picture is encoded; the video is there when its status is
    ``completed``."""
    began_s = time.monotonic()
    asked, files = await asked_in(request, VideoAsked, ["input_reference"], service.limits.body_bytes)
    reference = files.get("input_reference")
    if asked.input_reference is not None:
        reference = data_in(asked.input_reference.image_url, "input_reference")
    model = service.model(asked.model, video=True)
    form = asked.output_format or "mp4"
    _check(asked, model, form, given=reference is not None)
    with service.jobs.entrance():
        drawing, record = await service.encoding(partial(_submit, service, model, asked, reference, began_s))
        job = Job(
            identity=new_identity("video"),
            drawing=drawing,
            model=model.name,
            prompt=asked.prompt,
            size=drawing.size,
            seconds=length(model),
            seed=drawing.seeds[0],
            form=form,
            created_s=service.jobs.clock(),
        )
        service.jobs.start(job, _made(service, drawing, record, form, began_s))
    log.info("%s: plan %s by %s", job.identity, drawing.plan.name, model.name)
    return _answer(job, service.jobs)


@router.get("/v1/videos", response_model=VideosAnswer)
async def videos(asked: Annotated[VideosAsked, Query()], service: Served) -> Any:
    """The videos that are kept, whoever asked for them."""
    jobs = list(service.jobs)
    if asked.order == "desc":
        jobs.reverse()
    if asked.after is not None:
        jobs = jobs[jobs.index(service.jobs.find(asked.after)) + 1 :]
    data = [_answer(job, service.jobs) for job in jobs[: asked.limit]]
    return VideosAnswer(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(jobs) > asked.limit,
    )


@router.get("/v1/videos/{identity}", response_model=VideoAnswer)
async def video(
    identity: str,
    service: Served,
    polling: Annotated[str | None, Header(alias="X-Stainless-Poll-Helper", include_in_schema=False)] = None,
) -> Any:
    """How far a video is."""
    answer = _answer(service.jobs.find(identity), service.jobs)
    if polling is not None and answer.status == "cancelled":
        # OpenAI's client, which knows no cancelled videos, would ask for this one for ever, and without a pause.
        answer.status = "failed"
    return answer


@router.get(
    "/v1/videos/{identity}/content",
    response_class=Response,
    responses={
        200: {"content": {kind: {"schema": {"type": "string"}} for kind in (*MEDIA_TYPES.values(), _THUMBNAIL)}}
    },
)
async def content(identity: str, asked: Annotated[ContentAsked, Query()], service: Served) -> Any:
    """The file of a video that is completed."""
    job = service.jobs.find(identity)
    if job.made is None:
        if job.error is not None:
            raise ApiError(404, f"the video is {job.status} and has no content: {job.error}", code=job.error.code)
        message = f"the video is {job.status} ({job.progress} %); ask again once its status is completed"
        raise ApiError(409, message, code="not_ready", retry_s=1)
    if asked.variant == "thumbnail":
        return Response(job.made.thumbnail, media_type=_THUMBNAIL)
    headers = {
        "Content-Length": str(len(job.made.content)),
        "Content-Disposition": f'inline; filename="{job.identity}.{job.form}"',
    }
    return StreamingResponse(_parts(job, job.made), media_type=MEDIA_TYPES[job.form], headers=headers)


@router.post("/v1/videos/{identity}/cancel", response_model=VideoAnswer)
async def cancel(identity: str, service: Served) -> Any:
    """Call a video off that is not through. It stays listed."""
    job = service.jobs.find(identity)
    if job.ended_s is not None and job.status != "cancelled":
        message = f"the video is {job.status}, and there is nothing to cancel; DELETE forgets it"
        raise ApiError(409, message, code="not_under_way")
    service.jobs.cancel(job)
    return _answer(job, service.jobs)


@router.delete("/v1/videos/{identity}", response_model=VideoDeleted)
async def delete(identity: str, service: Served) -> Any:
    """Forget a video, and call it off if it is not through."""
    service.jobs.forget(service.jobs.find(identity))
    return VideoDeleted(id=identity)


def length(model: Model) -> str:
    """How long a model's videos are, in seconds, as requests and answers tell it."""
    manifest = model.session.manifest
    return f"{manifest.frames / manifest.fps:.6g}"


def _check(asked: VideoAsked, model: Model, form: VideoFormat, *, given: bool) -> None:
    """What a model does not take is refused before anything is read. Raises :class:`ApiError`."""
    has = {"prompt": asked.prompt is not None, "input_reference": given}
    takes, other = ("input_reference", "prompt") if model.takes_picture else ("prompt", "input_reference")
    if has[other]:
        message = f"{model.name} starts from {takes}, and so {other} has no effect; leave it out"
        raise ApiError(400, message, code="unknown_parameter", param=other)
    if not has[takes]:
        raise ApiError(400, f"{model.name} starts from {takes}; give one", code="invalid_value", param=takes)
    if model.takes_picture and asked.negative_prompt is not None:
        message = f"{model.name} takes no prompts, and so negative_prompt has no effect; leave it out"
        raise ApiError(400, message, code="unknown_parameter", param="negative_prompt")
    if asked.seconds not in (None, length(model)):
        message = f"seconds: videos of {model.name} are of '{length(model)}', got '{shown(asked.seconds, 60)}'"
        raise ApiError(400, message, code="invalid_value", param="seconds")
    try:
        check_writable(f".{form}")
    except RequestError as error:
        raise ApiError(400, f"output_format: {error}", code="invalid_value", param="output_format") from None


def _submit(
    service: Service, model: Model, asked: VideoAsked, reference: bytes | None, came_s: float
) -> tuple[Drawing, Record]:
    """A drawing without its picture, which would be held for as long as it waits, and what it is drawn from."""
    picture = None
    if reference is not None:
        try:
            picture = read_picture(reference, "input_reference")
        except RequestError as error:
            raise ApiError(400, str(error), code="invalid_value", param="input_reference") from None
    wish = Wish(prompt=asked.prompt, picture=picture, **asked.common())
    service.check(model, wish)
    drawing = model.submit(wish, came_s)
    return replace(drawing, wish=replace(wish, picture=None)), drawing.record(0)


async def _made(service: Service, drawing: Drawing, record: Record, form: VideoFormat, began_s: float) -> Made:
    drawn = await drawing.handle.drawn()

    def files() -> tuple[bytes, bytes, float]:
        begin_s = time.monotonic()
        frames = drawing.pictures(drawn)[0]
        whole = video_bytes(frames, f".{form}", fps=drawing.model.session.manifest.fps, record=record)
        return whole, picture_bytes(frames[0], ".webp"), time.monotonic() - begin_s

    whole, thumbnail, decode_s = await service.decoding(files)
    request_s = time.monotonic() - began_s
    service.metrics.drawn(drawing.model.name, queue_s=drawn.waited_s, decode_s=decode_s, request_s=request_s)
    told = report(drawing, drawn, list(drawing.handle.steps()), decode_s)
    return Made(content=whole, thumbnail=thumbnail, report=told)


async def _parts(job: Job, made: Made) -> AsyncIterator[bytes]:
    for start in range(0, len(made.content), _PART_BYTES):
        yield made.content[start : start + _PART_BYTES]
    job.fetched = True


def _answer(job: Job, jobs: Jobs) -> VideoAnswer:
    return VideoAnswer(
        id=job.identity,
        model=job.model,
        status=job.status,
        progress=job.progress,
        created_at=int(job.created_s),
        completed_at=None if job.ended_s is None else int(job.ended_s),
        expires_at=None if job.ended_s is None else int(job.ended_s + jobs.keep_s),
        output_format=job.form,
        size=job.size,
        seconds=job.seconds,
        seed=job.seed,
        prompt=job.prompt,
        error=None if job.error is None else VideoError(code=job.error.code, message=str(job.error)),
        queue_position=job.ahead,
        tgate=None if job.made is None else job.made.report,
    )
