"""The published JSON Schema describes what export really writes, and what is read."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tgate_engine.graph import GraphSpec, Macs, TensorSpec
from tgate_engine.manifest import Adapter, Conditioning, FileDigest, Golden, Manifest, Shape, Tokenizer

SCHEMA: dict[str, Any] = json.loads((Path(__file__).parents[2] / "docs" / "manifest.schema.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    return jsonschema.Draft202012Validator(SCHEMA)


@pytest.fixture(scope="module")
def written(large: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((large / "manifest.json").read_text("utf-8"))
    return data


def test_a_toys_manifest_is_valid(validator: jsonschema.Draft202012Validator, written: dict[str, Any]) -> None:
    assert [error.message for error in validator.iter_errors(written)] == []


def test_an_exported_manifest_is_valid(validator: jsonschema.Draft202012Validator, mini_bundle: Path) -> None:
    data = json.loads((mini_bundle / "manifest.json").read_text("utf-8"))
    assert [error.message for error in validator.iter_errors(data)] == []


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (Manifest, ""),
        (Shape, "shape"),
        (GraphSpec, "graph"),
        (TensorSpec, "tensor"),
        (Macs, "macs"),
        (Conditioning, "conditioning"),
        (Tokenizer, "tokenizer"),
        (Golden, "golden"),
        (Adapter, "adapter"),
        (FileDigest, "file"),
    ],
)
def test_every_field_is_there_and_needed(of: Any, name: str) -> None:
    schema = SCHEMA["$defs"][name] if name else SCHEMA
    fields = [field.name for field in dataclasses.fields(of)] + ([] if name else ["digest"])
    assert list(schema["properties"]) == fields
    assert schema["required"] == [field for field in fields if field != "adapters"]
    assert schema["additionalProperties"] is False


def test_a_plan_has_the_fields_that_are_written(written: dict[str, Any]) -> None:
    plan = written["plans"]["default"]
    for schema, value in (("plan", plan), ("step", plan["steps"][0]), ("sampler", plan["sampler"])):
        assert set(SCHEMA["$defs"][schema]["properties"]) == set(value)
        assert set(SCHEMA["$defs"][schema]["required"]) == set(value)


def steps(data: dict[str, Any]) -> Any:
    return data["plans"]["default"]["steps"]


def graph(data: dict[str, Any]) -> Any:
    return data["shapes"][0]["graphs"]["full"]


WRONG: list[Callable[[dict[str, Any]], Any]] = [
    lambda m: m.update(surprise=1),
    lambda m: m.pop("shapes"),
    lambda m: m.update(shapes=[]),
    lambda m: m.update(schema_version=2),
    lambda m: m.update(digest="0"),
    lambda m: m["shapes"][0].update(width=0),
    lambda m: m["shapes"][0].update(batch=[1]),
    lambda m: m["shapes"][0].update(surprise=1),
    lambda m: m["shapes"][0]["constants"].update(time_ids=["a"]),
    lambda m: m["shapes"][0]["constants"].update(time_ids=[]),
    lambda m: graph(m).update(file="../../x"),
    lambda m: graph(m).update(role="magic"),
    lambda m: graph(m).pop("scratch_bytes"),
    lambda m: graph(m)["inputs"][0].update(shape=["2*batch", 4]),
    lambda m: graph(m)["inputs"][0].update(shape=[4, "batch"]),
    lambda m: graph(m)["inputs"][0].update(dtype="float8"),
    lambda m: m["carries"]["self.0"].update(of=["mean"]),
    lambda m: m["conditioning"][0].update(value=[1.0]),
    lambda m: m["plans"]["default"].pop("baselines"),
    lambda m: m["plans"]["default"].update(schedule={}),
    lambda m: m["plans"]["default"]["settings"].update(m=[5]),
    lambda m: steps(m).clear(),
    lambda m: steps(m)[0].pop("reads"),
    lambda m: steps(m)[0].update(latents=[1.0]),
    lambda m: m["goldens"]["image"].pop("size"),
    lambda m: m["goldens"]["image"].update(plan=3),
    lambda m: m["files"]["weights.safetensors"].update(sha256="x"),
]


@pytest.mark.parametrize("number", range(len(WRONG)))
def test_what_no_manifest_holds_is_refused(
    validator: jsonschema.Draft202012Validator, written: dict[str, Any], number: int
) -> None:
    changed = copy.deepcopy(written)
    WRONG[number](changed)
    assert not validator.is_valid(changed)
