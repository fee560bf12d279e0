"""Real server processes for tests, on free ports of the loopback."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
WAIT_S = 40.0

SERVE = """
from transformers_api.server.serve import serve
from transformers_api.config.settings import Settings
settings = Settings(
    host={host!r}, port=0, graceful_s={grace_s}, max_inflight=4, residency_lock=False, **{more!r}
)
serve(settings, app="{app}")
"""


def until(condition: Callable[[], object]) -> None:
    """Wait for what becomes true, with a deadline."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not come true"


def reserve_port() -> socket.socket:
    """A port that nobody else gets while this socket is open, but for a program that names it.

    Bound and not listening; the program's own socket needs SO_REUSEADDR, too, which is usual.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


class Server:
    """A process in a group of its own, and what it says on stderr."""

    def __init__(self, command: Sequence[str], **environ: str) -> None:
        clean = {k: v for k, v in os.environ.items() if k not in ("PORT", "HOST")}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=clean | environ,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._connections: list[http.client.HTTPConnection] = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line)
                self._said.notify_all()

    @property
    def log(self) -> str:
        with self._said:
            return "".join(self.lines)

    def said(self, pattern: str) -> re.Match[str]:
        """Wait for a line of the log."""
        with self._said:
            found = self._said.wait_for(lambda: re.search(pattern, "".join(self.lines)), WAIT_S)
        assert found, f"{pattern} is not in the log:\n{self.log}"
        return found

    def address(self) -> tuple[str, int]:
        found = self.said(r"Listening at: http://\[?([^\]\s]+?)\]?:(\d+) ")
        return found[1], int(found[2])

    def get(self, path: str) -> str:
        """The body of a whole answer."""
        connection = self.connect()
        connection.request("GET", path)
        return connection.getresponse().read().decode()

    def connect(self) -> http.client.HTTPConnection:
        """A connection that is closed with the server."""
        self._connections.append(http.client.HTTPConnection(*self.address(), timeout=WAIT_S))
        return self._connections[-1]

    def signal(self, number: signal.Signals) -> None:
        """To the whole process group, as a terminal and ``make`` send it."""
        os.killpg(self.process.pid, number)

    def is_refusing(self) -> bool:
        try:
            socket.create_connection(self.address(), timeout=WAIT_S).close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # it had come in just before the socket was closed
            return False
        return False

    def wait(self) -> int:
        """The exit status."""
        status = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        return status

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        assert self.process.stderr is not None
        self.process.stderr.close()


@contextmanager
def started(*command: str, **environ: str) -> Iterator[Server]:
    server = Server(command, **environ)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def serving(
    app: str = "tests.streaming_app:create_app",
    grace_s: int = 30,
    host: str = "127.0.0.1",
    **more: Any,
) -> Iterator[Server]:
    """A server that answers; ``more`` are settings."""
    script = SERVE.format(app=app, grace_s=grace_s, host=host, more=more)
    with started(sys.executable, "-c", script) as server:
        server.address()
        yield server


def run(*command: str, **environ: str) -> tuple[int, str]:
    """(exit status, stderr) of a server that does not start."""
    with started(*command, **environ) as server:
        return server.wait(), server.log
