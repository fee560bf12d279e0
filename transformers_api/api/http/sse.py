"""Server-sent events: frames, and nothing of what is in them."""

from __future__ import annotations

from typing import Any

import orjson

from transformers_api.api.http.strict_json import OPTIONS

# JSON leaves them as they are, and programs that read lines of text end a line there.
_LINE_ENDS = {"\u2028": b"\\u2028", "\u2029": b"\\u2029", "\x85": b"\\u0085"}
LINE_ENDS = (b"\xe2\x80", b"\xc2\x85")  # how they begin in UTF-8
CONTENT_TYPE = "text/event-stream; charset=utf-8"
PING = b": ping\n\n"  # a comment: every client skips it, and proxies see life
DONE = b"data: [DONE]\n\n"


def in_one_line(data: bytes) -> bytes:
    """JSON that is one line for whoever reads it; only needed where one of LINE_ENDS is in it."""
    for character, escape in _LINE_ENDS.items():
        data = data.replace(character.encode(), escape)
    return data


def frame(payload: Any, event: str | None = None) -> bytes:
    """One event with ``payload`` as JSON; ``event`` is its name, for streams of several kinds."""
    data = orjson.dumps(payload, option=OPTIONS)
    if LINE_ENDS[0] in data or LINE_ENDS[1] in data:
        data = in_one_line(data)
    if event is None:
        return b"data: %b\n\n" % data
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)
