"""A real redis of its own for a test, on a socket that nobody else knows."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import redis

from transformers_api.serving import redis_times

WAIT_S = 30.0


def wait_for_redis(patch: pytest.MonkeyPatch, timeout_s: float = WAIT_S) -> None:
    """Let what is made from now on wait so long: on a busy machine redis has not gone away."""
    patch.setattr(redis_times, "TIMEOUT_S", timeout_s)


class RedisServer:
    """Started and killed at will, always at ``url``; it forgets everything in between."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("redis-server")
        if program is None:
            pytest.skip("redis-server is not installed; scripts/install_test_tools.sh does it")
        self._socket = folder / "redis.sock"
        self._command = [program, "--port", "0", "--unixsocket", str(self._socket)]
        self._command += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
        self.url = f"unix://{self._socket}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url)
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                client.ping()
            except redis.RedisError:
                assert time.monotonic() < deadline, "redis-server did not start"
                assert self._process.poll() is None, "redis-server ended"
            else:
                break
        client.close()

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(WAIT_S)
            self._process = None
