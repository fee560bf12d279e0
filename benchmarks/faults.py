"""Figures for the faults that need no model: `python -m benchmarks.faults`.

A real gunicorn with an engine that makes a token each ten milliseconds; each line is one row of the
table in docs/operations.md. Takes about a minute and a half.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import selectors
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from tests.servers import Server, serving
from tests.test_lifecycle import begin, code, last_event, post, ready, until, worker

APP = "tests.faulty_app:create_app"
BREAKABLE = "tests.faulty_app:create_breakable_app"
PROBE_EVERY_S = 0.02
HALVES = {
    "line": b"POST /v1/comp",
    "headers": b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Le",
    "body": b'POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 99\r\n\r\n{"pro',
}


def main() -> None:
    """Print every figure."""
    print("| fault | figure |\n| --- | --- |")
    with serving(APP, max_queue=4) as server:
        until(lambda: ready(server))
        row("32 requests at once, 8 places", burst(server))
    with serving(APP, send_timeout_s=20.0) as server:
        until(lambda: ready(server))
        for name, half in HALVES.items():
            row(f"400 connections with half of the {name}", half_sent(server, half))
        row("200 clients gone in mid-stream, half with FIN, half with RST", left(server, True))
        row("100 clients gone while waiting", left(server, False))
        row("8 readers beside 8 who do not read", silent_readers(server))
    row("SIGTERM with 8 short and 8 long streams, GRACEFUL_S=5", ended())
    row("kill -9 of the worker", killed())
    for how in ("die", "hang"):
        row(f"the engine thread is made to {how}, STEP_TIMEOUT_S=1", broken(how))


def row(fault: str, figure: str) -> None:
    """Print one of them."""
    print(f"| {fault} | {figure} |", flush=True)


def burst(server: Server) -> str:
    """Refusals, their waiting times, and what probes see meanwhile."""
    asked_together(server)  # the threads of a new process have still to be made
    answers, probes = asked_together(server)
    refused = [(head, s) for head, s in answers if b" 429 " in head]
    waits = sorted({int(head.lower().split(b"retry-after: ")[1].split()[0]) for head, _ in refused})
    good = sum(head.startswith(b"HTTP/1.1 200") for head, _ in answers)
    return (
        f"{good} answered, {len(refused)} refused in {ms([s for _, s in refused])}, Retry-After "
        f"{waits[0]} to {waits[-1]}; /health {ms(probes)}"
    )


def asked_together(server: Server) -> tuple[list[tuple[bytes, float]], list[float]]:
    """The beginning and the time of each answer; the times of probes meanwhile."""
    clients = [socket.create_connection(server.address()) for _ in range(32)]
    answers: list[tuple[bytes, float]] = []
    with selectors.DefaultSelector() as waiting, ThreadPoolExecutor(1) as pool:
        probes = pool.submit(probed, server, lambda: len(answers) == len(clients))
        for client in clients:
            waiting.register(client, selectors.EVENT_READ, time.monotonic())
            client.sendall(completion(max_tokens=300))
        while len(answers) < len(clients):
            for key, _ in waiting.select():
                answered = key.fileobj
                assert isinstance(answered, socket.socket)
                answers.append((answered.recv(1 << 16), time.monotonic() - key.data))
                waiting.unregister(answered)
                answered.close()
        return answers, probes.result()


def completion(**fields: object) -> bytes:
    """The bytes of a request."""
    body = json.dumps({"prompt": "Hi", "max_tokens": 100_000, **fields}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body)
    return head + body


def half_sent(server: Server, half: bytes) -> str:
    """What others see while many clients send no further."""
    with ExitStack() as clients:
        for _ in range(400):
            client = clients.enter_context(socket.create_connection(server.address()))
            client.sendall(half)
        ends = time.monotonic() + 2
        probes = probed(server, lambda: time.monotonic() > ends)
        began = time.monotonic()
        post(server, "/v1/completions", {"prompt": "Hi", "max_tokens": 1}).read()
        return f"/health {ms(probes)}; a completion of one token {took(began)}"


def left(server: Server, streaming: bool) -> str:
    """Until the server holds nothing for clients that have left."""
    before = descriptors(server)
    worst = 0.0
    for _ in range(2 if streaming else 1):
        clients = [socket.create_connection(server.address()) for _ in range(100)]
        for client in clients:
            client.sendall(completion(stream=streaming))
        until(lambda: served_now(server) == 100)
        for number, client in enumerate(clients):
            if number % 2:
                reset = struct.pack("ii", 1, 0)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            client.close()
        began = time.monotonic()
        until(lambda: served_now(server) == 0)
        worst = max(worst, time.monotonic() - began)
    began = time.monotonic()
    until(lambda: descriptors(server) <= before + 2)
    return f"all places free after {1000 * worst:.0f} ms, all descriptors {took(began)} later"


def silent_readers(server: Server) -> str:
    """Gaps between tokens with and without clients that do not read, and when those are ended."""
    alone = gaps(server, 8)
    with ExitStack() as clients:
        began = time.monotonic()
        for _ in range(8):
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(server.address())
            client.sendall(completion(stream=True))
        beside = gaps(server, 8)
        until_within(lambda: served_now(server) == 0, 60)
        return (
            f"gaps p95 {1000 * percentile(alone, 95):.1f} ms alone, "
            f"{1000 * percentile(beside, 95):.1f} ms beside; the others ended after {took(began)}"
        )


def gaps(server: Server, count: int) -> list[float]:
    """Seconds between tokens of so many streams."""

    def read() -> list[float]:
        response = begin(server, max_tokens=400)
        times = [time.monotonic() for line in response if line.startswith(b"data: {")]
        return [after - before for before, after in itertools.pairwise(times)]

    with ThreadPoolExecutor(count) as pool:
        return [gap for call in [pool.submit(read) for _ in range(count)] for gap in call.result()]


def ended() -> str:
    """What becomes of streams at the end of the server."""
    with serving(APP, grace_s=5) as server:
        until(lambda: ready(server))
        short = [begin(server, max_tokens=100) for _ in range(8)]
        long = [begin(server) for _ in range(8)]
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        complete = sum(last_event(stream) == "data: [DONE]" for stream in short)
        told = sum(code(last_event(stream)) == "server_shutting_down" for stream in long)
        status = server.wait()
        killed = server.log.count("SIGKILL")
        return (
            f"{complete} of 8 short complete, {told} of 8 long told; status {status} after "
            f"{took(began)}, {killed} SIGKILL"
        )


def killed() -> str:
    """Until a killed worker has a successor that answers."""
    with serving(APP) as server:
        until(lambda: ready(server))
        began = time.monotonic()
        first = worker(server)
        os.kill(first, signal.SIGKILL)
        until(lambda: worker(server) != first)
        server.get("/healthz")
        return f"/healthz answers again after {took(began)}, no connection refused"


def broken(how: str) -> str:
    """Until a broken engine is known, and until another one serves."""
    with serving(BREAKABLE, step_timeout_s=1.0) as server:
        until(lambda: ready(server))
        stream, first = begin(server), worker(server)
        began = time.monotonic()
        post(server, f"/break/{how}", {}).read()
        until(lambda: not ready(server))
        unready = took(began)
        told = code(last_event(stream))
        until_within(lambda: worker(server) != first and ready(server), 60)
        status = re.search(r"exited with code (\d+)", server.log)
        assert status
        return (
            f"/readyz 503 after {unready}, streams end with {told}; status {status[1]}, "
            f"ready again after {took(began)}"
        )


def probed(server: Server, over: Callable[[], bool]) -> list[float]:
    """How long probes take, one after the other."""
    times = []
    while not over():
        began = time.monotonic()
        server.get("/health")
        times.append(time.monotonic() - began)
        time.sleep(PROBE_EVERY_S)
    return times


def until_within(condition: Callable[[], object], most_s: float) -> None:
    """Wait longer than tests do."""
    ends = time.monotonic() + most_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def served_now(server: Server) -> int:
    """Requests that hold the model."""
    return int(json.loads(server.get("/health"))["active_requests"])


def descriptors(server: Server) -> int:
    """Open files of the worker, one of which is this question's connection."""
    for connection in server._connections:
        connection.close()
    until(lambda: served_now(server) == 0)
    return len(os.listdir(f"/proc/{worker(server)}/fd"))


def percentile(values: Sequence[float], share: int) -> float:
    """The value that ``share`` percent are below of."""
    return sorted(values)[min(len(values) * share // 100, len(values) - 1)]


def ms(values: Sequence[float]) -> str:
    """Median and 95th percentile."""
    return f"p50 {1000 * percentile(values, 50):.0f} ms, p95 {1000 * percentile(values, 95):.0f} ms"


def took(began: float) -> str:
    """Since then."""
    return f"{time.monotonic() - began:.2f} s"


if __name__ == "__main__":
    main()
