"""The real application with a fake engine, for the tests of what stands in front of it."""

from __future__ import annotations

import threading
from typing import Any

from flask import Flask, request

from tests.fakes import FakeEngine, FakeLoader, fake_model
from transformers_api import app
from transformers_api.config.settings import Settings
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel

TICK_S = 0.01


class Pace(threading.Event):
    """A token each tick."""

    def wait(self, timeout: float | None = None) -> bool:
        super().wait(TICK_S)
        return True


GATES: dict[str, Any] = {
    "paced": Pace,
    "halting": lambda: threading.Semaphore(3),  # three tokens, then silence
}


def build(spec: ModelSpec) -> LoadedModel:
    return fake_model(spec, FakeEngine(gate=GATES[spec.name]()))


def create_app(settings: Settings) -> Flask:
    application = app.create_app(settings, FakeLoader(build))

    @application.get("/v1/tests/headers")
    def headers() -> dict[str, str]:
        return dict(request.headers)

    return application
