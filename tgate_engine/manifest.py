"""The facts about a bundle, readable without loading a model.

Plain frozen dataclasses and their JSON. Reading is distrustful: every field is checked for its type, and
every file name must be a plain name inside the bundle. ``docs/manifest.schema.json`` is the published form.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args

from tgate_engine.errors import BundleError, TgateError
from tgate_engine.plan import Plan

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
DTYPES = ("float32", "float16", "bfloat16", "int64", "uint8")

Dim = int | str
"""A fixed size, ``"batch"`` (B) or a multiple of it: ``"2*batch"`` (both halves of guidance), ``"50*batch"`` (both
halves of 25 frames)."""

Guidance = Literal["classifier-free", "embedded", "none"]
GUIDANCE: tuple[Guidance, ...] = get_args(Guidance)
SOURCES = ("text", "image", "constant")
NEGATIVES = ("own", "same", "zeros")

T = TypeVar("T")
L = TypeVar("L", bound=str)

_MULTIPLE = re.compile(r"(?:([1-9]\d*)\*)?batch")
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def resolve(shape: Sequence[Dim], batch: int) -> tuple[int, ...]:
    """The sizes of ``shape`` for a batch of ``batch`` images."""
    return tuple(multiple(dim) * batch if isinstance(dim, str) else dim for dim in shape)


def multiple(dim: str) -> int:
    """How many times the batch ``"batch"`` or ``"<n>*batch"`` is. Raises :class:`BundleError` for anything else."""
    found = _MULTIPLE.fullmatch(dim)
    if found is None:
        raise BundleError(f"{dim!r} is neither 'batch' nor a multiple such as '2*batch'")
    return int(found[1] or 1)


def batches(count: int) -> str:
    """The dimension that is ``count`` times the batch."""
    return "batch" if count == 1 else f"{count}*batch"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph: its name there, its dtype (NumPy's name) and its shape."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-accumulates. ``paper`` counts linear and convolution layers, as the paper's tool does;
    ``all`` adds the two attention products."""

    paper: int
    all: int


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One exported computation. ``macs`` are for a batch of one image (both halves where it is guided), and so is
    ``scratch_bytes``, the most that its inner values hold at once; 0 in bundles that do not say."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: Macs
    scratch_bytes: int = 0

    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)

    def batch_of(self, shapes: Mapping[str, Sequence[int]]) -> int:
        """How many images inputs of those shapes are for; 1 where none of them says so."""
        for tensor in self.inputs:
            for dim, size in zip(tensor.shape, shapes[tensor.name], strict=True):
                if dim == "batch":
                    return size
        return 1


@dataclass(frozen=True, kw_only=True)
class Carry:
    """A cached attention output that one step writes and a later one reads.

    ``attention``: ``"self"`` or ``"cross"``. ``mean``: the mean of both halves of guidance (batch B) rather
    than both halves (batch 2B). ``module``: the attention module's qualified name in the checkpoint's denoiser.
    """

    name: str
    module: str
    attention: str
    mean: bool
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True, kw_only=True)
class FileDigest:
    """SHA-256 (hex) and size of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A ``tokenizers`` JSON file and the text graph's input it feeds.

    Ids are cut at ``length`` tokens, start and end included, and filled up with ``pad_id``.
    """

    file: str
    input: str
    length: int
    pad_id: int


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """One tensor that conditions the denoiser, per half of guidance.

    The denoising graphs take it as ``<name>.negative`` and ``<name>.positive``, each of batch B. It is an
    output of the text graph (``source = "text"``), of the image graph (``"image"``) or the constant row ``value``
    (``"constant"``). ``negative`` says what the negative half takes: the negative prompt's ``"own"`` value, the
    ``"same"`` as the positive half (as constants always do), or ``"zeros"``.
    """

    name: str
    source: str
    value: tuple[float, ...] = ()
    negative: str = "own"


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs and eager PyTorch's outputs, in ``file`` (safetensors).

    ``plan`` is walked from tensor ``latents.0`` and must give ``latents.<i+1>`` after step i; with no plan,
    graph ``graph`` is run once on ``input.*`` and must give ``output.*``. ``tolerance`` bounds the largest
    absolute difference over the largest absolute value. ``oracle``: who recorded it, for people to read.
    """

    file: str
    tolerance: float
    graph: str = ""
    plan: Plan | None = None
    oracle: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a bundle except its tensors. Immutable; one per bundle.

    ``latents``: the shape of one image's latents, [C, h, w]; of one video's, [F, C, h, w] or [C, F, h, w].
    ``frames``: pictures of one result, 1 unless it is a video; ``fps``: how many a second, 0 for no video.
    ``batch``: least and largest number of images (or videos) in one run.
    ``guidance``: ``"classifier-free"`` (the denoising graphs hold both halves), ``"embedded"`` (one half, the scale
    is an input of the network) or ``"none"``.
    ``guidance_rescale``, ``clip_skip``: what the graphs do beside guiding and encoding (0: nothing), for people.
    ``zero_negative``: a request without a negative prompt uses zeros in place of its text (SDXL's convention).
    ``weights``, ``text``, ``image``, ``decoder``: the weight file and the names of graphs; empty where the export
    left them out.
    """

    model: str
    family: str
    licence: str
    dtype: str
    height: int
    width: int
    latents: tuple[int, ...]
    batch: tuple[int, int]
    frames: int
    fps: int
    guidance: Guidance
    guidance_scale: float
    zero_negative: bool
    weights: str
    text: str
    image: str
    decoder: str
    graphs: Mapping[str, GraphSpec]
    carries: tuple[Carry, ...]
    conditioning: tuple[Conditioning, ...]
    tokenizers: tuple[Tokenizer, ...]
    plans: Mapping[str, Plan]
    goldens: Mapping[str, Golden]
    files: Mapping[str, FileDigest]
    scheduler: Mapping[str, Any]
    tools: Mapping[str, str] = field(default_factory=dict)
    guidance_rescale: float = 0.0
    clip_skip: int = 0
    schema_version: int = SCHEMA_VERSION

    def plan(self, name: str) -> Plan:
        """The plan of that name. Raises :class:`BundleError` listing the names there are."""
        try:
            return self.plans[name]
        except KeyError:
            have = ", ".join(sorted(self.plans))
            raise BundleError(f"the bundle has no plan {name!r}; it has {have}. Add one with `tgate plan`.") from None

    @property
    def guided(self) -> bool:
        """Whether the denoising graphs hold both halves of classifier-free guidance."""
        return self.guidance == "classifier-free"

    def conditioned_by(self, source: str) -> tuple[str, ...]:
        """The conditioning tensors of that source."""
        return tuple(c.name for c in self.conditioning if c.source == source)

    def carry_specs(self) -> dict[str, Carry]:
        return {carry.name: carry for carry in self.carries}


