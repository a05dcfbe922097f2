"""From prompts to pictures. It knows prompts, seeds and pictures; the runner knows steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.bundle import Bundle
from tgate_engine.errors import shown
from tgate_engine.graph import PREVIEW, Role
from tgate_engine.manifest_json import bundle_digest
from tgate_engine.plan import Plan
from tgate_runtime.beginning import Beginner, Beginning, begins
from tgate_runtime.conditioning import from_embeddings, rows_of
from tgate_runtime.control import Controls, Steered, steered
from tgate_runtime.decoder import decode
from tgate_runtime.encoder import Encoder, Row
from tgate_runtime.engines.protocol import Engine, OnBuild, Options
from tgate_runtime.finite import check_computed
from tgate_runtime.generators import check_generator, in_dtype, in_step, noise
from tgate_runtime.inpainting import Around, around, draw_of
from tgate_runtime.names import with_hints
from tgate_runtime.preview import Look, Previews
from tgate_runtime.record import EngineRecord, PlanRecord, Record, controls_of, digests_of_given, loras_of
from tgate_runtime.reference import reference_scale_of
from tgate_runtime.request import (
    check_call,
    check_count,
    check_latents,
    check_prompts,
    check_room,
    check_source,
    decoder_of,
    scales_of,
    seeds_of,
    strength_of,
    takes_both,
)
from tgate_runtime.runner import StepDone, run
from tgate_runtime.session import PlanLike, Session
from tgate_runtime.state import Mend, State, most_at_once

log = logging.getLogger("tgate")

_CUT_SHOWN = 500
"""How many characters of what was cut off a prompt are quoted."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """``images``: one RGB picture for each image asked for, prompt by prompt; empty where the bundle makes videos
    or has no decoder. ``videos``: likewise, the frames of each. ``latents``: float32 [N, ...], the final latents
    before decoding. ``seeds``: each image's own, with which it can be drawn alone. ``records``: what each was drawn
    from, for :func:`tgate_runtime.files.save_picture`."""

    images: list[Image.Image]
    videos: list[list[Image.Image]]
    latents: NDArray[np.float32]
    seeds: tuple[int, ...]
    records: tuple[Record, ...]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """``done`` of ``total`` steps of the whole request are taken; ``step`` is the last one, of the request's
    ``images``. What they look like is worked out when it is asked for, and can be until ``on_step`` returns."""

    done: int
    total: int
    step: StepDone
    images: range
    plan: Plan
    look: Look = field(repr=False, compare=False)

    def latents(self) -> NDArray[np.float32]:
        """The images' latents after the step, float32 [images, ...], a copy."""
        return self.look.latents()

    def preview(self) -> list[Image.Image]:
        """Of each image, an RGB picture of where it is heading, roughly: by the bundle's small decoder where it has one
        (``tgate-export --preview-decoder``), as large as the image will be.

        Otherwise it has one pixel for each place of the latents. They become colours by a linear map, which is fitted
        at the first preview of a Pipeline, for a few calls of the decoder. Raises :class:`RequestError` for a bundle
        without a decoder, or one of videos.
        """
        return self.look.pictures(self.plan.steps[self.step.index + 1 :])


