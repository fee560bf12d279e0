"""Requests to upstreams: one event loop on a thread of its own, bounded reads, mapped errors.

Only the registry says where they go. Redirects are not followed, proxies of the environment are
not asked, and what comes back has at most so many bytes.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import lru_cache
from typing import Any

import httpx2
import orjson

from transformers_api.config.environment import secret
from transformers_api.errors import (
    ApiError,
    ContextLengthExceeded,
    InvalidRequest,
    Unavailable,
    UpstreamBusy,
    UpstreamFailed,
    UpstreamTimeout,
)
from transformers_api.serving.models.spec import UpstreamSource
from transformers_api.serving.upstream.loop import BackgroundLoop
from transformers_api.serving.upstream.pace import PART_S, Pace, Turn

MAX_LINE_BYTES = 4 << 20  # of one event
MAX_STREAM_BYTES = 256 << 20  # of one answer
MAX_WHOLE_BYTES = 64 << 20  # of one that comes in one piece, such as vectors
MAX_ERROR_BYTES = 64 << 10
LINES = 16  # between two looks at how long they have taken
CONNECT_S = 10.0
MOST_CONNECTIONS = 1024
_CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_SECONDS = re.compile(r"[0-9]{1,5}")  # of Retry-After; it may also be a date, or nonsense
_MOST_MESSAGE = 500  # characters


class UpstreamConnections:
    """The connections to all upstreams. From any thread, through ``start``."""

    def __init__(self) -> None:
        self.start = BackgroundLoop("upstreams").start
        self._client: httpx2.AsyncClient | None = None
        self._paces: dict[str, Pace] = {}

    def pace(self, upstream: UpstreamSource) -> Pace:
        """The pace of all answers of one upstream, of which the registry has so many."""
        return self._paces.setdefault(upstream.url, Pace())

    async def post(
        self, upstream: UpstreamSource, route: str, body: Mapping[str, Any]
    ) -> httpx2.Response:
        """The response, whose body is not read yet and must be closed.

        Raises what its status means, UpstreamFailed, UpstreamTimeout.
        """
        client, headers = self._http(), {"Accept-Encoding": "identity"}
        if upstream.api_key_env is not None:
            headers["Authorization"] = f"Bearer {secret(upstream.api_key_env)}"
        request = client.build_request(
            "POST",
            f"{upstream.url}/{route}",
            content=orjson.dumps({**body, "model": upstream.model}),
            headers={**headers, "Content-Type": "application/json"},
            timeout=httpx2.Timeout(upstream.timeout_s, connect=min(CONNECT_S, upstream.timeout_s)),
        )
        try:
            async with asyncio.timeout(2 * upstream.timeout_s):  # each silence is shorter
                response = await client.send(request, stream=True)
            if response.status_code == 200:
                return response
            try:
                text = await read_whole(response, MAX_ERROR_BYTES, self.pace(upstream))
            finally:
                await response.aclose()
        except (httpx2.HTTPError, TimeoutError) as error:
            raise transport_error(error) from None
        raise refusal(response.status_code, text, response.headers.get("Retry-After"))

    def _http(self) -> httpx2.AsyncClient:
        if self._client is None:
            limits = httpx2.Limits(max_connections=MOST_CONNECTIONS, max_keepalive_connections=64)
            self._client = httpx2.AsyncClient(
                limits=limits, follow_redirects=False, trust_env=False, verify=_certificates()
            )
        return self._client


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    """Those of the system; reading them takes as long as many requests."""
    return ssl.create_default_context()


async def read_whole(response: httpx2.Response, most: int, pace: Pace) -> bytes:
    """The body. Raises UpstreamFailed for more than ``most`` bytes."""
    parts, size = [], 0
    async for part in response.aiter_raw():
        size += len(part)
        if size > most:
            raise UpstreamFailed(f"The upstream sends more than {most} bytes")
        parts.append(part)
        await pace.rest(PART_S)
    return b"".join(parts)


async def read_events(response: httpx2.Response, pace: Pace) -> AsyncIterator[bytes]:
    """The data of each server-sent event. Raises UpstreamFailed where they are too large.

    Whoever takes the events is on the pace, too.
    """
    rest, size, turn = bytearray(), 0, Turn(pace)
    async for part in response.aiter_raw():
        turn.begin()
        size += len(part)
        rest += part  # in place: a long line may come byte by byte
        lines: list[bytearray] = []
        if b"\n" in part:
            *lines, rest = rest.split(b"\n")
        if size > MAX_STREAM_BYTES or len(rest) > MAX_LINE_BYTES:
            raise UpstreamFailed("The upstream sends more than an answer may have")
        for number, line in enumerate(lines, start=1):
            if line.startswith(b"data:"):
                yield bytes(line[5:].strip())
            if not number % LINES and turn.is_over:
                await turn.end()
        await turn.end()


def transport_error(error: Exception) -> ApiError:
    """The error of a connection that did not hold; it names no address."""
    if isinstance(error, httpx2.TimeoutException | TimeoutError):
        return UpstreamTimeout("The upstream of this model is silent", retry_after=5)
    kind = type(error).__name__
    return UpstreamFailed(f"The upstream of this model cannot be reached ({kind})", retry_after=5)


def refusal(status: int, text: bytes, retry_after: str | None = None) -> ApiError:
    """The error that stands for an upstream's status and body."""
    details = error_details(text)
    message = details.get("message") or "it gives no reason"
    wait_s = int(retry_after) if retry_after and _SECONDS.fullmatch(retry_after) else 1
    if status == 429:
        return UpstreamBusy(f"The upstream takes no more: {message}", retry_after=wait_s)
    if status in (503, 529):
        return Unavailable(f"The upstream cannot serve now: {message}", retry_after=wait_s)
    if status in (408, 504):
        return UpstreamTimeout(f"The upstream took too long: {message}")
    if status in (400, 413, 422):
        code = details.get("code")
        kind = ContextLengthExceeded if code == ContextLengthExceeded.code else InvalidRequest
        return kind(f"The upstream refuses this: {message}", param=details.get("param"))
    if 300 <= status < 400:
        return UpstreamFailed(f"The upstream redirects ({status}), which is not followed")
    if status in (401, 403):
        return UpstreamFailed(f"The upstream refuses this server's key ({status})")
    return UpstreamFailed(f"The upstream answers {status}: {message}")


def error_details(text: bytes) -> dict[str, str]:
    """``message``, ``code`` and ``param`` of an error's body in the shape of many servers."""
    try:
        body = orjson.loads(text)
    except ValueError:
        return {}
    error = body.get("error", body) if isinstance(body, dict) else {}
    if isinstance(error, str):
        error = {"message": error}
    if not isinstance(error, dict):
        return {}
    fields = {"message": error.get("message") or error.get("detail"), "code": error.get("code")}
    fields["param"] = error.get("param")
    return {
        name: _CONTROLS.sub(" ", value)[:_MOST_MESSAGE]
        for name, value in fields.items()
        if isinstance(value, str)
    }
