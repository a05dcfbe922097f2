"""What commands show of their results."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import Toy, build
from tgate_cli import views
from tgate_cli.inspect import describe
from tgate_engine.bundle import Bundle
from tgate_export.families import MODELS


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def bundle(good: Path) -> Bundle:
    return Bundle.open(good)


def test_an_inspection_for_people(bundle: Bundle) -> None:
    out = io.StringIO()
    views.inspection(describe(bundle), out)
    lines = out.getvalue().splitlines()
    assert lines[0] == "toy (toy), 4×4 (1 to 4 at once), float32, with guidance, licence Apache-2.0"
    title = lines.index("plan default: tgate, n=8, m=5, k=2, w=2, f=1, toy, guidance 3")
    assert " ".join(lines[title + 1].split()) == "step phase graph timestep reads writes paper MACs all MACs"
    assert " ".join(lines[title + 5].split()) == "3 semantics-planning reuse_self 909.5 self.0, self.1 1600 1700"
    after = lines[title + 10 :]
    assert after[0] == "paper MACs 12000; ungated 16000, 1.33× as many; guidance_stopped 13000, 1.08× as many"
    assert after[1] == "all MACs 15400; ungated 20800, 1.35× as many; guidance_stopped 16900, 1.10× as many"
    assert after[2] == "quality not measured; `tgate tune` does that"
    assert "plan ungated: ungated, n=8, toy, guidance 3" in lines
    assert "all MACs 20800" in lines
    assert "\x1b" not in out.getvalue()


def test_an_inspection_of_several_sizes_names_them(tmp_path: Path) -> None:
    toy = Toy(sizes=((4, 4), (8, 2)), batches=((1, 1), (2, 4)))
    bundle = Bundle.open(build(tmp_path / "toy", toy, goldens=False))
    out = io.StringIO()
    views.inspection(describe(bundle, "8x2"), out)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("toy (toy), 4×4 (1 or 2 to 4 at once), 8×2 (1 or 2 to 4 at once), float32, ")
    assert "plan default: tgate, n=8, m=5, k=2, w=2, f=1, toy, guidance 3, 8x2" in lines


def test_an_inspection_at_a_terminal(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    out = Terminal()
    views.inspection(describe(bundle), out)
    assert "reuse_self" in out.getvalue()
    assert "───" in out.getvalue()


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({}, ""),
        ({"method": "tgate", "n": 25, "m": 10}, "tgate, n=25, m=10"),
        ({"method": "other", "threshold": 0.25, "shared": True, "unset": None}, "other, threshold=0.25, shared=True"),
    ],
)
def test_settings_of_any_method(settings: dict[str, Any], shown: str) -> None:
    assert views.facts(settings) == shown


def measured(**ms: float) -> dict[str, Any]:
    """What a benchmark returns, the first plan being the chosen one; all MACs are a hundred times the milliseconds."""
    plans = {
        name: {
            "ms": value,
            "picture_ms": value + 1,
            "outside_engine": 0.02,
            "step_ms": {"p50": 1.0, "p99": 2.0},
            "macs": {"paper": 0, "all": int(100 * value)},
        }
        for name, value in ms.items()
    }
    return {
        "graphs": {"full": {"ms": 2.0, "macs": {"paper": 0, "all": 2600}, "gmacs_per_s": 1.3}},
        "plans": plans,
        "open_s": 0.5,
        "sgemm_gmacs_per_s": 14.0,
        "settings": {
            "model": "toy",
            "dtype": "float32",
            "size": "8x2",
            "plan": next(iter(ms)),
            "plan_settings": {"method": "tgate", "n": 8, "m": 5},
            "engine": "ort-cpu",
            "engine_version": "1.31",
            "threads": None,
            "precision": None,
            "memory": "fast",
            "cpu": "a processor",
            "batch": 2,
            "repeats": 5,
        },
    }


def rows(data: dict[str, Any]) -> list[list[str]]:
    out = io.StringIO()
    views.benchmark(data, out)
    lines = out.getvalue().splitlines()
    return [line.split() for line in lines[lines.index("plan default: tgate, n=8, m=5") + 2 :]]


def test_a_benchmark_is_read_against_the_first_plan_that_is_compared() -> None:
    data = measured(default=10.0, ungated=20.0, guidance_stopped=12.5)
    assert [(row[0], row[6], row[7]) for row in rows(data)] == [
        ("default", "2.00×", "2.00×"),
        ("ungated", "1.00×", "1.00×"),
        ("guidance_stopped", "1.60×", "1.60×"),
    ]
    out = io.StringIO()
    views.benchmark(data, out)
    assert out.getvalue().startswith(
        "toy, 8×2, float32, batch 2; ort-cpu 1.31, memory fast, the engine's own number of "
    )


def test_a_benchmark_of_one_plan_alone() -> None:
    assert [(row[0], row[1], row[6], row[7]) for row in rows(measured(default=10.0))] == [("default", "10.0", "-", "-")]


def test_engines() -> None:
    out = io.StringIO()
    views.engines([{"name": "ort-cpu", "runs_on": "CPU", "version": "", "says": "engine ort-cpu needs x"}], out)
    assert [line.split() for line in out.getvalue().splitlines()[1:]] == [
        ["engine", "runs", "on", "version", "here"],
        ["ort-cpu", "CPU", "-", "engine", "ort-cpu", "needs", "x"],
    ]


def test_models() -> None:
    out = io.StringIO()
    views.models(MODELS, out)
    _, _, *rows = out.getvalue().splitlines()
    lines = {line.split()[0]: line.split() for line in rows[: len(MODELS)]}
    assert list(lines) == list(MODELS)
    (told,) = rows[len(MODELS) :]
    assert told.startswith(
        "mini-pixart: where no part of a plan is named, its default is tgate+guidance_delta, n=25, m=7,"
    )
    assert lines["sdxl"][:8] == ["sdxl", "sdxl", "25", "10", "5", "2", "dpmpp_2m", "5"]
    assert "latent-consistency/lcm-sdxl" in lines["lcm-sdxl"]
