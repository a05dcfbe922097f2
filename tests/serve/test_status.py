"""What a server says of itself: models, health, metrics, and a description that holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from prometheus_client.parser import text_string_to_metric_families
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from tests.serve.requests import plans
from tests.serve.running import PATH, Server, running, until
from tgate_runtime.session import Session
from tgate_serve.api.limits import Limits

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Server]:
    with running(session, rows=4, added=0.1) as found:
        yield found


def metrics(server: Server) -> dict[tuple[str, ...], float]:
    """Samples by their names and the values of their labels."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(server.http.get("/metrics").text)
        for sample in family.samples
    }


def test_models(server: Server) -> None:
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model == server.http.get("/v1/models/mini").json()
    facts, manifest = model["tgate"], server.worker.session.manifest
    assert (model["id"], facts["sizes"], facts["takes"], facts["makes"]) == ("mini", ["128x128"], "prompt", "pictures")
    assert [plan["name"] for plan in facts["plans"]] == list(manifest.plans)
    default = facts["plans"][0]
    assert default["settings"] == dict(manifest.plans["default"].settings)
    assert default["steps"] == {"full": 8, "reuse_self": 7, "reuse_cross": 10}
    assert default["baselines"] == ["ungated", "guidance_stopped"]
    missing = server.http.get("/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


def test_health(server: Server) -> None:
    answer = {"status": "ok", "models": {"mini": {"running": 0, "waiting": 0}}}
    assert server.http.get("/health").json() == answer
    assert server.http.get("/ready").json() == answer
    server.service.ready = False
    try:
        stopping = server.http.get("/ready")
        assert (stopping.status_code, stopping.json()["status"]) == (503, "stopping")
        assert server.http.get("/health").status_code == 200
    finally:
        server.service.ready = True


def test_a_worker_that_has_failed_is_seen(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(session, rows=1) as server:
        monkeypatch.setattr(server.worker._scheduler, "advance", lambda _: 1 / 0)
        status, error = server.refused()
        assert (status, error["code"]) == (503, "stopped")
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")


def test_metrics_count(server: Server) -> None:
    before = metrics(server)
    assert server.draw(n=3).status_code == 200
    assert server.draw(nothing=1).status_code == 400
    after = metrics(server)

    def more(*name: str) -> float:
        return after[name] - before.get(name, 0)

    assert more("tgate_images_ended_total", "through", "mini") == 3
    assert more("tgate_requests_total", PATH, "200") == 1
    assert more("tgate_requests_total", PATH, "400") == 1
    steps = {"full": 24, "reuse_self": 21, "reuse_cross": 30}
    for graph, count in steps.items():
        assert more("tgate_step_images_sum", graph, "mini", "128x128") == count
        assert more("tgate_step_seconds_count", graph, "mini", "128x128") <= count
        assert more("tgate_step_seconds_sum", graph, "mini", "128x128") > 0
    for name in ("queue", "decode", "request"):
        assert more(f"tgate_{name}_seconds_count", "mini") == 1
    assert after["tgate_images", "mini", "running"] == 0
    assert after["tgate_planned_bytes", "mini"] == server.worker.planned_bytes


def test_the_description_says_what_this_server_takes(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    asked = document["components"]["schemas"]["ImageAsked"]
    assert asked["additionalProperties"] is False
    values = {name: schema["anyOf"][0] for name, schema in asked["properties"].items() if "anyOf" in schema}
    assert values["model"]["enum"] == ["mini"]
    assert values["size"]["enum"] == ["auto", "128x128"]
    assert values["plan"]["enum"] == ["default", "ungated", "guidance_stopped"]
    assert (values["m"]["enum"], values["k"]["enum"], values["num_inference_steps"]["enum"]) == ([15], [3], [25])
    assert (values["n"]["minimum"], values["n"]["maximum"]) == (1, 10)
    assert "422" not in str(document)


LEFT_OUT: list[Any] = [positive_data_acceptance, unsupported_method]
"""Checks of schemathesis that are not made: values may each be right and not go together, such as a plan and another's
m; and which methods a route does not have is the framework's matter."""


@pytest.fixture(scope="module")
def described(session: Session) -> Iterator[schemathesis.BaseSchema]:
    quick = [replace(plans(session)["short"], name="default"), plans(session)["ungated"]]
    with running(session, plans=quick, rows=4, added=0.1, limits=Limits(images=2)) as server:
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        assert server.http.get("/health").json()["status"] == "ok"
        assert until(lambda: server.worker.load() == (0, 0))


ROUTES = {
    (PATH, "POST"),
    (f"{PATH}/{{identity}}", "DELETE"),
    ("/v1/images/edits", "POST"),
    ("/v1/videos", "POST"),
    ("/v1/videos", "GET"),
    ("/v1/videos/{identity}", "GET"),
    ("/v1/videos/{identity}", "DELETE"),
    ("/v1/videos/{identity}/cancel", "POST"),
    ("/v1/videos/{identity}/content", "GET"),
    ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"),
    ("/health", "GET"),
    ("/ready", "GET"),
    ("/metrics", "GET"),
}


def test_all_routes_are_described(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {(path, method.upper()) for path, methods in paths.items() for method in methods} == ROUTES


@pytest.mark.parametrize(("path", "method"), sorted(ROUTES))
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_the_description_holds(
    described: schemathesis.BaseSchema, path: str, method: str, mode: schemathesis.GenerationMode
) -> None:
    @given(described[path][method].as_strategy(generation_mode=mode))
    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
    def check(case: schemathesis.Case[Any]) -> None:
        case.call_and_validate(excluded_checks=LEFT_OUT)

    with suppress(Unsatisfiable):  # nothing can be wrong with a request that says nothing
        check()


def test_the_dashboard_asks_for_metrics_that_there_are(server: Server) -> None:
    server.draw()
    there = {name for name, *_ in metrics(server)}
    text = (DOCS / "grafana.json").read_text("utf-8")
    asked = set(re.findall(r"\btgate_\w+", text))
    assert asked - {"tgate_engine"} <= there
    panels = json.loads(text)["panels"]
    assert len(panels) == 8
    assert {panel["datasource"]["uid"] for panel in panels} == {"${source}"}


def test_the_documentation_names_every_metric(server: Server) -> None:
    server.draw()
    families = text_string_to_metric_families(server.http.get("/metrics").text)
    named = set(re.findall(r"`(tgate_\w+)`", (DOCS / "serving.md").read_text("utf-8")))
    there = {family.name + "_total" * (family.type == "counter") for family in families}
    assert named == {name for name in there if not name.endswith("_created")}
