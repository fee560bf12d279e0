"""How much a client may ask for, and what its answers say about that."""

from __future__ import annotations

import math
from collections.abc import Callable

from flask import Response, g

from transformers_api.errors import RateLimited, TooManyTokens
from transformers_api.serving.limits.rate_limit import ROUNDING_S, Level, Limiter

HEADERS = tuple(
    f"X-RateLimit-{what}-{kind}"
    for kind in ("Requests", "Tokens")
    for what in ("Limit", "Remaining", "Reset")
)


def take_request(limiter: Limiter, message: str = "Rate limit exceeded") -> None:
    """One request of this client's bucket. Raises RateLimited."""
    level = limiter.take(g.client)
    _tell("Requests", level)
    if level.wait_s:
        raise RateLimited(message, retry_after=math.ceil(level.wait_s))


class Reservation:
    """The tokens that an answer may need, taken out of a client's bucket before it begins."""

    def __init__(self, limiter: Limiter, tokens: int) -> None:
        """Raises RateLimited, or TooManyTokens where waiting will not help."""
        self._limiter = limiter
        self._client: str = g.client  # at its end the request is not at hand any more
        self._rest = [tokens]
        self.used: Callable[[], int] = _nothing
        level = limiter.take(self._client, tokens)
        _tell("Tokens", level)
        most = limiter.rate.per_min
        if math.isinf(level.wait_s):
            raise TooManyTokens(
                f"This request may take {tokens} tokens with its prompt and its max_tokens; a "
                f"client has {most} a minute",
                param="max_tokens",
            )
        if level.wait_s:
            raise RateLimited(
                f"Rate limit exceeded: {tokens} tokens were asked for, {level.remaining} of "
                f"{most} a minute are left",
                retry_after=math.ceil(level.wait_s),
            )

    def settle(self) -> None:
        """Give back what was not used. Once, however often called."""
        try:
            reserved = self._rest.pop()  # of two threads one finds it
        except IndexError:
            return
        if (left := reserved - self.used()) > 0:
            self._limiter.give_back(self._client, left)


def show(response: Response) -> Response:
    """Add the headers of OpenAI for every bucket that this request took from."""
    levels: dict[str, Level] = g.get("levels", {})
    for kind, level in levels.items():
        response.headers[f"X-RateLimit-Limit-{kind}"] = str(level.rate.burst)
        response.headers[f"X-RateLimit-Remaining-{kind}"] = str(level.remaining)
        response.headers[f"X-RateLimit-Reset-{kind}"] = duration(level.full_in_s)
    return response


def duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 8s, 1m30s; rounded up."""
    if (milliseconds := max(0, math.ceil((seconds - ROUNDING_S) * 1000))) < 1000:
        return f"{milliseconds}ms"
    minutes, rest = divmod(math.ceil(seconds - ROUNDING_S), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _tell(kind: str, level: Level) -> None:
    if level.rate.per_min:
        g.setdefault("levels", {})[kind] = level


def _nothing() -> int:
    return 0
