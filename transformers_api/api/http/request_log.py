"""What is told of every request once its last byte is out: a line of log, and the metrics.

The record of a request fills on the way: views, ``exchange.py`` and ``errors.py`` note in it what
they come to know. Streams are told at their end too, whoever ended them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any

import flask

from transformers_api.api.http.services import services
from transformers_api.errors import ApiError, ClientGone
from transformers_api.serving.generation import Generation
from transformers_api.serving.models.spec import LoadedModel
from transformers_api.serving.text import chat_template

log = logging.getLogger(__name__)
QUIET = ("/health", "/healthz", "/readyz", "/metrics")  # asked every few seconds
MOST_PATH = 200  # characters
MOST_TEXT = 10_000  # characters of a prompt or an answer, with LOG_PROMPTS


@dataclass(kw_only=True)
class RequestRecord:
    """What is known of one request. On the request's thread, but for ``client_gone``."""

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
    client: str | None = None  # the name of its key, or its network
    texts: dict[str, str] = field(default_factory=dict)  # with LOG_PROMPTS

    def note_error(self, error: ApiError) -> None:
        """How it ended, where that was not the end of its answer."""
        self.error = error
        self.client_gone = isinstance(error, ClientGone)

    def note_generation(self, model: LoadedModel, generation: Generation, texts: bool) -> None:
        """At the end of an answer: tokens, times and reasons; with ``texts`` also what was said."""
        usage = generation.usage
        self.prompt_tokens = (self.prompt_tokens or 0) + usage.prompt_tokens
        self.completion_tokens = (self.completion_tokens or 0) + usage.completion_tokens
        if generation.first_token_at is not None and self.first_token_s is None:
            self.first_token_s = generation.first_token_at - self.began
        self.finish_reason = ",".join(sorted(set(generation.finish_reasons))) or None
        self.is_traced = self.is_traced or generation.request.trace is not None
        if texts:
            asked = [chat_template.decode_ids(model, ids) for ids in generation.request.prompts]
            said = [
                chat_template.decode_ids(model, choice.token_ids) for choice in generation.choices
            ]
            self.texts = {
                "prompt": "\n".join(asked)[:MOST_TEXT],
                "completion": "\n".join(said)[:MOST_TEXT],
            }

    def fields(self) -> dict[str, Any]:
        """What the line of log says, but for what is not known."""
        known = {
            "method": self.method,
            "route": self.route,
            "path": self.path[:MOST_PATH] if self.path != self.route else None,
            "status": self.status,
            "duration_ms": round(1000 * self.seconds),
            "client": self.client,
            "model": self.model,
            "model_wait_ms": _ms(self.model_wait_s),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_ms": _ms(self.first_token_s),
            "finish_reason": self.finish_reason,
            "error": self.error and code_of(self.error),
            "stream": self.is_streamed or None,
            "client_gone": self.client_gone or None,
            **self.texts,
        }
        return {name: value for name, value in known.items() if value is not None}


def code_of(error: ApiError) -> str:
    """The code of an error; a wrong request has none of its own."""
    return error.code or "invalid_request"


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else round(1000 * seconds)


def begin() -> None:
    """Open the record of this request."""
    request = flask.request
    rule = request.url_rule
    flask.g.record = RequestRecord(
        method=request.method, path=request.path, route=rule.rule if rule else "none"
    )


def current() -> RequestRecord:
    """The record of the request that this thread is working on."""
    if "record" not in flask.g:  # a malformed request may fail before it is opened
        begin()
    record: RequestRecord = flask.g.record
    return record


def note_error(error: ApiError) -> None:
    """Keep the error that this request is answered with."""
    current().note_error(error)


def watch(response: flask.Response) -> flask.Response:
    """Tell of this request when the response has been sent, or given up."""
    record, known = current(), services()
    record.status = response.status_code
    record.client = flask.g.get("client")

    def end() -> None:
        record.seconds = time.monotonic() - record.began
        _tell(record)
        if known.metrics is not None:
            known.metrics.on_request(record)

    # A file is sent by the server itself, which does not close the response.
    if response.direct_passthrough:
        end()
    else:
        response.call_on_close(end)
    return response


def _tell(record: RequestRecord) -> None:
    level = logging.DEBUG if record.route in QUIET else logging.INFO
    if log.isEnabledFor(level):
        log.log(level, "request", extra={"fields": record.fields()})
