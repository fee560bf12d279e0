"""A front's look at the cluster's head: noticed when it goes, bounded while it is away."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from transformers_api.cluster import head_watch
from transformers_api.cluster.head_watch import HeadWatch
from transformers_api.errors import Unavailable


@pytest.fixture
def port(monkeypatch):
    """A listening socket, the head's; looks at it are fast."""
    monkeypatch.setattr(head_watch, "LOOK_S", 0.01)
    monkeypatch.setattr(head_watch, "PATIENCE_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as port:
        yield port


def watch_of(port):
    return HeadWatch(f"127.0.0.1:{port.getsockname()[1]}")


async def late(seconds):
    await asyncio.sleep(seconds)
    return "answer"


def gone(watch):
    until = time.monotonic() + 30
    while watch.fault is None:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_head_that_goes_is_noticed_and_one_that_comes_back(port):
    watch = watch_of(port)
    watch.begin()
    assert (watch.fault, watch.away_s) == (None, 0.0)
    address = port.getsockname()
    port.close()
    gone(watch)
    assert "is away" in watch.fault
    assert watch.away_s > 0
    with socket.create_server(address):
        until = time.monotonic() + 30
        while watch.fault is not None:
            assert time.monotonic() < until
            time.sleep(0.01)


def test_while_it_is_there_an_answer_may_take_its_time(port):
    watch = watch_of(port)
    watch.begin()
    assert asyncio.run(watch.accepted(late(0.3))) == "answer"


def test_while_it_is_away_only_what_is_taken_at_once_is_answered(port):
    watch = watch_of(port)
    watch.begin()
    port.close()
    gone(watch)
    assert asyncio.run(watch.accepted(late(0))) == "answer"
    began = time.monotonic()
    with pytest.raises(Unavailable, match="is away") as refusal:
        asyncio.run(watch.accepted(late(60)))
    assert refusal.value.retry_after == 5
    assert time.monotonic() - began < 30


def test_an_error_of_the_answer_itself_comes_through(port):
    async def failing():
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        asyncio.run(watch_of(port).accepted(failing()))


def test_a_wrong_or_closed_port_is_refused_at_once(port):
    watch = watch_of(port)
    watch.reach()
    port.close()
    with pytest.raises(OSError, match="refused"):
        watch.reach()
