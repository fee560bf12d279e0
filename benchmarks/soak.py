"""Ten minutes like a bad day: many streams, clients that leave, bodies that are no JSON.

    python -m benchmarks.soak                   ten minutes
    python -m benchmarks.soak --minutes 60      through the night, see how flat it stays

A real server with a tiny random model, so that as many requests as possible go through it. Ends
with status 1 where something was lost or grew: a 5xx, a stream without its end, memory, threads,
descriptors.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import random
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

from tests.faults.tiny import RST, Tiny, environment, started

LEAVE, BREAK, WHOLE = (
    0.05,
    0.02,
    0.10,
)  # shares of requests; the rest is streamed and read to its end
BROKEN = (
    *(b"", b"{", b"\0", b"null", b"[1]", b"NaN", b"{} {}", b"\xff\xfe{}", b"[" * 100_000),
    *(b'{"prompt":', b'{"prompt":"a","prompt":"b"}', b'{"prompt":"a","max_tokens":1e999}'),
    *(b'{"prompt":"a","n":"2"}', b'{"prompt":"\\ud800"}', b'{"prompt":{}}', b"{'prompt':1}"),
)
EVERY_S = 2.0
LINGER = (socket.SOL_SOCKET, socket.SO_LINGER)
RAW_TEXT = argparse.RawDescriptionHelpFormatter
MOST_MB_PER_MIN = 1.0
MOST_THREADS = 2
MOST_DESCRIPTORS = 8


@dataclass
class Sample:
    """The server at one moment."""

    at_s: float
    rss_mb: float
    threads: int
    descriptors: int
    kv_mb: float  # of it, the cache of keys and values


@dataclass
class Soak:
    """What came of all requests, and how the server was meanwhile."""

    minutes: float
    statuses: Counter[int] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)  # of streams
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (when, between two tokens)
    samples: list[Sample] = field(default_factory=list)
    tokens: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def at_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.began

    @property
    def is_over(self) -> bool:
        """Whether no new request begins."""
        return self.at_s >= self.minutes * 60

    @property
    def warm(self) -> list[Sample]:
        """The samples after the first fifth, in which caches fill and threads come."""
        return [sample for sample in self.samples if sample.at_s >= self.minutes * 12]

    def slope(self) -> float:
        """MB per minute, by least squares."""
        times = [sample.at_s / 60 for sample in self.warm]
        return statistics.linear_regression(times, [s.rss_mb for s in self.warm]).slope

    def drift(self, name: str) -> float:
        """How much more of it there is in the last third of the time than in the first."""
        values = [getattr(sample, name) for sample in self.warm]
        third = max(len(values) // 3, 1)
        return statistics.median(values[-third:]) - statistics.median(values[:third])

    def p99_ms(self, first: float, last: float) -> float:
        """Between two tokens of a stream, in a part of the time."""
        inside = [gap for at_s, gap in self.gaps if first <= at_s < last]
        return 1000 * statistics.quantiles(inside, n=100)[-1]


async def client(soak: Soak, address: tuple[str, int], chance: random.Random) -> None:
    """One request after the other."""
    while not soak.is_over:
        kind = chance.random()
        reader, writer = await asyncio.open_connection(*address)
        try:
            if kind < BREAK:
                await refused(soak, reader, writer, chance.choice(BROKEN))
            else:
                body = {"prompt": f"{chance.random()} Once", "ignore_eos": True}
                body["max_tokens"] = chance.randint(8, 256)
                body["stream"] = kind >= BREAK + WHOLE
                leaves_after = chance.randint(1, 50) if kind >= 1 - LEAVE else None
                await answered(soak, reader, writer, body, leaves_after)
        finally:
            if chance.random() < 0.5:
                writer.get_extra_info("socket").setsockopt(*LINGER, RST)
            writer.close()


async def refused(
    soak: Soak, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, raw: bytes
) -> None:
    """Send what nobody can read."""
    send(writer, raw)
    status = await status_of(reader)
    soak.statuses[status] += 1
    await reader.read()


async def answered(
    soak: Soak,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    body: dict[str, object],
    leaves_after: int | None,
) -> None:
    """Send a request and read its answer, all of it or so many events."""
    send(writer, json.dumps(body).encode())
    status = await status_of(reader)
    soak.statuses[status] += 1
    if status != 200 or not body["stream"]:
        text = await reader.read()
        soak.tokens += int(body["max_tokens"]) if status == 200 and text else 0
        return
    count, last = 0, 0.0
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        now = time.monotonic()
        if line.startswith(b"data: [DONE]"):
            soak.ends["whole"] += 1
            return
        if b'"error"' in line:
            soak.ends["error"] += 1
            return
        if last:
            soak.gaps.append((soak.at_s, now - last))
        count, last = count + 1, now
        soak.tokens += 1
        if count == leaves_after:
            soak.ends["left"] += 1
            return
    soak.ends["cut off"] += 1


def send(writer: asyncio.StreamWriter, raw: bytes) -> None:
    """A request that closes its connection."""
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(raw), raw)
    )


async def status_of(reader: asyncio.StreamReader) -> int:
    """Of the answer that begins; 0 where there is none."""
    line = await reader.readline()
    return int(line.split()[1]) if line else 0


async def look(soak: Soak, tiny: Tiny) -> None:
    """Note how the server is, from time to time."""
    while not soak.is_over:
        kv_bytes = await asyncio.to_thread(tiny.metric, "transformers_api_kv_cache_bytes")
        seen = tiny.rss_mb(), tiny.threads(), tiny.descriptors()
        soak.samples.append(Sample(soak.at_s, *seen, kv_bytes / 2**20))
        await asyncio.sleep(EVERY_S)


async def run(soak: Soak, tiny: Tiny, streams: int, seed: int) -> None:
    """All clients at once, until the time is over and each has its last answer."""
    clients = (client(soak, tiny.address, random.Random(f"{seed} {n}")) for n in range(streams))
    await asyncio.gather(look(soak, tiny), *clients)


def report(soak: Soak, tiny: Tiny) -> Iterator[tuple[str, bool]]:
    """What was found, line by line, and whether that is as it should be."""
    failures = sum(count for status, count in soak.statuses.items() if status >= 500)
    failures += soak.statuses[0]
    yield f"requests {soak.statuses.total()}, by status {dict(sorted(soak.statuses.items()))}", True
    yield f"5xx or no answer: {failures}", failures == 0
    lost = soak.ends["error"] + soak.ends["cut off"]
    yield f"streams by their end {dict(soak.ends)}", lost == 0
    yield f"tokens per second {soak.tokens / soak.at_s:.0f}", True
    warm = soak.warm
    low, high = (pick(sample.rss_mb for sample in warm) for pick in (min, max))
    text = f"memory {low:.0f} to {high:.0f} MB, slope {soak.slope():+.2f} MB/min"
    yield text, soak.slope() < MOST_MB_PER_MIN
    for name, most in (("threads", MOST_THREADS), ("descriptors", MOST_DESCRIPTORS)):
        ends = f"{getattr(warm[0], name)} and then {getattr(warm[-1], name)}"
        drift = soak.drift(name)
        yield f"{name} {ends}, drift {drift:+.0f}", drift <= most
    minute = min(60.0, soak.minutes * 20)
    first, last = soak.p99_ms(0, minute), soak.p99_ms(soak.minutes * 60 - minute, 1e9)
    yield f"p99 between tokens: first {first:.1f} ms, last {last:.1f} ms", True
    yield f"idle at the end: {tiny.is_idle()}", tiny.is_idle()


def main() -> int:
    """Run it; 0 when all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW_TEXT)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--samples", type=Path, help="write how the server was to this CSV file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = environment(Path(folder))
        with started(settings, MAX_INFLIGHT=str(options.streams), RATE_LIMIT_PER_MIN="0") as tiny:
            soak = Soak(options.minutes)
            asyncio.run(run(soak, tiny, options.streams, options.seed))
            found = list(report(soak, tiny))
    if options.samples is not None:
        with options.samples.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(sample_field.name for sample_field in fields(Sample))
            rows.writerows(map(astuple, soak.samples))
    for text, is_good in found:
        print("ok  " if is_good else "BAD ", text)
    return 0 if all(is_good for _, is_good in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
