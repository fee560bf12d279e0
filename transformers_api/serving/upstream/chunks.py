"""An upstream's chunks to pieces of our own, one by one. Nothing in them is believed unchecked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import orjson

from transformers_api.engine.base import FinishReason, TokenOutput
from transformers_api.errors import UpstreamFailed
from transformers_api.serving.text.choice_text import TextDelta, TokenDetail, TopToken
from transformers_api.serving.tools.spec import (
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
)
from transformers_api.serving.upstream.connection import refusal
from transformers_api.serving.upstream.spec import UpstreamUsage

DONE = b"[DONE]"
MOST_CALLS = 128  # of a choice
_NO_TOKEN = -1  # an upstream does not say which
_REASONS = ("length", "content_filter")  # others are a stop; calls are seen as such


class ChunkReader:
    """Reads the chunks of one answer of ``choices`` choices.

    What ends a choice is held back until ``finish``: the usage comes after it.
    """

    def __init__(self, choices: int) -> None:
        self.usage = UpstreamUsage()
        self._calls: list[set[int]] = [set() for _ in range(choices)]
        self._sizes = [0] * choices  # characters of each choice
        self._ends: dict[int, TextDelta] = {}

    def read(self, data: bytes) -> Iterator[TextDelta]:
        """The pieces of one chunk. Raises UpstreamFailed, and what an error in it stands for."""
        chunk = _object(_json(data), "a chunk")
        if "error" in chunk:
            raise _late_error(chunk)
        if (usage := chunk.get("usage")) is not None:
            self._count(_object(usage, "usage"))
        choices = chunk.get("choices", [])
        if not isinstance(choices, list):
            raise _nonsense("choices")
        for choice in choices:
            yield from self._choice(_object(choice, "a choice"))

    def finish(self) -> Iterator[TextDelta]:
        """The last piece of each choice. Raises UpstreamFailed where one has none."""
        if len(self._ends) < len(self._calls):
            raise UpstreamFailed("The upstream ended the answer before it was complete")
        for index, delta in sorted(self._ends.items()):
            if index == 0:
                delta.reasoning_tokens = self.usage.reasoning_tokens
            yield delta

    @property
    def is_complete(self) -> bool:
        """True once every choice has ended."""
        return len(self._ends) == len(self._calls)

    def _choice(self, choice: Mapping[str, Any]) -> Iterator[TextDelta]:
        index = choice.get("index", 0)
        if type(index) is not int or not 0 <= index < len(self._calls):
            raise _nonsense("the index of a choice")
        if index in self._ends:
            raise _nonsense("a choice that goes on after its end")
        parts = list(self._parts(index, choice))
        text = "".join(part.text for part in parts if isinstance(part, Content))
        logprobs = tuple(self._logprobs(index, choice.get("logprobs")))
        self._sizes[index] += len(text)
        if parts or logprobs:
            yield TextDelta(
                index=index, text=text, token_ids=(), logprobs=logprobs, parts=tuple(parts)
            )
        if (reason := choice.get("finish_reason")) is not None:
            stop = choice.get("stop_reason")
            self._ends[index] = TextDelta(
                index=index,
                text="",
                token_ids=(),
                finish_reason=reason if reason in _REASONS else "stop",
                stop_reason=stop if isinstance(stop, str | int) else None,
                parts=(),
            )

    def _parts(self, index: int, choice: Mapping[str, Any]) -> Iterator[Part]:
        if "text" in choice:
            yield from _texts(choice, ("text",), Content)
            return
        delta = _object(choice.get("delta") or {}, "a delta")
        thoughts = list(_texts(delta, ("reasoning_content",), Reasoning))
        yield from thoughts or _texts(delta, ("reasoning",), Reasoning)
        yield from _texts(delta, ("content", "refusal"), Content)
        calls = delta.get("tool_calls") or []
        if not isinstance(calls, list):
            raise _nonsense("tool_calls")
        for call in calls:
            yield from self._call(index, _object(call, "a call"))

    def _call(self, index: int, call: Mapping[str, Any]) -> Iterator[Part]:
        place, places = call.get("index", 0), self._calls[index]
        function = _object(call.get("function") or {}, "a function")
        if type(place) is not int or not 0 <= place <= min(len(places), MOST_CALLS):
            raise _nonsense("the index of a call")
        if place not in places:
            name = function.get("name")
            if not isinstance(name, str) or not name:
                raise _nonsense("a call without a name")
            places.add(place)
            yield CallStart(place, name)
        arguments = function.get("arguments")
        if isinstance(arguments, str) and arguments:
            yield CallArguments(place, arguments)

    def _count(self, usage: Mapping[str, Any]) -> None:
        def number(fields: Any, name: str) -> int:
            value = fields.get(name) if isinstance(fields, Mapping) else None
            return value if type(value) is int and 0 <= value < 1 << 31 else 0

        self.usage.prompt_tokens = number(usage, "prompt_tokens")
        self.usage.completion_tokens = number(usage, "completion_tokens")
        cached = number(usage.get("prompt_tokens_details"), "cached_tokens")
        self.usage.cached_tokens = min(cached, self.usage.prompt_tokens)
        thoughts = number(usage.get("completion_tokens_details"), "reasoning_tokens")
        self.usage.reasoning_tokens = min(thoughts, self.usage.completion_tokens)

    def _logprobs(self, index: int, scores: Any) -> Iterator[TokenDetail]:
        """The scores of a chunk, in the form of chats or in that of completions."""
        if not isinstance(scores, Mapping):
            return
        start = self._sizes[index]
        rows = scores.get("content") or _rows(scores)
        for row in rows if isinstance(rows, list) else ():
            token = _scored(row)
            others = row.get("top_logprobs")
            top = tuple(map(_scored, others if isinstance(others, list) else ()))
            yield TokenDetail(*token, top, start)
            start += len(token.text)


def ended(delta: TextDelta) -> TokenOutput:
    """``delta`` as an output of an engine, for a ``TokenStream``."""
    reasons = {None: None, "length": FinishReason.LENGTH}
    reason = reasons.get(delta.finish_reason, FinishReason.STOP)
    return TokenOutput(index=delta.index, finish_reason=reason, extras={"delta": delta})


def _rows(scores: Mapping[str, Any]) -> list[Any]:
    """The columns of a completion's scores as rows like a chat's."""
    columns = [scores.get(name) for name in ("tokens", "token_logprobs", "top_logprobs")]
    tokens, numbers, tops = (column if isinstance(column, list) else [] for column in columns)
    tops = tops or [None] * len(tokens)
    return [
        {
            "token": token,
            "logprob": number,
            "top_logprobs": [
                {"token": other, "logprob": score}
                for other, score in (top.items() if isinstance(top, dict) else ())
            ],
        }
        for token, number, top in zip(tokens, numbers, tops, strict=False)
    ]


def _scored(row: Any) -> TopToken:
    fields = _object(row, "a score")
    text, number, raw = fields.get("token"), fields.get("logprob"), fields.get("bytes")
    if not isinstance(text, str) or type(number) not in (int, float):
        raise _nonsense("a score")
    is_raw = isinstance(raw, list) and all(type(b) is int and 0 <= b < 256 for b in raw)
    data = bytes(cast("list[int]", raw)) if is_raw else text.encode(errors="replace")
    return TopToken(_NO_TOKEN, text, data, float(cast("float", number)))


def _texts(
    fields: Mapping[str, Any], names: tuple[str, ...], kind: type[Content] | type[Reasoning]
) -> Iterator[Part]:
    for name in names:
        text = fields.get(name)
        if text is not None and not isinstance(text, str):
            raise _nonsense(name)
        if text:
            yield kind(text)


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except ValueError:
        raise _nonsense("JSON") from None


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _nonsense(name)
    return value


def _nonsense(name: str) -> UpstreamFailed:
    return UpstreamFailed(f"The upstream sends what is no answer: {name}")


def _late_error(chunk: Mapping[str, Any]) -> Exception:
    error = chunk["error"]
    code = error.get("code") if isinstance(error, dict) else None
    status = code if type(code) is int else 500
    return refusal(status, orjson.dumps(chunk))
