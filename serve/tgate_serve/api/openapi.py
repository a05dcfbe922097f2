"""The application's description of itself: what this server takes, and not what any could."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from tgate_engine.plan import Plan
from tgate_serve.api.edits import FILES
from tgate_serve.api.events import event_schemas
from tgate_serve.api.schemas import EditAsked, VideoAsked
from tgate_serve.api.service import Service
from tgate_serve.api.videos import length
from tgate_serve.choice import steps_of
from tgate_serve.model import Model

_REFERENCE = "input_reference"


def described(app: FastAPI, service: Service) -> Callable[[], dict[str, Any]]:
    """What makes the application's OpenAPI document: with the models' names, sizes and plans, the limits, and errors as
    they are told."""
    whole = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = whole()
            schemas = document["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas |= event_schemas()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            _, asked = models_json_schema(
                [(VideoAsked, "validation"), (EditAsked, "validation")], ref_template="#/components/schemas/{model}"
            )
            schemas |= asked["$defs"]
            for name, video in (("ImageAsked", False), ("EditAsked", False), ("VideoAsked", True)):
                models = [model for model in service.models.values() if model.video == video]
                if name == "EditAsked":
                    models = [model for model in models if model.edits]
                _narrow(schemas[name]["properties"], service, models)
                if video and models:
                    _narrow_sources(schemas[name], models)
            schemas["EditAsked"]["anyOf"] = [{"required": ["image"]}]
            schemas["VideoForm"] = _form(schemas["VideoAsked"], schemas["Reference"], "VideoForm")
            schemas["EditForm"] = _form(schemas["EditAsked"], schemas["Reference"], "EditForm")
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _narrow(properties: dict[str, Any], service: Service, models: Sequence[Model]) -> None:
    """To what some of ``models`` take."""
    plans = [plan for model in models for plan in model.worker.plans]
    choices: dict[str, list[Any]] = {
        "model": [model.name for model in models],
        "size": ["auto", *(size for model in models for size in model.session.sizes)],
        "plan": [plan.name for plan in plans],
        "num_inference_steps": sorted({steps_of(plan) for plan in plans}),
        "m": _facts(plans, "m"),
        "k": _facts(plans, "k"),
        "seconds": [length(model) for model in models if model.video],
    }
    for name, values in choices.items():
        if name in properties and values:
            _of(properties[name])["enum"] = list(dict.fromkeys(values))
    limits = service.limits
    for name, bounds in {
        "prompt": {"maxLength": limits.prompt},
        "negative_prompt": {"maxLength": limits.prompt},
        "n": {"maximum": limits.images},
    }.items():
        if name in properties:
            _of(properties[name]).update(bounds)


def _narrow_sources(asked: dict[str, Any], models: Sequence[Model]) -> None:
    """To prompts, or pictures, or one of both, as there are models for."""
    sources = {_REFERENCE if model.takes_picture else "prompt" for model in models}
    for name, source in (("prompt", "prompt"), ("negative_prompt", "prompt"), (_REFERENCE, _REFERENCE)):
        if source not in sources:
            del asked["properties"][name]
    asked["anyOf"] = [{"required": [name]} for name in sorted(sources)]


def _form(asked: Mapping[str, Any], reference: Mapping[str, Any], title: str) -> dict[str, Any]:
    """The same as a form, which has no null, and a picture as a file or as the field of an object."""
    fields = {
        name: {**{key: value for key, value in schema.items() if key not in ("anyOf", "default")}, **_of(schema)}
        for name, schema in asked["properties"].items()
        if name != "controls"  # which a form has no way to write
    }
    sources = [*asked.get("anyOf", [])]
    for name in [name for name in (_REFERENCE, *FILES) if name in fields]:
        file = {"type": "string", "contentMediaType": "application/octet-stream"}
        fields[name] = {**file, "description": f"the file of a picture; {fields[name]['description']}"}
        inside = {f"{name}[{key}]": schema for key, schema in reference["properties"].items()}
        fields |= inside
        if {"required": [name]} in sources:
            sources += [{"required": [key]} for key in inside]
    form = {"title": title, "description": f"{asked['description']} As a form.", "properties": fields}
    return {**asked, **form, **({"anyOf": sources} if sources else {})}


def _facts(plans: Sequence[Plan], name: str) -> list[Any]:
    return [plan.settings[name] for plan in plans if name in plan.settings]


def _of(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a value that may be null, the schema of the others."""
    found = next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), schema)
    assert isinstance(found, dict)
    return found
