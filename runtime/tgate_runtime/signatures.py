"""Whether a bundle's graphs take and give what this runtime feeds and reads: asked once, when it is opened."""

from __future__ import annotations

from collections.abc import Iterable

from tgate_engine.errors import BundleError
from tgate_engine.manifest import Manifest
from tgate_engine.plan import DENOISING_GRAPHS
from tgate_engine.sampler import HISTORY

_PAST = tuple(f"{name}.{lag}" for name in ("latents", "output") for lag in range(1, HISTORY + 1))
STEP_INPUTS = ("step", "noise", "latents", *_PAST)
STEP_OUTPUTS = ("next_latents", "output")


def check_signatures(manifest: Manifest, graphs: Iterable[str]) -> None:
    """Raises :class:`BundleError` for the first of ``graphs`` with an input that nothing feeds, or without an
    output that is needed."""
    feeds: dict[str, set[str]] = {}
    needs: dict[str, Iterable[str]] = {}
    if manifest.text:
        feeds[manifest.text] = {t.input for t in manifest.tokenizers}
        needs[manifest.text] = manifest.conditioned_by("text")
    if manifest.image:
        feeds[manifest.image] = {"picture", "noise"}
        needs[manifest.image] = manifest.conditioned_by("image")
    if manifest.decoder:
        feeds[manifest.decoder] = {"latents"}
        needs[manifest.decoder] = ["image"]
    halves = {f"{c.name}.{half}" for c in manifest.conditioning for half in ("negative", "positive")}
    for name in graphs:
        if name not in manifest.graphs:
            raise BundleError(f"the bundle has no graph {name!r}; it has {', '.join(manifest.graphs)}")
        spec = manifest.graphs[name]
        fed, needed = feeds.get(name, set()), [*needs.get(name, [])]
        if name in DENOISING_GRAPHS:
            fed = {*STEP_INPUTS, *halves, *manifest.carry_specs()}
            needed = [*STEP_OUTPUTS]
        if odd := [i for i in spec.input_names() if i not in fed]:
            raise BundleError(f"graph {name!r} takes {', '.join(odd)}, which nothing feeds; export the bundle again")
        if missing := [o for o in needed if o not in spec.output_names()]:
            raise BundleError(f"graph {name!r} does not give {', '.join(missing)}; export the bundle again")
    if manifest.text and (unfed := feeds[manifest.text] - {*manifest.graphs[manifest.text].input_names()}):
        raise BundleError(f"the text graph has no input {', '.join(sorted(unfed))}; export the bundle again")
