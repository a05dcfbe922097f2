"""The application: routes, guards, and the page."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles

from tgate_engine import __version__
from tgate_serve.api import edits, errors, images, status, videos
from tgate_serve.api.errors import ErrorAnswer
from tgate_serve.api.guards import Guards, Keys
from tgate_serve.api.openapi import described
from tgate_serve.api.service import Service

PAGE = Path(__file__).parent.parent / "page"

_TROUBLE: dict[int | str, dict[str, Any]] = {
    400: {"description": "what was asked cannot be done"},
    401: {"description": "an API key is wanted"},
    403: {"description": "another host was asked for"},
    404: {"description": "there is none"},
    408: {"description": "the body came too slowly"},
    409: {"description": "not yet, or no longer"},
    410: {"description": "cancelled, or not through within its time"},
    413: {"description": "the body is too large"},
    429: {"description": "the queue is full; Retry-After says when to ask again"},
    500: {"description": "the server failed"},
    503: {"description": "the server stops, or has not started"},
}


def create_app(service: Service, *, keys: Keys | None = None, hosts: Collection[str] | None = None) -> FastAPI:
    """The ASGI application of a service, which it closes at its end; models and workers stay the caller's.

    ``keys``, ``hosts``: see :class:`~tgate_serve.api.guards.Guards`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.ready = True
        yield
        service.ready = False
        service.close()

    app = FastAPI(
        title="tgate-engine",
        version=__version__,
        docs_url=None,  # it would load its scripts from another host
        redoc_url=None,
        lifespan=lifespan,
        responses={code: {"model": ErrorAnswer, **said} for code, said in _TROUBLE.items()},
    )
    app.state.service = service
    for routes in (images.router, edits.router, videos.router, status.router):
        app.include_router(routes)
    errors.install(app)
    app.openapi = described(app, service)  # type: ignore[method-assign]
    app.add_middleware(Guards, metrics=service.metrics, limits=service.limits, keys=keys, hosts=hosts)

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"Content-Security-Policy": _POLICY})

    app.mount("/page", _Files(directory=PAGE), name="page")
    return app


class _Files(StaticFiles):
    """Files that a browser asks for again each time, so that it never mixes those of two versions."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = "no-cache"
        return response


_POLICY = "default-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
