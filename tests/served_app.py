"""The real application around a model that is made up, for tests that need a real gunicorn."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from flask import Flask

from tests.fakes import FakeEngine, FakeLoader, fake_model
from tests.redis_server import wait_for_redis
from tests.servers import Server, started
from transformers_api import app
from transformers_api.config.settings import Settings

SERVE = """
from transformers_api.server.serve import serve
from transformers_api.config.settings import Settings
serve(Settings.from_env(), app="{app}")
"""


def create_app(settings: Settings) -> Flask:
    return app.create_app(settings, FakeLoader())


def create_patient_app(settings: Settings) -> Flask:
    """It takes no redis for gone only because the machine is busy."""
    wait_for_redis(pytest.MonkeyPatch())
    return create_app(settings)


def create_silent_app(settings: Settings) -> Flask:
    """Its model writes nothing: a chat's stream begins and then hears no more."""
    silence = threading.Semaphore(0)
    return app.create_app(
        settings, FakeLoader(lambda spec: fake_model(spec, FakeEngine(gate=silence)))
    )


@contextmanager
def serving(
    folder: object, app: str = "tests.served_app:create_app", **environ: str
) -> Iterator[Server]:
    """A server with these settings, once it listens."""
    settings = {"PORT": "0", "HOST": "127.0.0.1", "MODEL_STORE": f"{folder}/store"} | environ
    command = [sys.executable, "-c", SERVE.format(app=app)]
    with started(*command, **settings, HF_HOME=f"{folder}/hub") as server:
        server.address()
        yield server
