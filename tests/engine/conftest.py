from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.models import tiny_model
from transformers_api.engine.backend import Backend
from transformers_api.engine.backends import choose_backends
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.loader import Wrap, start
from transformers_api.engine.pretrained import differentiable
from transformers_api.engine.thread import EngineThread

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine_thread() -> Iterator[EngineThread]:
    thread = EngineThread(num_threads=1)
    yield thread
    thread.stop()


def built(
    model: Any, options: LoadOptions, thread: EngineThread, wrap: Wrap | None = None
) -> BatchingEngine:
    """As ``load_engine`` does it, of a copy: with the kernels, or without those that refuse.

    On the CPU, unless the options name another device.
    """
    device = "cpu" if options.device == "auto" else options.device

    def make(backend: Backend) -> Any:
        with differentiable():
            return copy.deepcopy(model).to(device)

    backends = choose_backends(options, device, thread.num_threads)
    return start(make, "a model", backends, options, thread, wrap)[0]


@pytest.fixture
def make_engine(
    engine_thread: EngineThread, native_default: Path | None
) -> Iterator[Callable[..., BatchingEngine]]:
    """make_engine(name or model, **LoadOptions): a running engine, closed at the end."""
    engines: list[BatchingEngine] = []

    def make(model: Any = "llama", thread: EngineThread | None = None, **options: Any):
        on = thread or engine_thread
        model = tiny_model(model) if isinstance(model, str) else model
        options = {"num_slots": 4, "prefill_chunk": 8, "native": native_default} | options

        def build() -> BatchingEngine:
            engine = built(model, LoadOptions(**options), on)
            on.engines.append(engine)
            return engine

        engines.append(on.call(build).result())
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
