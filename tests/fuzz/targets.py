"""What is fuzzed: every place where bytes of a stranger come in, with files that are sound to begin with.

An entry takes the bytes as if they had come by the usual way, and returns, or raises a
:class:`~tgate_engine.errors.TgateError` of one line. ``assert``: what has to hold of whatever was let through.
"""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.contract.test_tokenizer_check import charsmap, clip, t5
from tests.fuzz.graph_mutations import mutate_graph
from tests.fuzz.mutations import Mutator, mutate_json, mutate_picture, mutate_safetensors, with_words
from tests.hostile import relisted
from tests.toy_bundle import SAMPLERS, WEIGHTS, build
from tests.toy_model import WORDS
from tgate_cli import views
from tgate_cli.inspect import describe
from tgate_engine.bundle import Bundle
from tgate_engine.graph import DENOISE, TEXT, GraphSpec
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.manifest_json import content_digest, dump_manifest, parse_manifest
from tgate_engine.plan import Plan
from tgate_engine.sampler_tables import dump_tables, load_tables
from tgate_runtime.conditioning import from_embeddings
from tgate_runtime.engines import open_engine
from tgate_runtime.files import load_array, load_embeddings
from tgate_runtime.graph_check import read_graphs
from tgate_runtime.picture import MOST_PIXELS, read_picture
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_runtime.text import TextEncoder
from tgate_runtime.weights import map_weights, read_places

CORPUS = Path(__file__).parent / "corpus"


@dataclass(frozen=True, kw_only=True)
class Target:
    """``examples``: how many inputs each run of the tests tries; of a slow target few.

    ``endless``: inputs may ask for much time and memory within the bounds that docs/security-bundle.md states, which
    is no fault then.
    """

    name: str
    run: Callable[[bytes], object]
    sound: Callable[[], Sequence[bytes]]
    mutate: Mutator
    examples: int = 100
    endless: bool = False

    def seeds(self) -> list[bytes]:
        """Sound files, and everything in the corpus."""
        return [*self.sound(), *self.corpus().values()]

    def corpus(self) -> dict[str, bytes]:
        """Files that are kept, by their names: what was a fault once, and what mutations do not find."""
        return {path.name: path.read_bytes() for path in sorted((CORPUS / self.name).glob("*"))}


# --- what is sound ------------------------------------------------------------------------------


@functools.cache
def workspace() -> Path:
    """A directory of this process; whoever started the process removes what lies in its TMPDIR."""
    return Path(tempfile.mkdtemp(prefix="tgate-fuzz-"))


@functools.cache
def toy() -> Bundle:
    return Bundle.open(build(workspace() / "toy"))


@functools.cache
def session() -> Session:
    return Session.open(toy(), threads=1)


def written(name: str, data: bytes) -> Path:
    """A file of the workspace that holds ``data``."""
    path = workspace() / name
    path.write_bytes(data)
    return path


def file_of(name: str) -> Callable[[], Sequence[bytes]]:
    return lambda: [(toy().path / name).read_bytes()]


# --- bundles ------------------------------------------------------------------------------------


def signed(text: bytes) -> bytes:
    """A manifest's JSON without its digest, with it: whatever a stranger writes, they can sign."""
    try:
        digest = content_digest(json.loads(text))
    except (ValueError, RecursionError, TypeError, AttributeError):
        digest = "0" * 64
    head, brace, rest = text.partition(b"{")
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return head + brace + b'"digest":"' + digest.encode() + b'"' + comma + rest if brace and not head.strip() else text


def _unsigned() -> Sequence[bytes]:
    data = json.loads((toy().path / MANIFEST_FILE).read_text("utf-8"))
    del data["digest"]
    return [json.dumps(data).encode()]


def manifest(text: bytes) -> None:
    """What is read is what is written again."""
    read = parse_manifest(signed(text))
    assert parse_manifest(dump_manifest(read)) == read


@functools.cache
def _resigned() -> Path:
    """A copy of the toy, file by file a link to the same bytes, whose manifest is another."""
    build(workspace() / "resigned")
    return workspace() / "resigned"


def _opened(text: bytes) -> Bundle:
    (_resigned() / MANIFEST_FILE).write_bytes(signed(text))
    return Bundle.open(_resigned(), check_digests=False)


def bundle(text: bytes) -> None:
    """What opens can be shown: as JSON, and as lines that a terminal takes for text."""
    data = describe(_opened(text))
    json.dumps(data, allow_nan=False)
    out = io.StringIO()
    views.inspection(data, out)
    assert all(line.isprintable() for line in out.getvalue().replace("\xa0", " ").split("\n"))


