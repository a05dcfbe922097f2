"""A request's body as replicas get it: what it left open, and a second attempt has to repeat, is settled."""

from __future__ import annotations

import json
import time
from typing import Any

from tgate_runtime.generators import random_seed

_MOST_S = 1e9


class Asked:
    """A body, of which no more is read than what matters here: the replica says what is wrong with it."""

    def __init__(self, body: bytes) -> None:
        """A seed is drawn where none was said: each attempt makes the same picture."""
        self._body, self._came_s = body, time.monotonic()
        self._fields: dict[str, Any] = {}
        try:
            fields = json.loads(body)
            if isinstance(fields, dict):
                if fields.get("seed") is None:
                    fields["seed"] = random_seed()
                self._body, self._fields = json.dumps(fields).encode(), fields
        except (ValueError, RecursionError):
            pass

    @property
    def model(self) -> str | None:
        """The model's name; None where none was said, or nothing that can be one."""
        name = self._fields.get("model")
        return name if isinstance(name, str) else None

    def body(self, *, again: bool) -> bytes:
        """What a replica is to read. ``again``: of the time that the request had, as much as is left."""
        within_s: Any = self._fields.get("within_s")
        if not again or type(within_s) not in (int, float) or not 0 < within_s < _MOST_S:
            return self._body
        left_s = max(0.001, within_s - (time.monotonic() - self._came_s))
        return json.dumps({**self._fields, "within_s": left_s}).encode()
