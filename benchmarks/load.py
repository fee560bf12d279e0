"""Measure a running OpenAI-compatible server: N streams at once, every token timed.

    python -m benchmarks.load --base-url http://127.0.0.1:5000/v1 --streams 1,8 --max-tokens 64

Standard library and bare sockets only: on a small machine the client takes its cores from the
server, so it has to cost next to nothing; its share is in the output.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator
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


@dataclass
class Answer:
    """One streamed request; times in seconds from its start."""

    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    gaps: list[float] = field(default_factory=list)


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
    gaps = sorted(gap for answer in answers for gap in answer.gaps) or [0.0]
    return Level(
        streams=streams,
        requests=requests,
        prompt_tokens=round(statistics.median(answer.prompt_tokens for answer in answers)),
        tokens=tokens,
        ttft_ms=1e3 * statistics.median(answer.first for answer in answers),
        itl_ms=1e3 * statistics.median(map(_per_token, answers)),
        tokens_per_s=tokens / wall,
        client_cpu=cpu / wall,
        gap_ms=1e3 * statistics.median(gaps),
        gap_p95_ms=1e3 * gaps[int(0.95 * (len(gaps) - 1))],
    )


def _per_token(answer: Answer) -> float:
    return (answer.last - answer.first) / max(1, answer.tokens - 1)


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
    answer, started = Answer(), time.perf_counter()
    async for event in _events(f"{server.base_url}/chat/completions", body):
        if "error" in event:
            raise RuntimeError(f"the stream failed: {event['error']}")
        if usage := event.get("usage"):
            answer.tokens = usage["completion_tokens"]
            answer.prompt_tokens = usage["prompt_tokens"]
        if any(choice["delta"].get("content") for choice in event["choices"]):
            now = time.perf_counter() - started
            if answer.first:
                answer.gaps.append(now - answer.last)
            answer.first, answer.last = answer.first or now, now
    if not answer.tokens or not answer.first:
        raise RuntimeError("the answer has no text or no usage")
    return answer


async def _events(url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event of one POST."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    try:
        data = json.dumps(body).encode()
        head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        status = int((await reader.readline()).split()[1])
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        pieces = _chunks(reader) if b"transfer-encoding: chunked" in headers else _rest(reader)
        if status != 200:
            text = b"".join([piece async for piece in pieces])
            raise RuntimeError(f"status {status}: {text[:300].decode(errors='replace')}")
        line = b""
        async for piece in pieces:
            *lines, line = (line + piece).split(b"\n")
            for complete in lines:
                if complete.startswith(b"data:") and complete[5:].strip() != b"[DONE]":
                    yield json.loads(complete[5:])
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(65536):
        yield piece


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
