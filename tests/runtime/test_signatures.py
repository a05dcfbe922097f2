"""Graphs that take what nothing feeds, or do not give what is read, are refused when a bundle is opened."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pytest

from tgate_engine.errors import BundleError
from tgate_engine.graph import BATCH, DECODE, DENOISE, IMAGE, PREVIEW, GraphSpec, TensorSpec
from tgate_engine.manifest import Conditioning, Manifest, Shape
from tgate_runtime.session import Session
from tgate_runtime.signatures import check_forms, check_ranges, check_signatures


@pytest.fixture(scope="module")
def manifest(session: Session) -> Manifest:
    return session.manifest


@pytest.fixture(scope="module")
def graphs(manifest: Manifest) -> Mapping[str, GraphSpec]:
    return manifest.shapes[0].graphs


ODD = TensorSpec(name="odd", dtype="float32", shape=(BATCH, 1))


def without(spec: GraphSpec, name: str, *, output: bool = False) -> GraphSpec:
    if output:
        return replace(spec, outputs=tuple(t for t in spec.outputs if t.name != name))
    return replace(spec, inputs=tuple(t for t in spec.inputs if t.name != name))


def test_an_exported_bundles_graphs_are_as_they_should_be(manifest: Manifest, graphs: Mapping[str, GraphSpec]) -> None:
    check_signatures(manifest, graphs)


@pytest.mark.parametrize("name", ["full", "reuse_cross", "text", "decoder"])
def test_an_input_that_nothing_feeds(manifest: Manifest, graphs: Mapping[str, GraphSpec], name: str) -> None:
    spec = replace(graphs[name], inputs=(*graphs[name].inputs, ODD))
    with pytest.raises(BundleError, match=f"graph '{name}' takes odd, which nothing feeds; export the bundle again"):
        check_signatures(manifest, {name: spec})


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("full", "next_latents"),
        ("reuse_both", "output"),
        ("text", "text"),
        ("text", "pooled"),
        ("decoder", "image"),
    ],
)
def test_an_output_that_is_needed(manifest: Manifest, graphs: Mapping[str, GraphSpec], name: str, output: str) -> None:
    with pytest.raises(BundleError, match=f"graph '{name}' does not give {output}; export the bundle again"):
        check_signatures(manifest, {name: without(graphs[name], output, output=True)})


def test_an_output_that_nobody_needs(manifest: Manifest, graphs: Mapping[str, GraphSpec]) -> None:
    """The decoder's other output, for instance, which goldens compare."""
    check_signatures(manifest, {n: replace(g, outputs=(*g.outputs, ODD)) for n, g in graphs.items()})


def test_every_tokenizer_feeds_the_text_graph(manifest: Manifest, graphs: Mapping[str, GraphSpec]) -> None:
    with pytest.raises(BundleError, match=r"graph 'text' has no input ids\.1; export the bundle again"):
        check_signatures(manifest, {"text": without(graphs["text"], "ids.1")})


def test_a_carry_that_the_manifest_does_not_list(manifest: Manifest, graphs: Mapping[str, GraphSpec]) -> None:
    fewer = replace(manifest, carries={n: facts for n, facts in manifest.carries.items() if n != "cross.0"})
    with pytest.raises(BundleError, match=r"graph 'reuse_cross' takes cross\.0, which nothing feeds"):
        check_signatures(fewer, graphs)


def test_an_image_graph(manifest: Manifest) -> None:
    spec = GraphSpec(
        file="image.onnx",
        role=IMAGE,
        batch=(1, 1),
        inputs=(
            TensorSpec(name="picture", dtype="uint8", shape=(1, 4, 4, 3)),
            TensorSpec(name="noise", dtype="float32", shape=(1, 3, 4, 4)),
        ),
        outputs=(TensorSpec(name="latent", dtype="float32", shape=(1, 3)),),
        macs=manifest.shapes[0].graphs["text"].macs,
    )
    pictured = replace(manifest, conditioning=(Conditioning(name="latent", source="image"),))
    check_signatures(pictured, {"image": spec})
    check_signatures(pictured, {"image": without(spec, "noise")})
    with pytest.raises(BundleError, match="graph 'image' does not give latent"):
        check_signatures(pictured, {"image": without(spec, "latent", output=True)})
    with pytest.raises(BundleError, match="graph 'image' takes picture, noise, which nothing feeds"):
        check_signatures(pictured, {"image": replace(spec, role=DECODE)})


