"""Pictures as the bytes of an answer."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence

from PIL import Image

from tgate_runtime.files import picture_bytes
from tgate_runtime.record import Record
from tgate_serve.api.schemas import Format, Report
from tgate_serve.handle import Drawn, Step
from tgate_serve.model import Drawing


def encoded(picture: Image.Image, form: Format, quality: int | None, record: Record | None = None) -> str:
    """A picture in base64; ``quality``: of jpeg and webp, 100 where None. ``record``: what is written into it."""
    return base64.b64encode(picture_bytes(picture, f".{form}", record, quality=quality)).decode()


def all_encoded(drawing: Drawing, drawn: Drawn, form: Format, quality: int | None) -> tuple[list[str], float]:
    """Every picture of a request, with its record; and how long that took, in seconds."""
    began_s = time.monotonic()
    texts = [encoded(frames[0], form, quality, drawing.record(i)) for i, frames in enumerate(drawing.pictures(drawn))]
    return texts, time.monotonic() - began_s


def report(drawing: Drawing, drawn: Drawn, steps: Sequence[Step], decode_s: float) -> Report:
    """What was done for a request."""
    return Report(
        model=drawing.model.name,
        plan=drawn.plan.name,
        sampler=drawn.plan.sampler.name,
        steps=dict(drawn.steps),
        guidance_scale=drawing.guidance_scale,
        queue_s=round(drawn.waited_s, 6),
        draw_s=round(drawn.drawn_s, 6),
        decode_s=round(decode_s, 6),
        company=round(sum(step.company for step in steps) / len(steps), 3),
        cut=list(drawing.cuts) or None,
    )
