"""The one way text is generated: prompts in, pieces of text out, for streams and for the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers_api.engine.base import (
    FinishReason,
    SamplingParams,
    SequenceRequest,
    TokenConstraint,
    TokenOutput,
    TokenStream,
)
from transformers_api.errors import (
    ApiError,
    ClientGone,
    EngineFailed,
    InvalidRequest,
    ModelUnloaded,
    SlowReader,
)
from transformers_api.inspection.base import StepTrace, TracePlan
from transformers_api.inspection.divergence_question import Divergence
from transformers_api.inspection.edit_plan import EditPlan
from transformers_api.serving.float_range import within_float32
from transformers_api.serving.inspect.edit_request import InterveneRequest
from transformers_api.serving.inspect.interventions import PlannedEdits
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.inspect.trace_slots import WHOLE
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.seeds import with_seed
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.choice_text import ChoiceText, TextDelta, TokenDetail
from transformers_api.serving.text.spans import Span
from transformers_api.serving.text.token_counts import CountedTexts
from transformers_api.serving.tools.spec import Part
from transformers_api.serving.upstream.spec import UpstreamCall

_FAILURES = (FinishReason.ERROR, FinishReason.ABORT)


@dataclass(frozen=True)
class GenerationRequest:
    """The prompts to continue, how, and how often."""

    prompts: Sequence[Sequence[int]]  # ids
    params: SamplingParams
    n: int = 1  # choices per prompt
    best_of: int | None = None  # generate so many per prompt and keep the n most likely
    stop: tuple[str, ...] = ()
    quiet_s: float | None = None  # iteration gives None after each so many seconds of silence
    constrain: Callable[[], TokenConstraint] | None = None  # makes one for each sequence
    marks: Mapping[int, str] = field(default_factory=dict)  # of special tokens, shown in the text
    trace: TracePlan | None = None  # a piece for every token then, with what was noted of it
    trace_options: TraceRequest | None = None  # the trace as it was asked for
    trace_stops: bool = False  # also of the token that ends an answer
    trace_cost: int = WHOLE  # see trace_plan.cost
    trace_required: bool = True  # False: without a place for it the answer goes on untraced
    trace_refusal: ApiError | None = None  # why a trace that was asked for is not noted
    intervene: InterveneRequest | None = None  # what is changed, as it was asked for
    spans: Callable[[], Sequence[Span]] = tuple  # of the prompt's messages, for ``intervene``
    edits: tuple[PlannedEdits, ...] = ()  # of each prompt, once ``intervene`` has been planned
    # Of answers without the edits: the second half of each prompt's, one for each of the first.
    twins: SamplingParams | None = None
    shows_stop: bool = False  # the text that ends an answer is part of it
    strips_blank: bool = False  # leave out the white space with which an answer begins
    upstream: UpstreamCall | None = None  # for a model that another server answers for
    run: str | None = None  # the id under which the answer is kept as a run; None: it is not

    def untraced(self, reason: ApiError) -> GenerationRequest:
        """The same without the trace that was asked for, because of ``reason``."""
        return replace(
            self, trace=None, trace_options=None, trace_stops=False, trace_refusal=reason
        )

    @property
    def edited_places(self) -> int:
        """Parts of layers that are changed; 0: nothing is."""
        return max((each.plan.places for each in self.edits if each.plan), default=0)

    @property
    def stores(self) -> bool:
        """True where the answer is to be kept as a run."""
        options = (self.trace_options, self.intervene)
        return any(each is not None and each.store for each in options)

    @property
    def compares(self) -> bool:
        """True where the unedited model reads the answers too, once they are complete."""
        return self.intervene is not None and self.intervene.compares

    @property
    def edited_per_prompt(self) -> int:
        """The sequences of each prompt that ``edits`` are for: the first ones."""
        return self.per_prompt if self.twins is None else self.per_prompt // 2

    @property
    def per_prompt(self) -> int:
        """The sequences that are generated for each prompt."""
        return self.best_of or self.n

    @property
    def most_tokens(self) -> int:
        """The upper bound of its tokens: every prompt once, all its answers at their longest.

        Where answers are compared, each with its prompt once more.
        """
        answers = len(self.prompts) * self.per_prompt
        prompts, written = sum(map(len, self.prompts)), answers * self.params.max_tokens
        return prompts + written + self.compares * (prompts * self.per_prompt + written)


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
    parts: tuple[Part, ...] | None = None  # by an upstream: see TextDelta


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as the model counts them: each prompt once, every generated token that was read.

    Where the registry entry names an encoding of tiktoken, as that counts the texts.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


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
        self.answers = choices  # of each prompt n, once ``collect`` has chosen
        self.on_end: Callable[[], object] | None = None  # called when the last piece has been read
        self.comparisons: Sequence[Divergence] = ()  # of the choices, by ``on_end``
        self.first_token_at: float | None = None  # time.monotonic(); None: not yet
        self.finish_reasons: list[str] = []  # of the choices that have ended, as they did
        self._stream = stream
        self._counted = counted
        self._hear: Callable[[TextDelta, TokenOutput], object] | None = None
        self._notes_all = counted is not None
        self._running = len(choices)
        self._ended: ApiError | None = None

    def __iter__(self) -> Iterator[TextDelta | None]:
        return self

    def __next__(self) -> TextDelta | None:
        # One frame for all that every token needs: what is rare is in functions of its own.
        stream = self._stream
        while self._running:
            if self._ended is not None or stream.overrun:
                raise self._early_end()
            output = stream.get(self.request.quiet_s)
            if self._ended is not None or stream.overrun:
                raise self._early_end()
            if output is None:
                return None
            choice = self.choices[output.index]
            if choice.finished:  # by a stop string; the engine did not know yet
                continue
            if output.finish_reason in _FAILURES:
                self._raise_failure(output)
            self.first_token_at = self.first_token_at or time.monotonic()
            delta = choice.take(output)
            if delta is not None:
                if delta.finish_reason is not None or self._notes_all:
                    self._note(delta, output)
                return delta
        if self.on_end is not None:
            self.on_end()
        raise StopIteration

    @property
    def usage(self) -> Usage:
        """The tokens used so far; final once the iteration has ended."""
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
        """Those of the prompts and those that were generated, as the model counts them.

        Where answers have been compared, each with its prompt once more.
        """
        written = sum(choice.completion_tokens for choice in self.choices)
        prompts = sum(map(len, self.request.prompts))
        again = prompts * self.request.per_prompt + written
        return prompts + written + bool(self.comparisons) * again

    def notify(self, notice: Callable[[], object]) -> None:
        """From now on wait for nothing, but give None where nothing is ready.

        ``notice`` is called, on any thread, whenever there is something to look for.
        """
        self._stream.notify(notice)

    def wake(self) -> None:
        """Give the reader, who waits, a None before ``quiet_s`` are over. From any thread."""
        self._stream.wake()

    def close(self, error: ApiError | None = None) -> None:
        """Abort what still runs; a reader hears ``error``, else ClientGone.

        Idempotent, from any thread: also while a step of the engine takes long.
        """
        self._ended = self._ended or error or ClientGone("Nobody reads this answer any more")
        if self._running:
            self._stream.abort()
            self._stream.wake()

    def _early_end(self) -> ApiError:
        return self._ended or SlowReader("The answer is not read as fast as it is made")

    def listen(self, hear: Callable[[TextDelta, TokenOutput], object]) -> None:
        """Tell ``hear`` of each piece from now on, before it is given to the reader."""
        self._hear, self._notes_all = hear, True

    def _note(self, delta: TextDelta, output: TokenOutput) -> None:
        if self._hear is not None:
            self._hear(delta, output)
        if self._counted is not None:
            self._counted.add(output.index, delta.text)
        if delta.finish_reason is not None:
            self._running -= 1
            self.finish_reasons.append(delta.finish_reason)
            if output.finish_reason is None:  # ended by its text: the engine goes on
                self._stream.abort(output.index)

    def _raise_failure(self, output: TokenOutput) -> None:
        self.close()
        if output.finish_reason is FinishReason.ERROR:
            raise output.error or EngineFailed("The engine could not finish this answer")
        raise ModelUnloaded("The model was taken away before the answer was complete")


def start(
    model: LoadedModel,
    request: GenerationRequest,
    cancellation: Cancellation,
    *,
    client: str = "",
    stream: bool = False,
) -> Generation:
    """Submit all choices of all prompts at once, for ``client``, whose turns they share.

    Raises InvalidRequest for a ``best_of`` that is streamed or less than ``n``, the reason of a
    cancellation, and what the engine refuses with.
    """
    if model.relay is not None:
        generation: Generation = model.relay(request, cancellation)
        return generation
    params, per_prompt = within_float32(request.params), request.per_prompt
    if per_prompt < request.n:
        raise InvalidRequest("best_of must not be less than n", param="best_of")
    if per_prompt > request.n:
        if stream:
            raise InvalidRequest("best_of cannot be streamed when it exceeds n", param="best_of")
        if params.logprobs is None:
            params = replace(params, logprobs=0)
    if cancellation.is_cancelled:
        raise cancellation.error
    plans = [each.plan for each in request.edits] or [None] * len(request.prompts)
    places = [
        (prompt, i, plan if i < request.edited_per_prompt else None)
        for prompt, plan in zip(request.prompts, plans, strict=True)
        for i in range(per_prompt)
    ]
    sequences = _sequences(request, params, places, client, stream)
    observe = {} if request.trace is None else {"trace": request.trace}
    outputs = model.engine.submit(sequences, observe=observe)
    try:  # the rest, while the engine reads the prompts
        choices = [
            ChoiceText(
                index,
                prompt,
                model,
                request.params,
                request.stop,
                request.trace_stops,
                request.shows_stop,
                request.marks,
                request.strips_blank,
            )
            for index, (prompt, *_) in enumerate(places)
        ]
        count = model.count_tokens
        counted = count and CountedTexts(model, count, request.prompts, len(choices))
        generation = Generation(request, choices, outputs, counted)
        cancellation.on_cancel(lambda: generation.close(cancellation.error))
    except BaseException:
        outputs.abort()
        raise
    return generation


def _sequences(
    request: GenerationRequest,
    params: SamplingParams,
    places: Sequence[tuple[Sequence[int], int, EditPlan | None]],
    client: str,
    stream: bool,
) -> list[SequenceRequest]:
    """One for each prompt, number among its answers, and plan of edits."""
    others = params  # than the first of each prompt, which scores it for all: see ``collect``
    if params.max_tokens and not stream:
        others = replace(params, prompt_logprobs=None)
    edited, twins = request.edited_per_prompt, within_float32(request.twins or params)
    own = [params, *(with_seed(others, i) for i in range(1, edited))]
    own += [with_seed(twins, i) for i in range(request.per_prompt - edited)]
    return [
        SequenceRequest(
            prompt,
            own[i],
            constraint=None if request.constrain is None else request.constrain(),
            client=client,
            edits=plan,
            reads_anew=bool(request.trace and request.trace.records),
        )
        for prompt, i, plan in places
    ]


def collect(generation: Generation, hear: Callable[[TextDelta], object] = bool) -> list[Choice]:
    """The complete choices, in order; of ``best_of`` the ``n`` with the best mean logprob.

    ``hear`` is told of each piece as it comes.
    """
    pieces: list[list[TextDelta]] = [[] for _ in generation.choices]
    try:
        for delta in generation:
            if delta is not None:
                hear(delta)
                pieces[delta.index].append(delta)
    finally:
        generation.close()
    chosen: list[int] = []
    per_prompt = generation.request.per_prompt
    scores = [group[0].prompt_scores for group in pieces[::per_prompt]]
    for first in range(0, len(pieces), per_prompt):
        group = range(first, first + per_prompt)
        # sorted is stable: equally good choices stay in order
        best = sorted(group, key=lambda i: -generation.choices[i].mean_logprob)
        chosen += sorted(best[: generation.request.n])
    generation.answers = [generation.choices[place] for place in chosen]
    return [
        _joined(index, pieces[place], scores[place // per_prompt])
        for index, place in enumerate(chosen)
    ]


def _joined(index: int, deltas: list[TextDelta], scores: tuple[TokenDetail, ...] | None) -> Choice:
    last = deltas[-1]
    assert last.finish_reason is not None
    return Choice(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(i for delta in deltas for i in delta.token_ids),
        logprobs=tuple(detail for delta in deltas for detail in delta.logprobs),
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        prompt_scores=scores,
        traces=tuple(delta.trace for delta in deltas if delta.trace is not None),
        parts=None if last.parts is None else tuple(p for d in deltas for p in d.parts or ()),
    )
