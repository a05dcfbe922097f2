"""The application's description of itself: what this server takes, and not what any could."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI

from tgate_engine.plan import Plan
from tgate_serve.api.events import event_schemas
from tgate_serve.api.service import Service


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
            for asked in (schemas[name] for name in ("ImageAsked",) if name in schemas):
                _narrow(asked["properties"], service)
            app.openapi_schema = document
        return app.openapi_schema

    return openapi


def _narrow(properties: dict[str, Any], service: Service) -> None:
    models = service.models.values()
    plans = [plan for model in models for plan in model.worker.plans]
    choices: dict[str, list[Any]] = {
        "model": [model.name for model in models],
        "size": ["auto", *(size for model in models for size in model.session.sizes)],
        "plan": [plan.name for plan in plans],
        "num_inference_steps": sorted({plan.sampler.steps for plan in plans}),
        "m": _facts(plans, "m"),
        "k": _facts(plans, "k"),
    }
    for name, values in choices.items():
        _of(properties[name])["enum"] = list(dict.fromkeys(values))
    limits = service.limits
    for name, bounds in {
        "prompt": {"maxLength": limits.prompt},
        "negative_prompt": {"maxLength": limits.prompt},
        "n": {"maximum": limits.images},
    }.items():
        if name in properties:
            _of(properties[name]).update(bounds)


def _facts(plans: Sequence[Plan], name: str) -> list[Any]:
    return [plan.settings[name] for plan in plans if name in plan.settings]


def _of(schema: dict[str, Any]) -> dict[str, Any]:
    """Of a value that may be null, the schema of the others."""
    found = next((each for each in schema.get("anyOf", []) if each.get("type") != "null"), schema)
    assert isinstance(found, dict)
    return found
