"""The real application around a model that says what a test tells it to, in the message itself.

It answers with the last user message, a byte a token, and goes on where a prompt already has the
beginning of that answer. A first word changes how:

* ``slowly …`` writes a token each 10 ms,
* ``pausing …`` waits at each ``|``, until somebody posts to ``/go``,
* ``forever …`` repeats the rest until it is stopped, a token each 10 ms.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, cycle, islice
from typing import Any

from flask import Flask

from tests.fakes import FakeEngine, FakeLoader, fake_model
from tests.tokenizers import IM_END, IM_START
from transformers_api.app import create_app as create_real_app
from transformers_api.config.settings import Settings
from transformers_api.serving.models.spec import ModelSpec

TICK_S = 0.01
LIMIT_S = 30.0


def last_turns(prompt: Sequence[int]) -> tuple[bytes, bytes]:
    """What the user said last, and what of the answer is in the prompt."""
    turns: list[bytes] = []
    for token in chain(prompt, [IM_END]):
        if token == IM_START:
            turns.append(b"")
        elif turns and token < 256:
            turns[-1] += bytes([token])
    bodies = {turn.split(b"\n", 1)[0]: turn.split(b"\n", 1)[1] for turn in turns if b"\n" in turn}
    return bodies.get(b"user", b"").removesuffix(b"\n"), bodies.get(b"assistant", b"")


class Script:
    """The model's side: what comes next, and when."""

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)

    def __call__(self, prompt: Sequence[int], _params: Any, _index: int) -> Iterator[int]:
        said, written = last_turns(prompt)
        how, _, rest = said.partition(b" ")
        if how not in (b"slowly", b"pausing", b"forever"):
            return iter(said[len(written) :])
        text = cycle(rest) if how == b"forever" else iter(rest)
        return self.paced(how, islice(text, len(written), None))

    def paced(self, how: bytes, text: Iterator[int]) -> Iterator[int]:
        tick = threading.Event()
        for byte in text:
            if how == b"pausing" and byte == ord("|"):
                self.go.acquire(timeout=LIMIT_S)
                continue
            if how != b"pausing":
                tick.wait(TICK_S)
            yield byte


def create_app(settings: Settings) -> Flask:
    """An application with two such models, ``scripted`` and ``other``."""
    script = Script()

    def build(spec: ModelSpec) -> Any:
        # The gate makes the engine write on a thread of its own.
        gate = threading.Event()
        gate.set()
        return fake_model(spec, FakeEngine(script, gate=gate, max_model_len=1 << 16))

    app = create_real_app(replace(settings, allow_download=False), FakeLoader(build))

    @app.post("/go")
    def go() -> str:
        """Let the answer that pauses go on."""
        script.go.release()
        return "gone on\n"

    return app