def test_a_small_decoder_is_one_as_the_other_is(manifest: Manifest, graphs: Mapping[str, GraphSpec]) -> None:
    small, shape = replace(graphs["decoder"], role=PREVIEW), manifest.shapes[0]
    check_signatures(manifest, {"small": small})
    check_forms(shape, {"small": small})
    with pytest.raises(BundleError, match="graph 'small' does not give image"):
        check_signatures(manifest, {"small": without(small, "image", output=True)})
    with pytest.raises(BundleError, match="graph 'small' takes odd, which nothing feeds"):
        check_signatures(manifest, {"small": replace(small, inputs=(*small.inputs, ODD))})
    for odd, says in (
        (without(small, "latents"), "has no input latents"),
        (reshaped(small, "latents", 1, 5), r"has latents as float32 \[1, 5\], where"),
        (reshaped(small, "image", 1, 2, 2, 3, dtype="uint8"), r"has image as uint8 \[1, 2, 2, 3\], where"),
    ):
        with pytest.raises(BundleError, match=says):
            check_forms(shape, {"small": odd})


def reshaped(spec: GraphSpec, name: str, *shape: int | str, dtype: str = "float32") -> GraphSpec:
    def change(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(t, shape=shape, dtype=dtype) if t.name == name else t for t in tensors)

    return replace(spec, inputs=change(spec.inputs), outputs=change(spec.outputs))


@pytest.fixture(scope="module")
def shape(manifest: Manifest) -> Shape:
    return manifest.shapes[0]


def test_an_exported_bundles_graphs_are_of_the_forms_that_are_wanted(manifest: Manifest) -> None:
    for shape in manifest.shapes:
        check_forms(shape, shape.graphs)
        check_ranges(manifest.shapes_of(shape.size), [n for n, g in shape.graphs.items() if g.role == DENOISE])


def test_graphs_are_for_the_latents_pictures_and_batches_of_their_shape(
    shape: Shape, graphs: Mapping[str, GraphSpec]
) -> None:
    full, decoder = graphs["full"], graphs["decoder"]
    wanted = ", ".join(map(str, (BATCH, *shape.latents)))
    for spec, says in (
        (
            reshaped(full, "next_latents", BATCH, 5),
            f"next_latents as float32 [batch, 5], where next_latents as float32 [{wanted}] is wanted",
        ),
        (reshaped(full, "output", *shape.latents), "without a row for each image"),
        (reshaped(full, "step", BATCH, 13), "step as float32 [batch, 13], where step as float32 [batch, 12] is wanted"),
        (reshaped(full, "noise", BATCH, *shape.latents, dtype="int64"), "has noise as int64"),
        (without(full, "latents"), "has no input latents"),
        (without(full, "step"), "has no input step"),
        (reshaped(decoder, "latents", 1, 5), "has latents as float32 [1, 5], where"),
        (reshaped(decoder, "image", 1, 2, 2, 3, dtype="uint8"), "has image as uint8 [1, 2, 2, 3], where"),
        (reshaped(decoder, "image", 3, dtype="uint8"), "has image as uint8 [3], where"),
        (without(decoder, "latents"), "has no input latents"),
    ):
        with pytest.raises(BundleError, match=re.escape(says)):
            check_forms(shape, {"full": spec})
    least, most = full.batch
    with pytest.raises(
        BundleError, match=f"'full' is for {least} to {most} images, and its shape for 1 to {most + 1};"
    ):
        check_forms(replace(shape, batch=(1, most + 1)), graphs)


def test_a_videos_pictures_are_as_many_as_the_decoder_says(shape: Shape, graphs: Mapping[str, GraphSpec]) -> None:
    size = (shape.height, shape.width, 3)
    check_forms(shape, {"decoder": reshaped(graphs["decoder"], "image", 1, 25, *size, dtype="uint8")})


def test_ranges_of_one_size_take_and_give_the_same(shape: Shape, graphs: Mapping[str, GraphSpec]) -> None:
    least, most = shape.batch
    more = replace(shape, batch=(most + 1, most + 1))
    check_ranges([shape, more], ["full"])
    with pytest.raises(BundleError, match=f"other latents for {least} to {most} and {most + 1} to {most + 1} images"):
        check_ranges([shape, replace(more, latents=(1,))], ["full"])
    other = replace(more, graphs={**graphs, "full": without(graphs["full"], "latents.3")})
    with pytest.raises(BundleError, match=r"graph 'full' of .* takes and gives other tensors"):
        check_ranges([shape, other], ["full"])
    check_ranges([shape, other], ["unguided"])
