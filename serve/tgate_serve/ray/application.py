"""Ray Serve's application: an ingress without an engine, and a replica for each device."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from ray import serve

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError, TgateError
from tgate_runtime.mini import place_of
from tgate_serve.api.guards import Keys
from tgate_serve.bundles import places_asked
from tgate_serve.ray.away import Away
from tgate_serve.ray.ingress import Ingress
from tgate_serve.ray.replica import Replica
from tgate_serve.ray.settings import Settings

_CALLS = 16
"""Of a replica beside those that draw: how it is, and what is called off."""
_INGRESS_CALLS = 10_000


class Refused(RequestError, click.ClickException):
    """Ray's commands show the one line of such an error, and no traceback."""


def build(args: Mapping[str, Any]) -> serve.Application:
    """The application. ``args``: the fields of :class:`~tgate_serve.ray.settings.Settings`, of which ``bundles`` has to
    be said; texts where they come from a command line: ``serve run tgate_serve.ray:build bundles=mini replicas=2``.

    Raises :class:`~tgate_engine.errors.RequestError`, in one line, for what cannot be served.
    """
    try:
        return _application(Settings.of(args))
    except TgateError as error:
        raise Refused(str(error)) from None


def _application(settings: Settings) -> serve.Application:
    places = {name: _anywhere(place) for name, place in places_asked(settings.bundles).items()}
    models = [Away(name, Bundle.open(place_of(place), check_digests=False), settings) for name, place in places.items()]
    keys = None if settings.api_key_file is None else Keys.load(settings.api_key_file)
    rows = max(model.rows for model in models)
    least, most = settings.replicas
    count: dict[str, Any] = {"num_replicas": least}
    if least < most:
        # A replica that has an image for every row works as well as it can.
        count = {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": rows}}
    replicas = serve.deployment(
        Replica,
        name="Replica",
        ray_actor_options={"num_cpus": settings.threads or 1, "num_gpus": settings.gpus_kept},
        # The worker's own queue says when it is full, and Ray's is for the time while there is no replica.
        max_ongoing_requests=rows + settings.queue + _CALLS,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        **count,
    ).bind(settings, places)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name="Ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_INGRESS_CALLS,
        graceful_shutdown_timeout_s=settings.drain_seconds,
    )
    return ingress.bind(replicas, settings, places, keys)


def _anywhere(place: str) -> str:
    """A directory by its whole path, since processes start elsewhere; ``mini`` is every machine's own."""
    return str(Path(place).resolve()) if place_of(place) == Path(place) else place
