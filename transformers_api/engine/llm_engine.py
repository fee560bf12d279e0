"""Continuous batching for one model: the heart; everything else exists to keep this short."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from transformers_api import logs
from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.adapters import AdaptedEngine, Adapters
from transformers_api.engine.base import (
    BACKLOG,
    NOTHING,
    OBSERVED_BACKLOG,
    ContextOverflow,
    EngineFacts,
    EngineListener,
    EngineStats,
    FinishReason,
    SequenceRequest,
    SilentEngineListener,
    TokenStream,
)
from transformers_api.engine.batch import Batch
from transformers_api.engine.cached_rows import FinishedRow
from transformers_api.engine.platform.memory import release_memory
from transformers_api.engine.prompt_lookup import PromptLookup
from transformers_api.engine.runners.model_runner import OneRow, Runner, innermost
from transformers_api.engine.sampling.logits_processors import processors_for
from transformers_api.engine.sampling.sampler import Sampler, TokenSampler
from transformers_api.engine.scheduler import Scheduler
from transformers_api.engine.sequence import Sequence
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import (
    ApiError,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    ModelUnloaded,
    Overloaded,
)

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """Limits of one engine."""

    max_model_len: int  # tokens, prompt + completion
    vocab_size: int
    num_slots: int  # sequences decoded together
    max_waiting: int = 128  # sequences that may wait for a slot
    prefill_chunk: int = 256  # prompt tokens in one step, at most
    prefill_alone: int = 0  # of a prompt that is alone, where that is more; see PassBudget
    eos_token_ids: frozenset[int] = frozenset()
    context_overflow: ContextOverflow = None
    prompt_window: int | None = None  # with "crop": tokens of a prompt that are read
    torch_noise: bool = False  # sample as torch.multinomial with a seeded generator does
    mixes: bool = False  # one pass reads prompts and the tokens of running answers
    costly_context: int | None = None  # see Scheduler
    prompt_lookup_tokens: int = 0  # read ahead in a lone sequence that repeats itself
    forced_tokens: int = 0  # read ahead in a lone sequence where its constraint allows no others
    original_window: int | None = None  # tokens beyond which a sequence takes other rope factors
    adapter_bytes: int = 1 << 29  # of adapters in memory


class BatchingEngine:
    """Meets ``base.Engine``. Scheduler, cache and sampler belong to the engine thread.

    Other threads only put messages into the thread's inbox and read the queue of their request.
    """

    def __init__(
        self,
        model: Any,
        runner: Runner,
        limits: EngineLimits,
        thread: EngineThread,
        facts: EngineFacts,
        sampler: TokenSampler | None = None,
        listener: EngineListener | None = None,
    ) -> None:
        self.limits = limits
        self.facts = facts
        self.model = model
        self.runner = runner
        self.sampler = sampler or Sampler()
        self.listener = listener or SilentEngineListener()
        self.scheduler = Scheduler(
            runner.cache,
            limits.num_slots,
            limits.prefill_chunk,
            mixes=limits.mixes,
            costly_context=limits.costly_context,
            prefill_alone=limits.prefill_alone,
        )
        self.lookup = PromptLookup(limits.prompt_lookup_tokens, limits.forced_tokens)
        self.adapters = Adapters(self, lambda: innermost(self.runner), limits.adapter_bytes)
        self.thread = thread
        self._places = threading.Semaphore(limits.num_slots + limits.max_waiting)
        # When nothing runs any more, with the rows of finished sequences by their slots.
        self.on_closed: Callable[[Mapping[int, FinishedRow]], None] | None = None
        self._closed: ApiError | None = None
        self._steps = 0
        self._generated = 0

    # -- the engine thread --------------------------------------------------------------------

    def step(self) -> None:
        """One forward pass for whoever is scheduled; a failure ends those sequences only."""
        batch = None
        try:
            batch = self.scheduler.schedule()
            if batch is not None:
                self._step(batch)
        except Exception as error:
            hit = batch.sequences if batch else self.scheduler.running
            ids = ",".join(dict.fromkeys(seq.request_id for seq in hit))
            log.exception("A step of the engine failed", extra={"request_id": ids})
            failed = EngineFailed("A step of the model failed")
            self._fail_batch(batch, error if isinstance(error, ApiError) else failed)

    def _step(self, batch: Batch) -> None:
        self.lookup.extend(batch)
        budget, began = self.scheduler.budget, time.perf_counter()
        load = budget.load_of(batch)
        for part in batch.parts:
            logits = self.runner.forward(part, part.keep)  # (E, keep, V)
            self._steps += 1
            for place in range(part.keep):
                if not self._take(part, logits[:, place], place):
                    break
        budget.times.observe(load, time.perf_counter() - began)
        for seq in reversed(batch.sequences):  # only when all have advanced: finishing moves rows
            if seq.is_finished:
                self.scheduler.finish(seq)
            else:
                self.scheduler.settle(seq)

    def _take(self, batch: Batch, logits: torch.Tensor, place: int) -> bool:
        """Sample from ``logits`` (E, V), which are of a place in the draft, or after it.

        Return True where that is the draft's token: what was read after it holds then.
        """
        ending = batch.ending
        sampled = self.sampler.sample(logits, ending) if ending else []
        confirmed = place < len(batch.draft) and sampled[0].token_id == batch.draft[place]
        self._tell(batch, ending, place, confirmed)
        tokens = iter(sampled)
        for seq, stride, ends in zip(batch.sequences, batch.strides, batch.ends, strict=True):
            seq.advance(stride, next(tokens) if ends else None)
        self._generated += len(sampled)
        return confirmed and not batch.sequences[0].is_finished

    def _tell(self, batch: Batch, ending: list[Sequence], place: int, confirmed: bool) -> None:
        """Note the times of a step and tell them; before a sequence can end with it."""
        now, gaps = time.monotonic(), dict[EngineListener, list[float]]()
        for seq in ending:
            listener = seq.listener or self.listener
            if seq.first_token_at is None:
                seq.first_token_at = now
                spent_s = now - seq.submitted_at if seq.params.max_tokens else None
                listener.on_prompt(seq.prompt_len, seq.cached_tokens, spent_s)
            else:
                gaps.setdefault(listener, []).append(now - seq.token_at)
            seq.token_at = now
        self.listener.on_step(0 if place else batch.tokens, gaps.pop(self.listener, []))
        for listener, own in gaps.items():
            listener.on_step(0, own)
        if batch.draft:
            listener = batch.sequences[0].listener or self.listener
            listener.on_draft(0 if place else len(batch.draft), int(confirmed))

    def _ended(self, seq: Sequence, reason: FinishReason) -> None:
        self._places.release()
        (seq.listener or self.listener).on_finish(seq.stats(reason))

    @property
    def has_work(self) -> bool:
        """True where ``step`` would do something."""
        return self.scheduler.has_work

    def fail(self, error: ApiError) -> None:
        """End every sequence with ``error``."""
        for seq in [*self.scheduler.running, *self.scheduler.waiting]:
            seq.end(FinishReason.ERROR, error)
        self.scheduler.clear()

    def _fail_batch(self, batch: Batch | None, error: ApiError) -> None:
        """End the sequences of the batch; all of them where there was none yet."""
        if batch is None:
            self.fail(error)
        else:
            for seq in reversed(batch.sequences):
                seq.end(FinishReason.ERROR, error)
                self.scheduler.finish(seq)
        self.scheduler.forget()
        if not self.scheduler.running:
            self.runner.clear()

    # -- any thread ---------------------------------------------------------------------------

    @property
    def max_model_len(self) -> int:
        """See base.Engine."""
        return self.limits.max_model_len

    @property
    def vocab_size(self) -> int:
        """See base.Engine."""
        return self.limits.vocab_size

    @property
    def context_overflow(self) -> ContextOverflow:
        """See base.Engine."""
        return self.limits.context_overflow

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """See base.Engine."""
        return self.limits.eos_token_ids

    def submit(
        self, requests: SequenceOf[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        """See base.Engine."""
        for request in requests:
            self._check(request)
        self._take_places(len(requests))
        sequences: list[Sequence] = []
        limit = OBSERVED_BACKLOG if observe else BACKLOG
        stream = TokenStream(len(requests), lambda index: self._abort(sequences, index), limit)
        sequences += [self._sequence(r, stream, i, observe) for i, r in enumerate(requests)]
        try:
            self.thread.post(lambda: self._add(sequences))
        except ApiError:
            self._places.release(len(requests))
            raise
        return stream

    def call(self, visit: Callable[[Any], T]) -> Future[T]:
        """See base.Engine."""

        def run() -> T:
            if self._closed:
                raise self._closed
            return visit(self.model)

        return self.thread.call(run)

    def adapted(
        self,
        source: AdapterSource,
        *,
        listener: EngineListener | None = None,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> AdaptedEngine:
        """See base.Engine."""
        adapter = self.adapters.acquire(source, timeout, is_cancelled)
        return AdaptedEngine(self, adapter, self.adapters.release, listener)

    def evict_adapter(self, name: str) -> bool:
        """See base.Engine."""
        return self.adapters.evict(name)

    def describe(self) -> EngineFacts:
        """See base.Engine."""
        return self.facts

    def stats(self) -> EngineStats:
        """See base.Engine."""
        scheduler = self.scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            steps=self._steps,
            prompt_tokens=scheduler.prompt_tokens,
            generated_tokens=self._generated,
            cached_tokens=scheduler.cached_tokens,
            kv_bytes=scheduler.cache.bytes,
            kv_used_bytes=scheduler.reserved_bytes,
            kv_budget_bytes=scheduler.cache.budget_bytes,
            kv_token_bytes=scheduler.cache.token_bytes,
            mode=self.facts.mode,
            adapters=self.adapters.stats(),
        )

    def close(self, error: ApiError | None = None) -> None:
        """See base.Engine."""
        reason = error or ModelUnloaded("The model was unloaded")
        future = self.thread.call(lambda: self._close(reason))
        if self.thread.is_alive:
            future.result()

    def _close(self, error: ApiError) -> None:
        if self._closed:
            return
        self._closed, finished = error, self.scheduler.finished_rows()
        self.fail(error)
        if self in self.thread.engines:
            self.thread.engines.remove(self)
        self.adapters.clear()
        del self.model, self.runner, self.sampler
        self.scheduler.cache = OneRow()
        if self.on_closed is not None:
            self.on_closed(finished)
            self.on_closed = None  # it knows the model
        release_memory()

    def _check(self, request: SequenceRequest) -> None:
        length = len(request.prompt_ids)
        if not length:
            raise InvalidRequest("The prompt has no tokens", param="prompt")
        overflows = length + min(request.params.max_tokens, 1) > self.max_model_len
        is_scored = request.params.prompt_logprobs is not None
        if overflows and (is_scored or not self.context_overflow):
            raise ContextLengthExceeded(
                f"The prompt has {length} tokens, the model's context is {self.max_model_len}"
            )
        if not all(0 <= token < self.vocab_size for token in request.prompt_ids):
            raise InvalidRequest(
                f"Token ids must be from 0 to {self.vocab_size - 1}", param="prompt"
            )

    def _take_places(self, count: int) -> None:
        taken = 0
        while taken < count and self._places.acquire(blocking=False):
            taken += 1
        if taken < count:
            self._places.release(taken) if taken else None
            raise Overloaded("Too many requests are waiting", retry_after=1)

    def _sequence(
        self, request: SequenceRequest, stream: TokenStream, index: int, observe: Mapping[str, Any]
    ) -> Sequence:
        limits = self.limits
        if limits.context_overflow == "crop" and limits.prompt_window:
            cropped = request.prompt_ids[-limits.prompt_window :]
            request = replace(request, prompt_ids=cropped)
        seq = Sequence(
            request,
            stream,
            index,
            eos_token_ids=self.eos_token_ids,
            max_model_len=self.max_model_len,
            slides=limits.context_overflow == "slide",
            processors=processors_for(request.params),
            observe=observe,
            on_end=self._ended,
            original_window=limits.original_window,
        )
        seq.request_id = logs.request_id.get()
        return seq

    def _add(self, sequences: list[Sequence]) -> None:
        for seq in sequences:
            if self._closed:
                seq.end(FinishReason.ERROR, self._closed)
                continue
            if self.limits.torch_noise:
                seq.generator = torch.Generator().manual_seed(seq.seed)
            self.scheduler.add(seq)

    def _abort(self, sequences: list[Sequence], index: int | None) -> None:
        for seq in sequences:
            if index in (None, seq.index):
                seq.cancelled = True
