"""The facts about a bundle, readable without loading a model: plain frozen dataclasses.

:mod:`tgate_engine.manifest_json` writes and reads them; ``docs/manifest.schema.json`` is the published form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tgate_engine.errors import BundleError
from tgate_engine.graph import GraphSpec, Role
from tgate_engine.plan import Plan
from tgate_engine.sampler import Fact

SCHEMA_VERSION = 3
MANIFEST_FILE = "manifest.json"

Guidance = Literal["classifier-free", "embedded", "none"]
GUIDANCE: tuple[Guidance, ...] = get_args(Guidance)
SOURCES = ("text", "image", "constant", "reference", "scale", "masked")
NEGATIVES = ("own", "same", "zeros")


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
    output of the text graph (``source = "text"``), of the image graph (``"image"``) or a row of numbers that each
    shape holds among its ``constants`` (``"constant"``). ``negative`` says what the negative half takes: the negative
    prompt's ``"own"`` value, the ``"same"`` as the positive half (as constants always do), or ``"zeros"``.

    With an IP-Adapter, what a picture beside the prompt adds: outputs of the reference graph, ``<name>.<half>``
    (``"reference"``), and how much of it is added, a number of the request's [1] (``"scale"``). Both are 0 in a request
    without such a picture.

    Of an inpainting model, what lies around the mask (``"masked"``), [1 + C, h, w] beside latents [C, h, w]: the mask,
    1 where a picture is drawn anew, and then the latents of what is left of it.
    """

    name: str
    source: str
    negative: str = "own"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA that requests may name, kept beside the weights that it changes; see :mod:`tgate_engine.adapter`.

    ``file``: of the bundle. ``layers``: how many it changes. ``rank``: the largest of any of them.
    """

    file: str
    layers: int
    rank: int


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Inputs and eager PyTorch's outputs, in ``file`` (safetensors).

    ``plan`` is walked from tensor ``latents.0`` and must give ``latents.<i+1>`` after step i; with no plan,
    graph ``graph`` is run once on ``input.*`` and must give ``output.*``. Both on the graphs of ``size``.
    ``tolerance`` bounds the largest absolute difference over the largest absolute value. ``oracle``: who recorded it,
    for people to read.
    """

    file: str
    size: str
    tolerance: float
    graph: str = ""
    plan: Plan | None = None
    oracle: str = ""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What was exported for one size of pictures and one range of batches: graphs of that shape, over the bundle's
    one copy of the weights.

    ``width``, ``height``: pixels. ``batch``: least and largest number of images (or videos) in one denoising call.
    ``latents``: the shape of one image's latents, [C, h, w]; of one video's, [F, C, h, w] or [C, F, h, w].
    ``constants``: the rows of conditioning whose source is ``"constant"``. ``graphs``: by the names that plans use.
    """

    width: int
    height: int
    batch: tuple[int, int]
    latents: tuple[int, ...]
    constants: Mapping[str, tuple[float, ...]]
    graphs: Mapping[str, GraphSpec]

    @property
    def size(self) -> str:
        """``"<width>x<height>"``, which requests name."""
        return f"{self.width}x{self.height}"

    def graph(self, role: Role) -> GraphSpec | None:
        """The one graph of a role other than ``"denoise"``; None where the export left it out."""
        return next((spec for spec in self.graphs.values() if spec.role == role), None)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything about a bundle except its tensors. Immutable; one per bundle.

    ``frames``: pictures of one result, 1 unless it is a video; ``fps``: how many a second, 0 for no video.
    ``guidance``: ``"classifier-free"`` (the denoising graphs hold both halves), ``"embedded"`` (one half, the scale
    is an input of the network) or ``"none"``.
    ``guidance_rescale``, ``clip_skip``: what the graphs do beside guiding and encoding (0: nothing), for people.
    ``zero_negative``: a request without a negative prompt uses zeros in place of its text (SDXL's convention).
    ``weights``: the weight file, empty without weights. ``samplers``: the file of compiled samplers
    (:mod:`tgate_engine.sampler_tables`), empty where there is none.
    ``shapes``: at least one; the first one's size is the default. ``carries``: facts for people on each tensor that
    one step writes and a later one reads, by its name in the graphs. ``adapters``: by the names that requests use.
    """

    model: str
    family: str
    licence: str
    dtype: str
    frames: int
    fps: int
    guidance: Guidance
    guidance_scale: float
    guidance_rescale: float
    clip_skip: int
    zero_negative: bool
    weights: str
    samplers: str
    shapes: tuple[Shape, ...]
    carries: Mapping[str, Mapping[str, Fact]]
    conditioning: tuple[Conditioning, ...]
    tokenizers: tuple[Tokenizer, ...]
    plans: Mapping[str, Plan]
    goldens: Mapping[str, Golden]
    files: Mapping[str, FileDigest]
    scheduler: Mapping[str, Any]
    tools: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

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

    def takes_scale(self, scale: float) -> bool:
        """Whether the graphs go by such a guidance scale: those of both halves by one above 1, those of one half by
        none."""
        return self.guidance == "embedded" or (scale > 1) == self.guided

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes there are, each once, the default first."""
        return tuple(dict.fromkeys(shape.size for shape in self.shapes))

    def shapes_of(self, size: str | None = None) -> tuple[Shape, ...]:
        """The shapes of a size, None being the default, smallest batches first. Raises :class:`BundleError` listing
        the sizes there are."""
        chosen = self.sizes[0] if size is None else size
        shapes = [shape for shape in self.shapes if shape.size == chosen]
        if not shapes:
            raise BundleError(
                f"the bundle has no size {size}; it has {', '.join(self.sizes)}. Export it again with --size {size} as "
                "well."
            )
        return tuple(sorted(shapes, key=lambda shape: shape.batch))

    def graph(self, role: Role, size: str | None = None) -> GraphSpec | None:
        """The graph of a role other than ``"denoise"``, at a size; None where the export left it out."""
        return self.shapes_of(size)[0].graph(role)

    @property
    def inpaints(self) -> bool:
        """Whether it draws within the mask of a picture, which every request then has."""
        return bool(self.conditioned_by("masked"))

    def conditioned_by(self, source: str) -> tuple[str, ...]:
        """The conditioning tensors of that source."""
        return tuple(c.name for c in self.conditioning if c.source == source)
