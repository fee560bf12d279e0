"""OpenAI's headers about the limits of a client.

flask-limiter's own would give the reset as a time since 1970, and Retry-After with every answer.
"""

from __future__ import annotations

import math

from flask import Response, g

from transformers_api.serving.limits.token_bucket import ROUNDING_S, Level

HEADERS = tuple(
    f"X-RateLimit-{what}-{kind}"
    for kind in ("Requests", "Tokens")
    for what in ("Limit", "Remaining", "Reset")
)


def note(kind: str, level: Level) -> None:
    """Keep the level of a bucket, of "Requests" or "Tokens", for the headers of this answer."""
    g.setdefault("levels", {})[kind] = level


def show(response: Response) -> Response:
    """Add the headers for every bucket that this request took from."""
    levels: dict[str, Level] = g.get("levels", {})
    for kind, level in levels.items():
        response.headers[f"X-RateLimit-Limit-{kind}"] = str(level.rate.amount)
        response.headers[f"X-RateLimit-Remaining-{kind}"] = str(level.remaining)
        response.headers[f"X-RateLimit-Reset-{kind}"] = duration(level.full_in_s)
    return response


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 8s, 1m30s; rounded up."""
    if (milliseconds := max(0, math.ceil((seconds - ROUNDING_S) * 1000))) < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds - ROUNDING_S), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
