"""The one way text is generated: prompts in, pieces of text out, for streams and for the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from transformers_api.engine.base import (
    FinishReason,
    SamplingParams,
    SequenceRequest,
    TokenOutput,
    TokenStream,
)
from transformers_api.errors import (
    ApiError,
    ClientGone,
    ContextLengthExceeded,
    EngineFailed,
    InvalidRequest,
    ModelUnloaded,
    SlowReader,
)
from transformers_api.inspection.base import StepTrace, TracePlan
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import LoadedModel
from transformers_api.serving.text.choice_text import ChoiceText, TextDelta, TokenDetail
from transformers_api.serving.text.token_counts import CountedTexts

_SEEDS = 2**63


@dataclass(frozen=True)
class GenerationRequest:
    """What to continue, how, and how often."""

    prompts: Sequence[Sequence[int]]  # ids
    params: SamplingParams
    n: int = 1  # choices per prompt
    best_of: int | None = None  # generate so many per prompt and keep the n most likely
    stop: tuple[str, ...] = ()
    quiet_s: float | None = None  # iteration gives None after each so many seconds of silence
    trace: TracePlan | None = None  # a piece for every token then, with what was noted of it
    trace_stops: bool = False  # also of the token that ends an answer

    @property
    def per_prompt(self) -> int:
        """How many sequences are generated for each prompt."""
        return self.best_of or self.n

    @property
    def most_tokens(self) -> int:
        """What it may come to: every prompt once, and all its answers at their longest."""
        answers = len(self.prompts) * self.per_prompt
        return sum(map(len, self.prompts)) + answers * self.params.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One complete result."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenDetail, ...]
    finish_reason: str
    stop_reason: str | int | None
    prompt_scores: tuple[TokenDetail, ...] | None
    traces: tuple[StepTrace, ...] = ()  # one per token, when asked for


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the model counts them: each prompt once, every generated token that was read.

    Where the registry entry names an encoding of tiktoken, as that counts the texts.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class HasModel(Protocol):
    """A lease."""

    @property
    def model(self) -> LoadedModel:
        """The resident model."""
        ...


class Generation:
    """Iterate for ``TextDelta``s, and None after each ``quiet_s`` of silence. One reader.

    Iteration raises what ended the generation early: the engine's error, the reason of a
    cancellation, ModelUnloaded, SlowReader. Nothing of it runs on in the engine then.
    """

    def __init__(
        self,
        request: GenerationRequest,
        choices: Sequence[ChoiceText],
        stream: TokenStream,
        counted: CountedTexts | None = None,
    ) -> None:
        self.request = request
        self.choices = choices  # of each prompt best_of, or else n
        self.on_end: Callable[[], object] | None = None  # called when the last piece has been read
        self.first_token_at: float | None = None  # time.monotonic(); None: not yet
        self.finish_reasons: list[str] = []  # of the choices that have ended, as they did
        self._stream = stream
        self._counted = counted
        self._running = len(choices)
        self._ended: ApiError | None = None

    def __iter__(self) -> Iterator[TextDelta | None]:
        return self

    def __next__(self) -> TextDelta | None:
        while self._running:
            self._check_open()
            output = self._stream.get(self.request.quiet_s)
            self._check_open()
            if output is None:
                return None
            delta = self._take(output)
            if delta is not None:
                return delta
        if self.on_end is not None:
            self.on_end()
        raise StopIteration

    @property
    def usage(self) -> Usage:
        """What has been used so far; final once the iteration has ended."""
        cached = sum(choice.cached_tokens for choice in self.choices[:: self.request.per_prompt])
        if self._counted is not None:
            prompt, completion = self._counted.totals()
            return Usage(prompt, completion, min(cached, prompt))
        return Usage(
            prompt_tokens=sum(map(len, self.request.prompts)),
            completion_tokens=sum(choice.completion_tokens for choice in self.choices),
            cached_tokens=cached,
        )

    @property
    def tokens_read(self) -> int:
        """Those of the prompts and those that were generated, as the model counts them."""
        written = sum(choice.completion_tokens for choice in self.choices)
        return sum(map(len, self.request.prompts)) + written

    def notify(self, notice: Callable[[], object]) -> None:
        """From now on wait for nothing, but give None where nothing is ready.

        ``notice`` is called, on any thread, whenever there is something to look for.
        """
        self._stream.notify(notice)

    def close(self, error: ApiError | None = None) -> None:
        """Abort what still runs; a reader hears ``error``, else ClientGone.

        Idempotent, from any thread: also while a step of the engine takes long.
        """
        self._ended = self._ended or error or ClientGone("Nobody reads this answer any more")
        if self._running:
            self._stream.abort()
            self._stream.wake()

    def _check_open(self) -> None:
        if self._ended is not None:
            raise self._ended
        if self._stream.overrun:
            raise SlowReader("The answer is not read as fast as it is made")

    def _take(self, output: TokenOutput) -> TextDelta | None:
        choice = self.choices[output.index]
        if choice.finished:  # by a stop string; the engine did not know yet
            return None
        self._raise_early_end(output)
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        delta = choice.take(output)
        if delta is not None and self._counted is not None:
            self._counted.add(output.index, delta.text)
        if delta is not None and delta.finish_reason is not None:
            self._running -= 1
            self.finish_reasons.append(delta.finish_reason)
            if output.finish_reason is None:
                self._stream.abort(output.index)
        return delta

    def _raise_early_end(self, output: TokenOutput) -> None:
        if output.finish_reason is FinishReason.ERROR:
            self.close()
            raise output.error or EngineFailed("The engine could not finish this answer")
        if output.finish_reason is FinishReason.ABORT:
            self.close()
            raise ModelUnloaded("The model was taken away before the answer was complete")


def start(
    model: LoadedModel | HasModel,
    request: GenerationRequest,
    cancellation: Cancellation,
    *,
    stream: bool = False,
) -> Generation:
    """Submit all choices of all prompts at once.

    Raises InvalidRequest for a ``best_of`` that is streamed or less than ``n``, the reason of a
    cancellation, and what the engine refuses with.
    """
    loaded = model if isinstance(model, LoadedModel) else model.model
    if request.per_prompt < request.n:
        raise InvalidRequest("best_of must not be less than n", param="best_of")
    if stream and request.per_prompt > request.n:
        raise InvalidRequest("best_of cannot be streamed when it exceeds n", param="best_of")
    params = request.params
    if request.per_prompt > request.n and params.logprobs is None:
        params = replace(params, logprobs=0)
    cancellation.check()
    places = [(prompt, i) for prompt in request.prompts for i in range(request.per_prompt)]
    vocabulary = loaded.vocabulary
    choices = [
        ChoiceText(
            index, prompt, loaded, vocabulary, request.params, request.stop, request.trace_stops
        )
        for index, (prompt, _) in enumerate(places)
    ]
    sequences = [SequenceRequest(prompt, _with_seed(params, i)) for prompt, i in places]
    count = loaded.count_tokens
    counted = count and CountedTexts(loaded, count, request.prompts, len(choices))
    observe = {} if request.trace is None else {"trace": request.trace}
    tokens = loaded.engine.submit(sequences, observe=observe)
    generation = Generation(request, choices, tokens, counted)
    cancellation.on_cancel(lambda: generation.close(cancellation.error))
    return generation


def collect(generation: Generation) -> list[Choice]:
    """The complete choices, in order; of ``best_of`` the ``n`` with the best mean logprob."""
    pieces: list[list[TextDelta]] = [[] for _ in generation.choices]
    try:
        for delta in generation:
            if delta is not None:
                pieces[delta.index].append(delta)
    finally:
        generation.close()
    kept: list[int] = []
    per_prompt = generation.request.per_prompt
    for first in range(0, len(pieces), per_prompt):
        group = range(first, first + per_prompt)
        # sorted is stable: equally good choices stay in order
        best = sorted(group, key=lambda i: -generation.choices[i].mean_logprob)
        kept += sorted(best[: generation.request.n])
    return [_joined(index, pieces[place]) for index, place in enumerate(kept)]


def fit(
    max_tokens: int,
    prompt_tokens: int,
    max_model_len: int,
    *,
    explicit: bool,
    param: str = "messages",
    max_tokens_param: str = "max_tokens",
) -> int:
    """How many tokens to generate after ``prompt_tokens``.

    ``explicit``: the client asked for ``max_tokens``; what does not fit is ContextLengthExceeded
    then. A default is cut to what remains. ``param``: the field that holds the prompt.
    """
    limit = f"This model's maximum context length is {max_model_len} tokens"
    if prompt_tokens + min(max_tokens, 1) > max_model_len:
        raise ContextLengthExceeded(
            f"{limit}. However, your {param} resulted in {prompt_tokens} tokens. "
            f"Please reduce the length of the {param}.",
            param=param,
        )
    total = prompt_tokens + max_tokens
    if explicit and total > max_model_len:
        raise ContextLengthExceeded(
            f"{limit}. However, you requested {total} tokens ({prompt_tokens} in the {param}, "
            f"{max_tokens} in the completion). Please reduce one of them.",
            param=max_tokens_param,
        )
    return min(max_tokens, max_model_len - prompt_tokens)


def _with_seed(params: SamplingParams, place: int) -> SamplingParams:
    """The choices of a prompt differ, and each can be had again: seed + its place."""
    if params.seed is None or place == 0:
        return params
    return replace(params, seed=(params.seed + place) % _SEEDS)


def _joined(index: int, deltas: list[TextDelta]) -> Choice:
    last = deltas[-1]
    assert last.finish_reason is not None
    return Choice(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(i for delta in deltas for i in delta.token_ids),
        logprobs=tuple(detail for delta in deltas for detail in delta.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_scores=deltas[0].prompt_scores,
        traces=tuple(delta.trace for delta in deltas if delta.trace is not None),
    )
