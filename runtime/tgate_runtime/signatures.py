"""Whether a bundle's graphs take and give what this runtime feeds and reads: asked once, when it is opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tgate_engine.conditioning import half_names
from tgate_engine.errors import BundleError
from tgate_engine.graph import DECODE, DENOISE, IMAGE, TEXT, Dim, GraphSpec, Role
from tgate_engine.manifest import Manifest
from tgate_engine.step import STEP_INPUTS, STEP_OUTPUTS

TOKENS, PICTURE, PICTURE_NOISE, FINAL_LATENTS, PIXELS = "ids", "picture", "noise", "latents", "image"
"""Names of what the graphs around the denoiser take and give: ``ids.<i>`` for tokenizer i, and so on."""


def check_signatures(manifest: Manifest, graphs: Mapping[str, GraphSpec]) -> None:
    """Raises :class:`BundleError` for the first of ``graphs`` with an input that nothing feeds, or without an
    output that is needed, or with a tensor of the trajectory in another form than the others have it: all denoising
    graphs of a shape work on the same buffers."""
    feeds: dict[Role, set[str]] = {
        DENOISE: {*STEP_INPUTS, *half_names(manifest.conditioning), *manifest.carries},
        TEXT: {t.input for t in manifest.tokenizers},
        IMAGE: {PICTURE, PICTURE_NOISE},
        DECODE: {FINAL_LATENTS},
    }
    needs: dict[Role, Iterable[str]] = {
        DENOISE: STEP_OUTPUTS,
        TEXT: manifest.conditioned_by("text"),
        IMAGE: manifest.conditioned_by("image"),
        DECODE: (PIXELS,),
    }
    forms: dict[str, tuple[str, tuple[Dim, ...]]] = {}
    for name, spec in graphs.items():
        for tensor in (*spec.inputs, *spec.outputs) if spec.role == DENOISE else ():
            if forms.setdefault(tensor.name, (tensor.dtype, tensor.shape)) != (tensor.dtype, tensor.shape):
                raise BundleError(f"graph {name!r} has {tensor.name} in another form than a graph beside it has")
        if odd := [i for i in spec.input_names() if i not in feeds[spec.role]]:
            raise BundleError(f"graph {name!r} takes {', '.join(odd)}, which nothing feeds; export the bundle again")
        if missing := [o for o in needs[spec.role] if o not in spec.output_names()]:
            raise BundleError(f"graph {name!r} does not give {', '.join(missing)}; export the bundle again")
        if spec.role == TEXT and (unfed := feeds[TEXT] - {*spec.input_names()}):
            raise BundleError(f"graph {name!r} has no input {', '.join(sorted(unfed))}; export the bundle again")
