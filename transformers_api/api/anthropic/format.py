"""The answer of /v1/messages: one message, or its events. No Flask, no clock."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from transformers_api.api.http.dialects import MESSAGES
from transformers_api.api.http.request_context import Formatter
from transformers_api.api.openai.answer_parts import AnswerReader
from transformers_api.serving.generation import Generation
from transformers_api.serving.text.choice_text import TextDelta
from transformers_api.serving.tools.answer_plan import AnswerPlan
from transformers_api.serving.tools.spec import (
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
)

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Head:
    """The fields of a message that do not depend on what the model writes."""

    id: str
    model: str
    prompt: Sequence[int]  # ids
    stop_sequences: frozenset[str] = frozenset()
    shows_thinking: bool = True


def new_id(prefix: str) -> str:
    """``prefix`` and 24 hexadecimal digits."""
    return f"{prefix}_{uuid.uuid4().hex[:24]}"


class MessageFormatter(Formatter):
    """See the module."""

    dialect = MESSAGES

    def __init__(self, head: Head, plan: AnswerPlan) -> None:
        self.completion_id = head.id
        self.prompts = [head.prompt]
        self._head = head
        self._reader = AnswerReader(plan)
        self.parts = self._reader.counts
        self._blocks = 0  # that have begun
        self._open: str | None = None  # the type of the one that is open
        self._last: TextDelta | None = None

    def whole(self, generation: Generation) -> Json:
        """The whole message."""
        (answer,) = self._reader.whole(generation)
        blocks: list[Json] = []
        if answer.reasoning and self._head.shows_thinking:
            signature = _signature(answer.reasoning)
            blocks.append(
                {"type": "thinking", "thinking": answer.reasoning, "signature": signature}
            )
        if answer.content or not answer.calls:
            blocks.append({"type": "text", "text": answer.content})
        blocks += [
            {
                "type": "tool_use",
                "id": new_id("toolu"),
                "name": call.name,
                "input": _arguments(call.arguments),
            }
            for call in answer.calls
        ]
        choice = answer.choice
        ends = self._ends(answer.finish_reason, choice.stop_reason)
        return {**self._message(blocks), **ends, "usage": self._usage(generation)}

    def opening(self) -> Iterator[bytes]:
        """The message, without content."""
        message = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        message["usage"] = {
            "input_tokens": len(self._head.prompt),
            "cache_read_input_tokens": 0,
            "cache_creation_input_tokens": 0,
            "output_tokens": 0,
        }
        yield self._event("message_start", message=message)
        yield self.dialect.ping

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """The events of a piece."""
        events: list[bytes] = []
        for part in self._reader.parts(delta):
            events += self._part(part)
        if delta.finish_reason is not None:
            self._last = delta
        return events

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The end of the last block, why it ended, and the usage."""
        if not self._blocks:  # a message has a block
            yield from self._block("text", {"type": "text", "text": ""})
        yield from self._close()
        assert self._last is not None
        assert generation is not None
        reason = self._last.finish_reason or "stop"
        if self._reader.parser(0).calls and reason != "length":
            reason = "tool_calls"
        ends = self._ends(reason, self._last.stop_reason)
        yield self._event("message_delta", delta=ends, usage=self._usage(generation))
        yield self._event("message_stop")

    def _part(self, part: Part) -> Iterator[bytes]:
        match part:
            case Reasoning(text):
                if self._head.shows_thinking:
                    thinking = {"type": "thinking", "thinking": "", "signature": ""}
                    yield from self._block("thinking", thinking)
                    yield self._delta(type="thinking_delta", thinking=text)
            case Content(text):
                yield from self._block("text", {"type": "text", "text": ""})
                yield self._delta(type="text_delta", text=text)
            case CallStart(_, name):
                yield from self._close()
                start: Json = {"type": "tool_use", "id": new_id("toolu"), "name": name, "input": {}}
                yield from self._block("tool_use", start)
            case CallArguments(_, text):
                yield self._delta(type="input_json_delta", partial_json=text)

    def _block(self, kind: str, start: Json) -> Iterator[bytes]:
        """The start of a block, unless one of its kind is open."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._blocks += 1
        yield self._event("content_block_start", index=self._blocks - 1, content_block=start)

    def _close(self) -> Iterator[bytes]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta(type="signature_delta", signature=_signature(""))
        yield self._event("content_block_stop", index=self._blocks - 1)
        self._open = None

    def _delta(self, **delta: str) -> bytes:
        return self._event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _message(self, content: list[Json]) -> Json:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model,
            "content": content,
        }

    def _ends(self, reason: str, stop: str | int | None) -> Json:
        if reason == "stop" and isinstance(stop, str) and stop in self._head.stop_sequences:
            return {"stop_reason": "stop_sequence", "stop_sequence": stop}
        kinds = {"length": "max_tokens", "tool_calls": "tool_use"}
        return {"stop_reason": kinds.get(reason, "end_turn"), "stop_sequence": None}

    def _usage(self, generation: Generation) -> Json:
        used = generation.usage
        return {
            "input_tokens": used.prompt_tokens - used.cached_tokens,
            "cache_read_input_tokens": used.cached_tokens,
            "cache_creation_input_tokens": 0,
            "output_tokens": used.completion_tokens,
        }

    def _event(self, kind: str, **fields: Any) -> bytes:
        return self.dialect.frame({"type": kind, **fields}, kind)


def _arguments(text: str) -> Any:
    """The arguments of a call; empty where it was cut off."""
    try:
        return orjson.loads(text)
    except ValueError:
        return {}


def _signature(thought: str) -> str:
    """A text that its clients hand back with a thought; nothing is checked by it here."""
    return base64.b64encode(f"{len(thought)}".encode()).decode()
