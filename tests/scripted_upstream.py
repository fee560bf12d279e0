"""A server that speaks as much of OpenAI's API as a test scripts: also none, or half of it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """One request: ``server.script`` answers it."""

    server: ScriptedUpstream
    body: dict[str, Any]

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(self)
        self.server.script(self)

    def log_message(self, *_args: Any) -> None:
        return

    def head(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def event(self, payload: Any) -> None:
        data = payload if isinstance(payload, str) else json.dumps(payload)
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def is_left(self, within_s: float = 10) -> bool:
        """True once the other side has closed the connection."""
        self.connection.settimeout(within_s)
        try:
            return self.connection.recv(1) == b""
        except ConnectionError:
            return True
        except TimeoutError:
            return False


class ScriptedUpstream(ThreadingHTTPServer):
    """``script`` is called for every request, on a thread of its own."""

    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script = script
        self.requests: list[Handler] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def scripted_upstream(script: Script) -> Iterator[ScriptedUpstream]:
    server = ScriptedUpstream(script)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def chunk(delta: dict[str, Any], reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """A chunk of a chat with one choice."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason, **fields}]}


def answers(*payloads: Any, usage: tuple[int, int] = (7, 3)) -> Script:
    """A script of a whole stream, with its usage and its end."""

    def script(handler: Handler) -> None:
        handler.head()
        for payload in payloads:
            handler.event(payload)
        prompt, completion = usage
        handler.event(
            {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion}}
        )
        handler.event("[DONE]")

    return script


def says(text: str) -> Script:
    """A script that says ``text`` in pieces of one character."""
    return answers(*(chunk({"content": letter}) for letter in text), chunk({}, "stop"))


def refuses(status: int, body: Any, **headers: str) -> Script:
    """A script of an error."""

    def script(handler: Handler) -> None:
        handler.head(status, "application/json", **headers)
        handler.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

    return script
