"""Latents become pictures, by the graph of their size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests import toy_model
from tests.runtime.engines.small import save, tensor
from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.graph import DECODE
from tgate_runtime.decoder import decode
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.session import Session


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = build(tmp_path_factory.mktemp("decoder") / "toy", Toy(sizes=((4, 4), (8, 2))))
    with Session.open(path, plans=[], threads=1) as opened:
        yield opened


@pytest.mark.parametrize(("size", "width", "height"), [("4x4", 4, 4), ("8x2", 8, 2)])
def test_one_picture_of_the_size_of_its_latents(several: Session, size: str, width: int, height: int) -> None:
    graph = several.graph(DECODE, size)
    assert graph is not None
    latents = np.random.default_rng(0).standard_normal((2, height, width)).astype(np.float32)
    (image,) = decode(several, graph, latents)
    assert (image.mode, image.size) == ("RGB", (width, height))
    colours = latents.transpose(1, 2, 0).astype(np.float64) @ toy_model.weights()["image"]
    expected = np.clip(colours * 60 + 127.5, 0, 255)
    assert np.abs(np.asarray(image) - expected).max() <= 1


def test_a_picture_that_is_black_throughout_is_told(several: Session, caplog: pytest.LogCaptureFixture) -> None:
    """Bytes hold no NaN: numbers that are none become 0."""
    graph = several.graph(DECODE, "4x4")
    assert graph is not None
    decode(several, graph, np.zeros((2, 4, 4), np.float32))
    assert caplog.text == ""
    decode(several, graph, np.full((2, 4, 4), np.nan, np.float32))
    assert "the decoder's picture is black throughout, as it is where its numbers are not finite" in caplog.text


def test_a_videos_frames_in_their_order(toy_path: Path, tmp_path: Path) -> None:
    """Latents [F, 3, h, w] whose numbers are the pixels."""
    nodes = [
        helper.make_node("Transpose", ["latents"], ["last"], perm=[0, 1, 3, 4, 2]),
        helper.make_node("Cast", ["last"], ["image"], to=TensorProto.UINT8),
    ]
    spec = save(
        tmp_path / "decoder.onnx",
        nodes,
        [tensor("latents", 1, 5, 3, 2, 4)],
        [tensor("image", 1, 5, 2, 4, 3, dtype="uint8")],
        role=DECODE,
        batch=(1, 1),
    )
    engine, bundle = open_engine("ort-cpu", threads=1), Bundle.open(toy_path)
    assert isinstance(engine, OrtCpu)
    graphs = {spec.file: engine.load_graph((tmp_path / "decoder.onnx").read_bytes(), tmp_path, spec)}
    pixels = np.random.default_rng(1).integers(0, 256, (5, 3, 2, 4))
    with Session(bundle, engine, graphs, bundle.manifest.shapes) as session:
        frames = decode(session, spec, pixels.astype(np.float32))
    assert len(frames) == 5
    for frame, expected in zip(frames, pixels, strict=True):
        assert frame.size == (4, 2)
        np.testing.assert_array_equal(np.asarray(frame), expected.transpose(1, 2, 0))
