"""Ten thousand bodies that are not what they should be, sent to a real server with a real model."""

from __future__ import annotations

import http.client
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.test_fuzz import SEEDS, places, refused_by_niels, refused_by_openai, replaced
from tests.busy_machine import allowed
from tests.conftest import Measured
from tests.faults.tiny import LIMIT_S, MODEL, Tiny, environment, started, until

COUNT = 10_000
NASTY = (
    *(None, True, False, 0, -1, 1, 0.5, -0.0, 2**31, 2**63, -(2**63), 10**30, 1e308, 5e-324),
    *("", "5", "x", "\0", "\ud800", "\n", "null", "é" * 300, "{{ 7 * 7 }}", "../../etc/passwd"),
    *([], [[]], [None], {}, {"": {}}, [0] * 70, ["x"] * 70, {"a": {"b": [1, {"c": None}]}}),
)
RAW = (
    *(b"", b"\0", b"{", b"[]", b"null", b'"x"', b"NaN", b"{} {}", b"\xff\xfe{}", b"[" * 100_000),
    *(b'{"a":' * 70 + b"1" + b"}" * 70, b'{"a":1,"a":2}', b'{"max_tokens":1e999}', b"{'a':1}"),
    *(
        b'{"temperature":NaN}',
        b'{"n":' + b"9" * 6000 + b"}",
        b'{"prompt":"\\ud800"}',
        b"\xef\xbb\xbf",
    ),
)
ROUTES = {url: body for url, body in SEEDS.items() if url != "/v1/models"}


def bodies(chance: random.Random) -> Iterator[tuple[str, bytes]]:
    for number in range(COUNT):
        url = chance.choice(sorted(ROUTES))
        body: Any = json.loads(json.dumps(ROUTES[url]).replace('"fake"', f'"{MODEL}"'))
        if number % 10 == 0:
            yield url, chance.choice(RAW)
            continue
        for _ in range(chance.randint(1, 3)):
            path = chance.choice(list(places(body)))
            body = replaced(body, path, chance.choice(NASTY))
        raw = bytearray(json.dumps(body).encode())
        if number % 3 == 0 and raw:
            at = chance.randrange(len(raw))
            raw[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
        yield url, bytes(raw)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_malformed_bodies_are_refused_by_name(
    tmp_path: Path, measured: Measured
) -> None:
    with started(environment(tmp_path), RATE_LIMIT_PER_MIN="0") as tiny:
        seen, times = ask_all(tiny)
        until(tiny.is_idle)
    p99 = statistics.quantiles(times, n=100)[-1]
    failures = sum(count for status, count in seen.items() if status >= 500)
    measured(f"{dict(sorted(seen.items()))}: {failures} 5xx; p99 of refusals {p99 * 1000:.1f} ms")
    assert failures == 0
    assert len(times) > COUNT / 2
    assert p99 < allowed(1)


def ask_all(tiny: Tiny) -> tuple[Counter[int], list[float]]:
    """How often each status came, and the seconds that each refusal took."""
    seen: Counter[int] = Counter()
    times = []
    connection = http.client.HTTPConnection(*tiny.address, timeout=LIMIT_S)
    for url, raw in bodies(random.Random(6)):
        began = time.monotonic()
        connection.request("POST", url, raw, {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        seen[response.status] += 1
        if response.status == 200:
            continue
        times.append(time.monotonic() - began)
        is_inspected = url.startswith(("/chat/stream", "/inspect/"))
        check = refused_by_niels if is_inspected else refused_by_openai
        check(response.status, json.loads(body), raw[:300])
    connection.close()
    return seen, times
