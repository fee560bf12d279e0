"""Vectors of texts: the pooled hidden states of an encoder, or of a causal model.

Every forward pass is a visit of the engine thread, between two decode steps of whoever is being
answered, and reads at most ``slice_tokens`` tokens where the model allows it.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import DynamicCache

from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.base import (
    NOTHING,
    ContextOverflow,
    Engine,
    EngineFacts,
    EngineListener,
    EngineStats,
    SequenceRequest,
    TokenStream,
)
from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.engine.platform.memory import release_memory
from transformers_api.engine.pooling import Pool, Reduction
from transformers_api.engine.rope import sequence_length, switching_lengths
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ApiError, ModelNotCapable, ModelUnloaded

T = TypeVar("T")
log = logging.getLogger(__name__)


class EncoderEngine:
    """Meets ``base.Engine`` for a model that makes vectors and no text.

    ``threads``: torch's, during its passes; by default as many as the engine thread's.
    """

    eos_token_ids: frozenset[int] = frozenset()
    context_overflow: ContextOverflow = None

    def __init__(
        self, model: Any, max_model_len: int, thread: EngineThread, threads: int | None = None
    ) -> None:
        self.model = model
        self.facts = EngineFacts(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            bytes=sum(parameter.nbytes for parameter in model.parameters()),
            mode="encoder",
        )
        self.max_model_len = max_model_len
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.thread = thread
        self._threads = threads or thread.num_threads or usable_cores()
        self._closed: ApiError | None = None

    def submit(
        self, requests: Sequence[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        """Raises ModelNotCapable."""
        raise ModelNotCapable("This model makes embeddings, it does not generate text")

    def adapted(
        self,
        source: AdapterSource,
        *,
        listener: EngineListener | None = None,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> Engine:
        """Raises ModelNotCapable."""
        raise ModelNotCapable("A model that makes embeddings takes no adapters")

    def evict_adapter(self, name: str) -> bool:
        """See base.Engine."""
        return False

    def call(self, visit: Callable[[Any], T]) -> Future[T]:
        """See base.Engine."""

        def run() -> T:
            if self._closed:
                raise self._closed
            before = torch.get_num_threads()  # 1 beside a model that runs on native kernels
            torch.set_num_threads(self._threads)
            try:
                return visit(self.model)
            finally:
                torch.set_num_threads(before)

        return self.thread.call(run)

    def describe(self) -> EngineFacts:
        """See base.Engine."""
        return self.facts

    def stats(self) -> EngineStats:
        """See base.Engine."""
        return EngineStats(mode=self.facts.mode)

    def close(self, error: ApiError | None = None) -> None:
        """See base.Engine."""
        reason = error or ModelUnloaded("The model was unloaded")
        future = self.thread.call(lambda: self._close(reason))
        if self.thread.is_alive:
            future.result()

    def _close(self, error: ApiError) -> None:
        if self._closed is None:
            self._closed = error
            del self.model
            release_memory()


class Visitor:
    """Passes of a model between the steps of its engine: one at a time, by turns, from any thread.

    ``slice_tokens``: to be read in a pass, padding included.
    """

    def __init__(self, engine: Engine, slice_tokens: int) -> None:
        self.slice_tokens = slice_tokens
        self._engine = engine
        self._line = Line()  # several slices in the inbox would run without a step between
        lengths = self.visit(lambda model: switching_lengths(model, sys.maxsize))
        self._original = min(lengths, default=None)

    def of_one_kind(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The numbers of rows that can share a pass: all, unless rope factors differ."""
        if self._original is None:
            return [[*range(len(rows))]]
        is_long = [len(row) > self._original for row in rows]
        kinds = [[i for i, own in enumerate(is_long) if own == kind] for kind in (False, True)]
        return [numbers for numbers in kinds if numbers]

    def visit(self, visit: Callable[[Any], T]) -> T:
        """The result of ``visit``, which gets the model, on the engine thread."""
        with self._line.turn():
            return self._engine.call(visit).result()


