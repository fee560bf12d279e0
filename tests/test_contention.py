"""What `benchmarks.contention` measures with: the client, and a server that notes its steps."""

from __future__ import annotations

import asyncio
import os
import threading
import time

import pytest

from benchmarks import contention, load, servers, stamped
from transformers_api.tallies import EngineTally


def told(*events: str) -> list[bytes]:
    """A streamed answer, a byte at a time."""
    chunks = [f"data: {event}\n\n".encode() for event in (*events, "[DONE]")]
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return [bytes([byte]) for byte in head + body + b"0\r\n\r\n"]


def answered(*pieces: bytes) -> load.Answer:
    """What the client makes of an answer in these pieces."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    async def ask() -> load.Answer:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            return await load.ask(load.Server(f"http://127.0.0.1:{port}/v1", "m"), load.HELLO, 2)

    return asyncio.run(ask())


EVENTS = (
    '{"choices": [{"delta": {"content": "a"}}]}',
    '{"choices": [{"delta": {"content": "b"}}]}',
    '{"choices": [], "usage": {"completion_tokens": 2, "prompt_tokens": 7}}',
)


def test_the_client_reads_an_answer_however_it_is_cut():
    pieces = told(*EVENTS)
    for shown in (pieces, [b"".join(pieces)]):
        answer = answered(*shown)
        assert (answer.tokens, answer.prompt_tokens, len(answer.moments)) == (2, 7, 2)
        assert answer.started < answer.moments[0] <= answer.moments[1]


def test_the_client_takes_no_answer_that_is_cut_off_refused_or_failed():
    with pytest.raises(RuntimeError, match="cut off"):
        answered(*told(*EVENTS)[:-9])
    with pytest.raises(RuntimeError, match="status 503: not now"):
        answered(b"HTTP/1.1 503 Busy\r\n\r\nnot", b" now")
    with pytest.raises(RuntimeError, match="the stream failed: broken"):
        answered(*told('{"error": "broken"}'))


def test_a_stamped_server_notes_the_steps_that_give_tokens(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(EngineTally, "on_step", lambda _, read, gaps: heard.append((read, gaps)))
    stamped.note_steps(tmp_path / "stamps")
    began = time.perf_counter()
    for read, gaps in ((64, []), (2, [0.1, 0.1]), (1, [0.1])):
        EngineTally().on_step(read, gaps)
    noted = stamped.steps(tmp_path / "stamps", began)
    assert [tokens for _, tokens in noted] == [2, 1]
    assert began < noted[0][0] <= noted[1][0] < time.perf_counter()
    assert stamped.steps(tmp_path / "stamps", noted[0][0]) == noted[1:]
    assert len(heard) == 3


def test_tokens_that_come_before_the_next_step_are_delivered_by_this_one():
    answers = [load.Answer(0.0, [1.1, 2.1, 3.2]), load.Answer(0.0, [1.3, 2.2, 4.1])]
    steps = [(1.0, 2.0), (2.0, 3.0), (3.0, 4.0)]
    assert list(contention.deliveries(steps, answers)) == pytest.approx([0.3, 0.2])


def test_the_time_of_every_thread_of_a_server_is_known():
    before = servers.thread_times(os.getpid())
    sum(range(10**6))
    spent = servers.thread_times(os.getpid())
    assert spent[str(threading.get_native_id())] > before[str(threading.get_native_id())]
