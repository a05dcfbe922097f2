"""Whether a bundle's graphs take and give what this runtime feeds and reads: asked once, when it is opened."""

from __future__ import annotations

from collections.abc import Iterable

from tgate_engine.errors import BundleError
from tgate_engine.manifest import Manifest
from tgate_engine.plan import DENOISING_GRAPHS
from tgate_engine.sampler import HISTORY

RING_INPUTS = ("latents", *(f"{name}.{lag}" for name in ("latents", "output") for lag in range(1, HISTORY + 1)))
STEP_OUTPUTS = ("next_latents", "output")


def check_signatures(manifest: Manifest, graphs: Iterable[str]) -> None:
    """Raises :class:`BundleError` for the first of ``graphs`` with an input that nothing feeds, or without an
    output that is needed."""
    texts = [c.name for c in manifest.conditioning if c.source == "text"]
    feeds = {
        manifest.text: {t.input for t in manifest.tokenizers},
        manifest.decoder: {"latents"},
    }
    needs = {manifest.text: texts, manifest.decoder: ["image"]}
    halves = {f"{c.name}.{half}" for c in manifest.conditioning for half in ("negative", "positive")}
    for name in graphs:
        if name not in manifest.graphs:
            raise BundleError(f"the bundle has no graph {name!r}; it has {', '.join(manifest.graphs)}")
        spec = manifest.graphs[name]
        fed, needed = feeds.get(name, set()), needs.get(name, [])
        if name in DENOISING_GRAPHS:
            fed = {*RING_INPUTS, "step", *halves, *manifest.carry_specs()}
            needed = [*STEP_OUTPUTS]
        if odd := [i for i in spec.input_names() if i not in fed]:
            raise BundleError(f"graph {name!r} takes {', '.join(odd)}, which nothing feeds; export the bundle again")
        if missing := [o for o in needed if o not in spec.output_names()]:
            raise BundleError(f"graph {name!r} does not give {', '.join(missing)}; export the bundle again")
    unfed = {*feeds[manifest.text]} - {*manifest.graphs[manifest.text].input_names()}
    if unfed:
        raise BundleError(f"the text graph has no input {', '.join(sorted(unfed))}; export the bundle again")
