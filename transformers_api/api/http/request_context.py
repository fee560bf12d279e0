"""The walk of a request that generates text, and the context that holds all it needs.

``answer`` is the list of steps. The context lets go of everything in one place.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import flask

from transformers_api.api.http import errors
from transformers_api.api.http.dialects import Dialect
from transformers_api.api.http.disconnect import Watch
from transformers_api.api.http.request_record import AnswerParts, RequestRecord
from transformers_api.api.http.request_size import check_prompt_bytes, check_sequences
from transformers_api.api.http.services import EXTENSION, Services
from transformers_api.api.http.stream_writer import StreamBody
from transformers_api.api.trace.format import describe
from transformers_api.config.settings import Settings
from transformers_api.errors import ApiError, ModelNotCapable, Overloaded, TraceBusy
from transformers_api.serving import generation as serving_generation
from transformers_api.serving.generation import Generation, GenerationRequest
from transformers_api.serving.inspect.comparing import compare
from transformers_api.serving.inspect.intervening import Planner, place_cost
from transformers_api.serving.inspect.run_file import Run
from transformers_api.serving.inspect.run_recorder import RunRecorder
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.swap.loaded_model import LoadedModel, under_entry
from transformers_api.serving.swap.residency import Lease
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.choice_text import TextDelta
from transformers_api.serving.text.model_text import ModelText

log = logging.getLogger(__name__)
T = TypeVar("T")


class Formatter(ABC):
    """One answer in the words of its route: from pieces of text to JSON, or to framed events."""

    dialect: Dialect
    completion_id: str | None = None  # None: nobody can ask for its tokens afterwards
    prompts: Sequence[Sequence[int]]  # ids
    generation: Generation | None = None  # of a stream, while it goes out
    parts: AnswerParts | None = None  # None: it is all text

    @abstractmethod
    def whole(self, generation: Generation) -> Any:
        """Collect the whole answer."""

    def opening(self) -> Iterable[bytes]:
        """The events before the first piece."""
        return ()

    @abstractmethod
    def frames(self, delta: TextDelta) -> Iterable[bytes]:
        """The events of one piece; called for every token of every stream."""

    def closing(self, generation: Generation | None) -> Iterable[bytes]:
        """The events after the last piece. None: nothing was to be generated."""
        return ()

    def failing(self, error: ApiError) -> Iterable[bytes]:
        """The events of an error after the first byte, when the status is out already."""
        yield self.dialect.late_error(error)


class Task(ABC):
    """A validated body that asks for text, in the words of its route."""

    model_id: str | None  # None: the default model
    is_chat: bool = False  # refused by models whose registry entry says so
    is_streamed: bool
    texts: Sequence[str]  # of the prompt, whose bytes are counted; in ``field``
    field: str
    prompts: int = 1
    per_prompt: int = 1  # sequences
    is_relayed: bool = False  # ``prepare`` knows models that an upstream answers for

    @abstractmethod
    def prepare(self, model: LoadedModel, settings: Settings) -> GenerationRequest:
        """Work out all that the body means for ``model``, and check it. Called once.

        Raises InvalidRequest and its kinds, and for a trace what ``trace_plan.plan`` does.
        """

    @abstractmethod
    def formatter(self, model: LoadedModel, request: GenerationRequest) -> Formatter:
        """The words of the answer. Called once, when the engine works already."""


def answer(task: Task) -> Any:
    """Generate what ``task`` asks for: whole, or as a stream that ends with the response.

    Every generating route is this walk: check, lease the model, prepare, start, answer.
    """
    services: Services = flask.current_app.extensions[EXTENSION]
    check_prompt_bytes(task.texts, services.settings, task.field)
    check_sequences(task.prompts, task.per_prompt, services.settings)
    with RequestContext(services) as context:
        model = context.lease(task.model_id, is_chat=task.is_chat)
        if model.relay is not None and not task.is_relayed:
            raise upstream_refusal(model.spec, "this route reads its tokens")
        request = task.prepare(model, services.settings)
        if not request.params.max_tokens and request.params.prompt_logprobs is None:
            return context.stream(task.formatter(model, request), None)
        generation = context.start(model, request, is_streamed=task.is_streamed)
        formatter = task.formatter(model, generation.request)
        context.note_parts(formatter)
        if task.is_streamed:
            return context.stream(formatter, generation)
        whole = formatter.whole(generation)
        context.remember(formatter, generation)
        return whole


def upstream_refusal(spec: ModelSpec, reason: str, param: str = "model") -> ModelNotCapable:
    """The error for what cannot be asked of a model that an upstream answers for."""
    return ModelNotCapable(f"Model '{spec.name}' is served by an upstream: {reason}", param=param)


class RequestContext:
    """A request's place among those served, its watch on its client, its lease, its generation.

    A context manager: all is let go at the end of the block, or, after ``stream``, when the
    response is closed. That is not left to the generator of the stream: one that was never
    started runs no ``finally``.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self.cancellation = Cancellation()
        self.client: str = flask.g.client  # with whom others share by turns
        self._record: RequestRecord = flask.g.record
        self._model: LoadedModel | None = None
        self._watch = Watch(lambda: None)
        self._exits = ExitStack()
        self._is_streaming = self._is_over = False
        self._recorder: RunRecorder | None = None

    def take_place(self) -> None:
        """Be one of those that are served, until the end. Raises Overloaded where none is free."""
        services, exits = self.services, self._exits
        services.admission.enter(self.cancellation)
        exits.callback(services.admission.leave, self.cancellation)
        if (place := services.in_flight.enter(self.client)) is not None:
            exits.callback(services.in_flight.leave, place)
        self._watch = services.watcher.watch(flask.request.environ, self.cancellation.cancel)
        exits.callback(self._watch.close)

    def lease(self, model_id: str | None, *, is_chat: bool = False) -> LoadedModel:
        """The model, which stays in memory; None stands for the default one.

        Raises ModelNotFound; ChatUnavailable for ``is_chat`` where the registry says so; then,
        with a place among those served, what ``Swapper.lease`` does.
        """
        services, record = self.services, self._record
        name, spec = self._admitted(model_id, is_chat)
        if spec.upstream is not None:
            self._model = services.upstreams.model(spec)
            return self._model
        began = time.monotonic()
        try:
            lease = services.swapper.lease(
                spec, model_id=name, client=self.client, cancellation=self.cancellation
            )
        finally:
            record.model_wait_s = time.monotonic() - began
        self._exits.callback(lease.release)
        self._model = lease.model
        return self._model

    def lease_for(self, model: LoadedModel, cancellation: Cancellation) -> Lease:
        """Another lease on a model, for what goes on after this request."""
        swapper = self.services.swapper
        return swapper.lease(model.spec, client=self.client, cancellation=cancellation)

    def text(self, model_id: str | None, *, is_chat: bool = False) -> ModelText:
        """The tokenizer and the template of a model, whose weights are not loaded for it.

        Raises ModelNotFound, ChatUnavailable as ``lease``; then ModelLoadFailed for its files.
        """
        services = self.services
        _, spec = self._admitted(model_id, is_chat)
        if spec.upstream is not None:
            raise upstream_refusal(spec, "its tokens are not shown")
        resident = under_entry(services.swapper.resident(), spec)
        return services.text_of(spec) if resident is None else resident

    def _admitted(self, model_id: str | None, is_chat: bool) -> tuple[str, ModelSpec]:
        """(the id, its entry) of a model that may be asked so, with a place for this request."""
        services = self.services
        name = model_id or services.settings.default_model
        spec = services.registry.resolve(name)
        if is_chat and spec.chat == "off":  # before it is loaded for nothing
            raise chat_template.unavailable()
        self.take_place()
        self._record.model = spec.name
        return name, spec

    def hold(self, resource: AbstractContextManager[T]) -> T:
        """Enter ``resource``, and leave it with all else."""
        return self._exits.enter_context(resource)

    @property
    def planner(self) -> Planner:
        """The planner of this request's edits."""
        services = self.services
        return Planner(
            settings=services.settings,
            inspections=services.inspections,
            cancellation=self.cancellation,
            vector=partial(services.vectors.get, self.client),
            lens=partial(services.lenses.get, self.client),
            sae=partial(services.saes.get, self.client),
            calibration=services.calibration.get(self.client),
            runs=services.runs,
            run=partial(services.runs.get, self.client),
        )

    def start(
        self, model: LoadedModel, request: GenerationRequest, *, is_streamed: bool
    ) -> Generation:
        """Begin to generate, once its edits are planned and there is a place for its trace.

        Raises what ``Planner.planned`` does, TraceBusy where too many wait for one already,
        RateLimited and TooManyTokens. Where a trace is not required, the request of what comes back
        may have none.
        """
        services, exits = self.services, self._exits
        ends: list[Callable[[], None]] = []
        request = self.planner.planned_request(model, request, whole=not is_streamed)
        if request.trace is not None or request.edited_places or request.compares:
            request, end = self._placed(request)
            if end is not None:
                ends.append(end)
                exits.callback(end)
        reservation = None
        if services.access.tokens is not None:
            reservation = services.limits.reserve(request.most_tokens)
        if reservation is not None:
            ends.append(reservation.settle)
            exits.callback(reservation.settle)
        generation = serving_generation.start(
            model, request, self.cancellation, client=self.client, stream=is_streamed
        )
        exits.callback(generation.close)
        if request.run is not None:
            self._recorder = RunRecorder(model, request, describe(model, request))
            generation.listen(self._recorder.take)
        texts = services.settings.log_prompts
        exits.callback(self._record.note_generation, model, generation, texts)
        if reservation is not None:
            reservation.used = lambda: generation.tokens_read
        if request.compares:  # while it has its place
            ends.insert(
                0, partial(compare, model, generation, services.inspections, self.cancellation)
            )
        if ends:  # before the client can have read the end and asks again
            generation.on_end = lambda: [end() for end in ends]
        return generation

    def _placed(
        self, request: GenerationRequest
    ) -> tuple[GenerationRequest, Callable[[], None] | None]:
        """Return the request, and what gives back its place among those traced and edited."""
        settings = self.services.settings
        is_owed = request.edited_places > 0 or request.run is not None
        is_required = request.trace_required or is_owed
        try:
            end = self.services.traces.take(
                settings.trace_max_requests,
                place_cost(request),
                waiting=settings.inspect_queue if is_required else 0,
                cancellation=self.cancellation,
            )
        except TraceBusy as error:
            if is_required:
                raise
            return request.untraced(error), None
        return request, end

    def note_parts(self, formatter: Formatter) -> None:
        """Let the record have the counts of ``formatter``, which fill as the answer comes."""
        if formatter.parts is not None:
            self._record.parts = formatter.parts

    def remember(self, formatter: Formatter, generation: Generation | None) -> None:
        """Keep the tokens of a complete answer, for whoever asks for them by its id; its runs."""
        model = self._model
        if generation is not None:
            self._keep(self.recorded(generation))
        if formatter.completion_id is not None and model is not None and model.relay is None:
            answers: list[Sequence[int]] = [[]]
            edited = 0
            if generation is not None:
                request = generation.request
                edited = request.edited_per_prompt if request.edited_places else 0
                answers = [choice.token_ids for choice in generation.answers]
            own = formatter.completion_id, model, formatter.prompts, answers, self.client, edited
            self.services.completions.remember(*own)

    def _keep(self, runs: Iterable[Run]) -> None:
        """Keep these; the answer is out already: one that cannot be kept is not there later."""
        for run in runs:
            try:
                self.services.runs.put(self.client, run)
            except ApiError:
                log.warning("Run %s was not kept", run.id, exc_info=True)

    def recorded(self, generation: Generation) -> list[Run]:
        """The runs of a complete answer that is to be kept."""
        return [] if self._recorder is None else self._recorder.runs(generation)

    def stream(self, formatter: Formatter, generation: Generation | None) -> flask.Response:
        """Answer with events; the context ends with the response."""
        dialect = formatter.dialect
        frames = self._frames(formatter, generation)
        if generation is not None:
            environ = flask.request.environ
            writer = self.services.stream_writer
            frames = writer.write(frames, generation, environ, dialect.ping)
            ping = frames.ping if isinstance(frames, StreamBody) else generation.wake
            self._watch.answers_with(ping)
        response = flask.Response(frames, content_type=dialect.content_type)
        response.headers["Cache-Control"] = "no-cache"
        response.headers["X-Accel-Buffering"] = "no"  # proxies pass it on as it comes
        response.call_on_close(self.close)
        flask.g.streaming = self  # errors.py closes it where the response is not sent
        self._is_streaming = self._record.is_streamed = True
        return response

    def _frames(self, formatter: Formatter, generation: Generation | None) -> Iterator[bytes]:
        dialect, formatter.generation = formatter.dialect, generation
        has_begun = False  # the head of the answer leaves with the first event
        try:
            for frame in formatter.opening():
                self._watch.answer_begins()
                has_begun = True
                yield frame
            for delta in generation or ():
                if not has_begun:
                    self._watch.answer_begins()
                    has_begun = True
                if delta is None:
                    yield dialect.ping
                else:
                    yield from formatter.frames(delta)
            # Before the client can have read the end and asks for the tokens.
            self.remember(formatter, generation)
            self._watch.answer_begins()
            yield from formatter.closing(generation)
        except Exception as error:
            # The status is out. Without its end no client takes this for a complete answer.
            self._watch.answer_begins()
            failure = self._failed(error)
            yield from formatter.failing(self.services.private_paths.public(failure))
        else:
            self._is_over = True
            if dialect.stream_end:
                yield dialect.stream_end

    def _failed(self, error: Exception) -> ApiError:
        self._is_over = True
        failure = errors.visible(error)
        self._record.note_error(failure)
        errors.forget_frames(error)
        return failure

    def close(self) -> None:
        """Abort what runs, return the lease, stop watching. Idempotent."""
        if self._is_streaming and not self._is_over:  # the stream was given up
            self._failed(self.cancellation.error)
        self._exits.close()
        self.cancellation.forget()

    def __enter__(self) -> RequestContext:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if type(error) is Overloaded:  # by the engine, or the encoders, who know no rate
            estimate = self.services.admission.retry_after()
            error.retry_after = max(error.retry_after or 1, estimate)
        if error is not None or not self._is_streaming:
            self.close()
