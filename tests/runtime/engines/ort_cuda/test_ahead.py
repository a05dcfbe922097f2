"""What `tgate build` leaves of a bundle's graphs for a host without Python, beside the bundle and never in it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.engines.ort_cuda.halves import halves
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_runtime.engines import open_builder
from tgate_runtime.engines.ort_cuda.lowering import VERSION, lower
from tgate_runtime.mini import MODELS, assemble

LOWERED = {2: "3660f102ef640146803039d4f50e6b8a76ad40a53d1dcac51ee2792fe8db6737"}
"""The digest of what graphs in float32 and float16 are lowered to, those of ``mini`` and of :func:`halves`, by the
version of the lowering."""


def build(bundle: Bundle) -> Any:
    graphs = [*bundle.manifest.shapes[0].graphs.values()]
    return open_builder("ort-cuda").build(bundle, graphs)


def index(bundle: Bundle) -> Any:
    return json.loads((bundle.path / "engines/ort-cuda/lowered.json").read_text())


def test_a_graph_is_lowered_beside_the_bundle(tmp_path: Path) -> None:
    """By an engine that cannot run here: there is no GPU, and an onnxruntime without a provider for one."""
    bundle = halves(tmp_path / "bundle")
    before = (bundle.path / MANIFEST_FILE).read_bytes()
    (place,) = build(bundle).values()
    data = bundle.read("decoder.onnx")
    assert place.read_bytes() == lower(data).data != data
    entry = index(bundle)["graphs"]["decoder.onnx"]
    assert entry["source"] == hashlib.sha256(data).hexdigest()
    (whole,) = entry["lowered"]
    assert whole["outputs"] == ["image"]
    assert whole["sha256"] == hashlib.sha256(place.read_bytes()).hexdigest() == place.stem
    assert whole["weights"] == {
        "conv.weight:0231": {"source": "conv.weight", "order": [0, 2, 3, 1], "dtype": "float16"},
        "norm.weight:float32": {"source": "norm.weight", "order": [], "dtype": "float32"},
        "norm.bias:float32": {"source": "norm.bias", "order": [], "dtype": "float32"},
    }
    assert (bundle.path / MANIFEST_FILE).read_bytes() == before
    assert Bundle.open(bundle.path).manifest == bundle.manifest


def test_a_change_of_the_lowering_raises_its_version(tmp_path: Path) -> None:
    """Or libtgate would take what an older one left."""
    assemble(MODELS / "mini", tmp_path / "mini")
    digest = hashlib.sha256()
    for bundle in (Bundle.open(tmp_path / "mini"), halves(tmp_path / "halves")):
        for spec in bundle.manifest.shapes[0].graphs.values():
            digest.update(lower(bundle.read(spec.file)).data)
    assert LOWERED[VERSION] == digest.hexdigest()


def test_a_graph_is_lowered_for_what_steps_want(tmp_path: Path) -> None:
    """With all of its outputs, and without the carries that nobody reads of most steps."""
    assemble(MODELS / "mini", tmp_path / "mini")
    bundle = Bundle.open(tmp_path / "mini")
    build(bundle)
    graphs = bundle.manifest.shapes[0].graphs
    for name, spec in graphs.items():
        made = index(bundle)["graphs"][spec.file]["lowered"]
        steps = [step for plan in bundle.manifest.plans.values() for step in plan.steps if step.graph == name]
        wanted = {frozenset(("next_latents", "output", *step.writes)) for step in steps}
        assert set(made[0]["outputs"]) == {*spec.output_names()}
        assert {frozenset(each["outputs"]) for each in made} == {*wanted, frozenset(spec.output_names())}
        for each in made[1:]:
            data = (bundle.path / "engines/ort-cuda" / f"{each['sha256']}.onnx").read_bytes()
            assert data == lower(bundle.read(spec.file), each["outputs"]).data
    assert len(index(bundle)["graphs"]["full.onnx"]["lowered"]) > 1


def test_what_no_longer_fits_goes(tmp_path: Path) -> None:
    old, new = halves(tmp_path / "old"), halves(tmp_path / "new", groups=4)
    (stale,) = build(old).values()
    shutil.copytree(old.path / "engines", new.path / "engines")
    (place,) = build(new).values()
    assert {path.name for path in place.parent.iterdir()} == {place.name, "lowered.json"}
    assert place.name != stale.name
    assert [entry["lowered"][0]["sha256"] for entry in index(new)["graphs"].values()] == [place.stem]


def test_other_graphs_of_the_bundle_stay(tmp_path: Path) -> None:
    bundle = halves(tmp_path / "bundle")
    build(bundle)
    before = index(bundle)
    assert open_builder("ort-cuda").build(bundle, []) == {}
    assert index(bundle) == before


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 1, "graphs": {"decoder.onnx": 3}}'])
def test_a_damaged_index_is_written_anew(text: str, tmp_path: Path) -> None:
    bundle = halves(tmp_path / "bundle")
    build(bundle)
    good = index(bundle)
    (bundle.path / "engines/ort-cuda/lowered.json").write_text(text)
    build(bundle)
    assert index(bundle) == good


def a_file(bundle: Bundle, elsewhere: Path) -> None:
    (bundle.path / "engines").write_text("")


def a_link(bundle: Bundle, elsewhere: Path) -> None:
    elsewhere.mkdir()
    (bundle.path / "engines").symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("put", "says"), [(a_file, "cannot be written"), (a_link, "leads out of the bundle; remove the link")]
)
def test_nothing_is_written_elsewhere(put: Callable[[Bundle, Path], None], says: str, tmp_path: Path) -> None:
    bundle = halves(tmp_path / "bundle")
    put(bundle, tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=says):
        build(bundle)
    assert not [*tmp_path.glob("elsewhere/**/*.onnx")]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"precision": "f16"}, "leave out --precision"),
        ({"threads": 2}, "leave out --threads"),
        ({"architecture": "sm_90"}, "leave out --architecture"),
        ({"memory": "fast"}, "leave out --memory and --device"),
        ({"device": 1}, "leave out --memory and --device"),
    ],
)
def test_options_are_refused_as_the_engine_refuses_them(options: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        open_builder("ort-cuda", **options)
