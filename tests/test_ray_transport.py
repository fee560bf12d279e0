"""The way over Ray's handles, with a handle that stands in for Ray's."""

from __future__ import annotations

import asyncio
from concurrent.futures import CancelledError
from typing import Any

import pytest

from transformers_api.cluster import ray_runtime
from transformers_api.cluster.transport import RayTransport
from transformers_api.config.settings import Settings
from transformers_api.errors import ReplicaFailed


class Messages:
    """What a handle gives for a stream: one message, and then what ``then`` does."""

    def __init__(self, then) -> None:
        self._then, self._count = then, 0
        self.is_cancelled = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        self._count += 1
        return "first" if self._count == 1 else await self._then()

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """Meets as much of Serve's handle as is used of it."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def options(self, **options):
        return self

    def remote(self, *arguments):
        return self._answer


def over(answer) -> RayTransport:
    transport = RayTransport(Settings(), (), lambda: None)
    transport._handles = {"": Handle(answer)}
    return transport


async def given_up() -> None:
    raise asyncio.CancelledError


def test_a_stream_that_its_replica_gives_up_fails():
    messages = Messages(given_up)
    transport, read = over(messages), []

    async def drain() -> None:
        async for message in transport.stream("generate", "one"):
            read.append(message)

    with pytest.raises(ReplicaFailed):
        transport.start(drain()).result(30)
    assert read == ["first"]
    assert messages.is_cancelled


def test_a_call_that_its_replica_gives_up_fails():
    class Response:
        def __await__(self):
            return given_up().__await__()

        def cancel(self) -> None: ...

    transport = over(Response())
    with pytest.raises(ReplicaFailed):
        transport.start(transport.call("describe", "one")).result(30)


def test_whoever_stops_reading_is_not_told_of_a_failure():
    async def forever() -> None:
        await asyncio.Event().wait()

    messages = Messages(forever)
    transport, began = over(messages), asyncio.Event()

    async def drain() -> None:
        async for _ in transport.stream("generate", "one"):
            began.set()

    async def stop() -> None:
        reader = asyncio.ensure_future(drain())
        await began.wait()
        reader.cancel()
        await reader

    with pytest.raises(CancelledError):
        transport.start(stop()).result(30)
    assert messages.is_cancelled


def test_replicas_that_cannot_be_asked_now_are_silent_and_not_gone(monkeypatch):
    given: dict[str, Any] = {"shared": ["a", "b"], "own": ["c"]}

    def broadcast(handle, method, arguments):
        if isinstance(given[handle], Exception):
            raise given[handle]
        return given[handle]

    def asked() -> list[Any]:
        return transport.start(transport.broadcast("status")).result(30)

    monkeypatch.setattr(ray_runtime, "broadcast", broadcast)
    transport = RayTransport(Settings(), (), lambda: None)
    transport._handles = {"": "shared", "hot": "own"}
    assert asked() == ["a", "b", "c"]
    given["shared"] = ValueError("of Ray's")
    assert asked() == [None, None, "c"]
    given |= {"shared": [], "own": TimeoutError()}
    assert asked() == [None]
    given["shared"] = ValueError("of Ray's")
    with pytest.raises(ValueError, match="of Ray's"):
        asked()
