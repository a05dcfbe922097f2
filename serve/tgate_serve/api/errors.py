"""What goes wrong, as an answer: a status, and the JSON that OpenAI's clients read."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from tgate_engine.errors import RequestError, TgateError, shown
from tgate_serve.handle import Cancelled, Late, Stopped
from tgate_serve.scheduler import Busy

log = logging.getLogger("tgate")

INSTEAD = {
    "background": "pictures are opaque",
    "cfg_scale": "say guidance_scale",
    "fps": "a model has its own",
    "height": "say size",
    "input_reference.file_id": "no files are kept; give image_url, a data: URL",
    "moderation": "pictures are not judged",
    "num_frames": "a model has its own",
    "num_images": "say n",
    "num_images_per_prompt": "say n",
    "quality": "say plan, or m, k and num_inference_steps",
    "sampler": "a plan has its sampler",
    "scheduler": "a plan has its sampler",
    "steps": "say num_inference_steps",
    "style": "say it in the prompt",
    "true_cfg_scale": "say guidance_scale",
    "width": "say size",
}
"""What other servers call by another name, or take and do not heed."""


class Trouble(BaseModel):
    """What was wrong. ``param``: the parameter that it was wrong with, where it was one."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The answer to a request that failed."""

    error: Trouble


class ApiError(TgateError):
    """An answer other than 2xx. ``retry_s``: when to ask again."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s

    def trouble(self) -> Trouble:
        """What is told of it."""
        kind = (
            "invalid_request_error" if self.status < 429 else "rate_limit_error" if self.status == 429 else "api_error"
        )
        return Trouble(message=str(self), type=kind, param=self.param, code=self.code)

    def answer(self) -> JSONResponse:
        """An :class:`ErrorAnswer`, to be sent."""
        headers = {} if self.retry_s is None else {"Retry-After": str(math.ceil(self.retry_s))}
        return JSONResponse(ErrorAnswer(error=self.trouble()).model_dump(), self.status, headers=headers)


def api_error(error: BaseException) -> ApiError:
    """What to answer to an error. Only what a request is to blame for is told in its own words: others may name paths
    of this host, and go to the log."""
    match error:
        case ApiError():
            return error
        case RequestError():
            return ApiError(400, str(error), code="invalid_request")
        case Busy():
            return ApiError(429, str(error), code="queue_full", retry_s=error.after_s)
        case Cancelled():
            return ApiError(410, str(error), code="cancelled")
        case Late():
            return ApiError(410, str(error), code="too_late")
        case Stopped():
            return ApiError(503, str(error), code="stopped", retry_s=1)
    log.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says why", code="internal_error")


def install(app: FastAPI) -> None:
    """Have an application answer so."""

    async def tell(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).answer()

    async def tell_invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return _of_validation(error).answer()

    async def tell_http(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if error.status_code == 400:  # the parser's
            return _no_json().answer()
        answer = ApiError(error.status_code, str(error.detail), code=_CODES.get(error.status_code, "invalid_request"))
        response = answer.answer()
        response.headers.update(error.headers or {})
        return response

    app.add_exception_handler(TgateError, tell)
    app.add_exception_handler(Exception, tell)
    app.add_exception_handler(RequestValidationError, tell_invalid)
    app.add_exception_handler(HTTPException, tell_http)


_CODES = {401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}


def _of_validation(error: RequestValidationError) -> ApiError:
    """The first of what a body is not; a name that is not known before one that is missing, which it may be meant
    for."""
    found: Sequence[Mapping[str, Any]] = error.errors()
    first = min(found, key=lambda each: each["type"] != "extra_forbidden")
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    name = shown(".".join(where), 80) or None
    if first["type"] == "extra_forbidden":
        instead = INSTEAD.get(str(name), "leave it out")
        return ApiError(
            400, f"parameter '{name}' is not known or has no effect; {instead}", code="unknown_parameter", param=name
        )
    if first["type"] == "json_invalid" or name is None:
        return _no_json()
    return ApiError(
        400, f"{name}: {shown(first['msg'], 300)}, got {_got(first.get('input'))}", code="invalid_value", param=name
    )


def _no_json() -> ApiError:
    return ApiError(400, "the body must be JSON, with Content-Type: application/json", code="invalid_json")


def _got(value: object) -> str:
    return "nothing" if isinstance(value, dict) else f"'{shown(value, 60)}'"
