"""What systemd does for a unit with a socket: hold the socket, hand it over, wait for READY=1."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import ROOT, WAIT_S, reserve_port

# LISTEN_PID has to be that of the process which runs the command.
HAND_OVER = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""
SERVE = """
from transformers_api.server.serve import serve, settings_or_exit
serve(settings_or_exit(), app="tests.deploy.fake_app:create_app")
"""
MODELS = [{"name": name, "path": "."} for name in ("paced", "halting")]


def settings(folder: Path) -> dict[str, str]:
    """Of a server that may not listen by itself."""
    (folder / "models.json").write_text(json.dumps(MODELS))
    return {
        "DEFAULT_MODEL": "paced",
        "MODEL_REGISTRY_PATH": str(folder / "models.json"),
        "MODEL_STORE": str(folder),
        "HF_HOME": str(folder),
        "ALLOWED_HOSTS": "api.example.org",  # which the proxy passes on; there are no keys
        "PORT": "1",  # nobody may listen there: the socket that is handed over is used
    }


@contextmanager
def activated(folder: Path) -> Iterator[tuple[int, subprocess.Popen[bytes], Path]]:
    """(port, process, log) of systemd's own program that starts a server at the first connection."""
    holder = reserve_port()
    port = holder.getsockname()[1]
    given = [f"--setenv={name}={value}" for name, value in (os.environ | settings(folder)).items()]
    command = ["systemd-socket-activate", f"--listen=127.0.0.1:{port}", *given]
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, sys.executable, "-c", SERVE],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        until(lambda: "Listening on" in log.read_text())
        yield port, process, log
    finally:
        holder.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(WAIT_S)


class Unit:
    """A service whose socket outlives its processes."""

    def __init__(self, folder: Path, **environ: str) -> None:
        notify = {"NOTIFY_SOCKET": str(folder / "notify")}
        self.environ = os.environ | settings(folder) | notify | environ
        self.socket = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port: int = self.socket.getsockname()[1]
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.settimeout(WAIT_S)
        self._notified.bind(self.environ["NOTIFY_SOCKET"])
        self._log = (folder / "server.log").open("w+")
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()

    def start(self) -> None:
        """Start a process and wait until it says that it is ready."""
        handle = self.socket.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-c", HAND_OVER, str(handle), sys.executable, "-c", SERVE],
            cwd=ROOT,
            env=self.environ,
            pass_fds=[handle],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )
        while b"READY=1" not in self._told():
            pass

    def _told(self) -> bytes:
        try:
            return self._notified.recv(4096)
        except TimeoutError:
            raise AssertionError(self.log) from None

    def stop(self) -> int:
        """SIGTERM to the main process alone, as KillMode=mixed sends it; the exit status."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(WAIT_S)

    def restart(self) -> None:
        assert self.stop() == 0, self.log
        self.start()

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(WAIT_S)
        self.socket.close()
        self._notified.close()
        self._log.close()


@contextmanager
def unit(folder: Path, **environ: str) -> Iterator[Unit]:
    """A unit that is ready."""
    one = Unit(folder, **environ)
    try:
        one.start()
        yield one
    finally:
        one.close()


def active(service: Unit) -> int:
    """How many requests the server works at, asked directly."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=WAIT_S)
    connection.request("GET", "/health")
    number: int = json.load(connection.getresponse())["active_requests"]
    connection.close()
    return number


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.01)  # polling, with a deadline
