"""One request inside the engine."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any, Protocol

import torch
from torch import Tensor

from transformers_api.engine.base import (
    NOTHING,
    FinishReason,
    SequenceRequest,
    SequenceStats,
    TokenConstraint,
    TokenOutput,
    TokenScore,
    TokenStream,
)
from transformers_api.engine.row_kind import RowKind
from transformers_api.errors import ApiError, ConstraintFailed, SlowReader

log = logging.getLogger(__name__)


def _takes(constraint: TokenConstraint, token_id: int) -> bool:
    """Hand a token on; False where that failed, which is nobody else's matter in the batch."""
    try:
        constraint.take(token_id)
    except Exception:
        log.exception("A constraint failed")
        return False
    return True


class SampledToken:
    """The sampler's choice for one row."""

    __slots__ = ("error", "score", "token_id")

    def __init__(
        self, token_id: int, score: TokenScore | None = None, error: ApiError | None = None
    ) -> None:
        self.token_id = token_id
        self.score = score
        self.error = error


class LogitsProcessor(Protocol):
    """Changes a row of logits in place, before the temperature."""

    def __call__(self, seq: Sequence, row: Tensor) -> None:
        """``row`` (V,) float32, the sequence's own copy."""
        ...


class Sequence:
    """The tokens, the slot and the counters of one sequence. Owned by the engine thread.

    ``tokens`` are prompt and output. The model sees those from ``start`` on; the cache holds K and
    V of the first ``num_cached`` of these. With ``slides`` the model sees the last
    ``max_model_len`` tokens: beyond that each new token moves ``start`` and empties the cache.
    ``processors`` change its logits, in this order. Beyond ``original_window`` tokens, if there is
    one, the model takes other rope factors, and what it has read is read again.
    """

    def __init__(
        self,
        request: SequenceRequest,
        stream: TokenStream,
        index: int,
        *,
        eos_token_ids: frozenset[int],
        max_model_len: int,
        slides: bool = False,
        processors: SequenceOf[LogitsProcessor] = (),
        observe: Mapping[str, Any] = NOTHING,
        on_end: Callable[[Sequence, FinishReason], object] | None = None,
        original_window: int | None = None,
    ) -> None:
        params = request.params
        self.params = params
        self.constraint = request.constraint
        self.stream = stream
        self.index = index
        self.on_end = on_end
        self.observe = observe
        self.tokens = list(request.prompt_ids)
        self.prompt_len = len(self.tokens)
        self.start = max(self.prompt_len - max_model_len, 0)
        self.window = max_model_len
        self.original_window = original_window
        longest = self.prompt_len + params.max_tokens
        self.max_len = longest if slides else min(longest, max_model_len)
        self.generator: torch.Generator | None = None  # noise from torch, not from the seed alone
        own_eos = frozenset() if params.ignore_eos else eos_token_ids
        self.stop_ids = own_eos | params.stop_token_ids
        self.seed = int.from_bytes(os.urandom(8)) if params.seed is None else params.seed
        self.processors = processors
        self.slot = -1
        self.client = request.client
        self.adapter = request.adapter
        self.edits = request.edits
        self.reads_anew = request.reads_anew
        self.listener = request.listener
        self.arrival = 0  # its place among the prompts that are to be read, by when it came
        self.num_cached = 0
        self.num_shared = 0  # while it waits: tokens that it can probably copy when it is read
        self.cached_tokens = 0  # prompt tokens that came from the prefix cache
        self.prompt_scores: list[TokenScore | None] | None = None
        self.extras: dict[str, Any] = {}  # an observer leaves here what goes with the next token
        self.cancelled = False  # set by any thread, read by the scheduler
        self.is_finished = False
        self.has_failed = False
        self.request_id = "-"  # for the log
        # When, by time.monotonic(); None: not yet.
        self.submitted_at = self.token_at = time.monotonic()  # token_at: of the last token
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def num_output(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def num_pending(self) -> int:
        """Tokens that the next forwards have to read: 1 while decoding."""
        return self._length - self.num_cached

    @property
    def unread(self) -> int:
        """Tokens of its prompt that have to be read, as far as one can tell while it waits."""
        return self.num_pending - self.num_shared

    @property
    def is_prefilling(self) -> bool:
        """True where more is to be read than the token sampled last."""
        return self.num_pending > 1 or not self.num_output

    @property
    def is_scoring(self) -> bool:
        """True where the log probabilities of what is to be read were asked for."""
        return self.params.prompt_logprobs is not None and not self.num_output

    @property
    def is_long(self) -> bool:
        """True beyond the original window: all of it is read with the long factors."""
        return self.original_window is not None and self._length > self.original_window

    @property
    def takes_prefix(self) -> bool:
        """True where keys and values of its prompt may come from another sequence."""
        return self.params.prompt_logprobs is None and not self.reads_anew

    @property
    def row_kind(self) -> RowKind:
        """The way in which its tokens are read."""
        adapter = None if self.adapter is None else self.adapter.key
        if self.edits is None:
            return RowKind(self.is_long, adapter)
        unedited = max(self.edits.unedited - self.start, 0)
        return RowKind(self.is_long, adapter, f"{self.start} {self.edits.identity}", unedited)

    @property
    def _length(self) -> int:
        return len(self.tokens) - self.start

    @property
    def room(self) -> int:
        """Tokens of cache that it may need."""
        return min(self.max_len, self.window)

    @property
    def cached(self) -> list[int]:
        """The tokens whose K and V are in the cache."""
        return self.tokens[self.start : self.start + self.num_cached]

    def upcoming(self, width: int) -> list[int]:
        """The next ``width`` tokens to read."""
        first = self.start + self.num_cached
        return self.tokens[first : first + width]

    @property
    def masks_stops(self) -> bool:
        """True where stop tokens may not be sampled yet (min_tokens)."""
        return bool(self.stop_ids) and self.num_output < self.params.min_tokens

    def advance(self, width: int, sampled: SampledToken | None) -> None:
        """Count ``width`` tokens as cached; take the sampled one if the forward reached the end."""
        self.num_cached += width
        if sampled is None:
            return
        if sampled.error is not None:
            self.end(FinishReason.ERROR, sampled.error)
        elif self.max_len == self.prompt_len:
            self.end(FinishReason.LENGTH)
        else:
            self.tokens.append(sampled.token_id)
            if self.constraint is not None and not _takes(self.constraint, sampled.token_id):
                self.end(FinishReason.ERROR, ConstraintFailed("The requested format failed"))
                return
            if self._length > self.window:
                self.start, self.num_cached = len(self.tokens) - self.window, 0
            elif self.is_long and self._length - 1 == self.original_window:
                self.num_cached = 0
            self._emit(sampled.token_id, sampled.score, self._finish_reason(sampled.token_id))

    def stats(self, reason: FinishReason) -> SequenceStats:
        """Return its figures, at its end."""
        now = time.monotonic()
        admitted = self.admitted_at or now
        first = self.first_token_at or now
        return SequenceStats(
            finish_reason=reason,
            prompt_tokens=self.prompt_len,
            generated_tokens=self.num_output,
            queued_s=admitted - self.submitted_at,
            prefill_s=first - admitted,
            decode_s=now - first,
            total_s=now - self.submitted_at,
        )

    def end(self, reason: FinishReason, error: ApiError | None = None) -> None:
        """Send the terminal output, unless one has been sent."""
        if not self.is_finished:
            self._emit(None, None, reason, error)

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self.stop_ids:
            return FinishReason.STOP
        if self.constraint is not None and self.constraint.is_complete:
            return FinishReason.COMPLETE
        if len(self.tokens) >= self.max_len:
            return FinishReason.LENGTH
        return None

    def _emit(
        self,
        token_id: int | None,
        score: TokenScore | None,
        reason: FinishReason | None,
        error: ApiError | None = None,
    ) -> None:
        is_first = self.num_output == (token_id is not None)
        extras: Mapping[str, Any] = NOTHING
        if self.extras:
            extras, self.extras = self.extras, {}
        scores = self.prompt_scores if is_first else None
        self.stream.put(
            TokenOutput(
                index=self.index,
                token_id=token_id,
                score=score,
                finish_reason=reason,
                error=error,
                cached_tokens=self.cached_tokens if is_first else 0,
                prompt_scores=None if scores is None else tuple(scores),
                extras=extras,
            )
        )
        self.is_finished = reason is not None
        self.has_failed = error is not None
        if reason is not None and self.on_end:
            self.on_end(self, reason)
        if not self.is_finished and self.stream.is_overfull:
            self.stream.overrun = True
            self.end(FinishReason.ERROR, SlowReader("The answer is not read as fast as it is made"))
