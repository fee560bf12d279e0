"""A model in this process, as the server has it, without the server."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers_api.config.settings import Settings
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.native.convert_model import packed_bytes
from transformers_api.engine.thread import EngineThread
from transformers_api.model_loader import ModelLoader
from transformers_api.serving.models.spec import ModelSpec, PathSource
from transformers_api.serving.models.store import ModelStore

T = TypeVar("T")
PROMPT = 62  # tokens


class Inside:
    """An engine on its thread; ``environment`` are settings."""

    def __init__(self, folder: Path, **environment: str) -> None:
        settings = Settings.from_env({**os.environ, **environment})
        store = ModelStore(settings)
        self._thread = EngineThread(settings.torch_threads)
        loader = ModelLoader(settings, store, self._thread)
        spec = ModelSpec(name="inside", source=PathSource(folder))
        files = loader.prepare(spec, lambda _share, _what: None)
        self.loaded = loader.load(spec, files)
        self._count = 0

    @property
    def dtype(self) -> str:
        """Of the weights, as they are kept."""
        return self.loaded.dtype

    @property
    def weight_bytes(self) -> int:
        """What one step reads of packed weights; 0 without native kernels."""
        engine: Any = self.loaded.engine
        return packed_bytes(engine.model)

    def on_thread(self, call: Callable[[], T]) -> T:
        """Run something where the engine runs: a second thread in torch would slow both down."""
        return self._thread.call(call).result()

    def step_ms(self, rows: int, tokens: int) -> float:
        """The median time between two tokens of one of ``rows`` greedy sequences."""
        params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
        streams = [
            self.loaded.engine.submit([SequenceRequest(self.prompt(), params)]) for _ in range(rows)
        ]
        # the last to come: when it decodes, nobody's prompt is being read any more
        moments = [time.perf_counter() for _ in streams[-1].read()]
        for stream in streams[:-1]:
            for _ in stream.read():
                pass
        gaps = [after - before for before, after in itertools.pairwise(moments)]
        return 1000 * statistics.median(gaps)

    def prompt(self) -> list[int]:
        """Another one each time, so that none is known."""
        self._count += 1
        return [20 + (7 * i + 131 * self._count) % 4000 for i in range(PROMPT)]

    def close(self) -> None:
        """Let go of the model."""
        self.loaded.engine.close()
