"""The published JSON Schema describes what export really writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

SCHEMA = Path(__file__).parents[1] / "docs" / "manifest.schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def manifest(mini_bundle: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((mini_bundle / "manifest.json").read_text())
    return data


def test_an_exported_manifest_is_valid(validator: jsonschema.Draft202012Validator, manifest: dict[str, Any]) -> None:
    assert [error.message for error in validator.iter_errors(manifest)] == []


def test_the_schema_leaves_nothing_open(validator: jsonschema.Draft202012Validator, manifest: dict[str, Any]) -> None:
    """Every object of the manifest refuses a field that the schema does not name, and misses one it does."""

    def refused(change: Any) -> bool:
        changed = copy.deepcopy(manifest)
        change(changed)
        return not validator.is_valid(changed)

    assert refused(lambda m: m.update(surprise=1))
    assert refused(lambda m: m.pop("graphs"))
    assert refused(lambda m: m["plans"]["default"]["steps"][0].update(graph="magic"))
    assert refused(lambda m: m["plans"]["default"]["steps"][0].pop("reads"))
    assert refused(lambda m: m["carries"][0].update(surprise=1))
    assert refused(lambda m: m.update(schema_version=3))
    assert refused(lambda m: m["graphs"]["full"].update(file="../../x"))
