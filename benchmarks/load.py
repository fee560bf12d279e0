"""Measure a running OpenAI-compatible server: N streams at once, every token timed.

    python -m benchmarks.load --base-url http://127.0.0.1:5000/v1 --streams 1,8 --max-tokens 64

Standard library and bare sockets only: on a small machine the client takes its cores from the
server, so it has to cost next to nothing: it notes what came when, and reads it in the end. Its
share is in the output.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import socket
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

Message = dict[str, str]
RECEIVED = 1 << 16  # bytes, at most, at once
LAST_CHUNK = b"\r\n0\r\n\r\n"
HELLO: list[Message] = [{"role": "user", "content": "Say hello."}]
TEXT = (
    "amber basin candle drift ember fable garden harbour island juniper kettle lantern meadow "
    "needle orchard pebble quarry ribbon saddle timber valley willow yonder zephyr copper violet"
)


@dataclass(frozen=True)
class Server:
    """Where to send requests, and what this server needs to be told."""

    base_url: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)  # merged into each body


@dataclass(frozen=True)
class Level:
    """What was measured at one number of streams; times are medians over the requests."""

    streams: int
    requests: int
    prompt_tokens: int
    tokens: int  # generated, all requests
    ttft_ms: float  # from sending the request to its first text
    itl_ms: float  # from first to last text, per token
    tokens_per_s: float  # all streams together, waiting and prefill included
    client_cpu: float  # share of one core that this client took
    gap_ms: float = 0.0  # median between two pieces of text of a stream, of all streams
    gap_p95_ms: float = 0.0
    steady_ms: float = 0.0  # the same while no stream waits for its first piece
    steady_p95_ms: float = 0.0


@dataclass
class Answer:
    """One streamed request; times in seconds, by time.perf_counter()."""

    started: float
    moments: list[float] = field(default_factory=list)  # of pieces of text
    tokens: int = 0
    prompt_tokens: int = 0

    @property
    def first(self) -> float:
        """Seconds until the first piece of text."""
        return self.moments[0] - self.started

    @property
    def per_token(self) -> float:
        """Seconds from first to last piece, per token."""
        return (self.moments[-1] - self.moments[0]) / max(1, self.tokens - 1)

    def take(self, event: dict[str, Any], moment: float) -> None:
        """Note what an event says that came then. Raises RuntimeError for an error."""
        if "error" in event:
            raise RuntimeError(f"the stream failed: {event['error']}")
        if usage := event.get("usage"):
            self.tokens = usage["completion_tokens"]
            self.prompt_tokens = usage["prompt_tokens"]
        if any(choice["delta"].get("content") for choice in event["choices"]):
            self.moments.append(moment)


def conversation(words: int, rng: random.Random) -> list[Message]:
    """About ``words`` words to the model, with instructions that are new each time.

    They come first in every template, in the place of its own ones, so that no prefix cache helps.
    """
    text = " ".join(rng.choices(TEXT.split(), k=words))
    return [
        {"role": "system", "content": f"{rng.randrange(10**6)}: you tell stories, and do it well."},
        {"role": "user", "content": f"{text}. Tell a long story about all of these."},
    ]


@dataclass(frozen=True)
class Run:
    """Answers that were waited for, and what that took, in seconds."""

    streams: int
    answers: list[Answer]
    wall_s: float
    cpu_s: float  # of this client

    def level(self) -> Level:
        """What is to be known of it."""
        answers = self.answers
        tokens = sum(answer.tokens for answer in answers)
        gap_ms, gap_p95_ms = _typical(_gaps(answers))
        steady_ms, steady_p95_ms = _typical(_steady(answers))
        return Level(
            streams=self.streams,
            requests=len(answers),
            prompt_tokens=round(statistics.median(answer.prompt_tokens for answer in answers)),
            tokens=tokens,
            ttft_ms=1e3 * statistics.median(answer.first for answer in answers),
            itl_ms=1e3 * statistics.median(answer.per_token for answer in answers),
            tokens_per_s=tokens / self.wall_s,
            client_cpu=self.cpu_s / self.wall_s,
            gap_ms=gap_ms,
            gap_p95_ms=gap_p95_ms,
            steady_ms=steady_ms,
            steady_p95_ms=steady_p95_ms,
        )


async def measure(
    server: Server, streams: int, requests: int, *, words: int, max_tokens: int, seed: int
) -> Level:
    """Keep ``streams`` requests running until ``requests`` are done."""
    length = {"words": words, "max_tokens": max_tokens, "seed": seed}
    return (await run(server, streams, requests, **length)).level()


async def run(
    server: Server, streams: int, requests: int, *, words: int, max_tokens: int, seed: int
) -> Run:
    """The same, with every answer."""
    rng = random.Random(seed)
    conversations = [conversation(words, rng) for _ in range(requests)]
    responses: list[_Response] = []

    async def one_after_another() -> None:
        while conversations:
            responses.append(await _send(server, conversations.pop(), max_tokens))

    started, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(one_after_another())
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    return Run(streams, [response.answer() for response in responses], wall, cpu)


def _gaps(answers: Iterable[Answer]) -> Iterator[tuple[float, float]]:
    for answer in answers:
        yield from itertools.pairwise(answer.moments)


def _steady(answers: list[Answer]) -> Iterator[tuple[float, float]]:
    """The gaps while nobody's prompt was read, or waited to be."""
    waits = [(answer.started, answer.moments[0]) for answer in answers]
    for before, after in _gaps(answers):
        if not any(began < after and before < ended for began, ended in waits):
            yield before, after


