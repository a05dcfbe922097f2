"""Requests that begin from a picture in place of noise: its latents, and what is left of the plan."""

from __future__ import annotations

import functools
import logging
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.errors import PlanError, RequestError, shown
from tgate_engine.graph import ENCODE, GraphSpec
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.plan import Plan
from tgate_engine.starts import Start, Starts, begin_of, plan_from
from tgate_runtime.finite import check_computed
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.image import fit_picture
from tgate_runtime.picture import as_mask
from tgate_runtime.request import NO_ENCODER, check_strength
from tgate_runtime.session import Session
from tgate_runtime.signatures import DEVIATION, FINAL_LATENTS, MASK, PICTURE
from tgate_runtime.state import Mend

log = logging.getLogger("tgate")

_MOST_KEPT = 64
"""Plans from the middle that are kept for further requests."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a request for any number of images begins from.

    ``plan``: the steps that are left. ``start``: the noise that a picture is given. ``mean``, ``deviation``: of the
    picture's latents, float32 [...]. ``mask``: float32 [h, w], 1 where it is drawn anew and 0 where it stays; None
    where all of it is drawn. ``scale``: of the noise that a whole trajectory begins from.
    """

    plan: Plan
    start: Start
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]
    mask: NDArray[np.float32] | None = None
    scale: float = 1.0

    @property
    def draws(self) -> int:
        """The first draw of a seed that is a step's, less that of a request without a picture: diffusers' pipelines
        sample a picture's latents, then draw the noise, then sample those of the picture that a mask leaves."""
        return 1 if self.mask is None else 2

    def first(self, sample: NDArray[np.float32], noise: NDArray[np.float32]) -> tuple[NDArray[np.float32], Mend | None]:
        """x_0 of one image, float32 [...], and what becomes of its latents after each step (:meth:`State.begin`).

        ``sample``, ``noise``: standard normal [...], by which the picture's latents are sampled, and which is added to
        them. With a mask, what stays is put back after each step, as noisy as the step leaves the rest; and where the
        whole trajectory is taken, it begins from noise alone. Pure.
        """
        picture = self.mean + self.deviation * sample
        if self.mask is None:
            return self.start.noised(picture, noise), None
        mask, calls = self.mask, len(self.start.levels)

        def mend(index: int, latents: NDArray[np.float32]) -> NDArray[np.float32]:
            kept = self.start.noised(picture, noise, index + 1) if index + 1 < calls else picture
            mended: NDArray[np.float32] = (1 - mask) * kept + mask * latents
            return mended

        whole = self.start.begin == 0
        return (np.float32(self.scale) * noise if whole else self.start.noised(picture, noise)), mend


class Beginner:
    """Begins requests from pictures, on an open session. Thread-safe."""

    def __init__(self, session: Session) -> None:
        """Nothing is read or loaded before the first request that begins from a picture."""
        self._session = session
        self._lock = threading.Lock()
        self._starts: Starts | None = None
        self._left = functools.lru_cache(_MOST_KEPT)(self._plan_from)

    def begin(
        self,
        plan: Plan,
        image: Image.Image,
        strength: float,
        size: str | None = None,
        mask: Image.Image | None = None,
    ) -> Beginning:
        """What a request begins from that takes the last int(n * ``strength``) steps of ``plan``, n of them in all.

        ``image``: as :func:`~tgate_runtime.image.fit_picture` takes it. ``strength``: above 0, at most 1. ``mask``: see
        :func:`~tgate_runtime.picture.as_mask`; it is resized as the image is. Where the
        steps that are left do not come to a graph of the plan, a warning in the log ``tgate`` says so. Raises
        :class:`RequestError` for a bundle without an encoder, a strength that leaves no step, a plan that cannot begin
        in the middle, and as :func:`fit_picture` does; :class:`~tgate_engine.errors.EngineError` where the picture's
        latents are not finite.
        """
        graph = self._session.graph(ENCODE, size)
        if graph is None:
            raise RequestError(NO_ENCODER)
        start, left = self.left(plan, strength, masked=mask is not None)
        shape = self._session.shapes(size)[0]
        own = None if mask is None else fit_mask(mask, shape)
        _tell(plan, left, strength)
        mean, deviation = encode(self._session, graph, image)
        return Beginning(
            plan=left, start=start, mean=mean, deviation=deviation, mask=own, scale=plan.sampler.initial_scale
        )

    def left(self, plan: Plan, strength: float, *, masked: bool = False) -> tuple[Start, Plan]:
        """Where ``plan`` begins at that strength, and the steps that are left. Raises :class:`RequestError`, also for a
        sampler that takes no mask."""
        try:
            start, left = self._left(plan, begin_of(plan.sampler.steps, check_strength(strength)))
        except PlanError as error:
            raise RequestError(str(error)) from None
        if masked and not start.free:
            raise RequestError(
                f"sampler {plan.sampler.name} of plan '{shown(plan.name)}' goes by latents as it left them, and a mask "
                "puts others in their place; take a plan of dpmpp_2m, euler or ddim"
            )
        return start, left

    def _plan_from(self, plan: Plan, begin: int) -> tuple[Start, Plan]:
        manifest = self._session.manifest
        with self._lock:
            if self._starts is None:
                self._starts = (
                    Starts.load(self._session.bundle.file(manifest.samplers)) if manifest.samplers else Starts({}, {})
                )
        start = self._starts.find(plan, begin)
        return start, plan_from(plan, start, manifest.shapes[0].graphs, manifest.carries)


