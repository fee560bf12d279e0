"""A real server around a small random model, seen from outside: clients, memory, threads, files."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.servers import ROOT, Server
from tests.test_end_to_end import save_tiny, serve, wait_until_ready

MODEL = "tiny-llama"
CONTEXT = 65_536
LIMIT_S = 120.0
ENDLESS = {"prompt": "Once", "stream": True, "ignore_eos": True, "max_tokens": 30_000}
RST = struct.pack("ii", 1, 0)  # SO_LINGER: a close that says nothing


def until(condition: Callable[[], object], limit_s: float = LIMIT_S) -> float:
    """Wait for it to come true; the seconds that it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + limit_s, "did not come true"
        time.sleep(0.005)  # polling, with a deadline
    return time.monotonic() - began


def long_tiny(folder: Path) -> Path:
    """A model that can write for minutes: its context is long."""
    save_tiny(folder, "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": CONTEXT}))
    return folder


def environment(folder: Path, **models: Path) -> dict[str, str]:
    """Settings of a server that has these models, or one that is made here."""
    paths = models or {MODEL: long_tiny(folder / MODEL)}
    entries = [{"name": name, "path": str(path)} for name, path in paths.items()]
    (folder / "models.json").write_text(json.dumps(entries))
    return {
        "PORT": "0",
        "HOST": "127.0.0.1",
        "ALLOWED_HOSTS": "api.example.org",
        "DEFAULT_MODEL": next(iter(paths)),
        "MODEL_REGISTRY_PATH": str(folder / "models.json"),
        "MODEL_STORE": str(ROOT / "build" / "test-models"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_THREADS": "1",
        "METRICS_ENABLED": "true",
        "RESIDENCY_LOCK": "false",
        # as in deploy/systemd/transformers-api.service
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }


class Stream:
    """A request on a socket of its own, whose answer is read line by line."""

    def __init__(self, connection: socket.socket, body: Any, path: str = "/v1/completions") -> None:
        self.socket = connection
        data = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: api.example.org\r\nContent-Type: application/json\r\n"
        )
        connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        self.lines = connection.makefile("rb")

    def event(self) -> Any:
        """The next event; None for the end, whether it is one or not."""
        for line in self.lines:
            if line.startswith(b"data: "):
                text = line[6:].decode().strip()
                return text if text == "[DONE]" else json.loads(text)
        return None

    def events(self) -> Iterator[Any]:
        while (event := self.event()) is not None:
            yield event
            if event == "[DONE]" or "error" in event:
                return

    def status(self) -> int:
        return int(self.lines.readline().split()[1])

    def header(self, name: str) -> str:
        """Of an answer whose status was read."""
        for line in iter(self.lines.readline, b"\r\n"):
            known, _, value = line.decode().partition(":")
            if known.lower() == name.lower():
                return value.strip()
        raise AssertionError(f"no {name}")

    def leave(self, *, abruptly: bool = False) -> None:
        if abruptly:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
        self.lines.close()
        self.socket.close()


class Tiny:
    """A server and its worker process."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url
        self.address = server.address()
        self._streams: list[Stream] = []

    @property
    def worker(self) -> int:
        return int(re.findall(r"Booting worker with pid: (\d+)", self.server.log)[-1])

    def send(self, body: Any, buffer: int | None = None) -> Stream:
        """A request whose answer is left to be read; closed with the server."""
        connection = socket.socket()
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(LIMIT_S)
        connection.connect(self.address)
        self._streams.append(Stream(connection, body))
        return self._streams[-1]

    def begin(self, **fields: Any) -> Stream:
        """A stream that has begun."""
        stream = self.send(ENDLESS | fields)
        assert stream.status() == 200, stream.lines.read(500)
        assert stream.event()
        return stream

    def close(self) -> None:
        for stream in self._streams:
            stream.leave()

    def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the JSON of a whole answer."""
        connection = http.client.HTTPConnection(*self.address, timeout=LIMIT_S)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json else text

    def status(self) -> dict[str, Any]:
        status, body = self.ask("GET", "/status")
        assert status == 200
        return dict(body)

    def is_idle(self) -> bool:
        seen = self.status()
        resident = seen["resident"] or {"running": 0, "waiting": 0}
        return not (seen["requests"] or resident["running"] or resident["waiting"])

    def metric(self, name: str) -> float:
        """The sum over all series of a metric."""
        _, text = self.ask("GET", "/metrics")
        lines = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, lines))

    def rss_mb(self) -> float:
        text = Path(f"/proc/{self.worker}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found is not None
        return int(found[1]) / 1024

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.worker}/task"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.worker}/fd"))


@contextmanager
def started(settings: dict[str, str], **more: str) -> Iterator[Tiny]:
    """A server with a model in memory."""
    with serve(settings | more) as server:
        tiny = Tiny(server, wait_until_ready(server))
        try:
            yield tiny
        finally:
            tiny.close()
