"""A picture becomes conditioning: fitted, noised from its seed, encoded once."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from tests.runtime.engines.small import save, tensor
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.graph import IMAGE, GraphSpec
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.generators import CONDITIONING, noise
from tgate_runtime.image import encode_image, fit_picture
from tgate_runtime.session import Session

HEIGHT, WIDTH = 4, 6


def write_graph(path: Path, *, noised: bool) -> GraphSpec:
    """latent = picture / 255, [1, 3, H, W], and a tenth of the noise where there is any."""
    nodes = [
        helper.make_node("Cast", ["picture"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["numbers"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Div", ["planes", "most"], ["scaled"]),
    ]
    if noised:
        nodes.append(helper.make_node("Mul", ["noise", "little"], ["added"]))
        nodes.append(helper.make_node("Add", ["scaled", "added"], ["latent"]))
    else:
        nodes.append(helper.make_node("Identity", ["scaled"], ["latent"]))
    inputs = [tensor("picture", 1, HEIGHT, WIDTH, 3, dtype="uint8")]
    inputs += [tensor("noise", 1, 3, HEIGHT, WIDTH)] if noised else []
    constants = [
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in (("most", 255.0), ("little", 0.1))
    ]
    outputs = [tensor("latent", 1, 3, HEIGHT, WIDTH)]
    return save(path, nodes, inputs, outputs, constants[: 1 + noised], role=IMAGE, batch=(1, 1))


@pytest.fixture(scope="module", params=[True, False])
def loaded(
    request: pytest.FixtureRequest, toy_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Session, GraphSpec]]:
    """A session that holds an image graph, with noise and without."""
    path = tmp_path_factory.mktemp("image") / "image.onnx"
    spec = write_graph(path, noised=request.param)
    engine = open_engine("ort-cpu", threads=1)
    assert isinstance(engine, OrtCpu)
    bundle = Bundle.open(toy_path)
    graph = engine.load_graph(path.read_bytes(), path.parent, spec)
    with Session(bundle, engine, {spec.file: graph}, bundle.manifest.shapes) as session:
        yield session, spec


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return Image.fromarray(pixels)


def plain(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, np.float64).transpose(2, 0, 1)[np.newaxis] / 255


def test_a_picture_is_encoded_with_noise_of_its_seed(loaded: tuple[Session, GraphSpec]) -> None:
    session, spec = loaded
    noised = "noise" in spec.input_names()
    for seed in (3, 4):
        latent = encode_image(session, spec, picture(), seed=seed)["latent"]
        drawn = noise(seed, (1, 3, HEIGHT, WIDTH), draw=CONDITIONING)
        np.testing.assert_allclose(latent, plain(picture()) + noised * np.float32(0.1) * drawn, rtol=0, atol=1e-6)


def test_noise_may_be_brought_along(loaded: tuple[Session, GraphSpec]) -> None:
    session, spec = loaded
    noised = "noise" in spec.input_names()
    ones = np.ones((1, 3, HEIGHT, WIDTH), np.float32)
    latent = encode_image(session, spec, picture(1), seed=3, augmentation=ones)["latent"]
    np.testing.assert_allclose(latent, plain(picture(1)) + (0.1 if noised else 0), rtol=0, atol=1e-6)


def test_a_picture_that_fits_is_taken_as_it_is(
    loaded: tuple[Session, GraphSpec], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "tgate"):
        fitted = fit_picture(picture(), loaded[1])
    np.testing.assert_array_equal(np.asarray(fitted), np.asarray(picture()))
    assert not caplog.records


def test_another_size_is_resized_with_a_warning(
    loaded: tuple[Session, GraphSpec], caplog: pytest.LogCaptureFixture
) -> None:
    large = picture().resize((12, 16), Image.Resampling.NEAREST)
    with caplog.at_level(logging.WARNING, "tgate"):
        fitted = fit_picture(large, loaded[1])
    assert fitted.size == (WIDTH, HEIGHT)
    expected = large.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(np.asarray(fitted), np.asarray(expected))
    (record,) = caplog.records
    assert record.getMessage().startswith("the picture of 12 x 16 pixels is resized to 6 x 4, whatever its proportions")


def test_a_picture_is_turned_and_laid_over_white(loaded: tuple[Session, GraphSpec]) -> None:
    """What reaches the graph, of an image handed over in Python: EXIF's orientation 6 of a quarter turn, and alpha."""
    rgba = np.random.default_rng(0).integers(0, 256, (WIDTH, HEIGHT, 4), np.uint8)
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(rgba).save(out, "PNG", exif=exif)
    turned = rgba[::-1].transpose(1, 0, 2).astype(float)
    share = turned[..., 3:] / 255
    fitted = fit_picture(Image.open(out), loaded[1])
    assert np.abs(np.asarray(fitted) - (turned[..., :3] * share + 255 * (1 - share))).max() <= 1


@pytest.mark.parametrize(
    "odd", ["a.png", np.zeros((4, 6, 3), np.uint8), Image.new("F", (6, 4)), Image.new("L", (0, 4))]
)
def test_what_is_no_picture_is_refused(loaded: tuple[Session, GraphSpec], odd: Any) -> None:
    with pytest.raises(RequestError, match=r"an image must be|range is not known|has 0 x 4 pixels"):
        fit_picture(odd, loaded[1])


def test_an_opened_file_that_is_damaged_is_refused(loaded: tuple[Session, GraphSpec]) -> None:
    """Pillow decodes when pixels are asked for, which is here."""
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(out, "PNG")
    with pytest.raises(RequestError, match=r"the image cannot be decoded \(\w+: "):
        fit_picture(Image.open(io.BytesIO(out.getvalue()[:500])), loaded[1])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_every_mode_become_rgb(loaded: tuple[Session, GraphSpec], mode: str) -> None:
    fitted = fit_picture(picture().convert(mode), loaded[1])
    assert (fitted.mode, fitted.size) == ("RGB", (WIDTH, HEIGHT))