def _typical(gaps: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Median and 95th percentile, in milliseconds."""
    lengths = sorted(after - before for before, after in gaps) or [0.0]
    return 1e3 * statistics.median(lengths), 1e3 * lengths[int(0.95 * (len(lengths) - 1))]


async def ask(server: Server, messages: list[Message], max_tokens: int) -> Answer:
    """Stream one greedy chat completion. Raises RuntimeError when the server refuses or fails."""
    return (await _send(server, messages, max_tokens)).answer()


async def _send(server: Server, messages: list[Message], max_tokens: int) -> _Response:
    """The same, as it came: what it says is read when nobody's time is measured any more.

    Raises RuntimeError at once only where the server refuses.
    """
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        **server.fields,
    }
    started = time.perf_counter()
    parts = urlsplit(f"{server.base_url}/chat/completions")
    data = json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    address = (parts.hostname or "", parts.port or 80)
    with socket.create_connection(address) as connection:
        connection.setblocking(False)
        response = _Response(started, connection, loop.create_future())
        await loop.sock_sendall(connection, head.encode() + data)
        loop.add_reader(connection, response.read)
        try:
            await response.ended
        finally:
            loop.remove_reader(connection)
    if not response.is_accepted:
        response.answer()  # says why not
    return response


class _Response:
    """The bytes of an answer and when they came."""

    def __init__(
        self, started: float, connection: socket.socket, ended: asyncio.Future[None]
    ) -> None:
        self.started = started
        self.ended = ended
        self._receive = connection.recv
        self._pieces: list[tuple[float, bytes]] = []

    def read(self) -> None:
        """Take what is there."""
        try:
            data = self._receive(RECEIVED)
        except BlockingIOError:
            return
        except OSError as error:
            self.ended.set_exception(error)
            return
        self._pieces.append((time.perf_counter(), data))
        if not data or data.endswith(LAST_CHUNK):
            self.ended.set_result(None)

    @property
    def is_accepted(self) -> bool:
        """Whether it begins as an answer does."""
        return self._pieces[0][1][:20].partition(b" ")[2].startswith(b"200")

    def answer(self) -> Answer:
        """What they say. Raises RuntimeError for an error, and where they are cut off."""
        answer, reader, rest = Answer(self.started), _Reader(), b""
        for moment, data in self._pieces:
            rest += reader.body(data)
            if reader.status == 200:
                *lines, rest = rest.split(b"\n")
                for line in lines:
                    if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                        answer.take(json.loads(line[5:]), moment)
        if not reader.is_over:
            raise RuntimeError("the answer was cut off")
        if reader.status != 200:
            text = rest[:300].decode(errors="replace")
            raise RuntimeError(f"status {reader.status}: {text}")
        if not answer.tokens or not answer.moments:
            raise RuntimeError("the answer has no text or no usage")
        return answer


class _Reader:
    """Takes headers and chunks off what comes."""

    def __init__(self) -> None:
        self.status = 0
        self.is_over = False
        self._raw = b""  # not read yet
        self._is_chunked = False

    def body(self, data: bytes) -> bytes:
        """What more there is of the body; no data is the end of the connection."""
        self._raw += data
        if not self.status and not self._read_head():
            return b""
        if not self._is_chunked:
            self.is_over = not data
            body, self._raw = self._raw, b""
            return body
        body = b""
        while not self.is_over and (at := self._raw.find(b"\r\n")) >= 0:
            begin = at + 2
            end = begin + int(self._raw[:at].partition(b";")[0], 16)
            if len(self._raw) < end + 2:
                break
            self.is_over = begin == end
            body += self._raw[begin:end]
            self._raw = self._raw[end + 2 :]
        return body

    def _read_head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if found:
            self._raw = rest
            self.status = int(head.split(None, 2)[1])
            self._is_chunked = b"transfer-encoding: chunked" in head.lower()
        return bool(found)


def main() -> None:
    """Print one JSON object per level."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", default="http://127.0.0.1:5000/v1")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--streams", default="1,4,8,16", help="comma-separated")
    parser.add_argument("--requests", type=int, default=0, help="per level; default 2 per stream")
    parser.add_argument("--words", type=int, default=40, help="length of the prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--fields", default='{"stream_options": {"include_usage": true}}')
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    server = Server(options.base_url, options.model, json.loads(options.fields))
    for streams in map(int, options.streams.split(",")):
        level = asyncio.run(
            measure(
                server,
                streams,
                options.requests or 2 * streams,
                words=options.words,
                max_tokens=options.max_tokens,
                seed=options.seed,
            )
        )
        print(json.dumps(asdict(level)), flush=True)


if __name__ == "__main__":
    main()