def begins(manifest: Manifest, strength: float | None) -> bool:
    """Whether a request of that strength begins from its picture: one of a model that inpaints begins from noise alone
    where it takes all steps, as it is told what lies around the mask."""
    return strength is not None and not (manifest.inpaints and strength == 1)


def encode(
    session: Session, graph: GraphSpec, image: Image.Image, covered: NDArray[np.uint8] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of a picture's latents, float32 [...] each. Thread-safe.

    ``graph``: the session's of role "encode" for the size. ``image``: see :func:`~tgate_runtime.image.fit_picture`.
    ``covered``: uint8 [H, W], of an inpainting model's graph: what is left out of the picture, where it is not 0.
    """
    with GraphCall.borrow(session, graph) as encoder:
        encoder.inputs[PICTURE].write(np.asarray(fit_picture(image, graph), np.uint8)[np.newaxis])
        if (mask := encoder.inputs.get(MASK)) is not None:
            mask.write(np.zeros(mask.shape, np.uint8) if covered is None else covered[np.newaxis])
        encoder()
        mean, deviation = (encoder.outputs[name].read()[0] for name in (FINAL_LATENTS, DEVIATION))
    check_computed(mean, "the latents of this picture")
    check_computed(deviation, "the deviation of this picture's latents")
    return mean, deviation


def fit_mask(mask: Image.Image, shape: Shape) -> NDArray[np.float32]:
    """A mask as float32 [h, w] of the latents of a shape: 1 where its first pixel of each latent's is to be drawn anew,
    and 0 elsewhere. Raises :class:`RequestError` as :func:`~tgate_runtime.picture.as_mask` does, and for one that would
    change nothing."""
    return of_latents(mask_pixels(mask, shape), shape)


def mask_pixels(mask: Image.Image, shape: Shape) -> NDArray[np.uint8]:
    """A mask as uint8 [H, W] of a shape: 255 where it is to be drawn anew, and 0 elsewhere. Raises
    :class:`RequestError` as :func:`~tgate_runtime.picture.as_mask` does."""
    fitted = as_mask(mask)
    if fitted.size != (shape.width, shape.height):
        grey = fitted.resize((shape.width, shape.height), Image.Resampling.LANCZOS)
        fitted = grey.point([255 if value >= 128 else 0 for value in range(256)])
    return np.asarray(fitted, np.uint8)


def of_latents(pixels: NDArray[np.uint8], shape: Shape) -> NDArray[np.float32]:
    """:func:`mask_pixels` as :func:`fit_mask` gives it. Raises :class:`RequestError` for one that would change
    nothing."""
    height, width = shape.latents[-2:]
    rows = np.arange(height) * shape.height // height
    columns = np.arange(width) * shape.width // width
    values = (pixels[rows][:, columns] > 0).astype(np.float32)
    if not values.any():
        raise RequestError(
            "the mask leaves everything as it is: what is to be drawn anew is white, or transparent where it has alpha"
        )
    return values


def _tell(plan: Plan, left: Plan, strength: float) -> None:
    """Warn where the steps that are left reuse nothing, or end before the plan's last phase begins."""
    reached = {step.phase for step in left.steps}
    missing = dict.fromkeys(step.phase for step in plan.steps if step.phase not in reached)
    nothing = bool(plan.carries()) and not left.carries()
    if not missing and not nothing:
        return
    log.warning(
        "strength %g leaves %d of the %d steps of plan '%s'%s%s; take a plan with a smaller m, or more strength",
        strength,
        len(left.steps),
        len(plan.steps),
        shown(plan.name),
        f", which end before its {' and '.join(map(shown, missing))} phase" if missing else "",
        ": nothing is reused" if nothing else "",
    )
