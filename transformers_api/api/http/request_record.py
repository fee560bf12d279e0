"""The record of a request, which fills on the way: ``request_log.py`` writes it down at the end.

Views, ``request_context.py`` and ``errors.py`` note in it what they come to know.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from transformers_api.errors import ApiError, ClientGone
from transformers_api.serving.generation import Generation
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

MAX_PATH = 200  # characters
MAX_TEXT = 10_000  # characters of a prompt or an answer, with LOG_PROMPTS


@dataclass(slots=True)
class AnswerParts:
    """The parts of an answer, counted; ``choice`` and ``format`` are of its calls."""

    choice: str = "auto"  # or "required"
    format: str = "derived"  # from the template, or "own"
    calls: int = 0
    reasoning_tokens: int = 0


@dataclass(kw_only=True)
class RequestRecord:
    """The facts of one request. On the request's thread, but for ``client_gone``."""

    method: str = ""
    path: str = ""
    route: str = "none"  # the rule of the URL, such as /v1/models/<path:model_id>
    began: float = field(default_factory=time.monotonic)
    status: int = 0
    seconds: float = 0.0  # from the arrival to the last byte
    model: str | None = None  # as the registry calls it, not as the client did
    model_wait_s: float | None = None  # until the model was there; None: none was asked for
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    first_token_s: float | None = None
    finish_reason: str | None = None  # several are joined by commas
    error: ApiError | None = None  # also one that came in the middle of a stream
    client_gone: bool = False
    is_streamed: bool = False
    is_traced: bool = False
    parts: AnswerParts = field(default_factory=AnswerParts)
    client: str | None = None  # the name of its key, or its network
    texts: dict[str, str] = field(default_factory=dict)  # with LOG_PROMPTS

    def note_error(self, error: ApiError) -> None:
        """Note how it ended, where that was not the end of its answer."""
        self.error = error
        self.client_gone = isinstance(error, ClientGone)

    def note_generation(self, model: LoadedModel, generation: Generation, texts: bool) -> None:
        """Note tokens, times and reasons at the end of an answer; with ``texts`` the texts too."""
        usage = generation.usage
        self.prompt_tokens = (self.prompt_tokens or 0) + usage.prompt_tokens
        self.completion_tokens = (self.completion_tokens or 0) + usage.completion_tokens
        if generation.first_token_at is not None and self.first_token_s is None:
            self.first_token_s = generation.first_token_at - self.began
        self.finish_reason = ",".join(sorted(set(generation.finish_reasons))) or None
        self.is_traced = self.is_traced or generation.request.trace is not None
        if texts and model.relay is None:
            prompts = [chat_template.decode_ids(model, ids) for ids in generation.request.prompts]
            answers = [
                chat_template.decode_ids(model, choice.token_ids) for choice in generation.choices
            ]
            self.texts = {
                "prompt": "\n".join(prompts)[:MAX_TEXT],
                "completion": "\n".join(answers)[:MAX_TEXT],
            }

    def fields(self) -> dict[str, Any]:
        """The fields of the line of log, without those that have no value."""
        values = {
            "method": self.method,
            "route": self.route,
            "path": self.path[:MAX_PATH] if self.path != self.route else None,
            "status": self.status,
            "duration_ms": round(1000 * self.seconds),
            "client": self.client,
            "model": self.model,
            "model_wait_ms": _ms(self.model_wait_s),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_ms": _ms(self.first_token_s),
            "finish_reason": self.finish_reason,
            "tool_calls": self.parts.calls or None,
            "reasoning_tokens": self.parts.reasoning_tokens or None,
            "error": self.error and code_of(self.error),
            "stream": self.is_streamed or None,
            "client_gone": self.client_gone or None,
            **self.texts,
        }
        return {name: value for name, value in values.items() if value is not None}


def code_of(error: ApiError) -> str:
    """The code of an error; a wrong request has none of its own."""
    return error.code or "invalid_request"


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(1000 * seconds)
