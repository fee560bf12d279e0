"""The answer of /v1/responses: one object, or its events. No Flask, no clock."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from transformers_api.api.http.dialects import OPENAI, Dialect
from transformers_api.api.http.request_context import Formatter
from transformers_api.api.intervene import format as intervene_format
from transformers_api.api.openai.answer_parts import AnswerReader, new_call_id
from transformers_api.api.openai.logprobs import chat_logprobs
from transformers_api.errors import ApiError
from transformers_api.serving.generation import Generation
from transformers_api.serving.inspect.interventions import PlannedEdits
from transformers_api.serving.text.choice_text import TextDelta, TokenDetail
from transformers_api.serving.tools.answer_plan import AnswerPlan
from transformers_api.serving.tools.spec import (
    CallArguments,
    CallStart,
    Content,
    Part,
    Reasoning,
)

Json = dict[str, Any]
RESPONSES: Dialect = replace(OPENAI, stream_end=b"")
_SEAL = "thought:"  # before the text of a thought that a client carries for us


@dataclass(kw_only=True)
class Head:
    """The fields of a response that do not depend on what the model writes."""

    id: str
    created_at: int  # seconds since 1970
    model: str
    prompt: Sequence[int]  # ids
    echoed: Mapping[str, Any]  # fields of the request that stand in the answer
    free_tools: frozenset[str] = frozenset()  # that take text instead of JSON
    with_sealed: bool = False  # reasoning items have ``encrypted_content``
    with_logprobs: bool = False
    edits: Sequence[PlannedEdits] = ()
    run: str | None = None  # under which the answer is kept

    def body(
        self, status: str, output: Sequence[Json], usage: Json | None, error: ApiError | None = None
    ) -> Json:
        """The whole object."""
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        failure = {"code": error.code or error.type, "message": error.message} if error else None
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "completed_at": self.created_at if status == "completed" else None,
            "status": status,
            "background": False,
            "error": failure,
            "incomplete_details": reason,
            "model": self.model,
            "output": list(output),
            "usage": usage,
            **self.echoed,
            **intervene_format.header(self.edits, 0, {"run": self.run} if self.run else {}),
        }


def new_id(prefix: str) -> str:
    """``prefix`` and 32 hexadecimal digits."""
    return f"{prefix}_{uuid.uuid4().hex}"


@dataclass
class _Item:
    """One item of the output, as far as it has come."""

    kind: str  # reasoning, message, function_call, custom_tool_call
    id: str
    name: str = ""
    call_id: str = ""
    text: str = ""
    logprobs: list[Json] = field(default_factory=list)

    def as_json(self, status: str, head: Head) -> Json:
        """The item as a client reads it."""
        begin = {"id": self.id, "type": self.kind}
        if self.kind == "reasoning":
            content = [{"type": "reasoning_text", "text": self.text}] if self.text else []
            sealed = {"encrypted_content": _sealed(self.text)} if head.with_sealed else {}
            return {**begin, "summary": [], "content": content, "status": status, **sealed}
        if self.kind == "message":
            content = [] if status == "in_progress" else [self.part()]
            return {**begin, "role": "assistant", "status": status, "content": content}
        written = "input" if self.kind == "custom_tool_call" else "arguments"
        call = {"call_id": self.call_id, "name": self.name, written: self.text}
        return {**begin, "status": status, **call}

    def part(self, text: str | None = None) -> Json:
        """The one part of the content."""
        text = self.text if text is None else text
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {
            "type": "output_text",
            "text": text,
            "annotations": [],
            "logprobs": self.logprobs if text else [],
        }


class ResponseFormatter(Formatter):
    """See the module. ``keep`` is given each whole body, and what the assistant has said."""

    dialect = RESPONSES

    def __init__(
        self, head: Head, plan: AnswerPlan, keep: Callable[[Json, Sequence[Json]], object]
    ) -> None:
        self.completion_id = head.id
        self.prompts = [head.prompt]
        self._head = head
        self._reader = AnswerReader(plan)
        self.parts = self._reader.counts
        self._keep = keep
        self._number = -1  # of the last event
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._finish_reason = "stop"

    def whole(self, generation: Generation) -> Json:
        """The whole object."""
        (answer,) = self._reader.whole(generation)
        if answer.reasoning:
            self._items.append(_Item("reasoning", new_id("rs"), text=answer.reasoning))
        if answer.content:
            item = _Item("message", new_id("msg"), text=answer.content)
            item.logprobs = self._logprobs(answer.choice.logprobs)
            self._items.append(item)
        for call in answer.calls:
            self._items.append(self._call(call.name, call.id, call.arguments))
        self._finish_reason = answer.choice.finish_reason
        return self._finished(generation)

    def opening(self) -> Iterator[bytes]:
        """The response, without an output."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._head.body("in_progress", (), None))

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """The events of a piece."""
        is_content = not self._reader.parser(delta.index).is_thinking
        scores = self._logprobs(delta.logprobs) if is_content else []
        events: list[bytes] = []
        for part in self._reader.parts(delta):
            events += self._part(part, scores)
        if delta.finish_reason is not None:
            self._finish_reason = delta.finish_reason
        return events

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The end of the last item, and the whole object."""
        yield from self._close()
        assert generation is not None
        body = self._finished(generation)
        yield self._event(f"response.{body['status']}", response=body)

    def failing(self, error: ApiError) -> Iterable[bytes]:
        """An event ``error``, and the response that has failed."""
        kind = {"code": error.code or error.type, "message": error.message, "param": error.param}
        yield self._event("error", **kind)
        output = [item.as_json("incomplete", self._head) for item in self._items]
        body = self._head.body("failed", output, None, error)
        yield self._event("response.failed", response=body)

    def _part(self, part: Part, scores: list[Json]) -> Iterator[bytes]:
        match part:
            case Reasoning(text):
                yield from self._text("reasoning", "rs", "response.reasoning_text", text)
            case Content(text):
                yield from self._text("message", "msg", "response.output_text", text, scores)
            case CallStart(_, name):
                yield from self._close()
                yield from self._begin(self._call(name, new_call_id(), ""))
            case CallArguments(_, text):
                assert self._open is not None
                self._open.text += text
                if self._open.kind == "function_call":
                    kind = "response.function_call_arguments.delta"
                    yield self._event(kind, **self._place(), delta=text)

    def _text(
        self, kind: str, prefix: str, event: str, text: str, scores: list[Json] | None = None
    ) -> Iterator[bytes]:
        if self._open is None or self._open.kind != kind:
            yield from self._close()
            yield from self._begin(_Item(kind, new_id(prefix)))
            place = {**self._place(), "content_index": 0, "part": self._items[-1].part("")}
            yield self._event("response.content_part.added", **place)
        item = self._items[-1]
        item.text += text
        more = {}
        if kind == "message":
            item.logprobs += scores or []
            more = {"logprobs": scores or []}
        place = {**self._place(), "content_index": 0}
        yield self._event(f"{event}.delta", **place, delta=text, **more)

    def _begin(self, item: _Item) -> Iterator[bytes]:
        self._items.append(item)
        self._open = item
        added = {
            "output_index": len(self._items) - 1,
            "item": item.as_json("in_progress", self._head),
        }
        yield self._event("response.output_item.added", **added)

    def _close(self) -> Iterator[bytes]:
        """The events that end the open item."""
        item = self._open
        if item is None:
            return
        place = self._place()
        if item.kind in ("reasoning", "message"):
            event = "reasoning_text" if item.kind == "reasoning" else "output_text"
            more = {} if item.kind == "reasoning" else {"logprobs": item.logprobs}
            part_place = {**place, "content_index": 0}
            yield self._event(f"response.{event}.done", **part_place, text=item.text, **more)
            yield self._event("response.content_part.done", **part_place, part=item.part())
        elif item.kind == "function_call":
            done = {"arguments": item.text, "name": item.name}
            yield self._event("response.function_call_arguments.done", **place, **done)
        else:
            item.text = _free_text(item.text)
            yield self._event("response.custom_tool_call_input.delta", **place, delta=item.text)
            yield self._event("response.custom_tool_call_input.done", **place, input=item.text)
        done_item = {
            "output_index": place["output_index"],
            "item": item.as_json("completed", self._head),
        }
        yield self._event("response.output_item.done", **done_item)
        self._open = None

    def _place(self) -> Json:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": len(self._items) - 1}

    def _call(self, name: str, call_id: str, arguments: str) -> _Item:
        if name in self._head.free_tools:
            text = _free_text(arguments)
            return _Item("custom_tool_call", new_id("ctc"), name, call_id, text)
        return _Item("function_call", new_id("fc"), name, call_id, arguments)

    def _finished(self, generation: Generation) -> Json:
        is_cut = self._finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        used = generation.usage
        usage = {
            "input_tokens": used.prompt_tokens,
            "input_tokens_details": {"cached_tokens": used.cached_tokens},
            "output_tokens": used.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._reader.reasoning_tokens},
            "total_tokens": used.prompt_tokens + used.completion_tokens,
            **intervene_format.usage(self._head.edits, 1),
        }
        output = [item.as_json("completed", self._head) for item in self._items]
        if is_cut and output:
            output[-1]["status"] = "incomplete"
        body = self._head.body(status, output, usage)
        self._keep(body, messages_of(self._items))
        return body

    def _logprobs(self, details: Sequence[TokenDetail]) -> list[Json]:
        if not self._head.with_logprobs:
            return []
        scores: list[Json] = chat_logprobs(details)["content"]
        return scores

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        payload = {"type": kind, "sequence_number": self._number, **fields}
        return self.dialect.frame(payload, kind)


def messages_of(items: Sequence[_Item]) -> list[Json]:
    """The turn of the assistant, as a conversation goes on from it."""
    turn: Json = {"role": "assistant", "content": ""}
    for item in items:
        if item.kind == "reasoning":
            turn["reasoning_content"] = item.text
        elif item.kind == "message":
            turn["content"] += item.text
        else:
            is_free = item.kind == "custom_tool_call"
            arguments = orjson.dumps({"input": item.text}).decode() if is_free else item.text
            function = {"name": item.name, "arguments": arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            turn.setdefault("tool_calls", []).append(call)
    return [turn] if items else []


def _free_text(arguments: str) -> str:
    """The text in the arguments of a tool that takes free text; what there is of it."""
    try:
        return str(orjson.loads(arguments)["input"])
    except (ValueError, KeyError, TypeError):
        return arguments


def _sealed(text: str) -> str:
    return base64.b64encode(f"{_SEAL}{text}".encode()).decode()


def unsealed(text: str) -> str:
    """The thought in an ``encrypted_content`` of ours; empty for any other."""
    try:
        opened = base64.b64decode(text, validate=True).decode()
    except ValueError:
        return ""
    return opened.removeprefix(_SEAL) if opened.startswith(_SEAL) else ""