# --- JSON ---------------------------------------------------------------------------------------


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON text, with ``digest``: SHA-256 over its own content, so that damage shows."""
    data = _encode(manifest)
    data["digest"] = _content_digest(data)
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
        advice = "update tgate-engine" if version > SCHEMA_VERSION else "export the bundle again"
        raise BundleError(
            f"the bundle has schema version {version}, this tgate-engine reads version {SCHEMA_VERSION}; {advice}"
        )
    digest = data.pop("digest", None)
    if digest != _content_digest(data):
        raise BundleError(f"{MANIFEST_FILE} does not match its own digest; the bundle was damaged or edited by hand")
    try:
        return _manifest(_Reader(data, MANIFEST_FILE))
    except BundleError:
        raise
    except TgateError as error:
        raise BundleError(f"{MANIFEST_FILE}: {error}") from None


def check_name(name: str) -> str:
    """``name`` if it is a plain relative name inside a bundle, such as ``tokenizer/0.json``; else BundleError."""
    if not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
        raise BundleError(f"file name {name!r} is not a plain name inside the bundle; the bundle is not trustworthy")
    return name


def _content_digest(data: Mapping[str, Any]) -> str:
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()


def _encode(value: Any) -> Any:
    """Dataclasses to objects, in the order of their fields; Plan and Sampler write themselves."""
    if isinstance(value, Plan):
        return value.to_json()
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


class _Reader:
    """Typed access to a JSON object; every error says where it is, what was got and what was wanted."""

    def __init__(self, data: Any, where: str) -> None:
        if not isinstance(data, dict):
            raise BundleError(f"{where}: expected an object, got {type(data).__name__}; export the bundle again")
        self.data: dict[str, Any] = data
        self.where = where

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        if key not in self.data:
            raise BundleError(f"{self.where}: {key!r} is missing; export the bundle again")
        value = self.data[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(k.__name__ for k in kinds)
            raise BundleError(f"{self.where}.{key}: expected {wanted}, got {value!r:.60}; export the bundle again")
        return value

    def text(self, key: str) -> str:
        return str(self.get(key, str))

    def whole(self, key: str, least: int = 0) -> int:
        value = int(self.get(key, int))
        if value < least:
            raise BundleError(f"{self.where}.{key}: expected at least {least}, got {value}; export the bundle again")
        return value

    def number(self, key: str) -> float:
        return self.finite(key, self.get(key, (int, float)))

    def finite(self, key: str, value: Any) -> float:
        """``value`` as a float. JSON has no NaN, but Python reads it, and 1e999 as infinity."""
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if isinstance(value, (bool, str)) or not math.isfinite(number):
            raise BundleError(f"{self.where}.{key}: expected a finite number, got {value!r:.60}")
        return number

    def flag(self, key: str) -> bool:
        return bool(self.get(key, bool))

    def name(self, key: str) -> str:
        return check_name(self.text(key))

    def choice(self, key: str, choices: Sequence[L]) -> L:
        value = self.text(key)
        for choice in choices:
            if value == choice:
                return choice
        raise BundleError(f"{self.where}.{key}: expected one of {', '.join(choices)}, got {value!r:.60}")

    def whole_tuple(self, key: str) -> tuple[int, ...]:
        values = self.get(key, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 1 for v in values):
            raise BundleError(f"{self.where}.{key}: expected positive whole numbers, got {values!r:.60}")
        return tuple(values)

    def strings(self, key: str) -> dict[str, str]:
        values = self.get(key, dict)
        if not all(isinstance(v, str) for v in values.values()):
            raise BundleError(f"{self.where}.{key}: expected text values, got {values!r:.60}")
        return dict(values)

    def items(self, key: str, build: Callable[[_Reader], T]) -> tuple[T, ...]:
        return tuple(build(_Reader(v, f"{self.where}.{key}[{i}]")) for i, v in enumerate(self.get(key, list)))

    def table(self, key: str, build: Callable[[_Reader], T]) -> dict[str, T]:
        return {k: build(_Reader(v, f"{self.where}.{key}.{k}")) for k, v in self.get(key, dict).items()}

    def dtype(self, key: str) -> str:
        value = self.text(key)
        if value not in DTYPES:
            raise BundleError(f"{self.where}.{key}: expected one of {', '.join(DTYPES)}, got {value!r}")
        return value

    def shape(self, key: str) -> tuple[Dim, ...]:
        dims = self.get(key, list)
        for dim in dims:
            fixed = isinstance(dim, int) and not isinstance(dim, bool) and dim >= 1
            if not fixed and not (isinstance(dim, str) and _MULTIPLE.fullmatch(dim)):
                raise BundleError(f"{self.where}.{key}: {dim!r} is neither a size, 'batch' nor a multiple of it")
        return tuple(dims)


def _tensor(r: _Reader) -> TensorSpec:
    return TensorSpec(name=r.text("name"), dtype=r.dtype("dtype"), shape=r.shape("shape"))


def _macs(r: _Reader) -> Macs:
    return Macs(paper=r.whole("paper"), all=r.whole("all"))


def _graph(r: _Reader) -> GraphSpec:
    return GraphSpec(
        file=r.name("file"),
        inputs=r.items("inputs", _tensor),
        outputs=r.items("outputs", _tensor),
        macs=_macs(_Reader(r.get("macs", dict), f"{r.where}.macs")),
        scratch_bytes=r.whole("scratch_bytes") if "scratch_bytes" in r.data else 0,
    )


def _carry(r: _Reader) -> Carry:
    return Carry(
        name=r.text("name"),
        module=r.text("module"),
        attention=r.choice("attention", ("self", "cross")),
        mean=r.flag("mean"),
        dtype=r.dtype("dtype"),
        shape=r.shape("shape"),
    )


def _conditioning(r: _Reader) -> Conditioning:
    value = r.get("value", list)
    return Conditioning(
        name=r.text("name"),
        source=r.choice("source", SOURCES),
        value=tuple(r.finite("value", v) for v in value),
        negative=r.choice("negative", NEGATIVES),
    )


def _tokenizer(r: _Reader) -> Tokenizer:
    return Tokenizer(file=r.name("file"), input=r.text("input"), length=r.whole("length", 2), pad_id=r.whole("pad_id"))


def _digest(r: _Reader) -> FileDigest:
    return FileDigest(sha256=r.text("sha256"), bytes=r.whole("bytes"))


def _golden(r: _Reader) -> Golden:
    plan = r.get("plan", (dict, type(None)))
    return Golden(
        file=r.name("file"),
        tolerance=r.number("tolerance"),
        graph=r.text("graph"),
        plan=None if plan is None else Plan.from_json(plan),
        oracle=r.text("oracle") if "oracle" in r.data else "",
    )


def _manifest(r: _Reader) -> Manifest:
    batch = r.whole_tuple("batch")
    if len(batch) != 2 or batch[0] > batch[1]:
        raise BundleError(f"{r.where}.batch: expected [least, most], got {list(batch)}")
    files = r.table("files", _digest)
    for name in files:
        check_name(name)
    return Manifest(
        schema_version=r.whole("schema_version"),
        model=r.text("model"),
        family=r.text("family"),
        licence=r.text("licence"),
        dtype=r.dtype("dtype"),
        height=r.whole("height", 1),
        width=r.whole("width", 1),
        latents=r.whole_tuple("latents"),
        batch=(batch[0], batch[1]),
        frames=r.whole("frames", 1),
        fps=r.whole("fps"),
        guidance=r.choice("guidance", GUIDANCE),
        guidance_scale=r.number("guidance_scale"),
        zero_negative=r.flag("zero_negative"),
        weights=r.name("weights") if r.text("weights") else "",
        text=r.text("text"),
        image=r.text("image"),
        decoder=r.text("decoder"),
        graphs=r.table("graphs", _graph),
        carries=r.items("carries", _carry),
        conditioning=r.items("conditioning", _conditioning),
        tokenizers=r.items("tokenizers", _tokenizer),
        plans=r.table("plans", lambda p: Plan.from_json(p.data)),
        goldens=r.table("goldens", _golden),
        files=files,
        scheduler=r.get("scheduler", dict),
        tools=r.strings("tools"),
        guidance_rescale=r.number("guidance_rescale") if "guidance_rescale" in r.data else 0.0,
        clip_skip=r.whole("clip_skip") if "clip_skip" in r.data else 0,
    )
