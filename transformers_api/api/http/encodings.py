"""Bodies that a client has compressed."""

from __future__ import annotations

import zlib

from transformers_api.errors import InvalidRequest, PayloadTooLarge, UnsupportedEncoding

READABLE = "gzip, deflate"
_MEMBERS = 16  # that gzip may have; each costs a copy of the rest
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


def decoded(raw: bytes, encoding: str, most_bytes: int) -> bytes:
    """``raw`` without its content encoding.

    Raises UnsupportedEncoding for one that is not read, PayloadTooLarge beyond ``most_bytes``,
    InvalidRequest for what is not so encoded.
    """
    if encoding == "identity":
        return raw
    if encoding in ("gzip", "x-gzip"):
        formats: tuple[int, ...] = (_GZIP,)
    elif encoding == "deflate":
        formats = (_ZLIB, _RAW)  # the standard's, and what some clients take it for
    else:
        raise UnsupportedEncoding(
            f"Content-Encoding {encoding[:64]!r} is not read here; send the body as it is, or as "
            f"{READABLE}"
        )
    for form in formats:
        try:
            return _inflated(raw, form, most_bytes)
        except zlib.error:
            continue
    raise InvalidRequest(f"The body is not {encoding}, as its Content-Encoding says")


def _inflated(raw: bytes, form: int, most_bytes: int) -> bytes:
    pieces, size = [], 0
    for _ in range(_MEMBERS):
        stream = zlib.decompressobj(form)
        piece = stream.decompress(raw, most_bytes - size + 1)
        size += len(piece)
        if size > most_bytes:
            raise PayloadTooLarge(f"The body has more than {most_bytes} bytes")
        if not stream.eof:
            raise zlib.error("it ends too early")
        pieces.append(piece)
        raw = stream.unused_data
        if not raw:
            return b"".join(pieces)
    raise zlib.error("there is more behind it")