class PooledEmbedder(Visitor):
    """Meets ``serving.swap.Embedder``.

    ``reads_in_chunks``: a causal model can take a long text in pieces; its later tokens do not
    change the earlier ones.
    """

    def __init__(
        self, engine: Engine, reduction: Reduction, slice_tokens: int, *, reads_in_chunks: bool
    ) -> None:
        super().__init__(engine, slice_tokens)
        self._reduction = reduction
        self._reads_in_chunks = reads_in_chunks
        self.dimensions = len(self.embed([[0]])[0]) // 4

    def on(self, engine: Engine) -> PooledEmbedder:
        """See serving.swap.Embedder."""
        other = copy.copy(self)
        other._engine = engine
        return other

    def embed(
        self,
        rows: Sequence[Sequence[int]],
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt_tokens: Sequence[int] = (),
    ) -> list[bytes]:
        """See serving.swap.Embedder."""
        finish = partial(self._reduction.finish, dimensions=dimensions, normalize=normalize)
        if self._reads_in_chunks and len(rows) == 1 and len(rows[0]) > self.slice_tokens:
            pool = self._reduction.pool(torch.tensor([len(rows[0])]), prompt_tokens)
            reading = _Reading(rows[0], pool)
            while not reading.is_done:
                self.visit(partial(reading.read, width=self.slice_tokens))
            return self.visit(lambda _model: finish(pool.vectors()))
        vectors: dict[int, bytes] = {}
        for numbers in self.of_one_kind(rows):
            own = [rows[i] for i in numbers]
            skipped = [prompt_tokens[i] for i in numbers] if prompt_tokens else ()
            pooled = partial(_pooled, rows=own, reduction=self._reduction, prompt_tokens=skipped)
            made = self.visit(lambda model, pooled=pooled: finish(pooled(model)))  # type: ignore[misc]
            vectors |= zip(numbers, made, strict=True)
        return [vectors[i] for i in range(len(rows))]


class Line:
    """A lock whose holders come in the order in which they asked: who asks again is the last.

    One of ``threading`` goes to whoever is quick, which is the one that has just released it.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._line: deque[threading.Event] = deque()  # the first one holds it

    def __len__(self) -> int:
        """Those who hold it or wait for it."""
        return len(self._line)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn; it ends with the block."""
        turn = threading.Event()
        with self._guard:
            self._line.append(turn)
            self._line[0].set()
        turn.wait()
        try:
            yield
        finally:
            with self._guard:
                self._line.popleft()
                if self._line:
                    self._line[0].set()


class _Reading:
    """One long text, a chunk per visit."""

    def __init__(self, ids: Sequence[int], pool: Pool) -> None:
        self.ids = ids
        self.done = 0
        self.cache: Any = None
        self._pool = pool

    @property
    def is_done(self) -> bool:
        return self.done == len(self.ids)

    def read(self, model: Any, width: int) -> None:
        if self.cache is None:
            self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        ids = self.ids[self.done : self.done + width]
        stop = self.done + len(ids)
        with sequence_length(len(self.ids)):
            hidden = _hidden(
                model,
                input_ids=torch.tensor([ids], device=model.device),
                attention_mask=torch.ones(1, stop, dtype=torch.long, device=model.device),
                past_key_values=self.cache,
                use_cache=True,
            )
        self._pool.add(hidden)
        self.done = stop


def _hidden(model: Any, **inputs: Any) -> Tensor:
    """The last layer's states, float32 (B, T, H), without the language model's head."""
    output = model.base_model(**inputs, return_dict=True)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ModelNotCapable(f"{type(model).__name__} does not show its hidden states")
    states: Tensor = hidden.float()
    return states


def padded(model: Any, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of a pass (B, T), and the lengths of the rows (B)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    pad = max(getattr(model.config, "pad_token_id", None) or 0, 0)
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = (torch.arange(width) < lengths[:, None]).long().to(model.device)
    return {"input_ids": torch.tensor(ids, device=model.device), "attention_mask": mask}, lengths


def _pooled(
    model: Any,
    rows: Sequence[Sequence[int]],
    reduction: Reduction,
    prompt_tokens: Sequence[int] = (),
) -> Tensor:
    """(B, H) of texts of different lengths; what pads them takes no part."""
    inputs, lengths = padded(model, rows)
    pool = reduction.pool(lengths, prompt_tokens)
    pool.add(_hidden(model, **inputs))
    return pool.vectors()
