"""Pictures beside a prompt, on the toy bundle: what is seen of them, what they change, what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil

from tests.toy_bundle import Toy, build
from tests.toy_model import WIDTH
from tgate_engine.errors import BundleError, EngineError, RequestError
from tgate_engine.graph import REFERENCE, GraphSpec, Macs, TensorSpec
from tgate_export.methods.base import Settings
from tgate_runtime.conditioning import conditioning_inputs
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.record import parse_record
from tgate_runtime.reference import encode_reference, fit_reference
from tgate_runtime.signatures import check_forms, check_signatures

PROMPT = "a large red circle"
SETTINGS = {"default": Settings(steps=8, gate=5, self_interval=2, warm_up=0)}


def picture(size: tuple[int, int] = (4, 4), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("reference") / "toy", Toy(refers=True, begins=True, settings=SETTINGS))


@pytest.fixture(scope="module")
def pipe(path: Path) -> Iterator[Pipeline]:
    with Pipeline.open(path, threads=1) as opened:
        yield opened


def graph(side: int) -> GraphSpec:
    tensor = TensorSpec(name="picture", dtype="uint8", shape=(1, side, side, 3))
    none = Macs(paper=0, all=0)
    return GraphSpec(file="x", role=REFERENCE, batch=(1, 1), inputs=(tensor,), outputs=(), macs=none)


@pytest.mark.parametrize("side", [32, 37])
@pytest.mark.parametrize("size", [(37, 37), (41, 90), (300, 33), (64, 35), (20, 19)])
def test_a_picture_is_prepared_as_clips_are(size: tuple[int, int], side: int) -> None:
    image = picture(size)
    extractor = CLIPImageProcessorPil(size=side, crop_size=side, do_rescale=False, do_normalize=False)
    wanted = extractor(image, return_tensors="np").pixel_values[0].transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(fit_reference(image, graph(side))), wanted)


def test_one_that_is_all_length_would_fill_memory() -> None:
    with pytest.raises(RequestError, match=r"100000 x 2 pixels is 50000 times as long as it is wide; crop it"):
        fit_reference(Image.new("RGB", (100_000, 2)), graph(224))


def test_what_a_picture_changes(pipe: Pipeline) -> None:
    """As much as the scale says, in both halves; and the toy's text is linear in it."""
    image = picture()
    rows = conditioning_inputs(pipe.session)
    assert {"seen.negative", "seen.positive", "much.negative", "much.positive"} < {*rows}
    spec = pipe.session.graph(REFERENCE)
    assert spec is not None
    encoded = encode_reference(pipe.session, spec, image)
    first = np.asarray(image).reshape(-1)[:WIDTH].astype(np.float32) / 255
    np.testing.assert_allclose(encoded["seen.positive"][0], first, atol=1e-6)
    np.testing.assert_array_equal(encoded["seen.negative"], np.full((1, WIDTH), 0.25, np.float32))

    def drawn(**own: Any) -> NDArray[np.float32]:
        return pipe(PROMPT, seed=1, **own).latents

    plain = drawn()
    np.testing.assert_array_equal(plain, drawn(ip_adapter_image=None, ip_adapter_scale=None))
    seen = drawn(ip_adapter_image=image)
    np.testing.assert_array_equal(seen, drawn(ip_adapter_image=image, ip_adapter_scale=1.0))
    assert np.abs(seen - plain).max() > 1e-3
    weak = drawn(ip_adapter_image=image, ip_adapter_scale=1e-3)
    assert 0 < np.abs(weak - plain).max() < 1e-2 * np.abs(seen - plain).max() * 2
    assert np.abs(drawn(ip_adapter_image=picture(seed=1)) - seen).max() > 1e-3


def test_without_one_a_bundle_draws_what_it_draws_without_an_adapter(pipe: Pipeline, tmp_path: Path) -> None:
    plain = build(tmp_path / "toy", Toy(begins=True, settings=SETTINGS))
    with Pipeline.open(plain, threads=1) as without:
        wanted = without(PROMPT, seed=2, num_images=2).latents
    np.testing.assert_allclose(pipe(PROMPT, seed=2, num_images=2).latents, wanted, rtol=0, atol=1e-6)


