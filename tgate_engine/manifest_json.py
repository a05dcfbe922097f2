"""A manifest as JSON. Reading is distrustful: every field is checked for its type, and every file name must be a
plain name inside the bundle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
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
    Conditioning,
    FileDigest,
    Golden,
    Manifest,
    Shape,
    Tokenizer,
)
from tgate_engine.plan import Plan
from tgate_engine.reader import Reader, check_name
from tgate_engine.sampler import Fact, check_facts


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text, with ``digest``: SHA-256 over its own content, so that damage shows."""
    data = _encode(manifest)
    data["digest"] = content_digest(data)
    return json.dumps(data, separators=(",", ":"), ensure_ascii=False) + "\n"


def parse_manifest(text: str | bytes) -> Manifest:
    """A manifest from JSON text. Raises :class:`BundleError` for anything that is not one this version reads."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
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
        return _manifest(Reader(data, MANIFEST_FILE))
    except BundleError:
        raise
    except TgateError as error:
        raise BundleError(f"{MANIFEST_FILE}: {error}") from None


def content_digest(data: Mapping[str, Any]) -> str:
    """The digest of a manifest's JSON object, its ``digest`` left out: SHA-256, in hex, of it in canonical form."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _encode(value: Any) -> Any:
    """Dataclasses to objects, in the order of their fields; plans write themselves."""
    if isinstance(value, Plan):
        return value.to_json()
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


def _dtype(r: Reader, key: str) -> str:
    return r.choice(key, tuple(DTYPES))


def _dims(r: Reader, key: str) -> tuple[Dim, ...]:
    dims = r.get(key, list)
    for place, dim in enumerate(dims):
        fixed = isinstance(dim, int) and not isinstance(dim, bool) and dim >= 1
        if not fixed and not (dim == BATCH and place == 0):
            raise BundleError(f"{r.where}.{key}: {dim!r} is neither a size nor, in the first place, {BATCH!r}")
    return tuple(dims)


def _range(r: Reader, key: str) -> tuple[int, int]:
    batch = r.whole_tuple(key)
    if len(batch) != 2 or batch[0] > batch[1]:
        raise BundleError(f"{r.where}.{key}: expected [least, most], got {list(batch)}")
    return batch[0], batch[1]


def _tensor(r: Reader) -> TensorSpec:
    return TensorSpec(name=r.text("name"), dtype=_dtype(r, "dtype"), shape=_dims(r, "shape"))


def _macs(r: Reader) -> Macs:
    return Macs(paper=r.whole("paper"), all=r.whole("all"))


def _graph(r: Reader) -> GraphSpec:
    return GraphSpec(
        file=r.name("file"),
        role=r.choice("role", ROLES),
        batch=_range(r, "batch"),
        inputs=r.items("inputs", _tensor),
        outputs=r.items("outputs", _tensor),
        macs=_macs(Reader(r.get("macs", dict), f"{r.where}.macs")),
        scratch_bytes=r.whole("scratch_bytes"),
    )


def _shape(r: Reader) -> Shape:
    rows = Reader(r.get("constants", dict), f"{r.where}.constants")
    return Shape(
        width=r.whole("width", 1),
        height=r.whole("height", 1),
        batch=_range(r, "batch"),
        latents=r.whole_tuple("latents"),
        constants={name: tuple(rows.finite(name, v) for v in rows.get(name, list)) for name in rows.data},
        graphs=r.table("graphs", _graph),
    )


def _carry(r: Reader) -> Mapping[str, Fact]:
    return check_facts(r.data)


def _conditioning(r: Reader) -> Conditioning:
    return Conditioning(
        name=r.text("name"), source=r.choice("source", SOURCES), negative=r.choice("negative", NEGATIVES)
    )


def _tokenizer(r: Reader) -> Tokenizer:
    return Tokenizer(file=r.name("file"), input=r.text("input"), length=r.whole("length", 2), pad_id=r.whole("pad_id"))


def _digest(r: Reader) -> FileDigest:
    return FileDigest(sha256=r.text("sha256"), bytes=r.whole("bytes"))


def _golden(r: Reader) -> Golden:
    plan = r.get("plan", (dict, type(None)))
    return Golden(
        file=r.name("file"),
        size=r.text("size"),
        tolerance=r.number("tolerance"),
        graph=r.text("graph"),
        plan=None if plan is None else Plan.from_json(plan),
        oracle=r.text("oracle"),
    )


def _manifest(r: Reader) -> Manifest:
    files = r.table("files", _digest)
    for name in files:
        check_name(name)
    shapes = r.items("shapes", _shape)
    if not shapes:
        raise BundleError(f"{r.where}.shapes: expected at least one; export the bundle again")
    return Manifest(
        schema_version=r.whole("schema_version"),
        model=r.text("model"),
        family=r.text("family"),
        licence=r.text("licence"),
        dtype=_dtype(r, "dtype"),
        frames=r.whole("frames", 1),
        fps=r.whole("fps"),
        guidance=r.choice("guidance", GUIDANCE),
        guidance_scale=r.number("guidance_scale"),
        guidance_rescale=r.number("guidance_rescale"),
        clip_skip=r.whole("clip_skip"),
        zero_negative=r.flag("zero_negative"),
        weights=r.name("weights") if r.text("weights") else "",
        samplers=r.name("samplers") if r.text("samplers") else "",
        shapes=shapes,
        carries=r.table("carries", _carry),
        conditioning=r.items("conditioning", _conditioning),
        tokenizers=r.items("tokenizers", _tokenizer),
        plans=r.table("plans", lambda p: Plan.from_json(p.data)),
        goldens=r.table("goldens", _golden),
        files=files,
        scheduler=r.get("scheduler", dict),
        tools=r.strings("tools"),
    )
