"""From prompts to pictures. It knows prompts, seeds and pictures; the runner knows steps."""

from __future__ import annotations

import logging
import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.backends import OnBuild, Options
from tgate_runtime.binding import Binding
from tgate_runtime.conditioning import batch_rows, given, halves
from tgate_runtime.decoder import decode
from tgate_runtime.image import encode_image
from tgate_runtime.noise import check_seed, in_step, noise, random_seed
from tgate_runtime.runner import StepDone, run
from tgate_runtime.session import Session
from tgate_runtime.text import TextEncoder

log = logging.getLogger("tgate")

_ARTICLE = {"prompt": "a prompt", "image": "an image"}


@dataclass(frozen=True, kw_only=True)
class Result:
    """``images``: one RGB picture for each image asked for, prompt by prompt; empty where the bundle makes videos
    or has no decoder. ``videos``: likewise, the frames of each. ``latents``: float32 [N, ...], the final latents
    before decoding. ``seed``: the one used, drawn or given."""

    images: list[Image.Image]
    videos: list[list[Image.Image]]
    latents: NDArray[np.float32]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """``done`` of ``total`` steps of the whole request are taken; ``step`` is the last one."""

    done: int
    total: int
    step: StepDone


class Pipeline:
    """A bundle ready to draw, from prompts or, if its model is conditioned so, from a picture.

    Thread-safe: threads may call one Pipeline at once. Buffers and bindings of a request are kept for the next one
    with the same plan and batch; ``session.trim()`` frees them.
    """

    def __init__(self, session: Session) -> None:
        """Draw with an open session, which stays the caller's to close."""
        self.session = session
        self._text = TextEncoder(session) if session.manifest.text else None

    @staticmethod
    def open(
        source: str | os.PathLike[str] | Bundle,
        *,
        engine: str = "ort-cpu",
        plans: Sequence[str] | None = None,
        check_digests: bool = True,
        on_build: OnBuild | None = None,
        **options: Unpack[Options],
    ) -> Pipeline:
        """Open a bundle; see :meth:`Session.open`. Everything is loaded here, before the first request."""
        return Pipeline(
            Session.open(source, engine=engine, plans=plans, check_digests=check_digests, on_build=on_build, **options)
        )

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        image: Image.Image | None = None,
        prompt_embeds: Mapping[str, NDArray[Any]] | None = None,
        seed: int | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        guidance_scale: float | None = None,
        plan: str = "default",
        num_images: int = 1,
        initial_latents: NDArray[Any] | None = None,
        on_step: Callable[[Progress], None] | None = None,
    ) -> Result:
        """Draw ``num_images`` pictures (or videos) of each prompt, or from ``image``.

        ``prompt_embeds``: in place of a prompt or an image, ``<name>.<half>`` to [N, ...], float32, as ``tgate embed``
        writes them for N prompts.
        ``seed``: 0 .. 2**63 - 1; image j of the request takes its own stream of it. None draws one, which
        the result reports. ``negative_prompt``: one for all, or one for each prompt; None is the model's convention
        for none. ``guidance_scale``: above 1; None takes the plan's. ``initial_latents``: float32 [N, ...], standard
        normal noise in place of the seed's, for videos also with frames; stochastic samplers still draw their steps'
        noise from the seed. ``on_step`` is called after each step in the calling thread; an exception from it stops
        the request and comes out here.

        A prompt longer than the tokenizer takes is cut, with a warning in the log ``tgate`` that quotes what
        was cut. Raises :class:`RequestError` for a request that cannot be served, before any step is taken.
        """
        manifest = self.session.manifest
        chosen = manifest.plan(plan)
        scale = _check_guidance(guidance_scale, chosen, manifest)
        number = _check_count(num_images)
        used_seed = random_seed() if seed is None else check_seed(seed)
        rows = self._conditioning(prompt, negative_prompt, image, prompt_embeds, used_seed)
        rows = {name: np.repeat(values, number, axis=0) for name, values in rows.items()}
        count = len(next(iter(rows.values()))) if rows else number
        if initial_latents is None:
            start = np.stack([noise(used_seed, j, manifest.latents) for j in range(count)])
        else:
            start = _check_latents(initial_latents, (count, *manifest.latents))
        latents = self._denoise(chosen, start, rows, scale, used_seed, on_step)
        decoded = [decode(self.session, each) for each in latents] if manifest.decoder else []
        video = manifest.frames > 1
        return Result(
            images=[] if video else [frame for frames in decoded for frame in frames],
            videos=decoded if video else [],
            latents=latents,
            seed=used_seed,
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

    def _conditioning(
        self,
        prompt: str | Sequence[str] | None,
        negative_prompt: str | Sequence[str | None] | None,
        image: Image.Image | None,
        embeds: Mapping[str, NDArray[Any]] | None,
        seed: int,
    ) -> dict[str, NDArray[Any]]:
        """``<name>.<half>`` to [N, ...] from whichever was given, one row for each prompt."""
        manifest = self.session.manifest
        wanted = "image" if manifest.conditioned_by("image") else "prompt"
        named = {"prompt": prompt, "image": image, "prompt_embeds": embeds}
        several = [name for name, value in named.items() if value is not None]
        if len(several) != 1 or several[0] not in (wanted, "prompt_embeds"):
            raise RequestError(
                f"{manifest.model} is conditioned by {_ARTICLE[wanted]}: give {wanted}, or prompt_embeds, and "
                f"nothing else; got {' and '.join(several) or 'neither'}"
            )
        if wanted == "image" and negative_prompt is not None:
            raise RequestError(f"{manifest.model} is conditioned by an image and takes no negative prompt")
        if embeds is not None:
            if negative_prompt is not None:
                raise RequestError("prompt_embeds hold the negative half already; leave out the negative prompt")
            return given(manifest, embeds)
        if image is not None:
            if not manifest.image:
                raise RequestError("the bundle has no image encoder (--components); export it with one")
            return halves(manifest, encode_image(self.session, image, seed=seed), None)
        prompts, negatives = _check_prompts(prompt, negative_prompt)
        if not manifest.guided and negative_prompt:
            log.warning("the bundle was exported without guidance: the negative prompt is not used")
        return self._texts(prompts, negatives)

    def _texts(self, prompts: Sequence[str], negatives: Sequence[str | None]) -> dict[str, NDArray[Any]]:
        """``<name>.<half>`` to [N, ...], every distinct text encoded once."""
        manifest = self.session.manifest
        if self._text is None:
            raise RequestError(
                "the bundle has no text encoder (--components): give prompt_embeds, which `tgate embed` makes"
            )
        if not manifest.guided:
            negatives = [None] * len(prompts)
        elif not manifest.zero_negative:
            negatives = [negative or "" for negative in negatives]
        texts = dict.fromkeys([*prompts, *(negative for negative in negatives if negative is not None)])
        encoded = {text: self._text.encode(text) for text in texts}
        for cut in dict.fromkeys(text.cut for text in encoded.values() if text.cut):
            log.warning('the prompt is longer than the model takes; left out: "%s"', cut)
        each = [
            halves(manifest, encoded[prompt].tensors, None if negative is None else encoded[negative].tensors)
            for prompt, negative in zip(prompts, negatives, strict=True)
        ]
        return {name: np.concatenate([rows[name] for rows in each]) for name in each[0]}

    def _denoise(
        self,
        plan: Plan,
        start: NDArray[np.float32],
        rows: Mapping[str, NDArray[Any]],
        guidance_scale: float,
        seed: int,
        on_step: Callable[[Progress], None] | None,
    ) -> NDArray[np.float32]:
        """Final latents [N, ...] of all images, in batches of the size that the bundle takes."""
        count, done = len(start), 0
        batches = list(_batches(count, *self.session.manifest.batch))
        total = len(batches) * len(plan.steps)
        final = np.empty_like(start)
        for first, size, batch in batches:
            some = slice(first, first + size)

            def draw(step: int, first: int = first, batch: int = batch) -> NDArray[np.float32]:
                shape = self.session.manifest.latents
                return np.stack([noise(seed, first + j, shape, draw=in_step(step)) for j in range(batch)])

            with self._binding(plan, batch) as binding:
                steps = run(
                    binding,
                    latents=batch_rows(start[some], batch),
                    conditioning={name: batch_rows(values[some], batch) for name, values in rows.items()},
                    guidance_scale=guidance_scale,
                    step_noise=draw,
                )
                with closing(steps):  # whatever on_step raises, the binding is free again
                    for step in steps:
                        done += 1
                        if on_step is not None:
                            on_step(Progress(done=done, total=total, step=step))
                final[some] = binding.latents()[:size]
        return final

    def _binding(self, plan: Plan, batch: int) -> AbstractContextManager[Binding]:
        return self.session.lent((plan.name, batch), lambda: Binding(self.session, plan, batch))


def _batches(count: int, least: int, most: int) -> Iterator[tuple[int, int, int]]:
    """(first image, images, batch) of each run: full batches, then the rest, padded up to ``least``."""
    for first in range(0, count, most):
        size = min(most, count - first)
        yield first, size, max(size, least)


def _check_prompts(
    prompt: str | Sequence[str] | None, negative: str | Sequence[str | None] | None
) -> tuple[list[str], list[str | None]]:
    """Prompts and as many negative prompts."""
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(text, str) for text in prompts):
        raise RequestError(f"the prompt must be a text or a list of texts, got {prompt!r:.80}")
    negatives = [negative] * len(prompts) if negative is None or isinstance(negative, str) else negative
    if not isinstance(negatives, (list, tuple)) or not all(n is None or isinstance(n, str) for n in negatives):
        raise RequestError(f"the negative prompt must be a text or a list of texts, got {negative!r:.80}")
    if len(negatives) != len(prompts):
        raise RequestError(
            f"got {len(prompts)} prompts and {len(negatives)} negative prompts; give one for each, or one"
        )
    return [*prompts], [*negatives]


