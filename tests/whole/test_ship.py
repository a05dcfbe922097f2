"""What ships of the bundle `mini` is what export makes today."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_runtime.mini import MINI, MODELS

ROOT = Path(__file__).parents[2]


def facts(shipped: Path) -> Any:
    """The manifest without what another machine computes otherwise in the last bits, and digests of that."""
    data = json.loads((shipped / MANIFEST_FILE).read_text("utf-8"))
    for name in ("digest", "tools"):
        del data[name]
    data["files"] = list(data["files"])
    for plan in data["plans"].values():
        del plan["sampler"]["options"]["residual"]
    return data


@pytest.mark.slow
def test_what_ships_is_what_export_makes(tmp_path: Path) -> None:
    """Graphs, tokenizer and where weights lie byte by byte; the goldens and the table of samplers are replayed."""
    export(ExportSettings(model="mini-pixart", output=tmp_path / "bundle"), Silent())
    runpy.run_path(str(ROOT / "scripts" / "ship_mini.py"))["main"](tmp_path / "bundle", tmp_path / "shipped")
    shipped = MODELS / MINI
    assert facts(tmp_path / "shipped") == facts(shipped)
    exact = [path.relative_to(shipped) for path in shipped.rglob("*") if path.suffix in (".onnx", ".head", ".json")]
    assert len(exact) == 9
    for name in exact:
        if name.name != MANIFEST_FILE:
            assert (tmp_path / "shipped" / name).read_bytes() == (shipped / name).read_bytes(), name
