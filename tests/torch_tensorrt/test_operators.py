"""Which operators of every family's graphs torch-tensorrt has no converter for. Nothing is converted here, or run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.torch_tensorrt.dry import CPU, torch_tensorrt, unsupported
from tgate_engine.bundle import Bundle
from tgate_engine.graph import DECODE
from tgate_runtime.engines.aoti.graph import Weights

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None, reason="make torch-tensorrt installs it, and runs this"
)
# The decoder's last operator, which makes the bytes of a picture: it has no cast to uint8.
TO_BYTES = {"aten._to_copy.default"}


@pytest.fixture(scope="module")
def dynamo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with torch_tensorrt(tmp_path_factory.mktemp("stub")) as package:
        yield package


def check(dynamo: Any, path: Path) -> None:
    bundle = Bundle.open(path)
    weights = Weights(bundle.file(bundle.manifest.weights), CPU)
    for name, spec in bundle.manifest.shapes[0].graphs.items():
        count, unknown = unsupported(dynamo, bundle, spec, weights)
        assert count > 20, name
        assert unknown == (TO_BYTES if spec.role == DECODE else set()), name


def test_the_model_that_ships(dynamo: Any, shipped_bundle: Path) -> None:
    check(dynamo, shipped_bundle)


@pytest.mark.parametrize("variant", ["sd15_a", "pixart_alpha_a", "pixart_sigma_a", "lcm_sdxl", "svd_a", "latte_a"])
def test_a_family(dynamo: Any, family_bundle: Callable[..., tuple[Path, Path]], variant: str) -> None:
    check(dynamo, family_bundle(variant)[1])
