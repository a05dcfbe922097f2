"""A bundle that is served: its session, its worker, and what stands between a prompt and a picture."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from PIL import Image

from tgate_engine.control import nets_in
from tgate_engine.errors import RequestError
from tgate_engine.graph import DECODE, ENCODE, PREVIEW, REFERENCE
from tgate_engine.manifest_json import bundle_digest
from tgate_engine.plan import Plan
from tgate_runtime.adapters import scales_of_adapters
from tgate_runtime.beginning import Beginner, begins
from tgate_runtime.control import Controls, scales_of_controls, steered
from tgate_runtime.decoder import decode
from tgate_runtime.encoder import Encoder, Row
from tgate_runtime.generators import check_generator
from tgate_runtime.inpainting import around
from tgate_runtime.record import EngineRecord, PlanRecord, Record, controls_of, digests_of_given, loras_of
from tgate_runtime.reference import reference_scale_of
from tgate_runtime.request import (
    DECODERS,
    begins_from,
    check_prompts,
    check_source,
    decoder_of,
    scales_of,
    seeds_of,
    strength_of,
    takes_both,
)
from tgate_runtime.session import Session
from tgate_serve.choice import Choice
from tgate_serve.handle import Drawn, Handle, Step
from tgate_serve.scheduler import PRIORITIES
from tgate_serve.worker import Request, Worker


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What somebody asks of a model; None takes what the model has of its own.

    ``picture``: RGB, what an image-to-video model starts from, in place of a prompt; beside one, what the images begin
    from, with ``strength`` and ``mask`` as :class:`~tgate_runtime.pipeline.Pipeline` has them. ``images``: how many, of
    seeds that count on from ``seed``; a random one where that is None. ``size``: one of the model's.
    ``guidance_scale``: above 1. ``generator``: of noise. ``priority``, ``within_s``: see
    :class:`~tgate_serve.worker.Request`. ``partials``: how many looks at each image before it is through, evenly spread
    over its steps. ``loras``: scales by the names of the bundle's adapters. ``decoder``: of its pictures, one of
    :data:`~tgate_runtime.request.DECODERS`. ``ip_adapter_image``, RGB, and ``ip_adapter_scale`` as
    :class:`~tgate_runtime.pipeline.Pipeline` has them. ``controls``: by the names of the bundle's ControlNets, what
    each of them looks at, and when.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    picture: Image.Image | None = None
    strength: float | None = None
    mask: Image.Image | None = None
    images: int = 1
    size: str | None = None
    choice: Choice = field(default_factory=Choice)
    guidance_scale: float | None = None
    seed: int | None = None
    generator: str = "numpy"
    priority: int = 0
    within_s: float | None = None
    partials: int = 0
    loras: Mapping[str, float] | None = None
    decoder: str | None = None
    ip_adapter_image: Image.Image | None = None
    ip_adapter_scale: float | None = None
    controls: Controls | None = None


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A wish that a worker has taken, its open questions settled. ``cuts``: what was cut off its prompts."""

    handle: Handle
    model: Model
    wish: Wish
    plan: Plan
    size: str
    guidance_scale: float
    strength: float | None
    seeds: tuple[int, ...]
    cuts: tuple[str, ...]

    def record(self, image: int) -> Record:
        """What one of its images is drawn from."""
        wish, manifest = self.wish, self.model.session.manifest
        return Record(
            prompt=wish.prompt,
            negative_prompt=wish.negative_prompt,
            seed=self.seeds[image],
            generator=wish.generator,
            guidance_scale=self.guidance_scale,
            size=self.size,
            plan=PlanRecord.of(self.plan),
            model=manifest.model,
            bundle=self.model.digest,
            engine=EngineRecord.of(self.model.session.engine),
            strength=self.strength,
            decoder="preview" if wish.decoder == "preview" else None,
            loras=loras_of(scales_of_adapters(wish.loras, manifest), manifest),
            controls=controls_of(wish.controls),
            given=digests_of_given(1, image=wish.picture, mask=wish.mask, ip_adapter_image=wish.ip_adapter_image)[0],
            ip_adapter_scale=reference_scale_of(wish.ip_adapter_scale, manifest, wish.ip_adapter_image),
        )

    def pictures(self, drawn: Drawn) -> list[list[Image.Image]]:
        """Of each image, its picture, or a video's frames; decoded in the calling thread."""
        return self.model.worker.pictures(drawn, decoder_of(self.wish.decoder, self.model.session.manifest))

    def partial(self, step: Step) -> Image.Image:
        """Where a step's image is heading, as the small decoder sees it, or the only one; of a video the first frame.
        The step is one of those that were to be looked at."""
        session = self.model.session
        graph = session.graph(PREVIEW, self.size) or session.graph(DECODE, self.size)
        assert graph is not None  # Model.submit has seen it
        assert step.towards is not None
        return decode(session, graph, step.towards)[0]


