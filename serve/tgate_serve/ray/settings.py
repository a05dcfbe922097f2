"""What the application is told when it is started: ``name=value`` of a command line, or the values of Ray's files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from tgate_engine.errors import RequestError, shown
from tgate_runtime.engines import ENGINES


def _listed(value: object) -> object:
    """A text of a command line is a list with commas."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _range(value: object) -> object:
    """``2``, or ``1-4``: at least and at most."""
    if isinstance(value, str) and (found := re.fullmatch(r"(\d{1,4})(?:-(\d{1,4}))?", value)):
        value = int(found[1]), int(found[2] or found[1])
    elif isinstance(value, int) and not isinstance(value, bool):
        value = value, value
    if not isinstance(value, tuple) or not 1 <= value[0] <= value[1]:
        raise ValueError("how many there are, such as 2, or at least and at most, such as 1-4")
    return value


Texts = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]


class Settings(BaseModel):
    """``bundles``: NAME=DIRECTORY or DIRECTORY, the same on every machine. ``replicas``: of the engine, one for a
    device; a range, ``1-4``, follows the load. ``models_per_replica``: how many of the bundles one has in memory at a
    time; all of them if left out. ``threads``: of one graph on a CPU, and the CPUs that Ray keeps for a replica; 1 if
    left out. ``gpus``: what Ray keeps of them; 1 for an engine that needs one.
    ``drain_seconds``: how long requests that are under way may take once a replica is to stop.
    ``api_key_file``, ``hosts``: see :class:`~tgate_serve.api.guards.Guards`. The rest is what ``tgate serve`` takes,
    ``memory_limit`` in bytes and of each model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bundles: Texts
    replicas: Annotated[tuple[int, int], BeforeValidator(_range)] = (1, 1)
    models_per_replica: Count | None = None
    engine: str = "ort-cpu"
    threads: Count | None = None
    precision: str | None = None
    gpus: Annotated[float, Field(ge=0)] | None = None
    plans: Texts | None = None
    sizes: Texts | None = None
    rows: Count | None = None
    queue: Count = 64
    patience: Count = 8
    memory_limit: Count | None = None
    most_images: Count = 10
    drain_seconds: Count = 60
    api_key_file: Path | None = None
    hosts: Texts | None = None

    @staticmethod
    def of(args: Mapping[str, Any]) -> Settings:
        """What was said. Raises :class:`RequestError`, in one line, for what is not known, missing or of another
        kind."""
        try:
            settings = Settings.model_validate(dict(args))
        except ValidationError as error:
            # A name that is misspelt is also one that is missing.
            first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
            name = ".".join(str(part) for part in first["loc"])
            raise RequestError(_told(shown(name), first)) from None
        if settings.engine not in ENGINES:
            raise RequestError(f"there is no engine '{shown(settings.engine)}'; the engines are {', '.join(ENGINES)}")
        if settings.threads is not None and not settings.on_cpu:
            raise RequestError(f"engine {settings.engine} computes on a GPU; leave out threads")
        return settings

    @property
    def on_cpu(self) -> bool:
        """Whether replicas compute on the CPU."""
        return "CPU" in ENGINES[self.engine].runs_on and not self.gpus

    @property
    def gpus_kept(self) -> float:
        """What Ray keeps for a replica."""
        return self.gpus if self.gpus is not None else 0 if self.on_cpu else 1

    def fits(self, models: int) -> bool:
        """Whether a replica has so many models in memory at once."""
        return self.models_per_replica is None or self.models_per_replica >= models


def _told(name: str, error: Mapping[str, Any]) -> str:
    match error["type"]:
        case "missing":
            return f"say {name}=..., such as bundles=bundles/a,bundles/b"
        case "extra_forbidden":
            return f"'{name}' is not known; there is {', '.join(Settings.model_fields)}"
    what = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: {what[:1].lower()}{what[1:]}, got '{shown(error['input'])}'"
