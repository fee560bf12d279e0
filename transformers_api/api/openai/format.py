"""OpenAI's answers: from pieces of text to dictionaries. Pure functions: no Flask, no clock."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers_api.api.http import strict_json
from transformers_api.api.openai.text_offsets import TextOffsets
from transformers_api.api.trace.format import TraceWriter
from transformers_api.serving.generation import Choice, Generation, Usage
from transformers_api.serving.text.choice_text import TextDelta, TokenDetail, TopToken

Json = dict[str, Any]
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(frozen=True, kw_only=True)
class Head:
    """What every object of one answer repeats, and what was asked to be in it."""

    id: str
    created: int  # seconds since 1970
    model: str
    fingerprint: str
    prompts: Sequence[Sequence[int]]  # ids
    n: int = 1  # choices per prompt
    with_logprobs: bool = False
    with_token_ids: bool = False
    with_usage: bool = False  # in a stream
    traces: TraceWriter | None = None

    @property
    def with_more_than_text(self) -> bool:
        """Whether there is more to tell of a piece than its text and its place."""
        return self.with_logprobs or self.with_token_ids or self.traces is not None

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

    def traced(self, choice: Choice) -> Json:
        """The field ``trace`` of a whole choice."""
        if self.traces is None:
            return {}
        steps = [self.traces.step(noted, choice.index) for noted in choice.traces]
        header = self.traces.header(choice.index // self.n, choice.index)
        return {"trace": {"header": header, "steps": steps}}

    def usage(self, used: Usage) -> Json:
        """The tokens of a request, and what its traces took."""
        traced = {} if self.traces is None else {"trace": self.traces.usage}
        return {**usage(used), **traced}


def new_id(prefix: str) -> str:
    """``prefix`` and 24 hexadecimal digits."""
    return f"{prefix}-{uuid.uuid4().hex[:24]}"


def usage(used: Usage) -> Json:
    """The tokens of a request."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.prompt_tokens + used.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
    }


# Chat completions.


def chat_completion(head: Head, choices: Iterable[Choice], used: Usage) -> Json:
    """The whole answer."""
    shown = [
        {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": chat_logprobs(choice.logprobs) if head.with_logprobs else None,
            "finish_reason": choice.finish_reason,
            **head.token_ids(choice.index, choice.token_ids, first=True),
            **head.traced(choice),
        }
        for choice in choices
    ]
    return {**head.envelope("chat.completion", shown), "usage": head.usage(used)}


