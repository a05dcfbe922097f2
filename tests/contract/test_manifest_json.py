"""A manifest's JSON survives the round trip, and is read distrustfully."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, PlanError, TgateError
from tgate_engine.manifest import MANIFEST_FILE, SCHEMA_VERSION
from tgate_engine.manifest_json import bundle_digest, content_digest, dump_manifest, parse_manifest

Path_ = tuple[str | int, ...]

TABLES = ("plans", "goldens", "graphs", "files", "constants", "carries", "tools")
"""Objects whose keys are names that a bundle chooses."""


@pytest.fixture(scope="module")
def data(large: Path) -> dict[str, Any]:
    """A manifest's JSON object, without its digest; a short one, with every field."""
    content: dict[str, Any] = json.loads((large / MANIFEST_FILE).read_bytes())
    del content["digest"]
    content["plans"] = {"default": content["plans"]["fast"]}
    content["goldens"] = {"fast": {**content["goldens"]["trajectory"], "plan": content["plans"]["default"]}}
    content["shapes"] = content["shapes"][:1]
    content["scheduler"] = {"beta_start": 0.1}
    content["tools"] = {"torch": "2.13"}
    content["clip_skip"] = 1
    return content


def text_of(data: dict[str, Any]) -> str:
    """The file of a manifest's JSON object, as a mischievous hand would write it."""
    return json.dumps({**data, "digest": content_digest(data)})


