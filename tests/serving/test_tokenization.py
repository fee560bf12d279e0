"""Large texts are tokenized one after the other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from transformers_api.serving.text import tokenization
from transformers_api.serving.text.tokenization import LARGE_CHARACTERS, token_ids


class Tokenizer:
    """A character is a token; it notes how many texts it works at."""

    def __init__(self, meeting: threading.Barrier) -> None:
        self._meeting = meeting
        self.met = 0

    def encode(self, text: str, *, add_special_tokens: bool, verbose: bool) -> list[int]:
        try:
            self._meeting.wait(0.2)
            self.met += 1
        except threading.BrokenBarrierError:
            self._meeting.reset()
        return [*([1] if add_special_tokens else []), *map(ord, text)]


@pytest.mark.parametrize(("size", "met"), [(LARGE_CHARACTERS, 2), (LARGE_CHARACTERS + 1, 0)])
def test_large_texts_are_tokenized_one_after_the_other(monkeypatch, size, met) -> None:
    trimmed = []
    monkeypatch.setattr(tokenization, "trim_memory", lambda: trimmed.append(size))
    tokenizer = Tokenizer(threading.Barrier(2))
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(token_ids, tokenizer, "a" * size, add_special_tokens=True) for _ in range(2)
        ]
    assert [len(job.result()) for job in jobs] == [size + 1] * 2
    assert tokenizer.met == met
    assert len(trimmed) == (0 if met else 2)