def chat_chunks(head: Head, generation: Generation) -> Iterator[Json | None]:
    """The events of a stream: who speaks, what is said, why it ended, what it took."""
    for index in range(head.n):
        speaker = {"role": "assistant", "content": ""}
        chunk = _chat_chunk(head, index, speaker, **head.token_ids(index, (), first=True))
        if head.traces is not None:
            chunk["trace"] = head.traces.header(index // head.n, index)
        yield chunk
    around = None if head.with_more_than_text else [_around(head, i) for i in range(head.n)]
    for delta in generation:
        if delta is None:
            yield None
            continue
        if around is not None and delta.text:
            before, after = around[delta.index]
            yield strict_json.ready(b"%b%b%b" % (before, strict_json.dump(delta.text), after))
        elif _says_something(head, delta):
            chunk = _chat_chunk(
                head,
                delta.index,
                {"content": delta.text},
                logprobs=chat_logprobs(delta.logprobs) if head.with_logprobs else None,
                **head.token_ids(delta.index, delta.token_ids, first=False),
            )
            if head.traces is not None and delta.trace is not None:
                chunk["trace"] = head.traces.step(delta.trace, delta.index)
            yield chunk
        if delta.finish_reason is not None:
            yield _chat_chunk(head, delta.index, {}, finish_reason=delta.finish_reason)
    if head.with_usage:
        yield {**head.envelope("chat.completion.chunk", []), "usage": head.usage(generation.usage)}


def _around(head: Head, index: int) -> tuple[bytes, bytes]:
    """The JSON before and after the text of a piece that has nothing else, as most have."""
    before, _, after = strict_json.dump(_chat_chunk(head, index, {"content": ""})).rpartition(b'""')
    return before, after


def _says_something(head: Head, delta: TextDelta) -> bool:
    """Whether there is more to a piece than that it may be the last."""
    seen = delta.text or delta.logprobs or delta.trace is not None
    return bool(seen or (head.with_token_ids and delta.token_ids))


def _chat_chunk(head: Head, index: int, delta: Json, **fields: Any) -> Json:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
    chunk = head.envelope("chat.completion.chunk", [choice])
    return {**chunk, "usage": None} if head.with_usage else chunk


def chat_logprobs(details: Iterable[TokenDetail]) -> Json:
    """Scores as chat completions show them."""
    content = [
        {**_scored(detail), "top_logprobs": [_scored(top) for top in detail.top]}
        for detail in details
    ]
    return {"content": content, "refusal": None}


def _scored(token: TokenDetail | TopToken) -> Json:
    return {"token": token.text, "logprob": _logprob(token.logprob), "bytes": list(token.bytes)}


def _logprob(value: float | None) -> float | None:
    return None if value is None else max(value, _LOWEST_LOGPROB)


# Completions.


def completion(
    head: Head, texts: Sequence[str], echo: bool, choices: Iterable[Choice], used: Usage
) -> Json:
    """The whole answer; ``texts`` are the prompts."""
    shown = []
    for choice in choices:
        writer = _TextWriter(texts[choice.index // head.n], echo)
        shown.append(
            {
                **writer.write(choice, head.with_logprobs),
                "finish_reason": choice.finish_reason,
                **head.token_ids(choice.index, choice.token_ids, first=True),
                **head.traced(choice),
            }
        )
    return {**head.envelope("text_completion", shown), "usage": head.usage(used)}


def completion_chunks(
    head: Head, texts: Sequence[str], echo: bool, generation: Generation
) -> Iterator[Json | None]:
    """The events of a stream: pieces of text, the last of each choice with its finish reason."""
    writers: dict[int, _TextWriter] = {}
    for delta in generation:
        if delta is None:
            yield None
            continue
        is_first = delta.index not in writers
        if is_first:
            writers[delta.index] = _TextWriter(texts[delta.index // head.n], echo)
        choice = {
            **writers[delta.index].write(delta, head.with_logprobs),
            "finish_reason": delta.finish_reason,
            **head.token_ids(delta.index, delta.token_ids, first=is_first),
        }
        chunk = head.envelope("text_completion", [choice])
        if head.with_usage:
            chunk["usage"] = None
        if head.traces is not None:
            chunk |= _completion_trace(head.traces, head.n, delta, is_first)
        yield chunk
    if head.with_usage:
        yield {**head.envelope("text_completion", []), "usage": head.usage(generation.usage)}


def _completion_trace(traces: TraceWriter, n: int, delta: TextDelta, is_first: bool) -> Json:
    """Nobody speaks first here: the header stands in the first trace of each choice."""
    header = {"header": traces.header(delta.index // n, delta.index)} if is_first else {}
    if delta.trace is not None:
        return {"trace": traces.step(delta.trace, delta.index, **header)}
    return {"trace": header} if header else {}


class _TextWriter:
    """Writes one choice, whole or piece by piece; offsets count from the start of the prompt."""

    def __init__(self, prompt: str, echo: bool) -> None:
        self._repeat = prompt if echo else ""
        self._offsets = TextOffsets(0 if echo else len(prompt))

    def write(self, piece: Choice | TextDelta, with_logprobs: bool) -> Json:
        text = self._repeat + piece.text
        self._repeat = ""
        self._offsets.extend(text)
        details = (*(piece.prompt_scores or ()), *piece.logprobs)
        return {
            "index": piece.index,
            "text": text,
            "logprobs": self._logprobs(details) if with_logprobs else None,
        }

    def _logprobs(self, details: Sequence[TokenDetail]) -> Json:
        return {
            "tokens": [detail.text for detail in details],
            "token_logprobs": [_logprob(detail.logprob) for detail in details],
            "top_logprobs": [_top(detail) for detail in details],
            "text_offset": [self._offsets.place(detail.bytes) for detail in details],
        }


def _top(detail: TokenDetail) -> dict[str, float] | None:
    """The likeliest tokens by text, and the one that stands there; None where nothing predicts."""
    if detail.logprob is None:
        return None
    top: dict[str, float] = {}
    for token in detail.top:
        top.setdefault(token.text, max(token.logprob, _LOWEST_LOGPROB))
    top.setdefault(detail.text, max(detail.logprob, _LOWEST_LOGPROB))
    return top
