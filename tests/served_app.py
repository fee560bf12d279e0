"""The real application around a model that is made up, for tests that need a real gunicorn."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from flask import Flask

from tests.fakes import FakeLoader
from tests.servers import Server, started
from transformers_api import app
from transformers_api.config.settings import Settings

SERVE = """
from transformers_api.server.serve import serve
from transformers_api.config.settings import Settings
serve(Settings.from_env(), app="tests.served_app:create_app")
"""


def create_app(settings: Settings) -> Flask:
    return app.create_app(settings, FakeLoader())


@contextmanager
def serving(folder: object, **environ: str) -> Iterator[Server]:
    """A server with these settings, once it listens."""
    settings = {"PORT": "0", "HOST": "127.0.0.1", "MODEL_STORE": f"{folder}/store"} | environ
    with started(sys.executable, "-c", SERVE, **settings, HF_HOME=f"{folder}/hub") as server:
        server.address()
        yield server
