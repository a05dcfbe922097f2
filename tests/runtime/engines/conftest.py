"""What the engines' tests share: one small bundle, and one cache of what is compiled of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._inductor import config as inductor

from tests.runtime.engines.small import Small


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An engine cache, the same for all processes that run tests at the same time."""
    base = tmp_path_factory.getbasetemp()
    path = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "engine-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TGATE_CACHE", str(path))
        patch.setattr(inductor.cpp, "vec_isa_ok", True)  # not tried out, which takes several compilations
        yield path
