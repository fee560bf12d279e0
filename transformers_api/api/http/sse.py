"""Server-sent events: frames and headers, and nothing of what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flask import Response

from transformers_api.api.http import strict_json

PING = b": ping\n\n"  # a comment: every client skips it, and proxies see life
DONE = b"data: [DONE]\n\n"


def frame(payload: Any, event: str | None = None) -> bytes:
    """One event with ``payload`` as JSON; ``event`` is its name, for streams of several kinds."""
    return framed(strict_json.dump(payload), event)


def framed(data: bytes, event: str | None = None) -> bytes:
    """The same with JSON that is written already."""
    name = b"" if event is None else b"event: %b\n" % event.encode()
    return b"%bdata: %b\n\n" % (name, data)


def response(frames: Iterator[bytes]) -> Response:
    """A streamed answer that proxies pass on as it comes."""
    answer = Response(frames, content_type="text/event-stream; charset=utf-8")
    answer.headers["Cache-Control"] = "no-cache"
    answer.headers["X-Accel-Buffering"] = "no"
    return answer
