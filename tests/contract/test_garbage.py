"""No garbage is sought meanwhile, and all is as it was afterwards, whatever happened."""

from __future__ import annotations

import gc

import pytest

from tgate_engine.garbage import uncollected


@pytest.mark.parametrize("seeking", [True, False])
def test_it_leaves_the_collector_as_it_was(seeking: bool) -> None:
    before = gc.isenabled()
    seen = []

    def fails() -> None:
        with uncollected():
            seen.append(gc.isenabled())
            raise ZeroDivisionError

    (gc.enable if seeking else gc.disable)()
    try:
        with pytest.raises(ZeroDivisionError):
            fails()
        assert [*seen, gc.isenabled()] == [False, seeking]
    finally:
        (gc.enable if before else gc.disable)()
