from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.engine.conftest import (  # noqa: F401
    built,
    engine_thread,
)
from tests.families.conftest import converted, load  # noqa: F401
from tests.inspection.models import tiny
from transformers_api.engine.llm_engine import BatchingEngine
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.thread import EngineThread
from transformers_api.inspection.attachment import Attachment
from transformers_api.inspection.examination import Examined
from transformers_api.inspection.inspector import ModelInspector


@dataclass
class Watched:
    """An engine that can be looked into."""

    engine: BatchingEngine
    examined: Examined
    inspector: ModelInspector

    def run(self, job: Any) -> Any:
        """The result of a job; every slice is a visit of its own."""
        generator = self.engine.call(job).result()
        while True:
            try:
                self.engine.call(lambda _model: next(generator)).result()
            except StopIteration as end:
                return end.value


Engines = dict[Any, Watched]


@pytest.fixture(scope="module")
def running() -> Iterator[Engines]:
    """Engines of this file's tests, by model and options; closed with its last test."""
    engines: Engines = {}
    yield engines
    for watched in engines.values():
        watched.engine.close()


@pytest.fixture
def watch(
    engine_thread: EngineThread,  # noqa: F811
    native_default: Path | None,
    running: Engines,
) -> Callable[..., Watched]:
    """watch(name or model, **LoadOptions): a running copy of the model; a named one is shared.

    Give it the model where what was read before must not be in the cache.
    """

    def make(model: Any = "llama", **options: Any) -> Watched:
        options = {"num_slots": 4, "prefill_chunk": 8, "native": native_default} | options
        key = (model if isinstance(model, str) else object(), repr(options))
        if key not in running:
            own = tiny(model) if isinstance(model, str) else model
            running[key] = engine_thread.call(lambda: build(own, options)).result()
        return running[key]

    def build(model: Any, options: dict[str, Any]) -> Watched:
        attachment = Attachment(slice_tokens=options["prefill_chunk"])
        engine = built(model, LoadOptions(**options), engine_thread, attachment.wrap)
        engine_thread.engines.append(engine)
        assert attachment.examined is not None
        return Watched(engine, attachment.examined, attachment.inspector(engine))

    return make
