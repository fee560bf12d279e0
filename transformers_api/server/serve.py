"""The process: gunicorn with one worker, set up for long streams and an orderly end.

One worker, because it holds the one resident model; threads, because a stream occupies one for
as long as it runs. On SIGTERM or the first Ctrl-C the listening socket closes at once, running
answers get ``graceful_s`` to finish, and the process ends as soon as the last one has.
"""

from __future__ import annotations

import argparse
import importlib
import os
import resource
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]
from gunicorn.arbiter import Arbiter  # type: ignore[import-untyped]
from gunicorn.config import Config  # type: ignore[import-untyped]
from gunicorn.errors import HaltServer  # type: ignore[import-untyped]

from transformers_api.config.environment import has_activated_sockets, take_notify_socket
from transformers_api.config.settings import (
    SettingError,
    Settings,
)
from transformers_api.engine.platform.dataclass_code import stored_methods
from transformers_api.engine.platform.deferred_modules import AtFirstUse, PatternsLater, treated
from transformers_api.engine.platform.imports import without_collection
from transformers_api.server import http_parser, lock, standard_streams
from transformers_api.server.logger import logger_class
from transformers_api.server.systemd import Notifier
from transformers_api.server.worker import FAULTY, DrainWorker

APP = "transformers_api.app:create_app"
BAD_SETTING = 2  # exit status
SECOND_S = 1.0  # between two SIGTERMs that are meant as two
MOST_DEATHS = 5  # of workers, within
DEATHS_S = 600.0
MOST_FILES = 1 << 16
UNUSED = "limits.aio"  # which limits imports
ADDRESSES = "marshmallow.validate"  # has a pattern of mail addresses, which no schema asks for


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
        "limit_request_line": http_parser.MAX_LINE,
        "limit_request_fields": http_parser.MAX_HEADS,
        "limit_request_field_size": http_parser.MAX_HEAD,
        "control_socket_disable": True,
        "preload_app": False,  # neither threads nor CUDA survive a fork
        "worker_tmp_dir": str(shm) if os.access(shm, os.W_OK) else None,
        "loglevel": settings.log_level,
        "logger_class": logger_class(settings),
        "proc_name": "transformers-api",
        "on_starting": lambda arbiter: prepare(arbiter, settings),
        "child_exit": Deaths(),
    }


def serve(settings: Settings, *, app: str = APP, reload: bool = False) -> NoReturn:
    """Serve until a signal ends it, then exit with 0.

    ``app`` names a function that makes the WSGI application from the settings; it is called in
    the worker process. Exits with 2 on bad settings and 1 where the address cannot be had.
    """
    workers = Config().workers  # gunicorn's default reads WEB_CONCURRENCY
    if workers != 1:
        stop(BAD_SETTING, f"WEB_CONCURRENCY={workers} is not allowed: {WHY_ONE}")
    chosen = options(settings) | {"reload": reload}
    if not has_activated_sockets():
        listener = _listen(settings)
        chosen["bind"] = f"fd://{listener.fileno()}"
        listener.detach()  # gunicorn owns it from here
    arbiter_pid = os.getpid()
    try:
        _Application(settings, app, chosen).run()
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
    standard_streams.open_missing()
    parser = argparse.ArgumentParser(prog="app.py", description="Serve language models over HTTP.")
    parser.add_argument("--host", help="address to listen on (HOST)")
    parser.add_argument("--port", type=int, help="port to listen on (PORT)")
    parser.add_argument("--workers", type=int, default=1, help="1: the model is loaded once")
    parser.add_argument("--reload", action="store_true", help="restart when the code changes")
    parsed = parser.parse_args(arguments)
    if parsed.workers != 1:
        stop(BAD_SETTING, f"--workers {parsed.workers} is not allowed: {WHY_ONE}")
    if parsed.port is not None and not 0 <= parsed.port <= 65535:
        stop(BAD_SETTING, f"--port {parsed.port} is not allowed: expected 0 to 65535")
    serve(settings_or_exit(host=parsed.host, port=parsed.port), reload=parsed.reload)


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
    def __init__(self, settings: Settings, app: str, chosen: dict[str, Any]) -> None:
        self._settings = settings
        self._app = app
        self._options = chosen
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Callable[..., Any]:
        module, _, name = self._app.partition(":")
        try:
            imports = self._settings.model_store.absolute() / "imports"
            with (
                without_collection(),
                stored_methods(imports, "app"),
                treated(UNUSED, AtFirstUse),
                treated(ADDRESSES, PatternsLater),
            ):
                make = getattr(importlib.import_module(module), name)
                application: Callable[..., Any] = make(self._settings)
        except SettingError as error:
            stop(Arbiter.APP_LOAD_ERROR, str(error))
        return application


def prepare(arbiter: Arbiter, settings: Settings) -> None:
    """Gunicorn's ``on_starting`` hook. Ends the process where it must not start."""
    tame(arbiter)
    try:
        if settings.engine == "local":  # else no model is loaded here
            lock.take(settings)
    except lock.LockedByOther as error:
        stop(1, str(error))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = MOST_FILES if most == resource.RLIM_INFINITY else min(most, MOST_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))  # each connection takes two
    # The worker says when it is ready; gunicorn would before it is.
    DrainWorker.maps_torch = settings.engine == "local"
    DrainWorker.notifier = Notifier(take_notify_socket())


class Deaths:
    """Gunicorn's ``child_exit`` hook: a worker that dies is replaced, but not for ever."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: deque[float] = deque(maxlen=MOST_DEATHS)

    def __call__(self, arbiter: Arbiter, worker: DrainWorker) -> None:
        """Raises HaltServer at the last of too many deaths."""
        cfg = arbiter.cfg
        if not arbiter.LISTENERS or cfg.reload or cfg.max_requests:  # it is meant to end
            return
        now = self._clock()
        self._times.append(now)
        if len(self._times) == MOST_DEATHS and now - self._times[0] < DEATHS_S:
            raise HaltServer(f"{MOST_DEATHS} workers died within {DEATHS_S:g} s", FAULTY)


def tame(arbiter: Arbiter) -> None:
    """Take out of gunicorn what would start a second worker or cut streams.

    Ends the process where more than one worker is asked for.
    """
    if arbiter.cfg.workers != 1:
        stop(BAD_SETTING, f"--workers {arbiter.cfg.workers} is not allowed: {WHY_ONE}")
    if not issubclass(arbiter.worker_class, DrainWorker):
        arbiter.log.warning("--worker-class is ignored: streams need threads")
        arbiter.worker_class = DrainWorker
        arbiter.cfg.set("threads", max(arbiter.cfg.threads, 2))

    def ignore(name: str) -> Callable[[], None]:
        return lambda: arbiter.log.warning("%s is ignored: restart instead", name)

    def end() -> NoReturn:
        first = time.monotonic()

        def again(*_: Any) -> None:
            if time.monotonic() - first > SECOND_S:  # not the same one, by another way
                arbiter.SIG_QUEUE.put_nowait(signal.SIGQUIT)

        signal.signal(signal.SIGTERM, again)
        raise StopIteration

    arbiter.handle_term = arbiter.handle_int = end  # a second one, while it waits, ends it at once
    at_terminal = sys.stdin is not None and not sys.stdin.closed and sys.stdin.isatty()
    # Gunicorn would load the new model beside the old one; without its terminal it ends.
    arbiter.handle_hup = end if at_terminal else ignore("SIGHUP")
    arbiter.handle_ttin = ignore("SIGTTIN")
    arbiter.handle_usr2 = ignore("SIGUSR2")
