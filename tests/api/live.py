"""An application of the tests on a real socket, and the commands of the documents against it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from flask import Flask
from werkzeug.serving import make_server

ROOT = Path(__file__).parent.parent.parent
LIMIT_S = 30


@dataclass(frozen=True)
class Live:
    """A server at ``url``; the documents name ``address`` in its place."""

    url: str
    address: str

    def run(self, *command: str) -> str:
        """What a command prints; it must succeed."""
        if not shutil.which(command[0]):
            pytest.skip(f"{command[0]} is not installed")
        words = [word.replace(self.address, self.url) for word in command]
        done = subprocess.run(
            words, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    def curl(self, command: str) -> str:
        """The body that a curl command of a document gets, whatever its status."""
        name, *words = shlex.split(command.replace("\\\n", " "))
        return self.run(name, "-sS", *words)

    def python(self, program: str) -> str:
        return self.run(sys.executable, "-c", program)

    def node(self, program: str) -> str:
        return self.run("node", "--input-type=module", "-e", program)


@contextmanager
def live(app: Flask, address: str) -> Iterator[Live]:
    """Serve ``app`` on a free port of the loopback."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    )
    thread.start()
    try:
        yield Live(f"http://127.0.0.1:{server.server_port}", address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