def draw(text: bytes) -> None:
    with Pipeline.open(_opened(text), threads=1) as pipeline:
        draws = pipeline("a red circle", seed=1, plan=next(iter(pipeline.session.manifest.plans), "default"))
        assert np.isfinite(draws.latents).all()


def plan(data: bytes) -> None:
    """A plan file, which draws where the toy has what it names."""
    path = written("plan.json", data)
    read = Plan.load(path)
    assert Plan.from_json(json.loads(json.dumps(read.to_json()))) == read
    assert np.isfinite(_pipeline()("a red circle", seed=1, plan=path).latents).all()


@functools.cache
def _pipeline() -> Pipeline:
    return Pipeline(session())


def _plans() -> Sequence[bytes]:
    return [json.dumps(each.to_json()).encode() for each in toy().manifest.plans.values()]


def samplers(data: bytes) -> None:
    tables = load_tables(written("samplers.safetensors", data))
    assert load_tables(written("again.safetensors", dump_tables(tables.values()))) == tables


def weights(data: bytes) -> None:
    """What is mapped is what graphs are checked against."""
    path = written("weights.safetensors", data)
    mapped, places = map_weights(path), read_places(path)
    assert {name: each.array.shape for name, each in mapped.items()} == {n: p.shape for n, p in places.items()}
    for each in mapped.values():
        each.array.tobytes()


# --- graphs -------------------------------------------------------------------------------------


def _checked(data: bytes) -> tuple[Bundle, GraphSpec]:
    """The toy with one graph exchanged: that of the name which the file bears, where there is one."""
    specs = toy().manifest.shapes[0].graphs
    named = (spec for spec in specs.values() if _field(Path(spec.file).stem) in data)
    spec = next(named, specs["full"])
    (_exchanged().path / spec.file).write_bytes(data)
    bundle = relisted(_exchanged(), spec.file)
    read_graphs(bundle, [spec])
    return bundle, spec


def _field(name: str) -> bytes:
    """The name of a graph, as protobuf writes it."""
    return bytes([0x12, len(name)]) + name.encode()


@functools.cache
def _exchanged() -> Bundle:
    return Bundle.open(build(workspace() / "exchanged"))


def _graphs() -> Mapping[str, GraphSpec]:
    return toy().manifest.shapes[0].graphs


def _graph_files() -> Sequence[bytes]:
    return [(toy().path / _graphs()[name].file).read_bytes() for name in ("full", "reuse_both", "text", "decoder")]


def graph(data: bytes) -> None:
    _checked(data)


def on_engine(data: bytes, *, engine: str) -> None:
    """A graph that is let through, on an engine: what it does not take, it says."""
    bundle, spec = _checked(data)
    loader = open_engine(engine, threads=1)
    executable = loader.load(bundle, [spec])[spec.file]
    rng = np.random.default_rng(0)
    inputs = {t.name: loader.allocate(t.resolve(1), t.dtype) for t in spec.inputs}
    for buffer in inputs.values():
        values = rng.standard_normal(buffer.shape) if buffer.dtype == "float32" else rng.integers(0, 4, buffer.shape)
        buffer.write(values.astype(buffer.dtype))
    outputs = {t.name: loader.allocate(t.resolve(1), t.dtype) for t in spec.outputs}
    executable.bind(inputs, outputs)()


# --- what a request brings ----------------------------------------------------------------------

PROMPTS = ("", "a red circle", "  A  RED\t</s> <|endoftext|> ", "x" * 300, "ﷺ½ é e\u0301 🏳️‍🌈\0\x1b[2J" * 20)


def tokenizer(data: bytes) -> None:
    """A prompt is cut where it says, or not at all."""
    encoder = _encoder(data)
    for prompt in PROMPTS:
        assert encoder.encode(prompt).cut in prompt


def _encoder(data: bytes) -> TextEncoder:
    file = session().bundle.path / session().manifest.tokenizers[0].file
    sound = file.read_bytes()
    file.write_bytes(data)
    try:
        return TextEncoder(session())
    finally:
        file.write_bytes(sound)


def _tokenizers() -> Sequence[bytes]:
    sound = [json.dumps(each).encode() for each in (clip(), t5(), t5(charsmap()))]
    return [*file_of(toy().manifest.tokenizers[0].file)(), *sound]


@functools.cache
def _encoders() -> Sequence[TextEncoder]:
    return [_encoder(data) for data in _tokenizers()]


