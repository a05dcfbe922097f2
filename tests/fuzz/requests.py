"""What comes with a request, as :mod:`tests.fuzz.targets` lists it."""

from __future__ import annotations

import copy
import functools
import io
import json
import struct
from collections.abc import Sequence
from random import Random

import numpy as np
from PIL import Image
from safetensors.numpy import save

from tests.contract.test_tokenizer_check import charsmap, clip, t5
from tests.fuzz.judging import LONGEST
from tests.fuzz.mutations import mutate_json, mutate_picture, mutate_safetensors, with_words
from tests.fuzz.target import Target, drawing, file_of, session, toy, written
from tests.hostile import relisted
from tests.toy_model import WORDS
from tgate_engine.errors import shown
from tgate_engine.graph import DENOISE
from tgate_runtime.conditioning import from_embeddings
from tgate_runtime.files import load_array, load_embeddings, picture_bytes, video_bytes
from tgate_runtime.picture import MOST_PIXELS, read_picture
from tgate_runtime.record import PlanRecord, Record, parse_record, plan_for
from tgate_runtime.stamps import comment, read_stamp
from tgate_runtime.text import TextEncoder

PROMPTS = ("", "a red circle", "  A  RED\t</s> <|endoftext|> ", "x" * 300, "ﷺ½ é e\u0301 🏳️‍🌈\0\x1b[2J" * 20)


def tokenizer(data: bytes) -> None:
    """A prompt is cut where it says, or not at all."""
    encoder = _encoder(data)
    for prompt in PROMPTS:
        assert encoder.encode(prompt).cut in prompt


def _encoder(data: bytes) -> TextEncoder:
    opened = copy.copy(session())
    name = opened.manifest.tokenizers[0].file
    file = opened.bundle.path / name
    sound = file.read_bytes()
    file.write_bytes(data)
    opened.bundle = relisted(opened.bundle, name)
    try:
        return TextEncoder(opened)
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


def _prompts() -> Sequence[bytes]:
    return [text.encode() for text in PROMPTS]


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


def record(data: bytes) -> None:
    """What a picture says that it was drawn from is drawn, and says the same of itself in every file."""
    said = parse_record(data, "it") if data.startswith(b"{") else read_stamp(data, "it")
    plan = plan_for(said, session().manifest)
    drawn = drawing()(**said.request(), plan=plan)
    own = drawn.records[0]
    assert (own.request(), own.plan) == (said.request(), PlanRecord.of(plan))
    assert all(shown(line, LONGEST) == line for line in said.differences(own))
    assert all(read_stamp(file, "it") == own for file in _stamped(drawn.images[0], own))


def _stamped(image: Image.Image, own: Record) -> list[bytes]:
    pictures = [picture_bytes(image, suffix, own) for suffix in (".png", ".webp", ".tif")]
    return [*pictures, video_bytes([image], ".gif", fps=1, record=own)]


def _records() -> Sequence[bytes]:
    """As JSON, and in files of every kind; an MP4's boxes alone."""
    drawn = drawing()("a red circle", negative_prompt="blue", seed=1)
    own, image = drawn.records[0], drawn.images[0]
    atoms = struct.pack(">II", 1, 0) + comment(own).encode()
    for kind in (b"data", b"\xa9cmt", b"ilst", b"meta", b"udta", b"moov"):
        atoms = struct.pack(">I4s", 8 + len(atoms), kind) + atoms
        atoms = b"\0" * 4 + atoms if kind == b"ilst" else atoms
    mp4 = struct.pack(">I4s", 8, b"ftyp") + atoms
    return [json.dumps(own.to_json()).encode(), picture_bytes(image, ".jpg", own), *_stamped(image, own), mp4]


def mutate_record(data: bytes, rng: Random) -> bytes:
    return (mutate_json if data.startswith(b"{") else mutate_picture)(data, rng)


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
    specs = {t.name: t for g in toy().manifest.shapes[0].graphs.values() if g.role == DENOISE for t in g.inputs}
    names = [f"{name}.{half}" for name in ("text", "pooled") for half in ("negative", "positive")]
    return [
        save({name: np.ones(specs[name].resolve(2), dtype) for name in names}) for dtype in (np.float32, np.float16)
    ]


_NPY_WORDS = ("'descr': ", "'fortran_order': ", "'shape': ", "True", "(1, 2)", "<f4", ">f2", "|O", "<U9", "9" * 30)
_TEXT_WORDS = ("</s>", "<|endoftext|>", "\u202e", "🏳️‍🌈", "e\u0301", "\0", "ﷺ", "\ue000", "\ud800", " " * 500, "a" * 99)

TARGETS = (
    Target(name="tokenizer", run=tokenizer, sound=_tokenizers, mutate=mutate_json, examples=60),
    Target(name="prompt", run=prompt, sound=_prompts, mutate=with_words(*WORDS, *_TEXT_WORDS)),
    Target(name="picture", run=picture, sound=_pictures, mutate=mutate_picture, examples=200),
    Target(name="record", run=record, sound=_records, mutate=mutate_record),
    Target(name="array", run=array, sound=_arrays, mutate=with_words(*_NPY_WORDS), examples=200),
    Target(name="embeddings", run=embeddings, sound=_embeddings, mutate=mutate_safetensors),
)
