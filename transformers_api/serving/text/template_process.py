"""Renders chat templates in a process of its own, which ``template_renderer.py`` starts.

A template is a program that came with a model. It may ask for a number of ten million digits or a
text of gigabytes in one operation, which nothing inside an interpreter can end. Here the kernel
does: of processor time and memory there is so much, and no more.

A script, with nothing but jinja2 and the standard library. On standard input come, and on standard
output go, messages of eight bytes of length and a JSON object. The argument: seconds of processor
time for one rendering.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from functools import lru_cache
from types import FrameType
from typing import Any, NoReturn

import jinja2
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 512 << 20  # of the whole process
MOST_CHARACTERS = 16 << 20  # of a rendered text
MOST_MESSAGE = 500  # characters of an error


class GenerationBlocks(Extension):
    """``{% generation %}`` marks what the model wrote, for training; here it only is a block."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> Node:
        """The statements between."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body).set_lineno(line)


class PlainNamespace(Namespace):
    """Of attributes without underscores in front, which reach into the interpreter."""

    def __init__(*args: Any, **attributes: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **attributes)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"A namespace may not have the attribute {name!r}")


class PlainDict:
    """``dict`` without what its class would lead to."""

    def __call__(self, *args: Any, **items: Any) -> dict[Any, Any]:
        """A dictionary."""
        return dict(*args, **items)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """See dict."""
        return dict.fromkeys(*args)


class Raised(jinja2.TemplateError):
    """A refusal of the template itself."""


def _raise(message: Any) -> NoReturn:
    raise Raised(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escapes for HTML; the mark in control tokens is never escaped."""
    text = json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    return text.replace("\\ufdd0", "\ufdd0") if ensure_ascii else text


def environment() -> ImmutableSandboxedEnvironment:
    """The environment that transformers gives to templates."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols]
    )
    made.filters["tojson"] = _tojson
    made.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": PlainDict(),
        "namespace": PlainNamespace,
    }
    return made


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    return environment().from_string(source)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """``text``, or the ``message`` of an error and its ``kind``.

    "broken": the template is no template. "raised": it refuses what it is to show. "failed": it
    trips over it. "limit": it wants too much.
    """
    try:
        template = _compiled(request["source"])
    except (MemoryError, RecursionError):
        return {"kind": "limit", "message": "it needs too much memory"}
    except Exception as error:
        return _failure("broken", error)
    try:
        text = template.render(**request["variables"])
    except Raised as error:
        _forget_frames(error)
        return {"kind": "raised", "message": str(error)[:MOST_MESSAGE]}
    except (MemoryError, RecursionError) as error:
        _forget_frames(error)
        return {"kind": "limit", "message": "it needs too much memory"}
    except Exception as error:
        return _failure("failed", error)
    if len(text) > MOST_CHARACTERS:
        return {"kind": "limit", "message": f"its text has more than {MOST_CHARACTERS} characters"}
    return {"text": text}


def _failure(kind: str, error: Exception) -> dict[str, str]:
    _forget_frames(error)
    text = str(error)[:MOST_MESSAGE] or "no reason"
    name = type(error).__name__
    plain = isinstance(error, jinja2.TemplateError)
    return {"kind": kind, "message": text if plain else f"{name}: {text}"}


def _forget_frames(error: BaseException) -> None:
    """Let go of the frames that ``error`` went through, and of what these know.

    Jinja shows the lines of a template as frames of its own making: they know those that made
    them, which know them, and all know their callers, down to the request's.
    """
    trace, error.__traceback__ = error.__traceback__, None
    while trace is not None:
        frame: FrameType | None = trace.tb_frame
        while frame is not None:
            try:
                frame.clear()
            except RuntimeError:  # it runs: those behind it do, too
                break
            frame = frame.f_back
        trace = trace.tb_next


def _serve(cpu_s: float) -> None:
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while size := requests.read(8):
        request = json.loads(requests.read(int.from_bytes(size, "big")))
        # Its signal ends the process, whatever the interpreter is doing.
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        reply = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        data = json.dumps(reply).encode()
        answers.write(len(data).to_bytes(8, "big") + data)
        answers.flush()


def _limit() -> None:
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    except ValueError:  # macOS maps more than that into every process, and refuses
        if sys.platform != "darwin":
            raise
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the server ends it


if __name__ == "__main__":
    _limit()
    _serve(float(sys.argv[1]))
