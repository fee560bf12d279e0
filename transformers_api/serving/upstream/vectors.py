"""An upstream's vectors, checked."""

from __future__ import annotations

import base64
import binascii
import math
from typing import Any

import orjson

from transformers_api.errors import UpstreamFailed

MOST_TOKENS = 1 << 31


def read_vectors(body: bytes, *, count: int, is_text: bool) -> dict[str, Any]:
    """The answer to a request for ``count`` vectors, as base64 where ``is_text``.

    Raises UpstreamFailed for all that is no such answer.
    """
    try:
        answer = orjson.loads(body)
        rows = sorted(answer["data"], key=lambda row: int(row["index"]))
        vectors = [row["embedding"] for row in rows]
        tokens = answer.get("usage", {}).get("prompt_tokens", 0)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _nonsense() from None
    fits = type(tokens) is int and 0 <= tokens < MOST_TOKENS
    if not fits or [row["index"] for row in rows] != list(range(count)):
        raise _nonsense()
    if not all(map(_is_base64 if is_text else _is_numbers, vectors)):
        raise _nonsense()
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": vector}
            for index, vector in enumerate(vectors)
        ],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _is_numbers(vector: Any) -> bool:
    return isinstance(vector, list) and all(
        type(number) in (int, float) and math.isfinite(number) for number in vector
    )


def _is_base64(vector: Any) -> bool:
    try:
        return isinstance(vector, str) and len(base64.b64decode(vector, validate=True)) % 4 == 0
    except binascii.Error:
        return False


def _nonsense() -> UpstreamFailed:
    return UpstreamFailed("The upstream sends what is no list of vectors")
