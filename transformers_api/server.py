"""The process: gunicorn with one worker, set up for long streams and an orderly end.

One worker, because it holds the one resident model; threads, because a stream occupies one for
as long as it runs. On SIGTERM or the first Ctrl-C the listening socket closes at once, running
answers get ``graceful_s`` to finish, and the process ends as soon as the last one has.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]
from gunicorn.config import Config  # type: ignore[import-untyped]
from gunicorn.workers.gthread import TConn, ThreadWorker  # type: ignore[import-untyped]

from transformers_api.settings import SettingError, Settings

APP = "transformers_api.app:create_app"
IDLE_LINGER_S = 0.5  # a request may be on its way on a connection that was kept open
BAD_SETTING = 2  # exit status

log = logging.getLogger(__name__)


def options(settings: Settings) -> dict[str, Any]:
    """Gunicorn's settings; ``gunicorn.conf.py`` uses the same."""
    shm = Path("/dev/shm")
    host = settings.host.strip("[]")
    return {
        "bind": f"[{host}]:{settings.port}" if ":" in host else f"{host}:{settings.port}",
        "workers": 1,
        "worker_class": DrainWorker,
        "threads": settings.threads,
        "worker_connections": max(1000, 2 * settings.threads),  # beyond: not accepted
        "timeout": 60,  # silence of the worker's main loop, not of a request
        "graceful_timeout": settings.graceful_s,
        "keepalive": 20,  # longer than a proxy in front keeps its own
        "limit_request_line": 4094,
        "control_socket_disable": True,
        "preload_app": False,  # neither threads nor CUDA survive a fork
        "worker_tmp_dir": str(shm) if os.access(shm, os.W_OK) else None,
        "loglevel": settings.log_level,
        "proc_name": "transformers-api",
        "on_starting": tame,
    }


def serve(settings: Settings, *, app: str = APP, reload: bool = False) -> NoReturn:
    """Serve until a signal ends it, then exit with 0.

    ``app`` names a function that makes the WSGI application from the settings; it is called in
    the worker process. Exits with 2 on bad settings and 1 where the address cannot be had.
    """
    workers = Config().workers  # gunicorn's default reads WEB_CONCURRENCY
    if workers != 1:
        stop(BAD_SETTING, f"WEB_CONCURRENCY={workers} is not allowed: {WHY_ONE}")
    listener = _listen(settings)
    given = options(settings) | {"bind": f"fd://{listener.fileno()}", "reload": reload}
    listener.detach()  # gunicorn owns it from here
    arbiter_pid = os.getpid()
    try:
        _Application(settings, app, given).run()
    except SystemExit as end:
        # The worker, a fork, comes by here too: its status is a word to the arbiter.
        if end.code == Arbiter.APP_LOAD_ERROR and os.getpid() == arbiter_pid:
            raise SystemExit(BAD_SETTING) from None
        raise
    raise SystemExit(0)


WHY_ONE = (
    "there is one worker process, because every worker would load a copy of the model. "
    "Requests are served in parallel by threads (MAX_INFLIGHT)."
)


def settings_or_exit(**overrides: Any) -> Settings:
    """The settings of the environment; one line on stderr and exit status 2 for a bad one."""
    try:
        settings = Settings.from_env()
    except SettingError as error:
        stop(BAD_SETTING, str(error))
    return replace(settings, **{name: v for name, v in overrides.items() if v is not None})


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """``python app.py``: the options that the documents name, before those of the environment."""
    parser = argparse.ArgumentParser(prog="app.py", description="Serve language models over HTTP.")
    parser.add_argument("--host", help="address to listen on (HOST)")
    parser.add_argument("--port", type=int, help="port to listen on (PORT)")
    parser.add_argument("--workers", type=int, default=1, help="1: the model is loaded once")
    parser.add_argument("--reload", action="store_true", help="restart when the code changes")
    given = parser.parse_args(arguments)
    if given.workers != 1:
        stop(BAD_SETTING, f"--workers {given.workers} is not allowed: {WHY_ONE}")
    if given.port is not None and not 0 <= given.port <= 65535:
        stop(BAD_SETTING, f"--port {given.port} is not allowed: expected 0 to 65535")
    serve(settings_or_exit(host=given.host, port=given.port), reload=given.reload)


