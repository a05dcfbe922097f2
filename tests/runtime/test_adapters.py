"""Adapters of a request, over the toy bundle: the weights that they change, and who sees them."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from tests.runtime.pictures import EVERY_GRAPH
from tests.toy_bundle import Toy, build
from tgate_engine.adapter import BIAS, DOWN, FACTOR, TURNED, UP
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import decode, encode
from tgate_engine.errors import BundleError, RequestError, TgateError
from tgate_engine.manifest import Adapter
from tgate_runtime.adapters import scales_of_adapters, weights_with
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_runtime.weights import map_weights

PROMPT = "a red fox"


def matrices(bundle: Bundle) -> list[str]:
    """The weights of the denoiser that are multiplied with."""
    weights = map_weights(bundle.file(bundle.manifest.weights))
    return [name for name, weight in weights.items() if weight.array.ndim == 2 and name != "w.image"]


def keep(bundle: Bundle, name: str, tensors: Mapping[str, NDArray[Any]]) -> Bundle:
    content = save({key: np.ascontiguousarray(values) for key, values in tensors.items()})
    file = f"adapters/{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
    return bundle.save_adapter(name, Adapter(file=file, layers=1, rank=2), content)


def lora(shape: tuple[int, ...], weight: str, seed: int, *, size: float = 0.3) -> dict[str, NDArray[Any]]:
    """A change of a weight of that shape, as the LoRA has it."""
    rng = np.random.default_rng(seed)
    return {
        weight + UP: rng.normal(0, size, (shape[0], 2)).astype(np.float32),
        weight + DOWN: rng.normal(0, size, (2, int(np.prod(shape[1:])))).astype(np.float32),
        weight + FACTOR: np.array([0.5], np.float32),
    }


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(build(tmp_path / "toy", Toy(settings=EVERY_GRAPH)))


@pytest.fixture
def adapted(bundle: Bundle) -> Bundle:
    """With the adapters "style" and "face", of all matrices each."""
    weights = map_weights(bundle.file(bundle.manifest.weights))
    for seed, name in enumerate(("style", "face")):
        tensors: dict[str, NDArray[Any]] = {}
        for place, weight in enumerate(matrices(bundle)):
            tensors |= lora(weights[weight].array.shape, weight, 100 * seed + place, size=0.05)
        bundle = keep(bundle, name, tensors)
    return Bundle.open(bundle.path)


@pytest.fixture
def pipe(adapted: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(adapted, threads=1) as opened:
        yield opened


def fused(bundle: Bundle, loras: Mapping[str, float], target: Path) -> Path:
    """The bundle with its weights changed on disk, by the rule in float64."""
    shutil.copytree(bundle.path, target)
    changed = weights_with(bundle, tuple(sorted(loras.items())))
    data = bytearray((target / bundle.manifest.weights).read_bytes())
    for name, weight in map_weights(bundle.file(bundle.manifest.weights)).items():
        if name in changed:
            old, new = weight.array.tobytes(), changed[name].array.tobytes()
            assert data.count(old) == 1
            data[data.index(old) : data.index(old) + len(old)] = new
    (target / bundle.manifest.weights).write_bytes(data)
    return target


@pytest.mark.parametrize("memory", ["fast", "shared"])
def test_a_request_sees_its_adapters_and_the_next_one_none(adapted: Bundle, tmp_path: Path, memory: str) -> None:
    loras = {"style": 0.8, "face": -0.5}
    with Pipeline.open(adapted, memory=memory, threads=1) as pipe:
        before = pipe(PROMPT, seed=3)
        result = pipe(PROMPT, seed=3, loras=loras)
        after = pipe(PROMPT, seed=3)
    assert np.array_equal(before.latents, after.latents)
    assert np.abs(result.latents - before.latents).max() > 1e-3
    changed = fused(adapted, loras, tmp_path / "fused")
    with Pipeline.open(Bundle(changed, adapted.manifest), memory=memory, threads=1) as other:
        assert np.array_equal(other(PROMPT, seed=3).latents, result.latents)
    assert {name: lora.scale for name, lora in result.records[0].loras.items()} == loras
    assert result.records[0].request()["loras"] == loras
    assert before.records[0].request()["loras"] is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("shape", "turned"), [((3, 4), False), ((3, 4), True), ((3, 2, 3, 3), False)])
def test_the_rule(tmp_path: Path, dtype: str, shape: tuple[int, ...], turned: bool) -> None:
    """W + sum of scale * factor * up @ down, in float64, rounded once."""
    bundle = Bundle.open(build(tmp_path / "toy"))
    rng = np.random.default_rng(1)
    own = rng.normal(size=shape).astype(np.float32)
    name = "net.layer.weight" + TURNED * turned
    stored = encode(np.ascontiguousarray(own.T if turned else own), dtype)
    tensor = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header = f'{{"{name}":{{"dtype":"{tensor}","shape":{list(stored.shape)},"data_offsets":[0,{stored.nbytes}]}}}}'
    content = len(header).to_bytes(8, "little") + header.encode() + stored.tobytes()
    (bundle.path / bundle.manifest.weights).write_bytes(content)
    want = decode(stored, dtype).astype(np.float64)
    scales = {"a": 0.75, "b": -1.5}
    for seed, (adapter, scale) in enumerate(scales.items()):
        parts = lora(shape, name, seed)
        bundle = _kept(bundle, adapter, parts)
        change = scale * 0.5 * (parts[name + UP].astype(np.float64) @ parts[name + DOWN].astype(np.float64))
        change = change.reshape(shape)
        want += change.T if turned else change
    (found,) = weights_with(bundle, tuple(scales.items())).values()
    assert found.dtype == dtype
    assert found.array.shape == stored.shape
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}[dtype]
    np.testing.assert_allclose(decode(found.array, dtype), want, rtol=tolerance, atol=tolerance)


def _kept(bundle: Bundle, name: str, tensors: Mapping[str, NDArray[Any]]) -> Bundle:
    """With an adapter, in memory alone: the weights are not those of the manifest."""
    content = save({key: np.ascontiguousarray(values) for key, values in tensors.items()})
    file = f"{name}.safetensors"
    (bundle.path / file).write_bytes(content)
    digest = replace(next(iter(bundle.manifest.files.values())), bytes=len(content))
    digest = replace(digest, sha256=hashlib.sha256(content).hexdigest())
    adapters = {**bundle.manifest.adapters, name: Adapter(file=file, layers=1, rank=2)}
    manifest = replace(bundle.manifest, adapters=adapters, files={**bundle.manifest.files, file: digest})
    return Bundle(bundle.path, manifest)


def test_a_bias_has_its_change_alone(bundle: Bundle) -> None:
    stored = np.arange(5, dtype=np.float32)
    header = b'{"net.bias":{"dtype":"F32","shape":[5],"data_offsets":[0,20]}}'
    content = len(header).to_bytes(8, "little") + header + stored.tobytes()
    (bundle.path / bundle.manifest.weights).write_bytes(content)
    kept = _kept(bundle, "bias", {"net.bias" + BIAS: np.full(5, 3, np.float32)})
    (found,) = weights_with(kept, (("bias", 0.5),)).values()
    assert np.array_equal(found.array, stored + 1.5)
    kept = _kept(bundle, "bias", {"net.bias" + BIAS: np.full(4, 3, np.float32)})
    with pytest.raises(BundleError, match=r"'net.bias' is \[5\], its change \[4\]"):
        weights_with(kept, (("bias", 0.5),))


def test_requests_of_several_combinations_and_threads(pipe: Pipeline) -> None:
    wanted: dict[int, Any] = {}
    asked: list[dict[str, float] | None] = [None, {"style": 1.0}, {"face": 1.0}, {"style": 1.0, "face": 0.5}]
    for number, loras in enumerate(asked):
        wanted[number] = pipe(PROMPT, seed=1, loras=loras).latents
    assert len({array.tobytes() for array in wanted.values()}) == len(asked)
    found: dict[int, list[bool]] = {number: [] for number in wanted}

    def draw(number: int) -> None:
        for _ in range(3):
            found[number].append(np.array_equal(pipe(PROMPT, seed=1, loras=asked[number]).latents, wanted[number]))

    threads = [threading.Thread(target=draw, args=(number,)) for number in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [True] * 3 for number in wanted}


def test_what_is_loaded_is_kept_for_the_next_and_no_more(pipe: Pipeline) -> None:
    first = pipe.session.adapted({"style": 1.0})
    assert pipe.session.adapted({"style": 1}) is first
    assert pipe.session.adapted({}) is pipe.session
    assert pipe.session.adapted(None) is pipe.session
    pipe.session.adapted({"face": 1.0})
    assert pipe.session.adapted({"style": 1.0}) is not first
    graph = pipe.session.graph("decode")
    assert graph is not None
    assert first.executable(graph) is pipe.session.executable(graph), "no adapter changes it"
    with pytest.raises(RequestError, match="has adapters already"):
        first.adapted({"face": 1.0})


def test_a_session_with_adapters_draws_as_any_does(pipe: Pipeline) -> None:
    session = pipe.session.adapted({"style": 1.0})
    assert session.adapted(None) is session
    own = Pipeline(session)(PROMPT, seed=3)
    assert np.array_equal(own.latents, pipe(PROMPT, seed=3, loras={"style": 1.0}).latents)
    assert own.records[0].loras["style"].scale == 1.0


def test_a_closed_session_takes_none(adapted: Bundle) -> None:
    session = Session.open(adapted, threads=1)
    other = session.adapted({"style": 1.0})
    session.close()
    for closed in (session, other):
        with pytest.raises(TgateError, match=r"is closed|has adapters already"):
            closed.adapted({"style": 1.0})
    graph = other.graph("decode")
    assert graph is not None
    with pytest.raises(TgateError, match="is closed"):
        other.executable(graph)


@pytest.mark.parametrize(
    ("loras", "why"),
    [
        ({"other": 1.0}, "the bundle has no adapter 'other'; it has face, style"),
        ({3: 1.0}, "the bundle has no adapter"),
        ({"style": 0}, "the scale of adapter 'style' is 0; a number other than 0"),
        ({"style": True}, "the scale of adapter 'style' is True"),
        ({"style": "1"}, "the scale of adapter 'style' is '?1'?"),
        ({"style": float("nan")}, "the scale of adapter 'style' is nan"),
        ({"style": 1e9}, "the scale of adapter 'style' is 1e\\+09|1000000000.0"),
        (["style"], "loras are scales by the names of adapters"),
        ("style", "loras are scales by the names of adapters"),
    ],
)
def test_what_is_no_adapter_ends_in_one_line(pipe: Pipeline, loras: Any, why: str) -> None:
    with pytest.raises(RequestError, match=why) as caught:
        pipe(PROMPT, loras=loras)
    assert "\n" not in str(caught.value)


def test_a_bundle_without_adapters_says_how_to_add_one(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="it has none; `tgate adapt` adds one"):
        scales_of_adapters({"style": 1.0}, bundle.manifest)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t, n: {k.replace(n, "nobody"): v for k, v in t.items()}, "weight 'nobody' is not there"),
        (lambda t, n: {n + UP: t[n + UP]}, "it has #up of"),
        (lambda t, n: {**t, n + BIAS: t[n + FACTOR]}, "it has #bias, #down, #factor, #up of"),
        (lambda t, n: {**t, n + UP: t[n + UP][:-1]}, "its change"),
        (lambda t, n: {**t, n + DOWN: t[n + DOWN][:1]}, "its change"),
        (lambda t, n: {**t, n + UP: t[n + UP].astype(np.int32)}, "has int32 or numbers that are not finite"),
        (lambda t, n: {**t, n + UP: t[n + UP] * np.nan}, "has float32 or numbers that are not finite"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(bundle: Bundle, change: Any, why: str) -> None:
    name = matrices(bundle)[0]
    shape = map_weights(bundle.file(bundle.manifest.weights))[name].array.shape
    kept = keep(bundle, "odd", change(lora(shape, name, 1), name))
    with pytest.raises(BundleError, match=why) as caught:
        weights_with(kept, (("odd", 1.0),))
    assert "\n" not in str(caught.value)


def test_what_is_no_safetensors_file_is_refused(bundle: Bundle) -> None:
    content = b"no tensors"
    kept = bundle.save_adapter("odd", Adapter(file="adapters/x.safetensors", layers=1, rank=1), content)
    with pytest.raises(BundleError, match="is not a whole safetensors file"):
        weights_with(kept, (("odd", 1.0),))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_scale_that_changes_nothing_is_refused(tmp_path: Path, dtype: str) -> None:
    """Too small for the dtype; the least that is not has its effect."""
    bundle = Bundle.open(build(tmp_path / "toy"))
    tensor = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    stored = encode(np.ones((3, 4), np.float32), dtype)
    header = f'{{"net.weight":{{"dtype":"{tensor}","shape":[3,4],"data_offsets":[0,{stored.nbytes}]}}}}'
    content = len(header).to_bytes(8, "little") + header.encode() + stored.tobytes()
    (bundle.path / bundle.manifest.weights).write_bytes(content)
    parts = {
        "net.weight" + UP: np.ones((3, 1)),
        "net.weight" + DOWN: np.ones((1, 4)),
        "net.weight" + FACTOR: np.ones(1),
    }
    kept = _kept(bundle, "faint", {key: values.astype(np.float32) for key, values in parts.items()})
    least = {"float32": 2**-23, "float16": 2**-10, "bfloat16": 2**-7}[dtype]
    (found,) = weights_with(kept, (("faint", least),)).values()
    assert np.array_equal(decode(found.array, dtype), np.full((3, 4), 1 + least, np.float32))
    for scale in (least / 4, -least / 8, 1e-320):
        with pytest.raises(RequestError, match=r"with faint:.*, no weight changes in .*; take larger scales"):
            weights_with(kept, (("faint", scale),))


def test_a_weight_beyond_its_dtype_is_refused(bundle: Bundle) -> None:
    name = matrices(bundle)[0]
    shape = map_weights(bundle.file(bundle.manifest.weights))[name].array.shape
    tensors = lora(shape, name, 1, size=1e19)
    kept = keep(bundle, "large", {**tensors, name + FACTOR: np.array([1e4], np.float32)})
    with pytest.raises(RequestError, match=f"does not fit into {bundle.manifest.dtype}; take smaller scales"):
        weights_with(kept, (("large", 100.0),))