def paths(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place of a JSON value; of lists and of tables by name the first entry alone, as the others are alike."""
    if path:
        yield path
    if isinstance(value, dict):
        alike = path and path[-1] in TABLES
        for key in list(value)[: 1 if alike else None]:
            yield from paths(value[key], (*path, key))
    elif isinstance(value, list) and value:
        yield from paths(value[0], (*path, 0))


def parent(data: dict[str, Any], path: Path_) -> Any:
    for key in path[:-1]:
        data = data[key]  # type: ignore[index]
    return data


def is_fact(path: Path_) -> bool:
    """Whether a place holds a fact for people, which may be missing, or another one."""
    return path[-2:-1] in (("scheduler",), ("settings",), ("options",)) or path[-3:-2] == ("carries",)


def others(value: Any) -> list[Any]:
    """Values of every other kind than ``value``; a whole number is a float's kind too."""
    kinds = {str: "a text", int: 3, float: 0.5, bool: True, type(None): None, list: [0.5], dict: {"a": 1}}
    alike = (float, int) if isinstance(value, float) else (type(value),)
    return [*(other for kind, other in kinds.items() if kind not in alike), float("nan")]


def test_a_manifest_survives_the_round_trip(large: Path) -> None:
    manifest = Bundle.open(large).manifest
    again = parse_manifest(dump_manifest(manifest))
    assert again == manifest
    assert dump_manifest(again) == dump_manifest(manifest)


def test_a_bundle_is_known_by_all_of_its_manifest_but_the_plans(large: Path) -> None:
    manifest = Bundle.open(large).manifest
    data = json.loads((large / MANIFEST_FILE).read_bytes())
    del data["plans"], data["digest"]
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert bundle_digest(manifest) == hashlib.sha256(canonical).hexdigest()
    some = dict(list(manifest.plans.items())[1:])
    assert bundle_digest(replace(manifest, plans=some)) == bundle_digest(manifest)
    assert bundle_digest(replace(manifest, guidance_rescale=0.5)) != bundle_digest(manifest)


def test_it_is_json_that_others_can_read(large: Path) -> None:
    data = json.loads((large / MANIFEST_FILE).read_bytes())
    assert data["schema_version"] == SCHEMA_VERSION == 3
    assert data["shapes"][0]["graphs"]["reuse_cross"]["file"] == "reuse_cross-batch-1-1.onnx"
    assert data["shapes"][0]["graphs"]["reuse_cross"]["role"] == "denoise"
    assert [(shape["width"], shape["height"], shape["batch"]) for shape in data["shapes"]] == [
        (4, 4, [1, 1]),
        (4, 4, [3, 4]),
        (8, 2, [1, 1]),
        (8, 2, [3, 4]),
    ]
    digest = data.pop("digest")
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert digest == hashlib.sha256(canonical).hexdigest()


def test_a_field_of_another_kind_is_refused(data: dict[str, Any]) -> None:
    """Each field there is, replaced by values of every other kind."""
    seen = 0
    for path in paths(data):
        if is_fact(path):
            continue
        value = parent(data, path)[path[-1]]
        for other in others(value):
            if path[-1] == "plan" and other is None:
                continue  # a golden without a plan runs a graph
            if path[-1] == 0 and "shape" in path and other == 3:
                continue  # a dimension is a size as well
            changed = copy.deepcopy(data)
            parent(changed, path)[path[-1]] = other
            with pytest.raises(TgateError) as error:
                pytest.fail(f"{path} may be {other!r}: {parse_manifest(text_of(changed)).model}")
            assert isinstance(error.value, BundleError), path
            assert "\n" not in str(error.value)
            seen += 1
    assert seen > 300


def test_a_field_that_is_missing_is_named(data: dict[str, Any]) -> None:
    missing = 0
    for path in paths(data):
        if is_fact(path) or isinstance(path[-1], int) or (len(path) > 1 and path[-2] in TABLES):
            continue
        changed = copy.deepcopy(data)
        del parent(changed, path)[path[-1]]
        with pytest.raises(BundleError) as error:
            pytest.fail(f"{path} may be missing: {parse_manifest(text_of(changed)).model}")
        assert str(path[-1]) in str(error.value)
        missing += 1
    assert missing > 60


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda d: d.update(schema_version=99),
            "has schema version 99, this tgate-engine reads version 3; update tgate",
        ),
        (lambda d: d.update(shapes=[]), "shapes: expected at least one"),
        (lambda d: d["shapes"][0].update(batch=[4, 1]), "expected [least, most], got [4, 1]"),
        (lambda d: d["shapes"][0].update(batch=[1]), "expected [least, most], got [1]"),
        (lambda d: d["shapes"][0].update(batch=[0, 1]), "expected positive whole numbers"),
        (lambda d: d["shapes"][0].update(width=0), "expected at least 1, got 0"),
        (lambda d: d["shapes"][0].update(latents=[2, 0, 4]), "expected positive whole numbers"),
        (
            lambda d: d["shapes"][0].update(constants={"time_ids": [float("inf")]}),
            "Infinity is no number of JSON); the bundle is damaged: export it again",
        ),
        (
            lambda d: d["shapes"][0]["graphs"]["full"].update(role="magic"),
            "expected one of denoise, text, image, decode",
        ),
        (lambda d: d["shapes"][0]["graphs"]["full"].update(file="../../x"), "'../../x' is not a plain name"),
        (lambda d: d["shapes"][0]["graphs"]["full"].update(file=""), "is not a plain name"),
        (
            lambda d: d["shapes"][0]["graphs"]["full"]["inputs"][0].update(shape=["2*batch"]),
            "'2*batch' is neither a size nor, in the first place, 'batch'",
        ),
        (
            lambda d: d["shapes"][0]["graphs"]["full"]["inputs"][0].update(shape=[2, "batch"]),
            "'batch' is neither a size nor, in the first place, 'batch'",
        ),
        (lambda d: d["shapes"][0]["graphs"]["full"]["inputs"][0].update(dtype="float8"), "expected one of float32,"),
        (lambda d: d["files"].update({"../../x": d["files"].pop("full-batch-1-1.onnx")}), "'../../x' is not a plain"),
        (lambda d: d.update(weights="/etc/passwd"), "'/etc/passwd' is not a plain name"),
        (lambda d: d.update(samplers=".hidden"), "'.hidden' is not a plain name"),
        (lambda d: d.update(weights="a\nb"), "is not a plain name"),
        (lambda d: d.update(guidance="some"), "expected one of classifier-free, embedded"),
        (lambda d: d["conditioning"][0].update(negative="?"), "expected one of own, same, zeros"),
        (lambda d: d["conditioning"][0].update(source="?"), "expected one of text, image, constant"),
        (lambda d: d["tokenizers"][0].update(length=1), "expected at least 2, got 1"),
        (lambda d: d["tokenizers"][0].update(pad_id=-1), "expected at least 0, got -1"),
        (lambda d: d["carries"]["self.0"].update(of=["mean"]), "fact of must be a text, a number"),
        (lambda d: d.update(frames=0), "expected at least 1, got 0"),
        (lambda d: d.update(dtype="float8"), "manifest.json.dtype"),
        (lambda d: d.update(guidance_scale=float("nan")), "NaN is no number of JSON"),
        (lambda d: d.update(guidance_scale=10**400), "10000000000000000000… is no whole number of 64 bits"),
        (lambda d: d.update(guidance_scale=1e39), "guidance_scale: expected a finite number, of float32, got 1e+39"),
        (lambda d: d["shapes"][0]["constants"].update(time_ids=[1e39]), "constants.time_ids: expected a finite"),
        (
            lambda d: d["plans"]["default"]["steps"][0].update(noise=1e39),
            "steps[0].noise: expected a finite number, of float32",
        ),
    ],
)
def test_what_no_manifest_holds(data: dict[str, Any], edit: Callable[[dict[str, Any]], Any], says: str) -> None:
    changed = copy.deepcopy(data)
    edit(changed)
    with pytest.raises(BundleError) as error:
        parse_manifest(text_of(changed))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_an_older_schema_says_how_to_export_again(toy: Path, version: int) -> None:
    """Before anything else of it is looked at, its digest among it."""
    (toy / MANIFEST_FILE).write_text(json.dumps({"schema_version": version, "height": 4, "digest": "0" * 64}))
    with pytest.raises(BundleError) as error:
        Bundle.open(toy)
    assert str(error.value) == (
        f"the bundle has schema version {version}, this tgate-engine reads version 3; export it again with "
        "tgate-export, from the same checkpoint"
    )


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, "\x00", "{}", '{"schema_version": true}'])
def test_a_text_that_is_no_manifest(text: str) -> None:
    with pytest.raises(BundleError) as error:
        parse_manifest(text)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(BundleError, match="is not JSON"):
        parse_manifest(b"\xff\xfe\xff")