def prompt(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")
    for encoder in _encoders():
        assert encoder.encode(text).cut in text


def picture(data: bytes) -> None:
    image = read_picture(data, "picture")
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MOST_PIXELS


def _pictures() -> Sequence[bytes]:
    rng = np.random.default_rng(0)
    colours = Image.fromarray(rng.integers(0, 255, (9, 7, 4), np.uint8), "RGBA")
    exif = Image.Exif()
    exif[274] = 6
    files = []
    for kind, mode, options in (
        ("PNG", "RGBA", {"exif": exif}),
        ("PNG", "P", {"transparency": 3}),
        ("JPEG", "RGB", {"exif": exif}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {"progressive": True}),
        ("WEBP", "RGBA", {"exif": exif}),
        ("WEBP", "RGB", {"lossless": True}),
        ("BMP", "RGB", {}),
        ("BMP", "P", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "1", {"compression": "group4"}),
        ("TIFF", "CMYK", {}),
        ("GIF", "P", {"transparency": 1}),
        ("PPM", "RGB", {}),
    ):
        out = io.BytesIO()
        colours.convert(mode).save(out, kind, **options)
        files.append(out.getvalue())
    for kind in ("PNG", "TIFF", "PPM"):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 2**16, (5, 6), np.uint16)).save(out, kind)
        files.append(out.getvalue())
    return files


def array(data: bytes) -> None:
    values = load_array(written("latents.npy", data))
    assert values.dtype.isnative
    assert values.dtype.kind in "fiub"
    values.sum(dtype=np.float64)


def _arrays() -> Sequence[bytes]:
    files = []
    for values in (
        np.zeros((1, 2, 4, 4), np.float32),
        np.asfortranarray(np.ones((3, 2), ">f8")),
        np.array(7, np.uint8),
    ):
        out = io.BytesIO()
        np.save(out, values)
        files.append(out.getvalue())
    return files


def embeddings(data: bytes) -> None:
    tensors = from_embeddings(session(), load_embeddings(written("embeddings.safetensors", data)))
    assert all(np.isfinite(each).all() for each in tensors.values())


def _embeddings() -> Sequence[bytes]:
    from safetensors.numpy import save

    specs = {t.name: t for g in _graphs().values() if g.role == DENOISE for t in g.inputs}
    names = [f"{name}.{half}" for name in ("text", "pooled") for half in ("negative", "positive")]
    return [
        save({name: np.ones(specs[name].resolve(2), dtype) for name in names}) for dtype in (np.float32, np.float16)
    ]


# --- all of them --------------------------------------------------------------------------------

_NPY_WORDS = (
    "'descr': ",
    "'fortran_order': ",
    "'shape': ",
    "True",
    "(1, 2)",
    "<f4",
    ">f2",
    "|O",
    "|V8",
    "<U9",
    "9" * 30,
)
_TEXT_WORDS = ("</s>", "<|endoftext|>", "\u202e", "🏳️‍🌈", "e\u0301", "\0", "ﷺ", "\ue000", "\ud800", " " * 500, "a" * 500)

TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(name="manifest", run=manifest, sound=_unsigned, mutate=mutate_json),
        Target(name="bundle", run=bundle, sound=_unsigned, mutate=mutate_json),
        Target(name="draw", run=draw, sound=_unsigned, mutate=mutate_json, examples=30),
        Target(name="plan", run=plan, sound=_plans, mutate=mutate_json),
        Target(name="samplers", run=samplers, sound=file_of(SAMPLERS), mutate=mutate_safetensors, examples=60),
        Target(name="weights", run=weights, sound=file_of(WEIGHTS), mutate=mutate_safetensors),
        Target(name="graph", run=graph, sound=_graph_files, mutate=mutate_graph),
        Target(
            name="ort", run=partial(on_engine, engine="ort-cpu"), sound=_graph_files, mutate=mutate_graph, endless=True
        ),
        Target(name="tokenizer", run=tokenizer, sound=_tokenizers, mutate=mutate_json),
        Target(
            name="prompt",
            run=prompt,
            sound=lambda: [p.encode() for p in PROMPTS],
            mutate=with_words(*WORDS, *_TEXT_WORDS),
        ),
        Target(name="picture", run=picture, sound=_pictures, mutate=mutate_picture, examples=200),
        Target(name="array", run=array, sound=_arrays, mutate=with_words(*_NPY_WORDS), examples=200),
        Target(name="embeddings", run=embeddings, sound=_embeddings, mutate=mutate_safetensors),
    )
}
