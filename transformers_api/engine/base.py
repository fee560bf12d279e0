"""Plain data and the protocol of an engine, for the rest of the program. Torch-free."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeVar

import numpy
import numpy.typing as npt

from transformers_api.engine.adapter_source import AdapterSource, AdapterStats
from transformers_api.errors import ApiError

T = TypeVar("T")
# The rule for prompts and answers beyond max_model_len: None refuses and ends them. "slide": the
# model sees the last max_model_len tokens, read again for each new one. "crop": the prompt's end.
ContextOverflow = Literal["slide", "crop"] | None
PairIds = tuple[Sequence[int], Sequence[int]]  # ids of a pair of texts; their types, or none
NOTHING: Mapping[str, Any] = MappingProxyType({})
Mask = npt.NDArray[numpy.uint32]  # (W,): bit i % 32 of word i // 32 is set for token i; 32 W >= V
BACKLOG = 4096  # outputs that a reader may fall behind
OBSERVED_BACKLOG = 256  # where each carries what an observer noted


class FinishReason(StrEnum):
    """Reasons for the end of a sequence."""

    STOP = "stop"  # an end-of-sequence or stop token; that token is not part of the text
    COMPLETE = "complete"  # nothing may follow by its constraint; the last token is part of it
    LENGTH = "length"  # max_tokens or the model's context
    ABORT = "abort"  # the caller asked
    ERROR = "error"  # TokenOutput.error says what


@dataclass(frozen=True, slots=True, kw_only=True)
class DryParams:
    """Parameters of the DRY penalty, as llama.cpp's of these names."""

    multiplier: float
    base: float = 1.75
    allowed_length: int = 2
    last_n: int = -1  # tokens; -1: all
    # By its first token, what may follow of each sequence that no repetition reaches across.
    breakers: Mapping[int, frozenset[tuple[int, ...]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one sequence. By default: plain sampling from the model."""

    max_tokens: int = 16  # 0 only together with prompt_logprobs
    min_tokens: int = 0  # before that, end-of-sequence and stop tokens are masked
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = off
    min_p: float = 0.0
    typical_p: float = 1.0
    word_repetition_penalty: float = 1.0  # divides logits of prompt and output ids (TinyGPT)
    repetition_penalty: float = 1.0  # multiplicative, over prompt and output (CTRL)
    repeat_last_n: int = -1  # tokens that repetition_penalty looks back at; -1: all
    presence_penalty: float = 0.0  # additive, over the output (OpenAI)
    frequency_penalty: float = 0.0  # additive, times the count in the output (OpenAI)
    dry: DryParams | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: frozenset[int] | None = None  # at least one; None: all
    forced: Mapping[int, int] = field(default_factory=dict)  # the token of a step, from 0
    top_n_sigma: float = 0.0  # standard deviations of the logits; 0 or less = off
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    stop_token_ids: frozenset[int] = frozenset()  # besides the model's own end-of-sequence ids
    ignore_eos: bool = False  # go on after the model's own end-of-sequence ids
    seed: int | None = None  # None: a fresh one from the operating system
    logprobs: int | None = None  # None: none; 0: of the chosen token; k: also of the k most likely
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt


class TokenConstraint(Protocol):
    """The tokens that one sequence may go on with, and the state of what it has. Ids only.

    The engine thread calls it, for one sequence, in the order ``allowed``, ``take``, ``allowed``, …
    """

    def allowed(self) -> Mask | None:
        """Return the tokens that may come next, or None for all.

        It holds until ``take``; may wait for another thread. Raises ConstraintFailed where nothing
        may come, or it cannot be worked out.
        """
        ...

    def take(self, token_id: int) -> None:
        """Note that this token has come. Raises nothing; returns soon."""
        ...

    def draft(self, most: int) -> Sequence[int]:
        """Return up to ``most`` tokens that are likely to come next because of it; often none."""
        ...

    @property
    def is_complete(self) -> bool:
        """True where nothing may follow what has come."""
        ...


class Edits(Protocol):
    """Changes of a model's numbers while it reads a sequence; whoever wraps the runner makes them.

    ``identity``: the same where the same tokens get the same keys and values.
    """

    @property
    def identity(self) -> str:
        """Never empty."""
        ...

    @property
    def unedited(self) -> int:
        """Tokens from the start whose keys and values are those of a sequence without edits."""
        ...


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One prompt to continue once."""

    prompt_ids: Sequence[int]  # at least one
    params: SamplingParams
    constraint: TokenConstraint | None = None  # of this sequence alone
    client: str = ""  # whoever asks: prompts of all clients are read by turns
    adapter: Any = None  # of the engine's own making: see ``Engine.adapted``
    listener: EngineListener | None = None  # None: the engine's
    edits: Edits | None = None
    reads_anew: bool = False  # no key or value of its prompt is taken from another sequence


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token's log probability under the model (natural log of the unprocessed distribution)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), most likely first
    rank: int | None = None  # of a prompt's token: 1 is the likeliest


@dataclass(slots=True, kw_only=True)  # not frozen: that takes longer to make, for every token
class TokenOutput:
    """One generated token of one sequence, or the end of a sequence without one.

    The last output of a sequence has ``finish_reason``; exactly one such output comes for each
    sequence. With ``STOP`` ``token_id`` is the stop token, with ``LENGTH`` the last token (or None
    where max_tokens was 0), with ``ABORT`` and ``ERROR`` None.
    """

    index: int = 0  # which sequence of the submit
    token_id: int | None = None
    score: TokenScore | None = None  # when logprobs were asked for
    finish_reason: FinishReason | None = None
    error: ApiError | None = None
    cached_tokens: int = 0  # first output of a sequence: prompt tokens taken from the prefix cache
    prompt_scores: tuple[TokenScore | None, ...] | None = None  # first output; None for token 0
    extras: Mapping[str, Any] = field(default_factory=dict)  # what an observer attached


def _nothing(_index: int | None) -> None:
    return None


class TokenStream:
    """The outputs of one submit, as they come: one queue, written by the engine thread only.

    ``limit`` bounds the backlog of a reader that does not keep up: the engine ends the sequences
    of an overfull stream, which has ``overrun`` its reader then.
    """

    def __init__(
        self, count: int, abort: Callable[[int | None], None], limit: int = BACKLOG
    ) -> None:
        self._outputs: queue.SimpleQueue[TokenOutput | None] = queue.SimpleQueue()
        self._abort = abort
        self._open = count
        self._notice: Callable[[], object] | None = None
        self.limit = limit
        self.overrun = False

    def put(self, output: TokenOutput) -> None:
        """Called by the engine."""
        self._outputs.put(output)
        if self._notice is not None:
            self._notice()

    @property
    def is_overfull(self) -> bool:
        """True where the reader has fallen ``limit`` outputs behind."""
        return self._outputs.qsize() > self.limit

    def get(self, timeout: float | None = None) -> TokenOutput | None:
        """The next output; None when none came within ``timeout`` seconds, or after ``wake``.

        After ``notify`` it waits for none.
        """
        if self._notice is not None and self._outputs.empty():
            return None
        try:
            output = self._outputs.get(timeout=timeout)
        except queue.Empty:
            return None
        if output is not None and output.finish_reason is not None:
            self._open -= 1
            if not self._open:
                self._abort = _nothing  # it knows the sequences, which know this
        return output

    def wake(self) -> None:
        """Let a reader that waits in ``get`` go on with None. From any thread."""
        self._outputs.put(None)
        if self._notice is not None:
            self._notice()

    def notify(self, notice: Callable[[], object]) -> None:
        """Call ``notice`` whenever something has come, on the thread that it came from.

        It is quick and never raises. What had come before, one looks for oneself.
        """
        self._notice = notice

    def read(self, quiet_s: float | None = None) -> Iterator[TokenOutput | None]:
        """All outputs until every sequence has finished; None for each ``quiet_s`` of silence."""
        while self._open:
            yield self.get(quiet_s)

    def abort(self, index: int | None = None) -> None:
        """Stop one sequence, or all of them. Idempotent, from any thread; ABORT outputs follow."""
        self._abort(index)
        if index is None:
            self._abort = _nothing


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot, advisory."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    kv_bytes: int = 0  # allocated
    kv_used_bytes: int = 0  # of the budget, reserved for the sequences that run
    kv_budget_bytes: int = 0
    kv_token_bytes: int = 0  # of a token's keys and values in all layers
    mode: str = "batching"  # or "sequential": one at a time, for models that cannot share a batch
    adapters: tuple[AdapterStats, ...] = ()  # in memory


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """Facts of a loaded model that do not change."""

    device: str  # "cpu", "cuda:0", …
    dtype: str  # of the KV cache, and of the weights unless they are quantised
    quantization: str = "none"  # or int8, int4
    kernels: str = "torch"  # or native
    isa: str = ""  # the instruction set of native kernels
    bytes: int  # of the weights, as they lie in memory
    mode: str = "batching"  # or "sequential": one at a time; or "encoder"
    in_pieces: bool = True  # a text may be read in several passes

    @property
    def weights(self) -> str:
        """The format of the weights: dtype or quantisation."""
        return self.dtype if self.quantization == "none" else self.quantization


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStats:
    """Figures of one sequence, at its end. Times in seconds."""

    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    queued_s: float  # until it got a slot, or ended without one
    prefill_s: float  # from there to its first token, or its end without one
    decode_s: float  # from the first token to the end
    total_s: float


class EngineListener(Protocol):
    """Hears of steps and ends, on the engine thread: quick, and it never raises."""

    def on_step(self, read_tokens: int, gaps: Sequence[float]) -> None:
        """A forward pass read so many tokens; 0: this is still of the last one.

        ``gaps``: for each token that came of it, but for the first one of a sequence, the seconds
        since the token before.
        """
        return

    def on_prompt(self, tokens: int, cached_tokens: int, first_token_s: float | None) -> None:
        """A prompt has been read, ``cached_tokens`` of it from the prefix cache.

        ``first_token_s``: from submit to its first token; None where none was asked for.
        """
        return

    def on_draft(self, proposed: int, accepted: int) -> None:
        """So many tokens were proposed for a step, or so many of them were right."""
        return

    def on_finish(self, stats: SequenceStats) -> None:
        """A sequence has ended, however."""
        return


class SilentEngineListener(EngineListener):
    """Does nothing."""


class Engine(Protocol):
    """Token ids in, token ids out. Every method may be called from any thread."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and completion together."""
        ...

    @property
    def context_overflow(self) -> ContextOverflow:
        """The rule for prompts and answers beyond ``max_model_len``."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids below this may be sent and can be sampled."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a sequence unless ``ignore_eos``."""
        ...

    def submit(
        self, requests: Sequence[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        """Start generating; the outputs of all ``requests`` come through one stream.

        ``observe``: what observers are to note of every step, by their names; it comes back in
        ``TokenOutput.extras``.

        Raises Overloaded when too much is waiting, ContextLengthExceeded, EngineDead.
        """
        ...

    def call(self, visit: Callable[[Any], T]) -> Future[T]:
        """Run ``visit(model)`` on the engine thread between two steps."""
        ...

    def adapted(
        self,
        source: AdapterSource,
        *,
        listener: EngineListener | None = None,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> Engine:
        """The same model with an adapter, which that engine's ``close`` gives back, and no more.

        ``listener`` hears of its sequences. Where memory for adapters is full, others are waited
        for up to ``timeout`` seconds. Raises ModelLoadFailed, InsufficientMemory, Unavailable.
        """
        ...

    def evict_adapter(self, name: str) -> bool:
        """Take an adapter that nobody uses out of memory; False where there is none such."""
        ...

    def describe(self) -> EngineFacts:
        """The facts of the loaded model, also after ``close``."""
        ...

    def stats(self) -> EngineStats:
        """An advisory snapshot."""
        ...

    def close(self, error: ApiError | None = None) -> None:
        """End what runs with ``error``, drop the model and give its memory back. Idempotent."""
        ...
