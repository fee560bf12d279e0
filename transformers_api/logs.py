"""Logging to standard error: one line per event, text or JSON, the request's id in each.

No line can be forged by what a client sends, none holds a secret, and none what a client or a
model wrote, unless LOG_PROMPTS is on.
"""

from __future__ import annotations

import contextvars
import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TextIO, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
SECRETS = re.compile(
    r"hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|(?i:bearer)\s+[^\s\"',;]{4,}"
    r"|(?<=://)[^\s/@]+:[^\s/@]+(?=@)"
)
# Controls, and what turns the direction of text around.
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_TEXT = "%(asctime)s %(levelname)s %(name)s [%(request_id)s] %(message)s"


def hidden(text: str) -> str:
    """``text`` without secrets."""
    return SECRETS.sub("***", text)


def carried(function: Callable[P, T]) -> Callable[P, T]:
    """``function``, whose log lines have this thread's request id on whatever thread it runs."""
    own_id = request_id.get()

    def run(*args: P.args, **options: P.kwargs) -> T:
        before = request_id.set(own_id)
        try:
            return function(*args, **options)
        finally:
            request_id.reset(before)

    return run


class LineFormatter(logging.Formatter):
    """One line per event: control characters escaped, secrets hidden; a trace follows indented.

    ``shows_texts``: also the messages of errors in lines marked ``private``, which may quote what
    a client sent. A line may have ``fields``, a mapping, in its ``extra``.
    """

    def __init__(self, fmt: str = _TEXT, *, shows_texts: bool = False) -> None:
        super().__init__(fmt)
        self.shows_texts = shows_texts

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        record.request_id = id_of(record)
        record.message = record.getMessage()
        if self.usesTime():
            record.asctime = self.formatTime(record, self.datefmt)
        fields = "".join(f" {name}={_word(value)}" for name, value in fields_of(record).items())
        head = _one_line(self.formatMessage(record)) + _one_line(fields)
        trace = [_one_line(line) for line in trace_of(record, self.shows_texts).splitlines()]
        return hidden("\n    ".join([head, *trace]))


class JsonFormatter(logging.Formatter):
    """One JSON object per event: time, level, logger, request_id, message, its fields, trace."""

    def __init__(self, *, shows_texts: bool = False) -> None:
        super().__init__()
        self.shows_texts = shows_texts

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{when}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": id_of(record),
            "message": record.getMessage(),
            **fields_of(record),
        }
        if line["request_id"] == "-":
            del line["request_id"]
        if trace := trace_of(record, self.shows_texts):
            line["trace"] = trace
        clean = {k: hidden(v) if isinstance(v, str) else v for k, v in line.items()}
        return json.dumps(clean, default=str)  # ASCII: nothing else is safe in every terminal


def id_of(record: logging.LogRecord) -> str:
    """The request that a line is about: what it says itself, else that of its thread."""
    return getattr(record, "request_id", None) or request_id.get()


def fields_of(record: logging.LogRecord) -> Mapping[str, Any]:
    """The fields of a line besides its message."""
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return fields


def trace_of(record: logging.LogRecord, shows_texts: bool) -> str:
    """The trace of an error; of a private line without the messages of the errors."""
    error = record.exc_info[1] if record.exc_info else None
    if error is None:
        return ""
    if shows_texts or not getattr(record, "private", False):
        return "".join(traceback.format_exception(error)).rstrip()
    return "\n".join(_frames(error))


def _frames(error: BaseException) -> list[str]:
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = [*_frames(cause), "which led to:"] if cause else []
    lines += [line.rstrip() for line in traceback.format_tb(error.__traceback__)]
    # The system's own words on its own errors quote no request.
    words = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
    return [*lines, f"{type(error).__qualname__}{words} (LOG_PROMPTS=true shows the message)"]


def _one_line(text: str) -> str:
    return _UNSEEN.sub(lambda match: f"\\x{ord(match[0]):02x}", " ".join(text.splitlines()))


def _word(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if re.fullmatch(r"[\w./:,@+-]+", text) else json.dumps(text)


def formatter(how: str, *, shows_texts: bool = False) -> logging.Formatter:
    """The formatter of lines: ``text``, ``json``, or ``auto``, which is text on a terminal."""
    if how == "json" or (how == "auto" and not sys.stderr.isatty()):
        return JsonFormatter(shows_texts=shows_texts)
    return LineFormatter(shows_texts=shows_texts)


def configure_logging(level: str, how: str = "auto", *, shows_texts: bool = False) -> None:
    """Send this package's log to standard error; a second call changes how."""
    logger = logging.getLogger("transformers_api")
    logger.setLevel(level.upper())
    ours = next((handler for handler in logger.handlers if isinstance(handler, _Stderr)), None)
    if ours is None:
        ours = _Stderr(sys.stderr)
        logger.addHandler(ours)
        logger.propagate = False
    ours.setFormatter(formatter(how, shows_texts=shows_texts))


class _Stderr(logging.StreamHandler[TextIO]):
    """The handler that is ours, among those that others may add."""


def adopt(*names: str) -> None:
    """Let libraries that write to standard error by themselves use the root logger's handler."""
    for name in names:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
