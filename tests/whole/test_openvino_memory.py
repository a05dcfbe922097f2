"""``benchmarks.openvino_memory``: both ways do the same, and one takes less."""

from __future__ import annotations

from benchmarks.openvino_memory import measured
from tgate_runtime.mini import place_of


def test_one_packed_copy_takes_less_and_gives_the_same() -> None:
    rows = measured(place_of("mini"), ("full", "reuse_cross"), "f32", 1, 1)
    assert set(rows) == {"fast", "shared", "apart"}, rows
    assert max(rows["apart"].values()) < 1e-5
    assert rows["shared"]["peak_bytes"] < rows["fast"]["peak_bytes"]
    assert all(set(rows[way]["ms"]) == {"full", "reuse_cross"} for way in ("fast", "shared"))
