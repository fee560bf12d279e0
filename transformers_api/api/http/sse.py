"""Server-sent events: frames, and nothing of what is in them."""

from __future__ import annotations

from typing import Any

import orjson

from transformers_api.api.http.strict_json import OPTIONS

CONTENT_TYPE = "text/event-stream; charset=utf-8"
PING = b": ping\n\n"  # a comment: every client skips it, and proxies see life
DONE = b"data: [DONE]\n\n"


def frame(payload: Any, event: str | None = None) -> bytes:
    """One event with ``payload`` as JSON; ``event`` is its name, for streams of several kinds."""
    data = orjson.dumps(payload, option=OPTIONS)
    if event is None:
        return b"data: %b\n\n" % data
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)
