"""OpenAI's answers: from pieces of text to dictionaries and events. No Flask, no clock."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson

from transformers_api.api.http import sse
from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.request_context import Formatter
from transformers_api.api.intervene import format as intervene_format
from transformers_api.api.openai.logprobs import (
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)
from transformers_api.api.openai.text_offsets import text_offsets
from transformers_api.api.trace.format import TraceWriter, refused_header
from transformers_api.errors import ApiError
from transformers_api.inspection.uncertainty import agreement
from transformers_api.serving.generation import Choice, Generation, Usage, collect
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.interventions import PlannedEdits
from transformers_api.serving.inspect.run_recorder import run_id
from transformers_api.serving.text.choice_text import TextDelta
from transformers_api.serving.text.vocabulary import Vocabulary

Json = dict[str, Any]
_CHUNK = "chat.completion.chunk"


@dataclass(frozen=True, kw_only=True)
class Head:
    """The fields that every object of one answer repeats, and what was asked to be in it."""

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str
    prompts: Sequence[Sequence[int]]  # ids
    n: int = 1  # choices per prompt
    logprobs: int | None = None  # so many likely tokens beside each; None: no scores
    prompt_logprobs: int | None = None  # the same of the prompt's
    as_token_ids: bool = False  # names of tokens in scores
    with_token_ids: bool = False
    with_usage: bool = False  # in a stream
    with_usage_so_far: bool = False  # in every chunk of it
    traces: TraceWriter | None = None
    trace_refusal: ApiError | None = None  # why there are none, though they were asked for
    edits: Sequence[PlannedEdits] = ()  # of each prompt
    per_prompt: int = 1  # sequences, of which the first are ``edited``
    edited: int = 1
    vocabulary: Vocabulary | None = None  # which names tokens that are compared
    run: str | None = None  # under which the answer is kept
    with_agreement: bool = False  # of several choices

    @property
    def with_more_than_text(self) -> bool:
        """True where there is more to a piece than its text and its place."""
        is_scored = self.logprobs is not None
        is_counted = self.with_usage_so_far
        return is_scored or is_counted or self.with_token_ids or self.traces is not None

    def envelope(self, kind: str, choices: list[Json]) -> Json:
        """The object around ``choices``."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def token_ids(self, index: int, ids: Iterable[int], *, first: bool) -> Json:
        """The fields of ``return_token_ids``; the prompt's come once per choice."""
        if not self.with_token_ids:
            return {}
        prompt = {"prompt_token_ids": list(self.prompts[index // self.n])} if first else {}
        return {**prompt, "token_ids": list(ids)}

    def opening(self, index: int, chunk: Callable[..., Json]) -> Json:
        """The first chunk of a choice of a chat: its role, and what is told of it beforehand.

        ``chunk`` makes one from the index, the delta and more fields of the choice.
        """
        ids = self.token_ids(index, (), first=True)
        first = chunk(index, {"role": "assistant", "content": ""}, **ids)
        if (header := self.trace_header(index)) is not None:
            first["trace"] = header
        return first | self.intervened(index)

    def scored_prompt(self, choice: Choice) -> Json:
        """The field ``prompt_logprobs``, where it was asked for."""
        if self.prompt_logprobs is None:
            return {}
        scores = prompt_logprobs(choice.prompt_scores or (), self.prompt_logprobs)
        return {"prompt_logprobs": scores}

    def usage_so_far(self, generation: Generation | None) -> Json:
        """The field ``usage`` of a chunk that is not the last."""
        if not self.with_usage:
            return {}
        if generation is None or not self.with_usage_so_far:
            return {"usage": None}
        return {"usage": self.usage(generation.usage)}

    def traced(self, choice: Choice) -> Json:
        """The field ``trace`` of a whole choice."""
        header, steps = self.trace_header(choice.index), []
        if header is None:
            return {}
        if self.traces is not None:
            twin = self.twin_field(choice.index)
            steps = [self.traces.step(trace, choice.index, **twin) for trace in choice.traces]
        return {"trace": {"header": header, "steps": steps}}

    def trace_header(self, index: int) -> Any:
        """The header of the traces of a choice, or why there are none; None: nobody asked."""
        if self.traces is not None:
            return self.traces.header(index // self.n, index, self.run_field(index))
        return None if self.trace_refusal is None else refused_header(self.trace_refusal, index)

    def usage(self, used: Usage, generation: Generation | None = None) -> Json:
        """The tokens of a request, and what its traces took.

        Of a complete ``generation`` of several choices, how far these agree, where it was asked.
        """
        traced = {} if self.traces is None else {"trace": self.traces.usage}
        width = self.n - self.per_prompt + self.edited  # twins are no other opinions
        if traced and generation is not None and width > 1 and self.with_agreement:
            answers = [choice.token_ids for choice in generation.answers]
            groups = [answers[first : first + width] for first in range(0, len(answers), self.n)]
            traced["trace"]["agreement"] = [_rounded(agreement(group)) for group in groups]
        twins = self.per_prompt - self.edited
        edits = intervene_format.usage(self.edits, self.edited, twins * len(self.prompts))
        return {**usage(used), **traced, **edits}

    def twin_of(self, index: int) -> int | None:
        """The choice whose unedited twin this one is; None: it is none."""
        is_twin = index % self.n >= self.edited and self.edited < self.per_prompt
        return index - self.edited if is_twin else None

    def twin_field(self, index: int) -> Json:
        """The field ``twin`` of a trace."""
        return {} if self.twin_of(index) is None else {"twin": True}

    def intervened(self, index: int) -> Json:
        """The field ``intervene`` of a choice; {}: nobody asked."""
        if (edited := self.twin_of(index)) is not None:
            return {"intervene": {"edits": [], "twin_of": edited}}
        return intervene_format.header(self.edits, index // self.n, self.run_field(index))

    def run_field(self, index: int) -> dict[str, str]:
        """The field ``run`` of a choice, its id; {}: it is not kept."""
        if self.run is None:
            return {}
        return {"run": run_id(self.run, index, len(self.prompts) * self.n)}

    def compared(self, generation: Generation, index: int) -> Json:
        """The field ``compare`` of a choice; {}: nobody asked."""
        if self.vocabulary is None or not generation.comparisons:
            return {}
        own = generation.comparisons[index]
        ids = generation.choices[index].token_ids
        return {"compare": intervene_format.compared(own, index, ids, self.vocabulary)}

    def comparisons(self, kind: str, generation: Generation | None) -> Iterator[Json]:
        """The events with the field ``compare`` of each choice, after the last piece."""
        for index in range(0 if generation is None else len(generation.comparisons)):
            assert generation is not None
            event = self.envelope(kind, []) | self.usage_so_far(generation)
            yield event | self.compared(generation, index)


def new_id(prefix: str) -> str:
    """``prefix`` and 24 hexadecimal digits."""
    return f"{prefix}-{uuid.uuid4().hex[:24]}"


def _rounded(figures: Mapping[str, float]) -> Json:
    return {name: arrays.digits(value) for name, value in figures.items()}


def usage(used: Usage) -> Json:
    """The tokens of a request."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


class ChatFormatter(Formatter):
    """Chat completions."""

    dialect = OPENAI

    def __init__(self, head: Head) -> None:
        self.completion_id = head.id
        self.prompts = head.prompts
        self._head = head
        # By choice, the bytes before and after the text of a piece that has nothing else.
        self._around: list[tuple[bytes, bytes]] = []

    def whole(self, generation: Generation) -> Json:
        """The whole answer."""
        head, answers = self._head, collect(generation)
        choices = [
            {
                "index": choice.index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                **head.token_ids(choice.index, choice.token_ids, first=True),
                **head.traced(choice),
                **head.intervened(choice.index),
                **head.compared(generation, choice.index),
            }
            for choice in answers
        ]
        envelope = head.envelope("chat.completion", choices) | head.scored_prompt(answers[0])
        return {**envelope, "usage": head.usage(generation.usage, generation)}

    def opening(self) -> Iterator[bytes]:
        """The role of each choice."""
        head = self._head
        if not head.with_more_than_text:
            self._around = [self._text_event(index) for index in range(head.n)]
        for index in range(head.n):
            yield self.dialect.frame(head.opening(index, self._chunk))

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """A chunk with the text, and in the end one with the finish reason."""
        if self._around and delta.text and delta.finish_reason is None:  # nearly every piece
            before, after = self._around[delta.index]
            text = orjson.dumps(delta.text)
            if sse.LINE_ENDS[0] in text or sse.LINE_ENDS[1] in text:
                text = sse.in_one_line(text)
            return (before + text + after,)
        head, frames = self._head, []
        if _has_content(head, delta):
            chunk = self._chunk(
                delta.index,
                {"content": delta.text},
                logprobs=self._logprobs(delta),
                **head.token_ids(delta.index, delta.token_ids, first=False),
            )
            if head.traces is not None and delta.trace is not None:
                twin = head.twin_field(delta.index)
                chunk["trace"] = head.traces.step(delta.trace, delta.index, **twin)
            frames.append(self.dialect.frame(chunk))
        if delta.finish_reason is not None:
            ends = {"finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
            chunk = self._chunk(delta.index, {}, **ends)
            frames.append(self.dialect.frame(chunk))
        return frames

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The comparisons and the usage, where they were asked for."""
        yield from map(self.dialect.frame, self._head.comparisons(_CHUNK, generation))
        if self._head.with_usage and generation is not None:
            envelope = self._head.envelope(_CHUNK, [])
            usage = self._head.usage(generation.usage, generation)
            yield self.dialect.frame({**envelope, "usage": usage})

    def _logprobs(self, piece: Choice | TextDelta) -> Json | None:
        if self._head.logprobs is None:
            return None
        return chat_logprobs(piece.logprobs, as_ids=self._head.as_token_ids)

    def _text_event(self, index: int) -> tuple[bytes, bytes]:
        frame = self.dialect.frame(self._chunk(index, {"content": ""}))
        before, _, after = frame.rpartition(b'""')
        return before, after

    def _chunk(self, index: int, delta: Json, **fields: Any) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        chunk = self._head.envelope(_CHUNK, [choice])
        return {**chunk, **self._head.usage_so_far(self.generation)}


def _has_content(head: Head, delta: TextDelta) -> bool:
    """True where there is more to a piece than that it may be the last."""
    content = delta.text or delta.logprobs or delta.trace is not None
    return bool(content or (head.with_token_ids and delta.token_ids))


class CompletionFormatter(Formatter):
    """Completions; ``texts`` are the prompts."""

    dialect = OPENAI

    def __init__(self, head: Head, texts: Sequence[str], *, echo: bool) -> None:
        self.completion_id = head.id
        self.prompts = head.prompts
        self._head = head
        self._texts = texts
        self._echo = echo
        self._writers: dict[int, _TextWriter] = {}  # by choice

    def whole(self, generation: Generation) -> Json:
        """The whole answer."""
        head = self._head
        choices = [
            {
                **self._writer(choice.index).write(choice),
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                **head.scored_prompt(choice),
                **head.token_ids(choice.index, choice.token_ids, first=True),
                **head.traced(choice),
                **head.intervened(choice.index),
                **head.compared(generation, choice.index),
            }
            for choice in collect(generation)
        ]
        envelope = head.envelope("text_completion", choices)
        return {**envelope, "usage": head.usage(generation.usage, generation)}

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """A chunk; the last of each choice has its finish reason."""
        head = self._head
        is_first = delta.index not in self._writers
        if is_first:
            self._writers[delta.index] = self._writer(delta.index)
        choice = {
            **self._writers[delta.index].write(delta),
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
            **head.token_ids(delta.index, delta.token_ids, first=is_first),
        }
        chunk = head.envelope("text_completion", [choice]) | head.usage_so_far(self.generation)
        chunk |= _completion_trace(head, delta, is_first)
        if is_first:
            chunk |= head.intervened(delta.index)
        return (self.dialect.frame(chunk),)

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The comparisons and the usage, where they were asked for."""
        yield from map(self.dialect.frame, self._head.comparisons("text_completion", generation))
        if self._head.with_usage and generation is not None:
            envelope = self._head.envelope("text_completion", [])
            usage = self._head.usage(generation.usage, generation)
            yield self.dialect.frame({**envelope, "usage": usage})

    def _writer(self, index: int) -> _TextWriter:
        return _TextWriter(self._head, self._texts[index // self._head.n], self._echo)


def _completion_trace(head: Head, delta: TextDelta, is_first: bool) -> Json:
    """Nobody speaks first here: the header stands in the first trace of each choice."""
    first = head.trace_header(delta.index) if is_first else None
    header = {} if first is None else {"header": first}
    if head.traces is not None and delta.trace is not None:
        twin = head.twin_field(delta.index)
        return {"trace": head.traces.step(delta.trace, delta.index, **header, **twin)}
    return {"trace": header} if header else {}


class _TextWriter:
    """Writes one choice, whole or piece by piece; offsets count from the start of the prompt."""

    def __init__(self, head: Head, prompt: str, echo: bool) -> None:
        self._head = head
        self._prompt = prompt
        self._echo = echo
        self._repeat = prompt if echo else ""

    def write(self, piece: Choice | TextDelta) -> Json:
        text = self._repeat + piece.text
        self._repeat = ""
        return {
            "index": piece.index,
            "text": text,
            "logprobs": None if self._head.logprobs is None else self._logprobs(piece),
        }

    def _logprobs(self, piece: Choice | TextDelta) -> Json:
        count = self._head.logprobs
        scores = (piece.prompt_scores or ()) if self._echo else ()
        before = [replace(detail, top=detail.top[:count]) for detail in scores]
        offsets = text_offsets(self._prompt, [detail.bytes for detail in before])
        offsets += [len(self._prompt) + detail.offset for detail in piece.logprobs]
        details = (*before, *piece.logprobs)
        return completion_logprobs(details, offsets, as_ids=self._head.as_token_ids)
