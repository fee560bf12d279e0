"""Measure a running OpenAI-compatible server: N streams at once, every token timed.

    python -m benchmarks.load --base-url http://127.0.0.1:5000/v1 --streams 1,8 --max-tokens 64

Standard library and bare sockets only: on a small machine the client takes its cores from the
server, so it has to cost next to nothing; its share is in the output.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

Message = dict[str, str]
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

    def take(self, event: dict[str, Any]) -> None:
        """Note what an event says. Raises RuntimeError for an error."""
        if "error" in event:
            raise RuntimeError(f"the stream failed: {event['error']}")
        if usage := event.get("usage"):
            self.tokens = usage["completion_tokens"]
            self.prompt_tokens = usage["prompt_tokens"]
        if any(choice["delta"].get("content") for choice in event["choices"]):
            self.moments.append(time.perf_counter())


def conversation(words: int, rng: random.Random) -> list[Message]:
    """About ``words`` words to the model, with instructions that are new each time.

    They come first in every template, in the place of its own ones, so that no prefix cache helps.
    """
    text = " ".join(rng.choices(TEXT.split(), k=words))
    return [
        {"role": "system", "content": f"{rng.randrange(10**6)}: you tell stories, and do it well."},
        {"role": "user", "content": f"{text}. Tell a long story about all of these."},
    ]


async def measure(
    server: Server, streams: int, requests: int, *, words: int, max_tokens: int, seed: int
) -> Level:
    """Keep ``streams`` requests running until ``requests`` are done."""
    rng = random.Random(seed)
    conversations = [conversation(words, rng) for _ in range(requests)]
    answers: list[Answer] = []

    async def one_after_another() -> None:
        while conversations:
            answers.append(await ask(server, conversations.pop(), max_tokens))

    started, cpu = time.perf_counter(), time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(one_after_another())
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    tokens = sum(answer.tokens for answer in answers)
    gap_ms, gap_p95_ms = _typical(_gaps(answers))
    steady_ms, steady_p95_ms = _typical(_steady(answers))
    return Level(
        streams=streams,
        requests=requests,
        prompt_tokens=round(statistics.median(answer.prompt_tokens for answer in answers)),
        tokens=tokens,
        ttft_ms=1e3 * statistics.median(answer.first for answer in answers),
        itl_ms=1e3 * statistics.median(answer.per_token for answer in answers),
        tokens_per_s=tokens / wall,
        client_cpu=cpu / wall,
        gap_ms=gap_ms,
        gap_p95_ms=gap_p95_ms,
        steady_ms=steady_ms,
        steady_p95_ms=steady_p95_ms,
    )


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
    body = {
        "model": server.model,
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        **server.fields,
    }
    answer = Answer(time.perf_counter())
    await _post(f"{server.base_url}/chat/completions", body, answer.take)
    if not answer.tokens or not answer.moments:
        raise RuntimeError("the answer has no text or no usage")
    return answer


async def _post(url: str, body: dict[str, Any], take: Callable[[dict[str, Any]], None]) -> None:
    """Give ``take`` the JSON of each server-sent event of one POST."""
    parts = urlsplit(url)
    data = json.dumps(body).encode()
    head = (
        f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    transport, events = await loop.create_connection(
        lambda: _Events(take), parts.hostname, parts.port or 80
    )
    try:
        transport.write(head.encode() + data)
        await events.ended
    finally:
        transport.close()


class _Events(asyncio.Protocol):
    """A response as it comes, without a task to wake for each piece of it."""

    def __init__(self, take: Callable[[dict[str, Any]], None]) -> None:
        self.ended = asyncio.get_running_loop().create_future()
        self._take = take
        self._raw = b""  # not read yet: headers, then chunks or the body
        self._body = b""  # not read yet: lines
        self._status = 0
        self._is_chunked = False

    def data_received(self, data: bytes) -> None:
        """Read on."""
        if self.ended.done():
            return
        self._raw += data
        try:
            if self._status or self._read_head():
                self._read_body()
        except Exception as error:
            self.ended.set_exception(error)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end, which chunks announce and another body does not."""
        if self.ended.done():
            return
        if exc or self._is_chunked or not self._status:
            self.ended.set_exception(exc or RuntimeError("the answer was cut off"))
        else:
            self._finish()

    def _read_head(self) -> bool:
        head, found, rest = self._raw.partition(b"\r\n\r\n")
        if found:
            self._raw = rest
            self._status = int(head.split(None, 2)[1])
            self._is_chunked = b"transfer-encoding: chunked" in head.lower()
        return bool(found)

    def _read_body(self) -> None:
        if not self._is_chunked:
            self._body, self._raw = self._body + self._raw, b""
        is_over = False
        while self._is_chunked and not is_over and (at := self._raw.find(b"\r\n")) >= 0:
            begin = at + 2
            end = begin + int(self._raw[:at].partition(b";")[0], 16)
            if len(self._raw) < end + 2:
                break
            is_over = begin == end
            self._body += self._raw[begin:end]
            self._raw = self._raw[end + 2 :]
        if self._status == 200:
            self._read_lines()
        if is_over:
            self._finish()

    def _read_lines(self) -> None:
        *lines, self._body = self._body.split(b"\n")
        for line in lines:
            if line.startswith(b"data:") and line[5:].strip() != b"[DONE]":
                self._take(json.loads(line[5:]))

    def _finish(self) -> None:
        if self._status == 200:
            self.ended.set_result(None)
        else:
            text = self._body[:300].decode(errors="replace")
            self.ended.set_exception(RuntimeError(f"status {self._status}: {text}"))


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
