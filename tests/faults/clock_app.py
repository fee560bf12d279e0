"""The real application around a fake engine, in a process whose clock can be set over HTTP."""

from __future__ import annotations

import time

from flask import Flask

from tests import faulty_app
from transformers_api.config.settings import Settings


def create_app(settings: Settings) -> Flask:
    app = faulty_app.create_app(settings)
    real = time.time
    ahead_s = 0.0

    @app.post("/clock/<seconds>")
    def set_clock(seconds: str) -> str:
        nonlocal ahead_s
        ahead_s = float(seconds)
        return str(ahead_s)

    time.time = lambda: real() + ahead_s
    return app
