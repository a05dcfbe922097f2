"""A manifest as JSON. Reading is distrustful: every field is checked for its type, and every file name must be a
plain name inside the bundle."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import BundleError, TgateError
from tgate_engine.graph import BATCH, ROLES, Dim, GraphSpec, Macs, TensorSpec
from tgate_engine.manifest import (
    GUIDANCE,
    MANIFEST_FILE,
    NEGATIVES,
    SCHEMA_VERSION,
    SOURCES,
    Adapter,
    Conditioning,
    FileDigest,
    Golden,
    Manifest,
    Shape,
    Tokenizer,
)
from tgate_engine.plan import MOST_GUIDANCE, Plan
from tgate_engine.reader import Reader, check_name, is_nested, parse_json, unique
from tgate_engine.sampler import check_facts

MOST_BYTES = 32 << 20
"""How large a manifest may be. A plan of 50 steps over SDXL's 140 carries takes some 60 KB, so this is hundreds of
them; and reading what is all brackets, the worst there is, takes some twenty times this in memory."""
_MOST_FILES = 10_000
_MOST_SHAPES = 64
_MOST_PLANS = 1000
_MOST_ADAPTERS = 1000
_MOST_TENSORS = 1024  # of a graph, a way: SDXL's have 150
_MOST_SIZE = 1 << 16  # pixels of a side, frames, images in a call
_MOST_ROWS = 1 << 20  # tokens of a prompt
_MOST_RANK = 8
_MOST_TENSOR_BYTES = 1 << 40
_MOST_DEPTH = 16  # of the scheduler's configuration, which is nobody's but diffusers'
_SHA256 = re.compile("[0-9a-f]{64}")
_INFINITIES = {math.inf: "Infinity", -math.inf: "-Infinity"}
"""How a scheduler's infinite options are written, which JSON has no numbers for: ``lambda_min_clipped`` is one."""


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text, with ``digest``: SHA-256 over its own content, so that damage shows.

    Raises :class:`BundleError` where it would be larger than anybody reads.
    """
    data = _encode(manifest)
    data["digest"] = content_digest(data)
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n"
    if (size := len(text.encode())) > MOST_BYTES:
        raise BundleError(f"{MANIFEST_FILE} would hold {size} bytes, of at most {MOST_BYTES}; leave out some plans")
    return text


def parse_manifest(text: str | bytes) -> Manifest:
    """A manifest from JSON text. Raises :class:`BundleError` for anything that is not one this version reads."""
    if len(text) > MOST_BYTES:
        raise BundleError(f"{MANIFEST_FILE} holds more than {MOST_BYTES} bytes, which no manifest does")
    try:
        data = parse_json(text)
    except ValueError as error:
        raise BundleError(f"{MANIFEST_FILE} is not JSON ({error}); the bundle is damaged: export it again") from None
    if not isinstance(data, dict):
        raise BundleError(f"{MANIFEST_FILE} holds {type(data).__name__}, not an object; export the bundle again")
    version = data.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise BundleError(f"{MANIFEST_FILE} has no schema_version: this is not a tgate bundle")
    if version != SCHEMA_VERSION:
        newer = version > SCHEMA_VERSION
        advice = "update tgate-engine" if newer else "export it again with tgate-export, from the same checkpoint"
        raise BundleError(
            f"the bundle has schema version {version}, this tgate-engine reads version {SCHEMA_VERSION}; {advice}"
        )
    digest = data.pop("digest", None)
    if digest != content_digest(data):
        raise BundleError(f"{MANIFEST_FILE} does not match its own digest; the bundle was damaged or edited by hand")
    try:
        return Reader(data, MANIFEST_FILE).all_of(_manifest)
    except BundleError:
        raise
    except TgateError as error:
        raise BundleError(f"{MANIFEST_FILE}: {error}") from None


def content_digest(data: Mapping[str, Any]) -> str:
    """The digest of a manifest's JSON object, its ``digest`` left out: SHA-256, in hex, of it in canonical form.

    Raises :class:`UnicodeEncodeError` for half a surrogate pair, which JSON can spell and nothing can write.
    """
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def bundle_digest(manifest: Manifest) -> str:
    """What a bundle is known by: :func:`content_digest` of its manifest without plans and adapters, which are added to
    a bundle that stays the same."""
    kept = {adapter.file for adapter in manifest.adapters.values()}
    files = {name: digest for name, digest in manifest.files.items() if name not in kept}
    data = _encode(replace(manifest, adapters={}, files=files))
    del data["plans"]
    return content_digest(data)


def _encode(value: Any) -> Any:
    """Dataclasses to objects, in the order of their fields; plans write themselves."""
    if isinstance(value, Plan):
        return value.to_json()
    if isinstance(value, Manifest):
        data = _fields(replace(value, scheduler=_spelt(value.scheduler, _INFINITIES)))
        if not value.adapters:  # as before there were any
            del data["adapters"]
        return data
    if hasattr(value, "__dataclass_fields__"):
        return _fields(value)
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}


def _spelt(config: Mapping[str, Any], words: Mapping[Any, Any]) -> dict[str, Any]:
    """A scheduler's configuration with some of its values written in another way."""
    return {key: words.get(value, value) if isinstance(value, (float, str)) else value for key, value in config.items()}


