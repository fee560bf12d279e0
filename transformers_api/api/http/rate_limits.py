"""The limits of a client: flask-limiter counts requests, and beside it tokens are reserved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

from flask import Flask, g, request
from flask_limiter import Limiter, RequestLimit

from transformers_api.api.http import rate_limit_headers
from transformers_api.errors import RateLimited, TooManyTokens
from transformers_api.serving.limits import token_bucket
from transformers_api.serving.limits.access import Access, is_loopback
from transformers_api.serving.limits.redis_buckets import storage_of
from transformers_api.serving.limits.token_bucket import Rate, TokenBucketRateLimiter

_PASSED_ON = ("Forwarded", "X-Forwarded-For", "X-Real-Ip", "Via")  # what proxies write


class RateLimits:
    """The limits of one application, in its memory or in redis."""

    def __init__(self, access: Access, redis_url: str | None = None) -> None:
        self._access = access
        uri, options = storage_of(redis_url)
        self._limiter = Limiter(
            _client,
            strategy=token_bucket.NAME,
            storage_uri=uri,
            storage_options=options,
            request_identifier=lambda: "requests",  # unknown URLs are counted, too
            on_breach=self._refuse,
        )
        self._take_request = _nothing
        if access.requests is not None:
            limit = self._limiter.shared_limit(repr(access.requests), scope="requests")
            self._take_request = limit(self._pass)

    def init_app(self, app: Flask) -> None:
        """Make the storage, and show what is left in the headers of answers."""
        self._limiter.init_app(app)
        app.after_request(rate_limit_headers.show)

    @property
    def strategy(self) -> TokenBucketRateLimiter:
        """The buckets of ``init_app``."""
        return cast(TokenBucketRateLimiter, self._limiter.limiter)

    def take_request(self) -> None:
        """Take one request of this client, where all requests are limited. Raises RateLimited."""
        if self._access.limits_all:
            self._take_request()

    def take_inspection(self) -> None:
        """Take one request of this client, out of the same bucket. Raises RateLimited."""
        if not (self._access.spares_local and _is_local()):
            self._take_request()

    @property
    def inspections_per_min(self) -> int | None:
        """The limit of this client's inspections; None: there is none."""
        rate, is_spared = self._access.requests, self._access.spares_local and _is_local()
        return None if rate is None or is_spared else rate.per_min

    def reserve(self, tokens: int) -> Reservation | None:
        """Take ``tokens`` of this client; None where there is no limit.

        Raises RateLimited, or TooManyTokens where waiting will not help.
        """
        rate = self._access.tokens
        return None if rate is None else Reservation(self.strategy, rate, tokens)

    def _pass(self) -> None:
        rate_limit_headers.note("Requests", self.strategy.latest)

    def _refuse(self, _: RequestLimit) -> None:
        self._pass()
        raise RateLimited("Rate limit exceeded", retry_after=math.ceil(self.strategy.latest.wait_s))


class Reservation:
    """The tokens that an answer may need, taken out of a client's bucket before it begins."""

    def __init__(self, strategy: TokenBucketRateLimiter, rate: Rate, tokens: int) -> None:
        """Raises RateLimited, or TooManyTokens where waiting will not help."""
        self._strategy, self._rate = strategy, rate
        self._client = _client()  # at its end the request is not at hand any more
        self._rest = [tokens]
        self.used: Callable[[], int] = lambda: 0
        level = strategy.take(rate, self._client, "tokens", cost=tokens)
        rate_limit_headers.note("Tokens", level)
        if math.isinf(level.wait_s):
            raise TooManyTokens(
                f"This request may take {tokens} tokens with its prompt and its max_tokens; a "
                f"client has {rate.per_min} a minute",
                param="max_tokens",
            )
        if level.wait_s:
            raise RateLimited(
                f"Rate limit exceeded: {tokens} tokens were asked for, {level.remaining} of "
                f"{rate.per_min} a minute are left",
                retry_after=math.ceil(level.wait_s),
            )

    def settle(self) -> None:
        """Give back what was not used. Once, however often called."""
        try:
            reserved = self._rest.pop()  # only one of two threads gets it
        except IndexError:
            return
        used, self.used = self.used, lambda: 0  # it knows the answer, which knows this
        if (left := reserved - used()) > 0:
            self._strategy.give_back(self._rate, self._client, "tokens", cost=left)


def _client() -> str:
    """The key of this request's buckets: flask-limiter would not count an empty one."""
    return g.client or "local"


def _is_local() -> bool:
    """True for a client on this machine itself, and not for one that a proxy has passed on."""
    headers = request.headers
    is_passed_on = any(name in headers for name in _PASSED_ON)
    return is_loopback(request.remote_addr or "") and not is_passed_on


def _nothing() -> None:
    return None
