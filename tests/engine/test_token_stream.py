"""A stream and the sequences that write to it know each other only while it is open."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from transformers_api.engine.base import FinishReason, TokenOutput, TokenStream


class Sequences:
    """They know their stream, as the engine's do."""

    def __init__(self) -> None:
        self.aborted: list[int | None] = []
        self.stream = TokenStream(2, self.abort)

    def abort(self, index: int | None) -> None:
        self.aborted.append(index)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_once_all_has_been_read_nothing_keeps_the_sequences() -> None:
    sequences = Sequences()
    stream, reference = sequences.stream, weakref.ref(sequences)
    for index in range(2):
        assert reference() is not None
        stream.put(TokenOutput(index=index, token_id=1, finish_reason=FinishReason.STOP))
        stream.abort(index)
        stream.get()
    del sequences
    assert reference() is None
    stream.abort()


def test_once_all_is_aborted_nothing_keeps_the_sequences() -> None:
    sequences = Sequences()
    stream, reference = sequences.stream, weakref.ref(sequences)
    stream.abort(1)
    stream.abort()
    stream.abort()
    assert sequences.aborted == [1, None]
    del sequences
    assert reference() is None
