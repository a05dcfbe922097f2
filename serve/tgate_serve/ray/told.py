"""What of an answer is sent to the client, where more than one replica may begin it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastapi.sse import format_sse_event
from starlette.types import Message


class Told:
    """The messages of all attempts, as one answer.

    An answer in one piece is sent once it is there whole. Of a stream each event is sent once: a second attempt draws
    the same from the beginning, and what the client has had of it already is left out.
    """

    def __init__(self) -> None:
        self.began = False
        """Whether the client has had anything of a stream."""
        self.ended = False
        """Whether it has had all."""
        self._held: list[Message] = []
        self._streams = False
        self._events: set[tuple[Any, ...]] = set()

    def due(self, message: Message) -> Iterator[Message]:
        """What is to be sent now that a replica has sent ``message``, as ASGI has both."""
        if message["type"] == "http.response.start":
            kinds = [value for name, value in message["headers"] if name.lower() == b"content-type"]
            self._streams = any(kind.startswith(b"text/event-stream") for kind in kinds)
            self._held = []
        if not self._streams:
            self._held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                yield from self._whole()
        elif message["type"] == "http.response.start":
            if not self.began:
                self.began = True
                yield message
        elif self._is_news(message["body"]):
            self.ended = not message.get("more_body")
            yield message

    def failed(self, body: bytes) -> Message:
        """The end of a stream by an error, given the JSON that it would have been answered with."""
        self.ended = True
        told = {"type": "error", **json.loads(body)}
        event = format_sse_event(data_str=json.dumps(told), event="error")
        return {"type": "http.response.body", "body": event, "more_body": False}

    def _whole(self) -> Iterator[Message]:
        if self.began:  # a second attempt was refused
            yield self.failed(b"".join(message["body"] for message in self._held[1:]))
        else:
            self.ended = True
            yield from self._held

    def _is_news(self, chunk: bytes) -> bool:
        """Whether the client has not had such an event. What is no event of an image, as signs of life, is always."""
        _, found, data = chunk.partition(b"\ndata: ")
        event = json.loads(data) if found else {}
        if "image_index" not in event:
            return True
        key = (event["type"], event["image_index"], event.get("step"), event.get("partial_image_index"))
        if key in self._events:
            return False
        self._events.add(key)
        return True