class Pipeline:
    """A bundle ready to draw, from prompts or, if its model is conditioned so, from a picture.

    Thread-safe: threads may call one Pipeline at once. Buffers and bound calls of a request are kept for the next one
    that needs the same; ``session.trim()`` frees them.
    """

    def __init__(self, session: Session) -> None:
        """Draw with an open session, which stays the caller's to close."""
        self.session = session
        self._encoder = Encoder(session)
        self._beginner = Beginner(session)
        self._previews = Previews(session)

    @staticmethod
    def open(
        source: str | os.PathLike[str] | Bundle,
        *,
        engine: str | Engine = "ort-cpu",
        plans: Sequence[PlanLike] | None = None,
        sizes: Sequence[str] | None = None,
        check_digests: bool = True,
        on_build: OnBuild | None = None,
        **options: Unpack[Options],
    ) -> Pipeline:
        """Open a bundle; see :meth:`Session.open`. Everything is loaded here, before the first request."""
        session = Session.open(
            source,
            engine=engine,
            plans=plans,
            sizes=sizes,
            check_digests=check_digests,
            on_build=on_build,
            **options,
        )
        return Pipeline(session)

    @with_hints
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Image.Image | None = None,
        strength: float | None = None,
        mask: Image.Image | None = None,
        prompt_embeds: Mapping[str, NDArray[Any]] | None = None,
        seed: int | Sequence[int] | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        plan: PlanLike = "default",
        size: str | None = None,
        num_images: int = 1,
        loras: Mapping[str, float] | None = None,
        controls: Controls | None = None,
        initial_latents: NDArray[Any] | None = None,
        generator: str = "numpy",
        decoder: str | None = None,
        on_step: Callable[[Progress], None] | None = None,
        ip_adapter_image: Image.Image | None = None,
        ip_adapter_scale: float | None = None,
    ) -> Result:
        """Draw ``num_images`` pictures (or videos) of each prompt, or from ``image``.

        ``image``: what conditions an image-to-video model, in place of a prompt, or beside it where the model takes
        both; of other models, beside a prompt, what the request begins from in place of noise, with ``strength`` above
        0 and at most 1, the part of the plan's steps that is taken (:class:`~tgate_runtime.beginning.Beginner`; None is
        0.6). ``mask``: what of it is drawn anew (:func:`~tgate_runtime.picture.as_mask`); the rest of it stays. An
        inpainting model wants both, and there None is a strength of 1.
        ``prompt_embeds``: in place of a prompt or an image, ``<name>.<half>`` to [N, ...], float32, as ``tgate embed``
        writes them for N prompts.
        ``seed``: 0 .. 2**63 - 1. Image j of the request has the seed ``seed + j``, and comes out the same when it is
        drawn alone with it; or a list, one for each image. None draws one, and the result has each image's.
        ``guidance_scale``: above 1; None takes the plan's; or a list, one for each image.
        ``negative_prompt``: one for all, or one for each prompt; None is the model's convention for none.
        ``plan``: a name of the bundle's, a :class:`Plan`, or a file that ``tgate plan --output`` wrote (a path, or a
        text that ends in .json). ``size``: one of the session's, such as ``"832x1216"``; None is its default.
        ``loras``: scales by the names of the bundle's adapters, of which each is added to the weights for this request
        (:meth:`Session.adapted`). ``controls``: a :class:`~tgate_runtime.control.Control` by the name of each of the
        bundle's ControlNets that is to steer all images of the request: a picture, and how much of it, and when.
        ``initial_latents``: float32 [N, ...], standard normal noise in place of the seeds', for videos also with
        frames; stochastic samplers still draw their steps' noise from the seeds. ``generator``: what draws the noise,
        one of :data:`tgate_runtime.generators.GENERATORS`. ``decoder``: "preview" has the pictures decoded by the
        bundle's small decoder, "full" (or None) by the model's own. ``on_step`` is called after each step in the
        calling thread, and may look at the images (:class:`Progress`); an exception from it stops the request and comes
        out here.
        ``ip_adapter_image``: of a bundle with an IP-Adapter, a picture that all images attend to beside their prompts,
        with ``ip_adapter_scale``, how much of it is added (:func:`~tgate_runtime.reference.reference_scale_of`; None is
        1).

        A prompt longer than the tokenizer takes is cut, with a warning in the log ``tgate`` that quotes what
        was cut. Raises :class:`RequestError` for a request that cannot be served, before any step is taken, and
        :class:`~tgate_engine.errors.EngineError` where a graph fails or what it gives is not finite.
        """
        own = self._with(loras)
        chosen = own.session.plan(plan)
        shape, dtype = own.session.shapes(size)[0], own.session.manifest.dtype
        size, latents_shape = shape.size, shape.latents
        number = check_count(num_images)
        check_generator(generator)
        check_call(on_step, "on_step")
        role = decoder_of(decoder, own.session.manifest)
        texts = own._prompts(prompt, negative_prompt, image, prompt_embeds)
        prompts = len(texts) or 1
        if prompt_embeds is not None:
            prompts = rows_of(prompt_embeds, own.session.manifest) or 1
        count = prompts * number
        check_room(count, shape, own.session.manifest.frames)
        seeds = seeds_of(seed, count)
        scales = scales_of(guidance_scale, count, chosen, own.session.manifest)
        strength = strength_of(strength, own.session.manifest, image, mask)
        reference_scale = reference_scale_of(ip_adapter_scale, own.session.manifest, ip_adapter_image)
        if initial_latents is not None:
            check_latents(initial_latents, (count, *latents_shape))
        within, beginning = own._from_picture(chosen, size, image, mask, strength)
        taken = chosen if beginning is None else beginning.plan
        steering = steered(own.session, controls, taken, size)
        rows = own._rows(texts, image if strength is None else None, prompt_embeds, seeds, number, size)
        if ip_adapter_image is not None and reference_scale is not None:
            reference = own._encoder.of_reference(ip_adapter_image, reference_scale, size)
            rows = [{**row, **reference} for row in rows]

        def drawn(image: int, draw: int) -> NDArray[np.float32]:
            return in_dtype(noise(seeds[image], latents_shape, draw=draw, generator=generator), generator, dtype)

        start = initial_latents
        if start is None:
            start = np.stack([drawn(j, int(beginning is not None)) for j in range(count)])
        mends: list[Mend | None] = [None] * count
        if beginning is not None:
            first = [beginning.first(drawn(j, 0), start[j]) for j in range(count)]
            start, mends = np.stack([latents for latents, _ in first]), [mend for _, mend in first]
        skipped = 0 if beginning is None else beginning.draws
        if within is not None:
            sampled = draw_of(beginning)
            rows = [{**rows[j], **within.row(drawn(j, sampled))} for j in range(count)]
            skipped += 1

        def in_steps(image: int, index: int) -> NDArray[np.float32]:
            return drawn(image, skipped + in_step(index))

        given = digests_of_given(
            count,
            image=image,
            mask=mask,
            prompt_embeds=prompt_embeds,
            initial_latents=initial_latents,
            ip_adapter_image=ip_adapter_image,
        )
        latents = own._denoise(chosen, taken, size, start, rows, scales, in_steps, mends, steering, on_step)
        graph = own.session.graph(role, size)
        decoded = [decode(own.session, graph, each) for each in latents] if graph else []
        video = own.session.manifest.frames > 1
        return Result(
            images=[] if video else [frame for frames in decoded for frame in frames],
            videos=decoded if video else [],
            latents=latents,
            seeds=seeds,
            records=own._records(
                chosen, size, texts, scales, seeds, generator, strength, role, controls, given, reference_scale
            ),
        )

    def close(self) -> None:
        """Close the session."""
        self.session.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _with(self, loras: Mapping[str, float] | None) -> Pipeline:
        """One that draws with those adapters; this one where there are none."""
        session = self.session.adapted(loras)
        if session is self.session:
            return self
        own = Pipeline(session)
        own._previews = self._previews  # of decoders, which no adapter changes
        return own

    def _prompts(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str | None] | None,
        image: Image.Image | None,
        embeds: Mapping[str, NDArray[Any]] | None,
    ) -> list[tuple[str, str | None]]:
        """(prompt, negative prompt) of each text asked for; none where an image or embeddings stand for it."""
        manifest = self.session.manifest
        check_source(manifest, prompt=prompt, negative_prompt=negative_prompt, image=image, prompt_embeds=embeds)
        if prompt is None:
            return []
        prompts, negatives = check_prompts(prompt, negative_prompt)
        if not manifest.guided and negative_prompt:
            log.warning("the bundle was exported without guidance: the negative prompt is not used")
        return list(zip(prompts, negatives, strict=True))

    def _from_picture(
        self, plan: Plan, size: str, image: Image.Image | None, mask: Image.Image | None, strength: float | None
    ) -> tuple[Around | None, Beginning | None]:
        """What an inpainting model is told of a picture, and what is begun from in place of noise."""
        if image is None or strength is None:
            return None, None
        manifest, within = self.session.manifest, None
        if manifest.inpaints and mask is not None:
            within = around(self.session, image, mask, size)
        if not begins(manifest, strength):
            return within, None
        return within, self._beginner.begin(plan, image, strength, size, mask if within is None else None)

    def _rows(
        self,
        texts: Sequence[tuple[str, str | None]],
        image: Image.Image | None,
        embeds: Mapping[str, NDArray[Any]] | None,
        seeds: Sequence[int],
        number: int,
        size: str | None,
    ) -> list[Row]:
        """What conditions each image, ``number`` of each prompt."""
        pictured = [] if image is None else self._encoder.of_picture(image, seeds, size)
        if pictured and not takes_both(self.session.manifest):
            return pictured
        if embeds is not None:
            tensors = from_embeddings(self.session, embeds, size=size, pictured=bool(pictured))
            each: list[Row] = [
                {name: rows[i : i + 1] for name, rows in tensors.items()} for i in range(len(seeds) // number)
            ]
        else:
            each, cuts = self._encoder.of_texts(texts, size)
            for cut in cuts:
                log.warning('the prompt is longer than the model takes; left out: "%s"', shown(cut, _CUT_SHOWN))
        rows = [row for row in each for _ in range(number)]
        return [{**row, **picture} for row, picture in zip(rows, pictured, strict=True)] if pictured else rows

    def _records(
        self,
        plan: Plan,
        size: str,
        texts: Sequence[tuple[str, str | None]],
        scales: Sequence[float],
        seeds: Sequence[int],
        generator: str,
        strength: float | None,
        role: Role,
        controls: Controls | None,
        given: Sequence[Mapping[str, str]],
        reference_scale: float | None,
    ) -> tuple[Record, ...]:
        """What each image was drawn from."""
        manifest, number = self.session.manifest, len(seeds) // (len(texts) or 1)
        each: Sequence[tuple[str | None, str | None]] = texts or [(None, None)]
        of_image = [text for text in each for _ in range(number)]
        made, engine = PlanRecord.of(plan), EngineRecord.of(self.session.engine)
        loras, steered_by = loras_of(self.session.loras, manifest), controls_of(controls)
        return tuple(
            Record(
                prompt=prompt,
                negative_prompt=negative if manifest.guided else None,
                seed=seed,
                generator=generator,
                guidance_scale=scale,
                strength=strength,
                decoder="preview" if role == PREVIEW else None,
                size=size,
                plan=made,
                model=manifest.model,
                bundle=self._digest,
                engine=engine,
                loras=loras,
                controls=steered_by,
                given=digests,
                ip_adapter_scale=reference_scale,
            )
            for (prompt, negative), seed, scale, digests in zip(of_image, seeds, scales, given, strict=True)
        )

    @cached_property
    def _digest(self) -> str:
        return bundle_digest(self.session.manifest)

    def _denoise(
        self,
        chosen: Plan,
        plan: Plan,
        size: str,
        start: NDArray[np.float32],
        rows: Sequence[Row],
        scales: Sequence[float],
        in_steps: Callable[[int, int], NDArray[np.float32]],
        mends: Sequence[Mend | None],
        steering: Mapping[str, Steered],
        on_step: Callable[[Progress], None] | None,
    ) -> NDArray[np.float32]:
        """Final latents [N, ...] of all images, in batches of the sizes that the bundle takes. ``plan``: what is taken
        of the ``chosen`` one, for which buffers are kept."""
        batches = list(_batches(len(start), [shape.batch for shape in self.session.shapes(size)]))
        done, total = 0, len(batches) * len(plan.steps)
        final = np.empty_like(start)
        for first, count, batch in batches:
            # A batch that the bundle does not take so small is filled up with its last image.
            images = [first + min(j, count - 1) for j in range(batch)]
            new = partial(State, self.session, chosen, batch, size=size)
            with self.session.borrow((size, batch, chosen), new) as state:
                steps = run(
                    state,
                    latents=start[images],
                    conditioning={name: np.concatenate([rows[j][name] for j in images]) for name in rows[first]},
                    guidance_scale=[scales[j] for j in images],
                    plan=plan,
                    step_noise=partial(_step_noise, in_steps, images),
                    mend=[mends[j] for j in images],
                    controls=[steering] * len(images),
                )
                with closing(steps):  # whatever on_step raises, the state is free again
                    for step in steps:
                        done += 1
                        if on_step is not None:
                            own = range(step.rows.start, min(step.rows.stop, count))
                            look = Look(partial(self._previews.picture, size=size), state, own)
                            seen = range(first + own.start, first + own.stop)
                            on_step(Progress(done=done, total=total, step=step, images=seen, plan=plan, look=look))
                            look.over()
                final[first : first + count] = state.latents()[:count]
                last = plan.steps[-1].index
                for j in range(first, first + count):
                    check_computed(
                        final[j], f"the latents of image {j} after step {last}, the last of plan {plan.name!r}"
                    )
        return final


def _step_noise(
    in_steps: Callable[[int, int], NDArray[np.float32]], images: Sequence[int], row: int, step: int
) -> NDArray[np.float32]:
    return in_steps(images[row], step)


def _batches(count: int, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first image, images, rows) of each run: the largest batches there are, the last one filled up if need be.

    ``ranges``: what a call may hold, as (least, most), smallest first.
    """
    first = 0
    while first < count:
        left = count - first
        fitting = most_at_once(ranges, left)
        yield first, fitting or left, fitting or ranges[0][0]
        first += fitting or left
