"""What one request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from tgate_runtime.request import MOST_CHARACTERS


@dataclass(frozen=True, kw_only=True)
class Limits:
    """``body_bytes``: of a request, within ``body_s`` seconds. ``prompt``: characters of a prompt or a negative one.
    ``images``: n. ``pixels``: of all pictures of a request, a video's frames among them. ``jobs``: videos that are
    kept, finished ones for ``job_s`` seconds."""

    body_bytes: int = 2**25
    body_s: float = 30.0
    prompt: int = MOST_CHARACTERS
    images: int = 10
    pixels: int = 2**26
    jobs: int = 64
    job_s: float = 3600.0
