"""Whether a bundle's graphs take and give what this runtime feeds and reads: asked once, when it is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tgate_engine.conditioning import half_names
from tgate_engine.control import is_control, nets_in, scale_name
from tgate_engine.errors import BundleError
from tgate_engine.graph import (
    BATCH,
    CONTROL,
    DECODE,
    DENOISE,
    ENCODE,
    IMAGE,
    PREVIEW,
    REFERENCE,
    TEXT,
    Dim,
    GraphSpec,
    Role,
    TensorSpec,
)
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.step import HALVES, LATENTS, STEP, STEP_INPUTS, STEP_OUTPUTS, STEP_ROW, half

TOKENS, PICTURE, PICTURE_NOISE, FINAL_LATENTS, PIXELS = "ids", "picture", "noise", "latents", "image"
DEVIATION, MASK = "deviation", "mask"
"""Names of what the graphs around the denoiser take and give: ``ids.<i>`` for tokenizer i, and so on."""


def check_signatures(manifest: Manifest, graphs: Mapping[str, GraphSpec]) -> None:
    """Raises :class:`BundleError` for the first of ``graphs`` with an input that nothing feeds, or without an
    output that is needed, or with a tensor of the trajectory in another form than the others have it: all denoising
    graphs of a shape, and the ControlNets beside them, work on the same buffers."""
    halves = HALVES if manifest.guided else HALVES[1:]
    masks = (MASK,) if manifest.inpaints else ()
    feeds: dict[Role, set[str]] = {
        DENOISE: {*STEP_INPUTS, *half_names(manifest.conditioning), *manifest.carries},
        TEXT: {t.input for t in manifest.tokenizers},
        IMAGE: {PICTURE, PICTURE_NOISE},
        DECODE: {FINAL_LATENTS},
        ENCODE: {PICTURE, *masks},
        PREVIEW: {FINAL_LATENTS},
        REFERENCE: {PICTURE},
        CONTROL: {LATENTS, STEP, *half_names(manifest.conditioning)},
    }
    needs: dict[Role, Iterable[str]] = {
        DENOISE: STEP_OUTPUTS,
        TEXT: manifest.conditioned_by("text"),
        IMAGE: manifest.conditioned_by("image"),
        DECODE: (PIXELS,),
        ENCODE: (LATENTS, DEVIATION),
        PREVIEW: (PIXELS,),
        REFERENCE: [half(n, which) for n in manifest.conditioned_by("reference") for which in halves],
        CONTROL: (),
    }
    by_image = (DENOISE, CONTROL)
    forms: dict[str, tuple[str, tuple[Dim, ...]]] = {}
    for name, spec in graphs.items():
        for tensor in (*spec.inputs, *spec.outputs) if spec.role in by_image else ():
            if forms.setdefault(tensor.name, (tensor.dtype, tensor.shape)) != (tensor.dtype, tensor.shape):
                raise BundleError(f"graph {name!r} has {tensor.name} in another form than a graph beside it has")
        known = feeds[spec.role]
        steered = spec.role in by_image  # what is of ControlNets, Bundle.open has seen
        if odd := [i for i in spec.input_names() if i not in known and not (steered and is_control(i))]:
            raise BundleError(f"graph {name!r} takes {', '.join(odd)}, which nothing feeds; export the bundle again")
        if missing := [o for o in needs[spec.role] if o not in spec.output_names()]:
            raise BundleError(f"graph {name!r} does not give {', '.join(missing)}; export the bundle again")
        if spec.role == ENCODE and masks and MASK not in spec.input_names():
            raise BundleError(f"graph {name!r} has no input {MASK}; export the bundle again")
        if spec.role == TEXT and (unfed := feeds[TEXT] - {*spec.input_names()}):
            raise BundleError(f"graph {name!r} has no input {', '.join(sorted(unfed))}; export the bundle again")


def check_forms(shape: Shape, graphs: Mapping[str, GraphSpec]) -> None:
    """Raises :class:`BundleError` for the first of a shape's ``graphs`` that is not for the shape's latents, pictures
    and batches, or lacks what is fed to every graph of its role: buffers are made by the graphs, and filled by the
    shape. Conditioning and carries are checked where they are given and read."""
    latents, picture = shape.latents, (shape.height, shape.width, 3)
    wanted: dict[Role, dict[str, tuple[str, tuple[Dim, ...]]]] = {
        DENOISE: {
            **dict.fromkeys((*STEP_INPUTS, *STEP_OUTPUTS), ("float32", (BATCH, *latents))),
            STEP: ("float32", (BATCH, STEP_ROW)),
            **{scale_name(net): ("float32", (BATCH,)) for net in nets_in(graphs)},
        },
        TEXT: {},
        IMAGE: {PICTURE: ("uint8", (1, *picture)), PICTURE_NOISE: ("float32", (1, 3, *picture[:2]))},
        DECODE: {FINAL_LATENTS: ("float32", (1, *latents))},
        ENCODE: {
            PICTURE: ("uint8", (1, *picture)),
            MASK: ("uint8", (1, *picture[:2])),
            **dict.fromkeys((LATENTS, DEVIATION), ("float32", (1, *latents))),
        },
        PREVIEW: {FINAL_LATENTS: ("float32", (1, *latents))},
        REFERENCE: {},
        CONTROL: {LATENTS: ("float32", (BATCH, *latents)), STEP: ("float32", (BATCH, STEP_ROW))},
    }
    always: dict[Role, tuple[str, ...]] = {
        DENOISE: (LATENTS, STEP),
        TEXT: (),
        IMAGE: (PICTURE,),
        DECODE: (FINAL_LATENTS,),
        ENCODE: (PICTURE,),
        PREVIEW: (FINAL_LATENTS,),
        REFERENCE: (PICTURE,),
        CONTROL: (),
    }
    for name, spec in graphs.items():
        if missing := [i for i in always[spec.role] if i not in spec.input_names()]:
            raise BundleError(f"graph {name!r} has no input {', '.join(missing)}; export the bundle again")
        if spec.role == DENOISE and not spec.batch[0] <= shape.batch[0] <= shape.batch[1] <= spec.batch[1]:
            raise BundleError(
                f"graph {name!r} is for {spec.batch[0]} to {spec.batch[1]} images, and its shape for {shape.batch[0]} "
                f"to {shape.batch[1]}; export the bundle again"
            )
        rows = spec.role in (DENOISE, CONTROL)
        for tensor in (*spec.inputs, *spec.outputs):
            if rows and tensor.shape[:1] != (BATCH,):
                raise BundleError(
                    f"graph {name!r} has {_shown(tensor)}, without a row for each image; export the bundle again"
                )
            own = tensor.shape if rows else tensor.resolve(1)
            dtype, form = wanted[spec.role].get(tensor.name, (tensor.dtype, own))
            if spec.role in (DECODE, PREVIEW) and tensor.name == PIXELS:  # a video's frames come before
                dtype, form = "uint8", (*(own[:-3] or (1,)), *picture)
            if spec.role == REFERENCE and tensor.name == PICTURE:  # of the encoder's own size
                dtype, form = "uint8", (1, *own[1:2] * 2, 3)
            if (tensor.dtype, own) != (dtype, form):
                fits = _shown(TensorSpec(name=tensor.name, dtype=dtype, shape=form))
                raise BundleError(
                    f"graph {name!r} has {_shown(tensor)}, where {fits} is wanted; export the bundle again"
                )


def check_ranges(shapes: Sequence[Shape], names: Iterable[str]) -> None:
    """Raises :class:`BundleError` where the shapes of one size, which differ in their batches, differ in their latents
    or in what the graphs of ``names`` take and give: their images lie in the same buffers."""
    first, *others = shapes
    for other in others:
        ranges = " and ".join(f"{shape.batch[0]} to {shape.batch[1]}" for shape in (first, other))
        if other.latents != first.latents:
            raise BundleError(f"{first.size} has other latents for {ranges} images; export the bundle again")
        for name in names:
            one, two = first.graphs[name], other.graphs[name]
            if {*one.inputs} != {*two.inputs} or {*one.outputs} != {*two.outputs}:
                raise BundleError(
                    f"graph {name!r} of {first.size} takes and gives other tensors for {ranges} images; "
                    "export the bundle again"
                )


def _shown(tensor: TensorSpec) -> str:
    return f"{tensor.name} as {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"
