"""Renders chat templates in a helper process, which is ended where a template takes too much."""

from __future__ import annotations

import atexit
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import orjson

from transformers_api.config.environment import helper_environment
from transformers_api.errors import EngineFailed, InvalidRequest
from transformers_api.serving.text import template_process
from transformers_api.serving.text.bounded_template import is_bounded

CPU_S = 1.0  # of processor time for one rendering; an ordinary template takes a thousandth
WAIT_S = 30.0  # for a reply; what ends a template is the helper's processor time
MOST_HERE = 64 << 10  # bytes of a conversation that is rendered in this process
_SCRIPT = Path(__file__).with_name("template_process.py")

Kind = Literal["broken", "raised", "failed", "limit"]


class TemplateFailed(Exception):
    """A template gave no text; ``kind`` as in template_process.py."""

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind: Kind = kind


class TemplateRenderer:
    """The helper process, which starts with the first template. From any thread."""

    def __init__(self, cpu_s: float = CPU_S) -> None:
        self._cpu_s = cpu_s
        self._lock = threading.Lock()
        self._pid: int | None = None  # of the process that started it: a fork has no helper
        self._helper: subprocess.Popen[bytes] | None = None

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        """The text. Raises TemplateFailed, and InvalidRequest for text that is not Unicode."""
        try:
            request = orjson.dumps({"source": source, "variables": variables})
        except TypeError as error:
            raise InvalidRequest(
                "messages holds half of a surrogate pair, which is not text", param="messages"
            ) from error
        if len(request) <= MOST_HERE and is_bounded(source):
            reply = template_process.answer(orjson.loads(request))
        else:
            with self._lock:
                reply = self._ask(request)
                if reply.get("kind") == "limit":
                    self._end()  # with the memory that it took
        if "text" not in reply:
            raise TemplateFailed(reply["kind"], reply["message"])
        return str(reply["text"])

    def close(self) -> None:
        """End the helper; another template starts another one."""
        with self._lock:
            if self._pid == os.getpid():  # a parent's helper is the parent's
                self._end()

    def _ask(self, request: bytes) -> Any:
        for is_last in (False, True):  # one that was ended from outside is started again
            helper = self._started()
            assert helper.stdin is not None
            try:
                helper.stdin.write(len(request).to_bytes(8, "big") + request)
                return orjson.loads(self._read(int.from_bytes(self._read(8), "big")))
            except TimeoutError:
                self._end()
                return {"kind": "limit", "message": f"it takes more than {WAIT_S:g} s"}
            except (OSError, EOFError) as error:
                status = self._end()
                if status == -signal.SIGPROF:
                    return {"kind": "limit", "message": "it takes too long"}
                if is_last:
                    raise EngineFailed("The process that renders chat templates ended") from error
        raise AssertionError

    def _read(self, size: int) -> bytes:
        assert self._helper is not None
        assert self._helper.stdout is not None
        stdout, pieces, ends_at = self._helper.stdout, [], time.monotonic() + WAIT_S
        poll = select.poll()
        poll.register(stdout, select.POLLIN)
        while size:
            if not poll.poll(max(ends_at - time.monotonic(), 0) * 1000):
                raise TimeoutError
            piece = os.read(stdout.fileno(), size)
            if not piece:
                raise EOFError
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._helper is None or self._pid != os.getpid():
            self._helper = subprocess.Popen(
                [sys.executable, "-I", str(_SCRIPT), str(self._cpu_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=helper_environment(),
            )
            self._pid = os.getpid()
        return self._helper

    def _end(self) -> int | None:
        """End the helper; return how it ended."""
        helper, self._helper = self._helper, None
        if helper is None:
            return None
        if helper.stdin is not None:
            with suppress(OSError):
                helper.stdin.close()  # it ends then, unless it is at work
        with suppress(subprocess.TimeoutExpired):  # its own end says more than ours
            helper.wait(0.2)
        helper.kill()
        status = helper.wait()
        if helper.stdout is not None:
            helper.stdout.close()
        return status


renderer = TemplateRenderer()  # one for the process: templates of one model at a time
atexit.register(renderer.close)
