"""The head of a cluster as processes of this machine: started, looked at, ended by their ids."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from transformers_api.cluster import ray_runtime
from transformers_api.config.environment import ray_environment
from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import Unavailable

START_S = 180.0  # a busy machine takes a while
LOOK_S = 0.2
STARTED = "Ray runtime started"  # in the log of `ray start`
TITLE = b"ray::"  # of processes that Ray has renamed
TRIES = 3  # Ray gives its own parts 30 s, which a busy machine may not keep
END_S = 8.0  # nothing is left to be finished: the replicas have ended
LONGEST_PATH = 60  # letters: those of a socket in it, which Ray names, are 107 at most


class Head:
    """The head that ``settings`` describe: a process of its own, which outlives this one."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.cluster_folder.absolute()
        self._pid_file = self._folder / "head.pid"
        self._log = self._folder / "head.log"
        if len(str(self._folder)) > LONGEST_PATH:
            raise SettingError(
                f"CLUSTER_FOLDER={self._folder} is not allowed: expected a path of at most "
                f"{LONGEST_PATH} letters"
            )

    @property
    def pid(self) -> int | None:
        """The id of its process; None where it does not run."""
        pid, started = self._last()
        return pid if pid is not None and _started(pid) == started else None

    def _last(self) -> tuple[int | None, str]:
        """The one that was started last, and when: also one that was killed since."""
        try:
            pid, started = self._pid_file.read_text().split()
            return int(pid), started
        except (OSError, ValueError):
            return None, ""

    def start(self) -> None:
        """Start it, unless it runs, and join it. Raises Unavailable.

        What one that was killed has left is ended first: Ray would take it for a running head.
        """
        if self.pid is not None:
            ray_runtime.connect(self._settings)
            return
        self._make_token()
        ray_runtime.prepare(self._settings)
        for _ in range(TRIES):
            self.stop()
            process = self._spawn()
            if self._comes_up(process):
                return
            if process.poll() is None:
                raise Unavailable(f"The head did not come up within {START_S:g} s ({self._log})")
        raise Unavailable(f"The head has ended: {_last_line(self._log)} ({self._log})")

    def stop(self) -> bool:
        """End it and all that it has started; False where nothing of it runs."""
        if not self._processes():
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            for one in self._processes():
                _send(one, number)
            if _comes_true(lambda: not self._processes(), END_S):
                break
        self._pid_file.unlink(missing_ok=True)
        return True

    def _processes(self) -> list[int]:
        """Its own, and all that it has started; they may outlive it."""
        session, _ = self._last()
        ours = [] if self.pid is None else [self.pid]
        return ours + _belonging(session, self._folder)

    def _spawn(self) -> subprocess.Popen[bytes]:
        host, _, port = self._settings.cluster_address.rpartition(":")
        command = [
            *(sys.executable, "-c", "from ray.scripts.scripts import main; main()"),
            *("start", "--head", "--block", f"--node-ip-address={host.strip('[]')}"),
            *(f"--port={port}", "--include-dashboard=false", "--disable-usage-stats"),
            f"--dashboard-agent-listen-port={int(port) + 2}",  # Ray's own is that of one cluster
            *("--no-monitor", "--include-log-monitor=false"),  # nobody reads what they tell
            *(f"--temp-dir={self._folder / 'ray'}", f"--ray-client-server-port={int(port) + 1}"),
        ]
        with self._log.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=ray_environment(),
                cwd=self._folder,
                start_new_session=True,
            )
        self._pid_file.write_text(f"{process.pid} {_started(process.pid)}\n")
        return process

    def _comes_up(self, process: subprocess.Popen[bytes]) -> bool:
        """True once all of it runs; who connects before that is ended by Ray."""
        until = time.monotonic() + START_S
        while process.poll() is None and time.monotonic() < until:
            if STARTED in self._log.read_text(errors="replace"):
                ray_runtime.connect(self._settings)
                return True
            time.sleep(LOOK_S)
        return False

    def _make_token(self) -> None:
        """The secret of all connections, in a file that only this user reads."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = self._folder / ray_runtime.TOKEN
        if not file.exists():
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as out:
                out.write(secrets.token_hex(32))


def _comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(LOOK_S)
    return True


def _started(pid: int) -> str | None:
    """The start of a process, by which its id is not taken for another's; None: it is gone."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else rest[18]


def _belonging(head: int | None, folder: Path) -> list[int]:
    """The processes of this head: its session's, and those whose files are in its folder.

    A session's number may be another's by now: its processes name the folder in their environment,
    unless Ray has written a title over it.
    """
    files, name = str(folder / "ray").encode(), str(folder).encode()
    own = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) in (head, os.getpid()):
            continue
        try:
            title = (entry / "cmdline").read_bytes()
            is_ours = files in title or (
                os.getsid(int(entry.name)) == head
                and (title.startswith(TITLE) or name in (entry / "environ").read_bytes())
            )
        except OSError:
            continue
        if is_ours and _started(int(entry.name)) is not None:
            own.append(int(entry.name))
    return own


def _send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "no word")
