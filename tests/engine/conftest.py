from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.engine.models import tiny_model
from transformers_api.engine.batching import BatchingEngine
from transformers_api.engine.loader import LoadOptions, build_engine
from transformers_api.engine.thread import EngineThread

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine_thread() -> Iterator[EngineThread]:
    thread = EngineThread(num_threads=1)
    yield thread
    thread.stop()


@pytest.fixture
def make_engine(engine_thread: EngineThread) -> Iterator[Callable[..., BatchingEngine]]:
    """make_engine(name or model, **LoadOptions): a running engine, closed at the end."""
    engines: list[BatchingEngine] = []

    def make(model: Any = "llama", thread: EngineThread | None = None, **options: Any):
        on = thread or engine_thread
        model = copy.deepcopy(tiny_model(model) if isinstance(model, str) else model)
        options = {"num_slots": 4, "prefill_chunk": 8} | options

        def build() -> BatchingEngine:
            engine = build_engine(model, LoadOptions(**options), on)
            on.engines.append(engine)
            return engine

        engines.append(on.call(build).result())
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
