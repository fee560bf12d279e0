"""The code of dataclasses' methods, which Python compiles from text at every import, on the disk.

A start makes 500 dataclasses, whose 2,600 methods take a tenth of its time to compile. A method's
text states all that its code depends on but the version of Python, which a file's name has.
Torch-free.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import marshal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import CodeType
from typing import Any

from transformers_api.engine.platform.checked_file import (
    keep_newest,
    read_checked,
    write_checked,
)

PYTHON = f"{importlib.util.MAGIC_NUMBER.hex()}-{sys.flags.optimize}"
SUFFIX = ".methods"


@contextmanager
def stored_methods(folder: Path, name: str) -> Iterator[None]:
    """While it lasts, dataclasses of this thread take their code from a file of ``name``.

    Code that is not in it is compiled, and the file written anew with all that was used. Other
    threads compile theirs, unless they are in a block of their own.
    """
    path = folder / f"{name}-{PYTHON}{SUFFIX}"
    code = _Code(_read(path))
    before, _of_thread.code = _of_thread.code, code
    _execution.begin()
    try:
        yield
    finally:
        _execution.end()
        _of_thread.code = before
        if code.is_new:
            with suppress(OSError):
                write_checked(path, marshal.dumps(code.used))
                keep_newest(folder, f"{name}-*{SUFFIX}", 1)


class _Code:
    """Code by its text. ``used``: what was taken; ``is_new``: some of it is not of ``stored``."""

    def __init__(self, stored: Mapping[str, CodeType]) -> None:
        self._stored = stored
        self.used: dict[str, CodeType] = {}
        self.is_new = False

    def of(self, text: str) -> CodeType:
        """The code of a text."""
        code = self.used.get(text) or self._stored.get(text)
        if code is None:
            code = compile(text, "<string>", "exec", dont_inherit=True)
            self.is_new = True
        self.used[text] = code
        return code


class _OfThread(threading.local):
    code: _Code | None = None


class _Execution:
    """The ``exec`` that dataclasses call, replaced while anybody wants that."""

    def __init__(self) -> None:
        self._lock, self._count = threading.Lock(), 0

    def begin(self) -> None:
        """Replace it, where nobody has."""
        with self._lock:
            if not self._count:
                vars(dataclasses)["exec"] = _execute  # a global name comes before a builtin one
            self._count += 1

    def end(self) -> None:
        """Put the builtin one back, where nobody else wants it replaced."""
        with self._lock:
            self._count -= 1
            if not self._count:
                del vars(dataclasses)["exec"]


_of_thread, _execution = _OfThread(), _Execution()


def _execute(text: str, *names: Any, **options: Any) -> None:
    code = _of_thread.code
    exec(text if code is None else code.of(text), *names, **options)


def _read(path: Path) -> Mapping[str, CodeType]:
    """The code of a file; empty where there is none, or none whole."""
    content = read_checked(path)
    return {} if content is None else marshal.loads(content)
