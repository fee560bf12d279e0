"""The body of a request that is in memory already, as the application reads it."""

from __future__ import annotations

import io
from typing import Any

from gunicorn.http.body import Body, LengthReader  # type: ignore[import-untyped]

LARGE = 1 << 20  # bytes


def read_at_once(environ: dict[str, Any]) -> None:
    """Have a large body that is here be read from memory.

    Gunicorn's reader copies all that is left of it for each piece of 64 KiB: of 75 MB that takes
    more than a minute.
    """
    body, length = environ["wsgi.input"], int(environ.get("CONTENT_LENGTH") or 0)
    if length < LARGE or not isinstance(body, Body) or not isinstance(body.reader, LengthReader):
        return
    unreader = body.reader.unreader
    data: bytes = unreader.take_buffered()
    if len(data) < length:  # it is too long: nobody has waited for the rest
        unreader.unread(data)
        return
    body.reader.length = 0  # all of it has been read
    unreader.unread(data[length:])
    environ["wsgi.input"] = io.BytesIO(data if len(data) == length else data[:length])
