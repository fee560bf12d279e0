"""A small application that stands in for the real one where a test needs a real gunicorn."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

from flask import Flask, Response, request

from transformers_api.config.settings import SettingError, Settings

TICK_S = 0.02
LAST_WORDS_S = 1.0


class Services:
    """What the worker finds in ``app.extensions``."""

    def __init__(self, settings: Settings | None) -> None:
        self.settings = settings or Settings()
        self.over = threading.Event()

    def drain(self, grace_s: float) -> None:
        timer = threading.Timer(max(0.0, grace_s - LAST_WORDS_S), self.over.set)
        timer.daemon = True
        timer.start()


def create_app(settings: Settings | None = None) -> Flask:
    services = Services(settings)
    app = Flask(__name__)
    app.extensions["transformers_api"] = services

    @app.get("/pid")
    def pid() -> str:
        return str(os.getpid())

    @app.get("/stream")
    def stream() -> Response:
        def events() -> Iterator[str]:
            for _ in range(int(request.args["ticks"])):
                if services.over.wait(TICK_S):
                    yield 'data: {"error": "server_shutting_down"}\n\n'
                    return
                yield "data: tick\n\n"
            yield "data: [DONE]\n\n"

        ticks = events()
        return Response(_with_request(ticks, next(ticks)), mimetype="text/event-stream")

    @app.get("/stuck")
    def stuck() -> str:
        threading.Event().wait()
        return "never"

    _add_bodies(app)
    return app


def create_cramped_app(settings: Settings | None = None) -> Flask:
    """Its worker keeps little of what is on its way, and takes long bodies below one path."""
    from transformers_api.server import connections

    connections.MAX_WAITING_BYTES, connections.MOST_UPLOADING = 1 << 18, 20_000_000
    app = create_app(settings)
    app.config["UPLOADS"] = {"/inspect/lenses/": 1 << 24}
    app.config["MAY_UPLOAD"] = lambda head: head.field(b"x-api-key") == "right"
    return app


def _add_bodies(app: Flask) -> None:
    flooded = threading.Semaphore(0)

    @app.get("/health")
    def health() -> dict[str, bool]:
        return {"ok": True}

    @app.post("/echo")
    def echo() -> bytes:
        return request.get_data()

    @app.get("/flood")
    def flood() -> Response:
        """More than any buffer holds."""
        piece = b"x" * (1 << 16)
        response = Response(piece for _ in range(10**6))
        response.call_on_close(flooded.release)
        return response

    @app.get("/flooded")
    def floods_ended() -> str:
        return str(flooded.acquire(timeout=30))


def _with_request(rest: Iterator[str], first: str) -> Iterator[str]:
    """The first event was made while the request was at hand."""
    yield first
    yield from rest


def create_watched_app(settings: Settings | None = None) -> Flask:
    """Waits for clients to leave, each kind of request in its own way."""
    from transformers_api.api.http.disconnect import DisconnectWatcher, Watch

    app = Flask(__name__)
    watcher = DisconnectWatcher()
    begun = {kind: threading.Event() for kind in ("plain", "silent", "streaming")}
    left = {kind: threading.Event() for kind in begun}

    @app.get("/wait/<kind>")
    def wait(kind: str) -> Response | str:
        gone = left[kind]
        watch = watcher.watch(request.environ, gone.set)
        begun[kind].set()
        if kind == "plain":
            with watch:
                gone.wait(20)
            return "nobody reads this"

        def events(kind: str, watch: Watch) -> Iterator[str]:
            while kind == "streaming" and not gone.wait(0.01):
                watch.answer_begins()
                yield "data: event\n\n"
            gone.wait(20)
            watch.close()

        return Response(events(kind, watch), mimetype="text/event-stream")

    @app.get("/begun/<kind>")
    def has_begun(kind: str) -> str:
        return str(begun[kind].wait(30))

    @app.get("/left/<kind>")
    def has_left(kind: str) -> str:
        return str(left[kind].wait(30))

    return app


def refuse_to_start(settings: Settings) -> Flask:
    raise SettingError("MODEL_REGISTRY_PATH=models.json is not allowed: entry 3 has no name")


app = create_app()