def _check_guidance(scale: float | None, plan: Plan, manifest: Manifest) -> float:
    if scale is None:
        return plan.guidance_scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise RequestError(f"the guidance scale must be a number, got {scale!r}")
    if not math.isfinite(scale) or abs(scale) > float(np.finfo(np.float32).max):
        raise RequestError(f"the guidance scale must be finite, got {scale}")
    if manifest.guided and scale <= 1:
        raise RequestError(
            f"the bundle was exported with guidance, which takes a scale above 1, got {scale}; "
            "export with --guidance-scale 1 for a bundle without guidance"
        )
    if manifest.guidance == "none" and scale > 1:
        raise RequestError(
            f"the bundle was exported without guidance and takes no scale above 1, got {scale}; "
            "export with a --guidance-scale above 1"
        )
    return float(scale)


def _check_count(num_images: int) -> int:
    try:
        count = operator.index(num_images)
    except TypeError:
        count = 0
    if isinstance(num_images, bool) or count < 1:
        raise RequestError(f"the number of images must be a whole number of at least 1, got {num_images!r}")
    return count


def _check_latents(latents: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.float32]:
    wanted = f"initial latents must be float32 of shape {list(shape)}, standard normal noise"
    if not isinstance(latents, np.ndarray):
        raise RequestError(f"{wanted}, got {type(latents).__name__}")
    if latents.shape != shape or latents.dtype != np.float32:
        raise RequestError(f"{wanted}; got {latents.dtype} of shape {list(latents.shape)}")
    if not np.isfinite(latents).all():
        raise RequestError(f"{wanted}; got values that are not finite")
    return latents
