"""Graphs that take what nothing feeds, or do not give what is read, are refused when a bundle is opened."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest

from tgate_engine.errors import BundleError
from tgate_engine.graph import BATCH, DECODE, IMAGE, GraphSpec, TensorSpec
from tgate_engine.manifest import Conditioning, Manifest
from tgate_runtime.session import Session
from tgate_runtime.signatures import check_signatures


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