def _dtype(r: Reader, key: str) -> str:
    return r.choice(key, tuple(DTYPES))


def _dims(r: Reader, key: str) -> tuple[Dim, ...]:
    dims = r.get(key, list)
    for place, dim in enumerate(dims):
        fixed = isinstance(dim, int) and not isinstance(dim, bool) and dim >= 1
        if not fixed and not (dim == BATCH and place == 0):
            raise BundleError(f"{r.where}.{key}: {dim!r:.60} is neither a size nor, in the first place, {BATCH!r}")
    return tuple(dims)


def _range(r: Reader, key: str) -> tuple[int, int]:
    batch = r.whole_tuple(key, _MOST_SIZE)
    if len(batch) != 2 or batch[0] > batch[1]:
        raise BundleError(f"{r.where}.{key}: expected [least, most], got {list(batch)!r:.60}")
    return batch[0], batch[1]


def _tensor(r: Reader) -> TensorSpec:
    return TensorSpec(name=r.word("name"), dtype=_dtype(r, "dtype"), shape=_dims(r, "shape"))


def _tensors(r: Reader, key: str, most_images: int) -> tuple[TensorSpec, ...]:
    """Inputs or outputs, of which no two have one name, and none is beyond every memory."""
    tensors = r.items(key, _tensor, _MOST_TENSORS)
    unique((tensor.name for tensor in tensors), f"{r.where}.{key}")
    for tensor in tensors:
        if len(tensor.shape) > _MOST_RANK or tensor.size_bytes(most_images) > _MOST_TENSOR_BYTES:
            raise BundleError(
                f"{r.where}.{key}: {tensor.name} has shape {list(tensor.shape)!r:.60} for {most_images} images; at "
                f"most {_MOST_RANK} dimensions and {_MOST_TENSOR_BYTES} bytes are wanted"
            )
    return tensors


def _macs(r: Reader) -> Macs:
    return Macs(paper=r.whole("paper"), all=r.whole("all"))


def _graph(r: Reader) -> GraphSpec:
    batch = _range(r, "batch")
    return GraphSpec(
        file=r.name("file"),
        role=r.choice("role", ROLES),
        batch=batch,
        inputs=_tensors(r, "inputs", batch[1]),
        outputs=_tensors(r, "outputs", batch[1]),
        macs=r.inner("macs").all_of(_macs),
        scratch_bytes=r.whole("scratch_bytes"),
    )


def _shape(r: Reader) -> Shape:
    rows = Reader(r.named("constants"), f"{r.where}.constants")
    latents = r.whole_tuple("latents", _MOST_SIZE)
    if len(latents) > _MOST_RANK or 4 * math.prod(latents) > _MOST_TENSOR_BYTES:
        raise BundleError(f"{r.where}.latents: expected at most {_MOST_TENSOR_BYTES} bytes, got {latents!r:.60}")
    return Shape(
        width=r.whole("width", 1, _MOST_SIZE),
        height=r.whole("height", 1, _MOST_SIZE),
        batch=_range(r, "batch"),
        latents=latents,
        constants={name: tuple(rows.finite(name, v) for v in rows.get(name, list)) for name in rows.data},
        graphs=r.table("graphs", _graph, _MOST_TENSORS),
    )


