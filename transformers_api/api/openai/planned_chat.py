"""Chat completions whose answer has parts: what was thought, what is said, what is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.request_context import Formatter
from transformers_api.api.openai.answer_parts import AnswerReader, WholeAnswer, new_call_id
from transformers_api.api.openai.format import Head
from transformers_api.api.openai.logprobs import chat_logprobs
from transformers_api.serving.generation import Choice, Generation
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


class PlannedChatFormatter(Formatter):
    """See the module. ``is_legacy``: the request had ``functions``."""

    dialect = OPENAI

    def __init__(
        self, head: Head, plan: AnswerPlan, *, is_legacy: bool = False, with_reasoning: bool = True
    ) -> None:
        self.completion_id = head.id
        self.prompts = head.prompts
        self._head = head
        self._reader = AnswerReader(plan)
        self.parts = self._reader.counts
        self._is_legacy = is_legacy
        self._with_reasoning = with_reasoning

    def whole(self, generation: Generation) -> Json:
        """The whole answer."""
        head, answers = self._head, self._reader.whole(generation)
        choices = [
            {
                "index": answer.choice.index,
                "message": self._message(answer),
                "logprobs": self._logprobs(answer.choice),
                "finish_reason": self._reason(answer.finish_reason),
                "stop_reason": answer.choice.stop_reason,
                **head.token_ids(answer.choice.index, answer.choice.token_ids, first=True),
                **head.traced(answer.choice),
                **head.intervened(answer.choice.index),
                **head.compared(generation, answer.choice.index),
            }
            for answer in answers
        ]
        envelope = head.envelope("chat.completion", choices) | head.scored_prompt(answers[0].choice)
        return {**envelope, "usage": self._usage(generation)}

    def opening(self) -> Iterator[bytes]:
        """The role of each choice."""
        for index in range(self._head.n):
            yield self.dialect.frame(self._head.opening(index, self._chunk))

    def frames(self, delta: TextDelta) -> Sequence[bytes]:
        """A chunk for each part, and in the end one with the finish reason."""
        head, index = self._head, delta.index
        parser = self._reader.parser(index)
        deltas = list(filter(None, map(self._delta, self._reader.parts(delta))))
        extras: Json = head.token_ids(index, delta.token_ids, first=False)
        if delta.logprobs:
            extras["logprobs"] = self._logprobs(delta)
        trace = None
        if head.traces is not None and delta.trace is not None:
            trace = head.traces.step(delta.trace, index, **head.twin_field(index))
        if not deltas and (extras.get("token_ids") or extras.get("logprobs") or trace):
            deltas = [{}]
        chunks = [self._chunk(index, part) for part in deltas]
        if chunks:  # scores, ids and the trace come once
            chunks[0]["choices"][0] |= extras
            if trace is not None:
                chunks[0]["trace"] = trace
        if delta.finish_reason is not None:
            reason = delta.finish_reason
            if parser.calls and reason != "length":
                reason = "tool_calls"
            ends = {"finish_reason": self._reason(reason), "stop_reason": delta.stop_reason}
            chunks.append(self._chunk(index, {}, **ends))
        return [self.dialect.frame(chunk) for chunk in chunks]

    def closing(self, generation: Generation | None) -> Iterator[bytes]:
        """The comparisons and the usage, where they were asked for."""
        comparisons = self._head.comparisons("chat.completion.chunk", generation)
        yield from map(self.dialect.frame, comparisons)
        if self._head.with_usage and generation is not None:
            envelope = self._head.envelope("chat.completion.chunk", [])
            yield self.dialect.frame({**envelope, "usage": self._usage(generation)})

    def _message(self, answer: WholeAnswer) -> Json:
        message: Json = {
            "role": "assistant",
            "content": answer.content if answer.content or not answer.calls else None,
            "refusal": None,
        }
        if answer.reasoning and self._with_reasoning:
            message |= {"reasoning_content": answer.reasoning, "reasoning": answer.reasoning}
        if answer.calls and self._is_legacy:
            (call, *_) = answer.calls
            message["function_call"] = {"name": call.name, "arguments": call.arguments}
        elif answer.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in answer.calls
            ]
        return message

    def _delta(self, part: Part) -> Json | None:
        match part:
            case Reasoning(text):
                both = {"reasoning_content": text, "reasoning": text}
                return both if self._with_reasoning else None
            case Content(text):
                return {"content": text}
            case CallStart(index, name):
                function = {"name": name, "arguments": ""}
                if self._is_legacy:
                    return {"function_call": function}
                start = {"index": index, "id": new_call_id(), "type": "function"}
                return {"tool_calls": [{**start, "function": function}]}
            case CallArguments(index, text):
                if self._is_legacy:
                    return {"function_call": {"arguments": text}}
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}

    def _reason(self, reason: str) -> str:
        return "function_call" if self._is_legacy and reason == "tool_calls" else reason

    def _usage(self, generation: Generation) -> Json:
        usage = self._head.usage(generation.usage, generation)
        usage["completion_tokens_details"] = {"reasoning_tokens": self._reader.reasoning_tokens}
        return usage

    def _logprobs(self, piece: Choice | TextDelta) -> Json | None:
        if self._head.logprobs is None:
            return None
        return chat_logprobs(piece.logprobs, as_ids=self._head.as_token_ids)

    def _chunk(self, index: int, delta: Json, **fields: Any) -> Json:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **fields}
        chunk = self._head.envelope("chat.completion.chunk", [choice])
        return {**chunk, **self._head.usage_so_far(self.generation)}
