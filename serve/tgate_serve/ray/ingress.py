"""What clients reach: the whole API without an engine. What is to be drawn goes to a replica."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.routing import Route

from tgate_engine.bundle import Bundle
from tgate_runtime.mini import place_of
from tgate_serve.api.app import create_app
from tgate_serve.api.errors import ApiError
from tgate_serve.api.guards import Keys
from tgate_serve.api.limits import Limits
from tgate_serve.api.schemas import CancelAnswer
from tgate_serve.api.service import Service, service_of
from tgate_serve.metrics import Metrics
from tgate_serve.ray.asked import Asked
from tgate_serve.ray.away import Away
from tgate_serve.ray.passed import Passed
from tgate_serve.ray.settings import Settings
from tgate_serve.ray.summed import summed

log = logging.getLogger("tgate")

_SAY_S = 5.0
"""How long replicas may take to say how they are."""
_DRAW, _EDIT = "/v1/images/generations", "/v1/images/edits"


class Ingress:
    """A deployment. It keeps nothing of requests: any number of them do the same."""

    def __init__(
        self, replicas: DeploymentHandle[Any], settings: Settings, places: Mapping[str, str], keys: Keys | None
    ) -> None:
        """Read the manifests of the bundles, by the names and directories of ``places``, on this machine too."""
        self._replicas, self._settings, self._keys = replicas, settings, keys
        self._draws = replicas.options(method_name="answer", stream=True)
        bundles = {name: Bundle.open(place_of(place), check_digests=False) for name, place in places.items()}
        self._models = {name: Away(name, bundle, settings) for name, bundle in bundles.items()}
        self._service = Service(self._models, Metrics({}), Limits(images=settings.most_images))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The application of one server, but for what replicas alone can do."""
        app = create_app(self._service, keys=self._keys, hosts=self._settings.hosts)
        app.dependency_overrides[service_of] = self._told
        app.router.routes[:0] = [
            Route(_DRAW, self._draw, methods=["POST"]),
            Route(_DRAW + "/{identity}", self._cancel, methods=["DELETE"]),
            Route(_EDIT, self._edit, methods=["POST"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        return app

    async def _draw(self, request: Request) -> Response:
        asked = Asked(await request.body())
        name = self._service.model(asked.model, video=False).name
        if self._settings.fits(len(self._models)):
            return Passed(self._draws, name, asked)
        # Ray prefers replicas that have the model in memory.
        return Passed(self._draws.options(multiplexed_model_id=name), name, asked)

    async def _edit(self, _: Request) -> Response:
        message = "pictures that begin from one are not drawn by replicas; ask a server that `tgate serve` started"
        raise ApiError(400, message, code="invalid_request")

    async def _cancel(self, request: Request) -> Response:
        identity = request.path_params["identity"]
        if not any(await self._all("cancel", identity)):
            self._service.cancel(identity)  # refuses: it is under way nowhere
        return JSONResponse(CancelAnswer(id=identity).model_dump())

    async def _metrics(self, _: Request) -> Response:
        text = summed(dict(await self._all("metrics")))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _told(self) -> Service:
        """The service, once its models are as replicas say."""
        states = await self._all("states")
        for model in self._models.values():
            model.told(states)
        return self._service

    async def _all(self, method: str, *args: Any) -> list[Any]:
        """What each replica says; one that dies meanwhile says nothing."""
        try:
            asked = self._replicas.broadcast(method, *args)
            said = await asked.results_async(timeout_s=_SAY_S, return_exceptions=True)
        except (RayServeException, TimeoutError) as error:
            log.warning("no replica says its %s: %s", method, error)
            return []
        return [each for each in said if not isinstance(each, BaseException)]