def _conditioning(r: Reader) -> Conditioning:
    return Conditioning(
        name=r.word("name"), source=r.choice("source", SOURCES), negative=r.choice("negative", NEGATIVES)
    )


def _tokenizer(r: Reader) -> Tokenizer:
    return Tokenizer(
        file=r.name("file"),
        input=r.word("input"),
        length=r.whole("length", 2, _MOST_ROWS),
        pad_id=r.whole("pad_id"),
    )


def _digest(r: Reader) -> FileDigest:
    sha256 = r.text("sha256")
    if not _SHA256.fullmatch(sha256):
        raise BundleError(f"{r.where}.sha256: expected 64 hexadecimal digits, got {sha256!r:.60}")
    return FileDigest(sha256=sha256, bytes=r.whole("bytes"))


def _scheduler(r: Reader) -> Mapping[str, Any]:
    """An object of whatever JSON holds, no deeper than :data:`_MOST_DEPTH`."""
    config = r.get("scheduler", dict)
    if is_nested(config, _MOST_DEPTH):
        raise BundleError(f"{r.where}.scheduler: expected an object that is nested at most {_MOST_DEPTH} deep")
    return _spelt(config, {word: number for number, word in _INFINITIES.items()})


def _adapter(r: Reader) -> Adapter:
    return Adapter(file=r.name("file"), layers=r.whole("layers", 1), rank=r.whole("rank", 1))


def _golden(r: Reader) -> Golden:
    return Golden(
        file=r.name("file"),
        size=r.word("size"),
        tolerance=r.number("tolerance"),
        graph=r.word("graph") if r.text("graph") else "",
        plan=None if r.get("plan", (dict, type(None))) is None else r.inner("plan").all_of(Plan.read),
        oracle=r.text("oracle"),
    )


def _manifest(r: Reader) -> Manifest:
    files = r.table("files", _digest, _MOST_FILES)
    for name in files:
        check_name(name)
    shapes = r.items("shapes", _shape, _MOST_SHAPES)
    if not shapes:
        raise BundleError(f"{r.where}.shapes: expected at least one; export the bundle again")
    conditioning, tokenizers = r.items("conditioning", _conditioning), r.items("tokenizers", _tokenizer)
    unique((tensor.name for tensor in conditioning), f"{r.where}.conditioning")
    carries = r.inner("carries")
    unique((tokenizer.input for tokenizer in tokenizers), f"{r.where}.tokenizers")
    manifest = Manifest(
        schema_version=r.whole("schema_version"),
        model=r.text("model"),
        family=r.text("family"),
        licence=r.text("licence"),
        dtype=_dtype(r, "dtype"),
        frames=r.whole("frames", 1, _MOST_SIZE),
        fps=r.whole("fps", 0, _MOST_SIZE),
        guidance=r.choice("guidance", GUIDANCE),
        guidance_scale=r.number("guidance_scale", 0, MOST_GUIDANCE),
        guidance_rescale=r.number("guidance_rescale", 0, 1),
        clip_skip=r.whole("clip_skip"),
        zero_negative=r.flag("zero_negative"),
        weights=r.name("weights") if r.text("weights") else "",
        samplers=r.name("samplers") if r.text("samplers") else "",
        shapes=shapes,
        carries={name: check_facts(carries.get(name, dict)) for name in r.named("carries")},
        conditioning=conditioning,
        tokenizers=tokenizers,
        plans=r.table("plans", Plan.read, _MOST_PLANS),
        goldens=r.table("goldens", _golden, _MOST_PLANS),
        files=files,
        scheduler=_scheduler(r),
        tools=r.strings("tools"),
        adapters=r.table("adapters", _adapter, _MOST_ADAPTERS) if "adapters" in r.data else {},
    )
    if not manifest.takes_scale(manifest.guidance_scale):
        raise BundleError(
            f"{r.where}.guidance_scale: a bundle with guidance has a scale above 1, one without has none above; got "
            f"{manifest.guidance_scale}; {r.advice}"
        )
    return manifest
