"""Ollama's chat and generate: a conversation of a body, and the lines of an answer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from transformers_api.api.http.dialects import OLLAMA
from transformers_api.api.http.request_context import Formatter
from transformers_api.api.openai.answer_parts import AnswerReader, Call
from transformers_api.api.openai.conversation import CallIds, Conversation, Thinking
from transformers_api.api.openai.structured import constraint_of
from transformers_api.api.openai.tool_input import chosen, tools_of
from transformers_api.errors import InvalidRequest, UnsupportedParameter
from transformers_api.serving.constraints.spec import ConstraintSpec
from transformers_api.serving.generation import Generation
from transformers_api.serving.text.choice_text import TextDelta
from transformers_api.serving.tools.answer_plan import AnswerPlan
from transformers_api.serving.tools.spec import CallArguments, CallStart, Content, Reasoning

Json = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_NAMES = {"repeat_penalty": "repetition_penalty"}  # ours, where it is another one
_EFFORTS = ("low", "medium", "high")


def conversation_of(body: Mapping[str, Any], messages: Sequence[Any]) -> Conversation:
    """The conversation of a body. Raises InvalidRequest."""
    think = body.get("think")
    if think not in (None, True, False, *_EFFORTS):
        raise InvalidRequest("'think' must be true, false, low, medium or high", param="think")
    tools = tools_of(body.get("tools") or (), "tools")
    return Conversation(
        messages=_messages(messages),
        use=chosen(tools, "auto", "tools", parallel=True),
        form=form_of(body),
        thinking=Thinking(enabled=think if isinstance(think, bool) else None),
        variables={"reasoning_effort": think} if think in _EFFORTS else {},
    )


def _messages(items: Sequence[Any]) -> list[Json]:
    turns: list[Json] = []
    names: dict[str, str] = {}  # of calls without an answer yet, by function
    ids = CallIds()  # that clients have given; most give none
    for place, item in enumerate(items):
        where = f"messages[{place}]"
        if not isinstance(item, Mapping) or item.get("role") not in ROLES:
            listed = ", ".join(ROLES)
            raise InvalidRequest(f"'{where}.role' must be one of {listed}", param=f"{where}.role")
        content = item.get("content") or ""
        if not isinstance(content, str):
            raise InvalidRequest(f"'{where}.content' must be a string", param=f"{where}.content")
        if item.get("images"):
            name = f"{where}.images"
            raise UnsupportedParameter(f"Images are not supported ('{name}')", param=name)
        turn: Json = {"role": item["role"], "content": content}
        if isinstance(item.get("thinking"), str):
            turn["reasoning_content"] = item["thinking"]
        made = item.get("tool_calls") or []
        if not isinstance(made, list):
            name = f"{where}.tool_calls"
            raise InvalidRequest(f"'{name}' must be a list of calls", param=name)
        calls = [_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(made)]
        if calls:
            turn["tool_calls"] = calls
            names |= {call["function"]["name"]: call["id"] for call in calls}
            ids.add(
                {"tool_calls": [call if isinstance(call.get("id"), str) else {} for call in made]}
            )
        if turn["role"] == "tool":
            name = _text(item, "tool_name", where) or _text(item, "name", where)
            own_id = _text(item, "tool_call_id", where)
            if own_id:
                ids.check(own_id, f"{where}.tool_call_id")
            turn["tool_call_id"] = own_id or names.get(name, f"call_{place}")
        turns.append(turn)
    return turns


def _text(item: Mapping[str, Any], field: str, where: str) -> str:
    """The text of a field, empty where there is none. Raises InvalidRequest."""
    text = item.get(field)
    if not isinstance(text, str | None):
        raise InvalidRequest(f"'{where}.{field}' must be a string", param=f"{where}.{field}")
    return text or ""


def _call(call: Any, where: str) -> Json:
    function = call.get("function") if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not isinstance(function, Mapping):
        raise InvalidRequest(f"'{where}.function.name' must be a string", param=where)
    arguments = function.get("arguments") or {}
    written = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
    own_id = call.get("id")
    return {
        "id": own_id if isinstance(own_id, str) else f"call_{name}",
        "type": "function",
        "function": {"name": name, "arguments": written},
    }


def form_of(body: Mapping[str, Any]) -> ConstraintSpec | None:
    """The form of the answer: ``json``, or a schema. Raises InvalidRequest."""
    form = body.get("format")
    if form in (None, ""):
        return None
    if form == "json":
        return constraint_of({"response_format": {"type": "json_object"}})
    try:
        return constraint_of({"json_schema": form})
    except InvalidRequest as error:
        message = error.message.replace("'json_schema'", "'format'")
        raise InvalidRequest(message, param="format") from None


def sampling_of(body: Mapping[str, Any]) -> tuple[Json, int | None]:
    """Fields by the names of chat completions, and the ceiling of tokens."""
    options = dict(body.get("options") or {})
    options.pop("mirostat", None)
    most = options.pop("num_predict", None)
    fields: Json = {_NAMES.get(str(name), str(name)): item for name, item in options.items()}
    return fields, (1 << 24) if most is not None and most < 0 else most


class OllamaFormatter(Formatter):
    """Lines of JSON, of a chat or of a prompt."""

    dialect = OLLAMA

    def __init__(
        self, model: str, prompt: Sequence[int], plan: AnswerPlan, *, is_chat: bool, load_s: float
    ) -> None:
        self.prompts = [prompt]
        self._model = model
        self._is_chat = is_chat
        self._load_s = load_s
        self._reader = AnswerReader(plan)
        self.parts = self._reader.counts
        self._call: Call | None = None
        self._reason = "stop"
        self._began = time.monotonic()

    def whole(self, generation: Generation) -> Json:
        """The whole answer."""
        (answer,) = self._reader.whole(generation)
        message: Json = {"content": answer.content}
        if answer.reasoning:
            message["thinking"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_as_json(call) for call in answer.calls]
        self._reason = answer.choice.finish_reason
        return {**self._line(message), **self._end(generation)}

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """A line for each part; a call is one line, when it is whole."""
        lines: list[Json] = []
        for part in self._reader.parts(delta):
            match part:
                case Reasoning(text):
                    lines.append({"content": "", "thinking": text})
                case Content(text):
                    lines.append({"content": text})
                case CallStart(_, name):
                    lines += self._whole_call()
                    self._call = Call("", name)
                case CallArguments(_, text):
                    assert self._call is not None
                    self._call.arguments += text
        if delta.finish_reason is not None:
            lines += self._whole_call()
            self._reason = delta.finish_reason
        return [self.dialect.frame(self._line(line)) for line in lines]

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The last line, with counts and times."""
        assert generation is not None
        yield self.dialect.frame({**self._line({"content": ""}), **self._end(generation)})

    def _whole_call(self) -> list[Json]:
        call, self._call = self._call, None
        return [] if call is None else [{"content": "", "tool_calls": [_as_json(call)]}]

    def _line(self, message: Json) -> Json:
        return line(self._model, message, is_chat=self._is_chat)

    def _end(self, generation: Generation) -> Json:
        used, now = generation.usage, time.monotonic()
        first = generation.first_token_at or now
        return {
            "done": True,
            "done_reason": self._reason,
            "total_duration": _nanoseconds(now - self._began + self._load_s),
            "load_duration": _nanoseconds(self._load_s),
            "prompt_eval_count": used.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(first - self._began),
            "eval_count": used.completion_tokens,
            "eval_duration": _nanoseconds(now - first),
        }


def line(model: str, message: Json, *, is_chat: bool, **fields: Any) -> Json:
    """One line of an answer."""
    begin = {"model": model, "created_at": timestamp(time.time())}
    if is_chat:
        return {**begin, "message": {"role": "assistant", **message}, "done": False, **fields}
    thought = {"thinking": message["thinking"]} if "thinking" in message else {}
    return {**begin, "response": message["content"], **thought, "done": False, **fields}


def timestamp(seconds: float) -> str:
    """Seconds since 1970 in the words of RFC 3339."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _as_json(call: Call) -> Json:
    try:
        arguments = orjson.loads(call.arguments)
    except ValueError:  # it was cut off
        arguments = {}
    return {"function": {"name": call.name, "arguments": arguments}}


def _nanoseconds(seconds: float) -> int:
    return max(int(seconds * 1e9), 0)