def stop(status: int, message: str) -> NoReturn:
    """End the process with one line on stderr."""
    sys.stderr.write(f"{message}\n")
    raise SystemExit(status)


def _listen(settings: Settings) -> socket.socket:
    """Bind before gunicorn does, which would try for five seconds and log ten lines."""
    host = settings.host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, settings.port))
        listener.listen(2048)
    except OSError as error:
        reason = error.strerror or str(error)
        stop(1, f"Cannot listen on HOST={settings.host} PORT={settings.port}: {reason}")
    return listener


class _Application(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    def __init__(self, settings: Settings, app: str, given: dict[str, Any]) -> None:
        self._settings = settings
        self._app = app
        self._given = given
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._given.items():
            self.cfg.set(name, value)

    def load(self) -> Callable[..., Any]:
        module, _, name = self._app.partition(":")
        try:
            application: Callable[..., Any] = getattr(importlib.import_module(module), name)(
                self._settings
            )
        except SettingError as error:
            stop(Arbiter.APP_LOAD_ERROR, str(error))
        return application


def tame(arbiter: Arbiter) -> None:
    """Take out of gunicorn what would start a second worker or cut streams.

    Its ``on_starting`` hook. Ends the process where more than one worker is asked for.
    """
    if arbiter.cfg.workers != 1:
        stop(BAD_SETTING, f"--workers {arbiter.cfg.workers} is not allowed: {WHY_ONE}")
    if not issubclass(arbiter.worker_class, DrainWorker):
        arbiter.log.warning("--worker-class is ignored: streams need threads")
        arbiter.worker_class = DrainWorker
        arbiter.cfg.set("threads", max(arbiter.cfg.threads, 2))

    def ignore(name: str) -> Callable[[], None]:
        return lambda: arbiter.log.warning("%s is ignored: restart instead", name)

    arbiter.handle_int = arbiter.handle_term  # a second one, while it waits, ends it at once
    at_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    # Gunicorn would load the new model beside the old one; without its terminal it ends.
    arbiter.handle_hup = arbiter.handle_term if at_terminal else ignore("SIGHUP")
    arbiter.handle_ttin = ignore("SIGTTIN")
    arbiter.handle_usr2 = ignore("SIGUSR2")


class DrainWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """A gthread worker that ends in order: no new connection, no cut answer, no long wait."""

    _draining = False

    def init_signals(self) -> None:
        """Leave Ctrl-C and hang-ups, which reach the whole process group, to the arbiter."""
        super().init_signals()
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def handle_quit(self, sig: int, frame: Any) -> None:
        """End at once: the second Ctrl-C."""
        os._exit(0)

    def is_parent_alive(self) -> bool:
        """Whether the arbiter lives; without it, drain as after SIGTERM."""
        is_alive = bool(super().is_parent_alive())
        if not is_alive:
            self.alive = False
        return is_alive

    def run(self) -> None:
        """Serve until the end, then leave without waiting for threads that will not end.

        A thread that writes to a client which does not read would hold the interpreter's exit,
        and torch may crash in a daemon thread while it is taken apart.
        """
        super().run()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    def set_accept_enabled(self, enabled: bool) -> None:
        """Accept connections or not. Once the worker ends: refuse them, and begin to drain."""
        super().set_accept_enabled(enabled)
        if not self.alive and not self._draining:
            self._draining = True
            for listener in self.sockets:
                listener.close()  # else the kernel goes on queueing what nobody will answer
            self._drain()

    def _drain(self) -> None:
        services = getattr(self.wsgi, "extensions", {}).get("transformers_api")
        try:
            if services is not None:
                services.drain(float(self.cfg.graceful_timeout))
        except Exception:
            log.exception("Draining the application failed")

    def finish_request(self, conn: TConn, fs: Future[Any]) -> None:
        """After a response, keep its connection open only for a moment once the worker ends."""
        super().finish_request(conn, fs)
        if not self.alive:
            self._cap_keepalive(time.monotonic() + IDLE_LINGER_S)

    def _cap_keepalive(self, deadline: float) -> None:
        deadline = min(deadline, time.monotonic() + IDLE_LINGER_S)
        super()._cap_keepalive(deadline)
        for conn in self.pending_conns:  # they have sent nothing yet
            conn.timeout = min(conn.timeout, deadline)
