"""What a manifest answers: sizes, graphs by their role, plans."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_engine.graph import DECODE, IMAGE, TEXT
from tgate_engine.manifest import Manifest


@pytest.fixture(scope="module")
def sizes(large: Path) -> Manifest:
    return Bundle.open(large).manifest


def test_the_first_size_is_the_default(sizes: Manifest) -> None:
    assert sizes.sizes == ("4x4", "8x2")
    assert [shape.size for shape in sizes.shapes_of()] == ["4x4", "4x4"]
    assert [(shape.width, shape.height) for shape in sizes.shapes_of("8x2")] == [(8, 2)] * 2
    backwards = replace(sizes, shapes=sizes.shapes[::-1])
    assert backwards.sizes == ("8x2", "4x4")
    assert [shape.size for shape in backwards.shapes_of()] == ["8x2", "8x2"]


def test_shapes_of_a_size_begin_with_the_smallest_batches(sizes: Manifest) -> None:
    for manifest in (sizes, replace(sizes, shapes=sizes.shapes[::-1])):
        for size in manifest.sizes:
            assert [shape.batch for shape in manifest.shapes_of(size)] == [(1, 1), (3, 4)]


def test_a_size_that_is_not_there_is_answered_with_those_that_are(sizes: Manifest) -> None:
    with pytest.raises(BundleError) as error:
        sizes.shapes_of("2x8")
    assert str(error.value) == ("the bundle has no size 2x8; it has 4x4, 8x2. Export it again with --size 2x8 as well.")
    with pytest.raises(BundleError, match="has no size 3x3"):
        sizes.graph(DECODE, "3x3")


def test_graphs_by_their_role(sizes: Manifest) -> None:
    text, decoder = sizes.graph(TEXT), sizes.graph(DECODE, "8x2")
    assert text is not None
    assert (text.file, text.role) == ("text.onnx", "text")
    assert text == sizes.graph(TEXT, "8x2"), "the text graph knows no size"
    assert decoder is not None
    assert decoder.file == "decoder-8x2.onnx"
    assert sizes.graph(IMAGE) is None


def test_plans_by_their_name(manifest: Manifest) -> None:
    assert manifest.plan("ungated").name == "ungated"
    with pytest.raises(BundleError) as error:
        manifest.plan("slow")
    assert str(error.value) == (
        "the bundle has no plan 'slow'; it has default, guidance_stopped, ungated. Add one with `tgate plan`."
    )


def test_baselines_are_stored(sizes: Manifest) -> None:
    assert sizes.plan("default").baselines == ("ungated", "guidance_stopped")
    assert sizes.plan("fast").baselines == ("fast.ungated", "fast.guidance_stopped")
    assert sizes.plan("ungated").baselines == ()


def test_conditioning_by_its_source(manifest: Manifest) -> None:
    assert manifest.conditioned_by("text") == ("text", "pooled")
    assert manifest.conditioned_by("constant") == ("time_ids",)
    assert manifest.conditioned_by("image") == ()


@pytest.mark.parametrize(("guidance", "guided"), [("classifier-free", True), ("embedded", False), ("none", False)])
def test_both_halves_are_classifier_free_guidances_alone(manifest: Manifest, guidance: str, guided: bool) -> None:
    assert replace(manifest, guidance=guidance).guided is guided  # type: ignore[arg-type]