def test_an_edit_by_hand_is_seen(good: Path) -> None:
    content = json.loads((good / MANIFEST_FILE).read_bytes())
    parse_manifest(json.dumps(content, indent=4, sort_keys=True))  # only what it says counts
    content["model"] = "other"
    with pytest.raises(BundleError, match="does not match its own digest"):
        parse_manifest(json.dumps(content))


def test_a_plan_that_is_none_is_named_with_its_bundle(toy: Path) -> None:
    edit_manifest(toy, lambda d: d["plans"]["default"].update(guidance_scale="3"))
    with pytest.raises(BundleError, match=r"json\.plans\.default\.guidance_scale: expected int or float") as error:
        Bundle.open(toy)
    assert not isinstance(error.value, PlanError)


def test_a_key_that_is_not_known_is_named(data: dict[str, Any]) -> None:
    """In every object but those whose keys a bundle chooses, and in the facts of no kind."""
    refused = 0
    for path in ((), *paths(data)):
        target = data if not path else parent(data, path)[path[-1]]
        if not isinstance(target, dict) or (path and path[-1] in (*TABLES, "settings", "options", "scheduler")):
            continue
        changed = copy.deepcopy(data)
        (parent(changed, path)[path[-1]] if path else changed)["surprise"] = "x"
        if path[-2:-1] == ("carries",):
            parse_manifest(text_of(changed))
            continue
        with pytest.raises(BundleError, match="'surprise' is not known here; export the bundle again"):
            pytest.fail(f"{path} may hold more: {parse_manifest(text_of(changed)).model}")
        refused += 1
    assert refused > 12


@pytest.mark.parametrize(("guidance", "scale"), [("classifier-free", 1.0), ("classifier-free", 0), ("none", 1.5)])
def test_a_guidance_scale_that_the_graphs_do_not_go_by(data: dict[str, Any], guidance: str, scale: float) -> None:
    with pytest.raises(BundleError, match=r"guidance_scale: a bundle with guidance has a scale above 1, one without"):
        parse_manifest(text_of({**data, "guidance": guidance, "guidance_scale": scale}))
    assert parse_manifest(text_of({**data, "guidance": "embedded", "guidance_scale": scale})).guidance_scale == scale


@pytest.mark.parametrize("scale", [-1, 10_001])
def test_a_guidance_scale_that_nobody_exports(data: dict[str, Any], scale: float) -> None:
    for changed in (
        {**data, "guidance_scale": scale},
        {**data, "plans": {"default": {**data["plans"]["default"], "guidance_scale": scale}}},
    ):
        with pytest.raises(BundleError, match=r"guidance_scale: expected 0 to 10000\.0, got"):
            parse_manifest(text_of(changed))


def test_a_schedulers_infinity_is_written_as_a_text(large: Path) -> None:
    """diffusers' DPM-Solver has an option that is minus infinity, and JSON has no number for it."""
    config = {"lambda_min_clipped": float("-inf"), "other": float("inf"), "beta_end": 0.5, "name": "x", "none": None}
    manifest = replace(Bundle.open(large).manifest, scheduler=config)
    text = dump_manifest(manifest)
    written = json.loads(text, parse_constant=pytest.fail)["scheduler"]
    assert written == {**config, "lambda_min_clipped": "-Infinity", "other": "Infinity"}
    assert parse_manifest(text) == manifest
    assert bundle_digest(parse_manifest(text)) == bundle_digest(manifest)
    with pytest.raises(ValueError, match="not JSON compliant"):
        dump_manifest(replace(manifest, scheduler={"x": float("nan")}))
    bare = text.replace('"-Infinity"', "-Infinity")
    with pytest.raises(BundleError, match=r"-Infinity is no number of JSON\); .*: export it again"):
        parse_manifest(bare)