class Model:
    """A session and its worker. Thread-safe. It owns neither: close the worker, then the session."""

    def __init__(self, name: str, session: Session, worker: Worker) -> None:
        """Serve what the worker draws under a name. Raises :class:`RequestError` for a bundle that makes no pictures of
        its own."""
        if takes_both(session.manifest):
            raise RequestError(
                f"{name} is conditioned by a prompt and an image at once, which a server does not take yet; draw with "
                "tgate generate, or a Pipeline"
            )
        if session.graph(DECODE) is None:
            raise RequestError(
                f"{name} has no decoder, and a server answers with pictures; export it with --components all"
            )
        self.name = name
        self.session = session
        self.worker = worker
        self.created_s = int(time.time())
        """When it was opened, in seconds of Unix time."""
        self._encoder = Encoder(session)
        self._beginner = Beginner(session)
        self._entering = 0
        self._lock = threading.Lock()

    @property
    def video(self) -> bool:
        """Whether it makes videos."""
        return self.session.manifest.frames > 1

    @property
    def takes_picture(self) -> bool:
        """Whether it starts from a picture, and no prompt."""
        return bool(self.session.manifest.conditioned_by("image"))

    @property
    def edits(self) -> bool:
        """Whether its images can begin from a picture, beside a prompt."""
        return self.session.manifest.graph(ENCODE) is not None

    @property
    def inpaints(self) -> bool:
        """Whether all of them do, within a mask."""
        return self.session.manifest.inpaints

    @property
    def decoders(self) -> tuple[str, ...]:
        """What its pictures may be decoded by."""
        return tuple(name for name, role in DECODERS.items() if self.session.manifest.graph(role) is not None)

    @property
    def refers(self) -> bool:
        """Whether its images can attend to a picture, beside a prompt."""
        return self.session.manifest.graph(REFERENCE) is not None

    @property
    def controls(self) -> tuple[str, ...]:
        """The names of its ControlNets."""
        return nets_in(self.session.manifest.shapes[0].graphs)

    @cached_property
    def digest(self) -> str:
        """The :func:`~tgate_engine.manifest_json.bundle_digest` of its bundle."""
        return bundle_digest(self.session.manifest)

    def check(self, wish: Wish) -> tuple[Plan, str, float]:
        """The plan, size and guidance scale that are meant. Raises :class:`RequestError` for whatever cannot be drawn,
        or would change nothing, before anything is computed."""
        manifest = self.session.manifest
        check_source(manifest, prompt=wish.prompt, negative_prompt=wish.negative_prompt, image=wish.picture)
        if wish.prompt is not None:
            check_prompts(wish.prompt, wish.negative_prompt)
        if wish.negative_prompt is not None and not manifest.guided:
            raise RequestError(f"{self.name} has no guidance, and so negative_prompt no effect; leave it out")
        if wish.guidance_scale is not None and manifest.guidance == "none":
            raise RequestError(f"{self.name} has no guidance, and so guidance_scale no effect; leave it out")
        scales_of_adapters(wish.loras, manifest)
        decoder_of(wish.decoder, manifest)
        reference_scale_of(wish.ip_adapter_scale, manifest, wish.ip_adapter_image)
        plan = wish.choice.of(self.worker.plans)
        shape = self.session.shapes(wish.size)[0]
        check_generator(wish.generator, shape.latents)
        if wish.priority not in PRIORITIES:
            raise RequestError(f"a priority is 0 to {PRIORITIES[-1]}, got {wish.priority}")
        strength = strength_of(wish.strength, manifest, wish.picture, wish.mask)
        taken = plan
        if strength is not None and begins(manifest, strength):
            mended = wish.mask is not None and not manifest.inpaints
            taken = self._beginner.left(plan, strength, masked=mended)[1]
        scales_of_controls(wish.controls, taken, manifest)
        steps = len(taken.steps)
        if wish.partials >= steps:
            raise RequestError(
                f"plan '{plan.name}' has {steps} steps, and at most {steps - 1} partial images before the last; got "
                f"{wish.partials}"
            )
        return plan, shape.size, scales_of(wish.guidance_scale, 1, plan, manifest)[0]

    def submit(self, wish: Wish, came_s: float | None = None) -> Drawing:
        """Encode what a wish is conditioned by, and have it drawn. Blocks for the encoder's time. ``came_s``: when the
        wish arrived, by :func:`time.monotonic`; now if left out.

        Raises as :meth:`check` and :meth:`~tgate_serve.worker.Worker.submit` do; a full queue is told before anything
        is encoded.
        """
        came_s = time.monotonic() if came_s is None else came_s
        plan, size, scale = self.check(wish)
        seeds = seeds_of(wish.seed, wish.images)
        strength = strength_of(wish.strength, self.session.manifest, wish.picture, wish.mask)
        beginning, taken, within, manifest = None, plan, None, self.session.manifest
        with self._entrance(size, wish.images):
            session = self.worker.adapted(size, wish.loras)
            encoder = self._encoder if session is self.session else Encoder(session)
            row, cuts = self._encoded(encoder, wish, seeds, size)
            if manifest.inpaints:
                assert wish.picture is not None  # strength_of has seen them
                assert wish.mask is not None
                within = around(self.session, wish.picture, wish.mask, size)
            if strength is not None and begins(manifest, strength):
                assert wish.picture is not None  # strength_of has seen it
                mended = None if manifest.inpaints else wish.mask
                beginning = self._beginner.begin(plan, wish.picture, strength, size, mended)
                taken = beginning.plan
            controls = steered(session, wish.controls, taken, size)
            handle = self.worker.submit(
                Request(
                    conditioning=row,
                    seeds=seeds,
                    plan=plan,
                    size=size,
                    guidance_scale=scale,
                    generator=wish.generator,
                    priority=wish.priority,
                    within_s=wish.within_s,
                    came_s=came_s,
                    looks=looks(len(taken.steps), wish.partials),
                    beginning=beginning,
                    around=within,
                    session=session,
                    controls=controls,
                )
            )
        return Drawing(
            handle=handle,
            model=self,
            wish=wish,
            plan=plan,
            size=size,
            guidance_scale=scale,
            strength=strength,
            seeds=seeds,
            cuts=cuts,
        )

    def _encoded(self, encoder: Encoder, wish: Wish, seeds: Sequence[int], size: str) -> tuple[Row, tuple[str, ...]]:
        """What conditions the images, and what was cut off their prompts."""
        if wish.picture is None or begins_from(self.session.manifest, wish.picture):
            assert wish.prompt is not None  # check has seen it
            rows, cuts = encoder.of_texts([(wish.prompt, wish.negative_prompt)], size)
            scale = reference_scale_of(wish.ip_adapter_scale, self.session.manifest, wish.ip_adapter_image)
            if wish.ip_adapter_image is None or scale is None:
                return rows[0], cuts
            return {**rows[0], **encoder.of_reference(wish.ip_adapter_image, scale, size)}, cuts
        if len(seeds) > 1:
            raise RequestError(f"{self.name} makes one video of a picture at a time, got n={len(seeds)}")
        return encoder.of_picture(wish.picture, seeds, size)[0], ()

    @contextmanager
    def _entrance(self, size: str, images: int) -> Iterator[None]:
        """Those whose prompts are being encoded count as waiting, or any number of them would be."""
        with self._lock:
            self.worker.check_room(size, images, entering=self._entering)
            self._entering += images
        try:
            yield
        finally:
            with self._lock:
                self._entering -= images


def looks(steps: int, partials: int) -> tuple[int, ...]:
    """The steps, by index, after which an image is looked at: evenly spread, and none of them the last."""
    return tuple(steps * (i + 1) // (partials + 1) - 1 for i in range(partials))
