"""Clients that leave, flood, do not read, or send what nobody can read; a real server and model."""

from __future__ import annotations

import json
import selectors
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.busy_machine import allowed
from tests.conftest import Measured
from tests.deploy.nginx import Proxy, needs_nginx
from tests.faults.tiny import ENDLESS, LIMIT_S, Stream, Tiny, environment, started, until

pytestmark = pytest.mark.timeout(300)

FIELDS = ("max_tokens", "n", "top_k", "temperature", "top_p", "seed", "logprobs", "best_of")
EXTREMES = (10**9, -1, -(10**30), 10**6000, 1e999, -0.5, "5", True, [], {}, "9" * 6000)
NOT_TOO_MUCH = [
    ("top_k", -1),
    ("top_k", 10**9),
    ("seed", -1),
    ("seed", 10**9),
    ("max_tokens", -1),
]  # they mean something


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return environment(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tiny(settings: dict[str, str]) -> Iterator[Tiny]:
    with started(settings, MAX_INFLIGHT="32", MAX_QUEUE="32") as one:
        yield one


def leave_all(tiny: Tiny, send: Callable[[int], Stream]) -> float:
    """25 streams that have begun leave at once; the seconds until nothing is left of them."""
    streams = [send(number) for number in range(25)]
    for stream in streams:
        assert stream.status() == 200
        assert stream.event()
    for number, stream in enumerate(streams):
        stream.leave(abruptly=number % 2 == 0)
    return until(tiny.is_idle)


@pytest.mark.slow  # `make faults` runs it
@needs_nginx
def test_200_clients_that_leave_midway_leave_nothing_behind(
    tiny: Tiny, tmp_path: Path, measured: Measured
) -> None:
    with Proxy(tmp_path, tiny.address[1]).running() as proxy:

        def through_nginx(number: int) -> Stream:
            return Stream(proxy.socket(f"127.0.0.{10 + number}"), ENDLESS)

        ways: tuple[Callable[[int], Stream], ...] = (lambda _: tiny.send(ENDLESS), through_nginx)
        for way in ways:  # what is made once is there
            leave_all(tiny, way)
        before = tiny.descriptors(), tiny.rss_mb()
        slowest = [max(leave_all(tiny, way) for _ in range(4)) for way in ways]
        until(lambda: tiny.descriptors() <= before[0] + 2, 30)
        grown = tiny.rss_mb() - before[1]
    measured(
        f"idle after {slowest[0] * 1000:.0f} ms direct, {slowest[1] * 1000:.0f} ms through nginx "
        f"(slowest of 4 x 25 each); descriptors {tiny.descriptors() - before[0]:+d}; "
        f"memory {grown:+.1f} MB"
    )
    assert max(slowest) < allowed(5)
    assert grown < 10


@pytest.mark.slow
def test_100_clients_that_leave_while_they_wait_cost_no_step(
    settings: dict[str, str], measured: Measured
) -> None:
    with started(settings, MAX_INFLIGHT="1", MAX_QUEUE="128") as tiny:
        first = tiny.begin()
        read = tiny.metric("vllm:prompt_tokens_total")
        plain = ENDLESS | {"stream": False}
        waiting = [tiny.send(plain if n % 2 else ENDLESS) for n in range(100)]
        until(lambda: tiny.status()["requests"] == 101)
        for number, stream in enumerate(waiting):
            stream.leave(abruptly=number % 3 == 0)
        gone_s = until(lambda: tiny.status()["requests"] == 1)
        first.leave()
        until(tiny.is_idle)
        spent = tiny.metric("vllm:prompt_tokens_total") - read
        # and those whose answers are being written, but go out whole
        plain_one = tiny.send(plain)
        until(lambda: (tiny.status()["resident"] or {})["running"] == 1)
        plain_one.leave()
        plain_s = until(tiny.is_idle)
    measured(
        f"{spent:.0f} prompt tokens read for 100 that left the queue, all gone after "
        f"{gone_s * 1000:.0f} ms; one that is answered whole: {plain_s * 1000:.0f} ms"
    )
    assert spent == 0
    assert plain_s < allowed(5)


@pytest.mark.slow
def test_a_burst_of_four_times_what_fits_is_refused_at_once_and_the_rest_is_served(
    settings: dict[str, str], measured: Measured
) -> None:
    with started(settings, MAX_INFLIGHT="4", MAX_QUEUE="4") as tiny:
        tiny.begin(max_tokens=50).leave()
        until(tiny.is_idle)
        began = time.monotonic()
        burst = [tiny.send(ENDLESS | {"max_tokens": 500}) for _ in range(32)]
        with ThreadPoolExecutor(8) as pool:
            begins = pool.submit(first_bytes, burst, began)
            probes = healths(tiny, [begins])  # all but the last four are answered then
            took = begins.result()
            answers = [(stream.status(), stream) for stream in burst]
            ends = [pool.submit(last, stream) for status, stream in answers if status == 200]
            probes += healths(tiny, ends)
        served = [end.result() for end in ends]
        waits = [stream.header("Retry-After") for status, stream in answers if status == 429]
        refusals = [took[stream] for status, stream in answers if status == 429]
    slowest, typical = max(refusals), statistics.median(refusals)
    probe = statistics.quantiles(probes, n=20)[-1]
    measured(
        f"{len(refusals)} of 32 refused, the median after {typical * 1000:.0f} ms and the last "
        f"after {slowest * 1000:.0f} ms; {len(served)} served whole; /health p95 "
        f"{probe * 1000:.1f} ms of {len(probes)}"
    )
    assert served == ["[DONE]"] * 8
    assert len(refusals) == 24
    assert all(1 <= int(wait) <= 120 for wait in waits)
    assert slowest < allowed(1)
    assert probe < allowed(1)


def healths(tiny: Tiny, until_done: list[Future[Any]]) -> list[float]:
    """The seconds of requests for /health, one after the other while these are not done."""
    took = []
    while not all(future.done() for future in until_done):
        began = time.monotonic()
        assert tiny.ask("GET", "/health")[0] == 200
        took.append(time.monotonic() - began)
    return took


def last(stream: Stream) -> Any:
    return list(stream.events())[-1]


def first_bytes(streams: list[Stream], began: float) -> dict[Stream, float]:
    """Seconds until each answer begins, seen by one thread."""
    took = {}
    with selectors.DefaultSelector() as ready:
        for stream in streams:
            ready.register(stream.socket, selectors.EVENT_READ, stream)
        while ready.get_map():
            for key, _ in ready.select(LIMIT_S):
                took[key.data] = time.monotonic() - began
                ready.unregister(key.fileobj)
    return took


def gaps(streams: list[Stream], seconds: float) -> list[float]:
    """Times between two events of the same stream, read by a thread each."""
    found: list[float] = []

    def read(stream: Stream) -> None:
        end, last = time.monotonic() + seconds, time.monotonic()
        while last < end:
            stream.event()
            now = time.monotonic()
            found.append(now - last)
            last = now

    with ThreadPoolExecutor(len(streams)) as pool:
        list(pool.map(read, streams))
    return found


@pytest.mark.slow
def test_eight_who_do_not_read_slow_nobody_down_and_are_ended(
    settings: dict[str, str], measured: Measured
) -> None:
    with started(settings, MAX_INFLIGHT="32", SEND_TIMEOUT_S="20") as tiny:
        threads = tiny.threads()
        much = {"logprobs": 20}
        readers = [tiny.begin() for _ in range(8)]
        open_files = tiny.descriptors()
        beside = [tiny.begin(**much) for _ in range(8)]  # as those who will not read, but these do
        with ThreadPoolExecutor(1) as pool:
            others = pool.submit(gaps, beside, 6)
            alone = statistics.quantiles(gaps(readers, 5), n=20)[-1]
            others.result()
        for stream in beside:
            stream.leave()
        until(lambda: tiny.descriptors() <= open_files)  # then their threads are free again
        began = time.monotonic()
        deaf = [tiny.send(ENDLESS | much, buffer=4096) for _ in range(8)]
        together = statistics.quantiles(gaps(readers, 5), n=20)[-1]
        with ThreadPoolExecutor(8) as pool:
            reading = [pool.submit(gaps, [reader], 40) for reader in readers]
            until(lambda: tiny.status()["requests"] <= 8, 40)
            ended_s = time.monotonic() - began
            for reader in readers:
                reader.socket.shutdown(2)
            del reading
        for stream in [*deaf, *readers]:
            stream.leave()
        until(tiny.is_idle)
        # 16 requests at once have a thread each, and so has who asks how it goes: three, as one may
        # not have ended when the next asks. The stream writer, the deadlines and the watch on clients
        # start with the first request.
        assert tiny.threads() <= threads + 16 + 3 + 3
    measured(
        f"readers' p95 between tokens {together * 1000:.1f} ms beside 8 who do not read, "
        f"{alone * 1000:.1f} ms beside 8 who do; those ended after {ended_s:.1f} s"
    )
    assert together < alone * 1.5
    assert ended_s < 20 + allowed(10)


def test_extreme_numbers_are_named_and_cost_nothing(tiny: Tiny, measured: Measured) -> None:
    before = tiny.rss_mb()
    asked = 0
    for name in FIELDS:
        for value in EXTREMES:
            if (name, value) in NOT_TOO_MUCH:
                continue
            body = wire({"prompt": "Hi", "max_tokens": 2, name: value})
            status, answer = tiny.ask("POST", "/v1/completions", body)
            assert status == 400, (name, str(value)[:20], answer)
            asked += 1
    for name, value in (("stop", ["x" * 300]), ("stop", ["x"] * 99), ("logit_bias", {"-1": 999})):
        status, answer = tiny.ask("POST", "/v1/completions", {"prompt": "Hi", name: value})
        assert status == 400
        assert answer["error"]["param"].startswith(name)
    measured(f"{asked + 3} requests, all 400; memory {tiny.rss_mb() - before:+.1f} MB")
    assert tiny.rss_mb() - before < 5


def nested(depth: int) -> dict[str, Any]:
    """A schema within a schema, and so on."""
    return {} if depth == 0 else {"type": "object", "properties": {"a": nested(depth - 1)}}


BOMBS: tuple[dict[str, Any], ...] = (
    {"guided_regex": "(a+)+b"},
    {"guided_regex": "a{1,1000000}"},
    {"guided_grammar": "root ::= root root"},
    {"guided_json": nested(29)},
    {"guided_choice": ["x" * 8] * 100_000},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": nested(28)}}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
    {"structured_outputs": {"regex": "(a|a)*b" * 1000}},
    {"guided_json": {"enum": list(range(100_000))}},
    {"guided_json": {"type": "object", "properties": {f"k{i}": {} for i in range(500)}}},
    {"guided_json": {"type": "array", "items": {"type": "null"}, "minItems": 10**6}},
    {"guided_regex": "(x*y*){200}"},
    {"grammar": "root ::= " + "(" * 20_000},
)


def test_patterns_and_schemas_that_explode_hold_nobody_up(tiny: Tiny, measured: Measured) -> None:
    stream = tiny.begin()
    slowest = 0.0
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(gaps, [stream], 3)
        while not reading.done():
            for extra in BOMBS:
                began = time.monotonic()
                status, answer = tiny.ask("POST", "/v1/completions", {"prompt": "Hi"} | extra)
                slowest = max(slowest, time.monotonic() - began)
                # answered, refused by name, or because it has more values than a body may have
                if status == 400:
                    assert answer["error"]["param"].startswith(next(iter(extra))), answer
                else:
                    assert status in (200, 413), answer
    stream.leave()
    widest = max(reading.result())
    measured(
        f"slowest answer {slowest * 1000:.0f} ms, widest gap of the stream {widest * 1000:.0f} ms"
    )
    assert slowest < allowed(2)
    assert widest < allowed(1)


def wire(body: dict[str, Any]) -> bytes:
    """JSON, also of numbers that Python would rather not write."""
    parts = []
    for name, value in body.items():
        if isinstance(value, int) and abs(value) > 10**4000:
            text = "1" + "0" * 6000
        elif value == 1e999:
            text = "1e999"
        else:
            text = json.dumps(value)
        parts.append(f'"{name}": {text}')
    return ("{" + ", ".join(parts) + "}").encode()
