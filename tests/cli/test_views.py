"""What commands show of their results."""

from __future__ import annotations

import io

import pytest

from tests.toy_bundle import Toy, build
from tgate_cli import views
from tgate_cli.inspect import describe
from tgate_engine.bundle import Bundle
from tgate_engine.schedule import Schedule

SCHEDULES = {"default": Schedule(steps=8, gate=5, self_interval=2)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("views") / "toy", Toy(schedules=SCHEDULES)))


def test_an_inspection_for_people(bundle: Bundle) -> None:
    out = io.StringIO()
    views.inspection(describe(bundle), out)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("toy (toy), 4×4, float32, with guidance, 1 to 4 at once")
    title = lines.index("plan default: n=8, m=5, k=2, warm-up 2, fidelity interval 1, toy, guidance 3")
    assert " ".join(lines[title + 1].split()) == "step phase graph timestep reads writes paper MACs all MACs"
    assert " ".join(lines[title + 5].split()) == "3 semantics-planning reuse_self 909.5 self.0, self.1 1600 1700"
    assert "all MACs 15400; ungated 20800, 1.35× as many" in lines
    assert "\x1b" not in out.getvalue()


def test_an_inspection_at_a_terminal(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    views.inspection(describe(bundle), out)
    assert "reuse_self" in out.getvalue()
    assert "───" in out.getvalue()
