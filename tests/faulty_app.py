"""The real application around engines of the tests, some of which can be broken over HTTP."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any, cast

from flask import Flask

from tests.fakes import FakeEngine, FakeLoader, fake_model
from transformers_api.app import create_app as create_real_app
from transformers_api.config.settings import Settings
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import EngineDead
from transformers_api.server.readiness import Readiness
from transformers_api.serving.models.spec import ModelSpec

TICK_S = 0.01
TICKS = b"."


def paced(_prompt: Sequence[int], _params: Any, _index: int) -> Iterator[int]:
    """A token now and then, without end."""
    tick = threading.Event()
    while True:
        tick.wait(TICK_S)
        yield TICKS[0]


def create_app(settings: Settings) -> Flask:
    """An application whose answers come at a pace, as long as ``max_tokens``."""

    def build(spec: ModelSpec) -> Any:
        # The gate makes the engine write on a thread of its own.
        gate = threading.Event()
        gate.set()
        return fake_model(spec, FakeEngine(paced, gate=gate, max_model_len=1 << 20))

    loader = FakeLoader(build)
    return create_real_app(replace(settings, allow_download=False), loader)


class Hanging:
    """An engine whose step never ends."""

    def __init__(self) -> None:
        self.has_work = False

    def step(self) -> None:
        threading.Event().wait()

    def fail(self, error: EngineDead) -> None:
        return


def create_breakable_app(settings: Settings) -> Flask:
    """The same beside a real engine thread, which can be ended, or made to hang."""
    app = create_app(settings)
    # All that the thread itself wants of torch, which takes seconds to import.
    torch = SimpleNamespace(set_grad_enabled=bool, set_num_threads=int, inference_mode=nullcontext)
    sys.modules.setdefault("torch", cast(ModuleType, torch))
    thread = EngineThread(1)
    hanging = Hanging()
    thread.engines.append(hanging)
    services = app.extensions["transformers_api"]
    readiness = Readiness(None, thread, settings.step_timeout_s)
    app.extensions["transformers_api"] = replace(services, ready=readiness, fault=readiness.fault)

    def die() -> None:
        raise SystemExit("broken by a test")

    def hang() -> None:
        hanging.has_work = True

    @app.post("/break/<how>")
    def break_engine(how: str) -> str:
        thread.post({"die": die, "hang": hang}[how])
        return "broken"

    return app