def test_beside_embeddings_and_a_picture_that_is_begun_from(pipe: Pipeline) -> None:
    """And each image of a request is the one that its seed draws alone."""
    rng = np.random.default_rng(0)
    embeds = {
        name: rng.standard_normal(spec.resolve(2)).astype(np.float32)
        for name, spec in conditioning_inputs(pipe.session).items()
        if name.startswith(("text", "pooled"))
    }
    image = picture(seed=2)
    both = pipe(prompt_embeds=embeds, seed=4, ip_adapter_image=image, ip_adapter_scale=0.5).latents
    assert np.abs(both - pipe(prompt_embeds=embeds, seed=4).latents).max() > 1e-3
    own = {name: rows[1:] for name, rows in embeds.items()}
    alone = pipe(prompt_embeds=own, seed=5, ip_adapter_image=image, ip_adapter_scale=0.5).latents
    np.testing.assert_array_equal(both[1:], alone)
    begun = pipe(PROMPT, image=picture(seed=3), strength=0.5, seed=1).latents
    seen = pipe(PROMPT, image=picture(seed=3), strength=0.5, seed=1, ip_adapter_image=image).latents
    assert np.abs(seen - begun).max() > 1e-3


def test_its_encoder_is_loaded_when_a_request_first_has_one(path: Path) -> None:
    with Pipeline.open(path, threads=1) as pipe:
        spec = pipe.session.graph(REFERENCE)
        assert spec is not None
        pipe(PROMPT, seed=1)
        loaded: Any = pipe.session
        assert spec.file not in loaded._executables
        pipe(PROMPT, seed=1, ip_adapter_image=picture())
        assert spec.file in loaded._executables


def test_a_record_says_it(pipe: Pipeline) -> None:
    image = picture()
    (record,) = pipe(PROMPT, seed=3, ip_adapter_image=image, ip_adapter_scale=0.75).records
    assert (record.ip_adapter_scale, {*record.given}) == (0.75, {"ip_adapter_image"})
    again = parse_record(json.dumps(record.to_json()), "here")
    assert again == record
    assert again.request()["ip_adapter_scale"] == 0.75
    (plain,) = pipe(PROMPT, seed=3).records
    assert "ip_adapter_scale" not in plain.to_json()
    (other,) = pipe(PROMPT, seed=3, ip_adapter_image=picture(seed=1), ip_adapter_scale=0.75).records
    assert record.given != other.given


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"ip_adapter_scale": 0.5}, "ip_adapter_scale would change nothing: it is for requests with an"),
        ({"ip_adapter_image": picture(), "ip_adapter_scale": 0}, "from 0.001 to 10, got 0; without the picture"),
        ({"ip_adapter_image": picture(), "ip_adapter_scale": -1.0}, "from 0.001 to 10, got -1.0"),
        ({"ip_adapter_image": picture(), "ip_adapter_scale": math.nan}, "from 0.001 to 10, got nan"),
        ({"ip_adapter_image": picture(), "ip_adapter_scale": True}, "from 0.001 to 10, got True"),
        ({"ip_adapter_image": picture(), "ip_adapter_scale": "1"}, "from 0.001 to 10, got 1"),
        ({"ip_adapter_image": "in.png"}, "an image must be a PIL.Image.Image, got str"),
        ({"ip_adapter_image": Image.new("F", (4, 4))}, "a picture of mode F is not read"),
    ],
)
def test_refused(pipe: Pipeline, own: dict[str, Any], says: str) -> None:
    steps = list[object]()
    with pytest.raises(RequestError, match=says.replace(".", r"\.")):
        pipe(PROMPT, seed=1, on_step=steps.append, **own)
    assert not steps


def test_a_bundle_without_an_adapter_takes_none(tmp_path: Path) -> None:
    with (
        Pipeline.open(build(tmp_path / "toy"), threads=1) as pipe,
        pytest.raises(RequestError, match=r"the bundle has no IP-Adapter, .*; export it again with --ip-adapter"),
    ):
        pipe(PROMPT, ip_adapter_image=picture())


def test_what_its_graph_makes_is_finite_or_refused(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(values: object, what: str, **_options: object) -> None:
        raise EngineError(f"{what} is not finite")

    monkeypatch.setattr("tgate_runtime.reference.check_computed", nothing)
    with pytest.raises(EngineError, match=r"the IP-Adapter's seen\.negative of this picture is not finite"):
        pipe(PROMPT, ip_adapter_image=picture())


def test_a_graph_of_another_form_is_refused(pipe: Pipeline) -> None:
    manifest, shape = pipe.session.manifest, pipe.session.shapes()[0]
    spec = shape.graphs["reference"]
    lacking = replace(spec, outputs=spec.outputs[1:])
    with pytest.raises(BundleError, match=r"graph 'reference' does not give seen\.negative"):
        check_signatures(manifest, {"reference": lacking})
    for form in ((1, 4, 5, 3), (1, 4, 4, 4), (1, 4)):
        odd = replace(spec, inputs=(replace(spec.inputs[0], shape=form),))
        with pytest.raises(BundleError, match="graph 'reference' has picture as uint8"):
            check_forms(shape, {"reference": odd})
    with pytest.raises(BundleError, match="graph 'reference' has no input picture"):
        check_forms(shape, {"reference": replace(spec, inputs=())})
