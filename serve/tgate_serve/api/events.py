"""The events of a stream, in JSON; each goes out as ``event: TYPE`` and ``data: JSON``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from tgate_serve.api.errors import Trouble
from tgate_serve.api.schemas import Format, Report

Kind = Literal["image_generation", "image_edit"]
"""What the types of events begin with, as OpenAI's clients know them: of pictures of a prompt, and of those that begin
from one."""


class Queued(BaseModel):
    """A request waits; ``ahead``: how many images of others, until its last one has a row. Told when it changes."""

    type: Literal["image_generation.queued", "image_edit.queued"]
    id: str
    ahead: int


class StepTaken(BaseModel):
    """A step of an image. ``step``: its index in the plan. ``done`` of ``total`` steps of the whole request.
    ``company``: images of the call, of all requests; ``elapsed_ms``: its time inside the engine."""

    type: Literal["image_generation.step", "image_edit.step"]
    id: str
    image_index: int
    step: int
    graph: str
    done: int
    total: int
    company: int
    elapsed_ms: float


class _Image(BaseModel):
    created_at: int
    background: Literal["opaque"] = "opaque"
    output_format: Format
    quality: Literal["auto"] = "auto"
    size: str
    b64_json: str
    image_index: int


class PartialImage(_Image):
    """What an image is on its way to."""

    type: Literal["image_generation.partial_image", "image_edit.partial_image"]
    partial_image_index: int


class Completed(_Image):
    """An image."""

    type: Literal["image_generation.completed", "image_edit.completed"]
    seed: int
    tgate: Report


class Failed(BaseModel):
    """The request has failed, after its answer had begun."""

    type: Literal["error"] = "error"
    error: Trouble


Event = Queued | StepTaken | PartialImage | Completed | Failed
EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="type")])


def event_stream() -> dict[str, Any]:
    """What OpenAPI says of an answer that is a stream of them. Its schemas are to be among the document's components:
    :func:`event_schemas`."""
    data = EVENT.json_schema(ref_template="#/components/schemas/{model}")
    data.pop("$defs")
    item = {
        "type": "object",
        "properties": {
            "event": {"type": "string"},
            "data": {"type": "string", "contentMediaType": "application/json", "contentSchema": data},
        },
        "required": ["event", "data"],
    }
    return {"text/event-stream": {"itemSchema": item}}


def event_schemas() -> dict[str, Any]:
    """The schemas of events, by their names."""
    schemas = EVENT.json_schema(ref_template="#/components/schemas/{model}")["$defs"]
    assert isinstance(schemas, dict)
    return schemas
