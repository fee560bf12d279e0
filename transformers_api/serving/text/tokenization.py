"""Texts to ids. A large text takes its turn, and what it took is given back.

While a tokenizer works at a text it takes two hundred times its size: eight texts of a megabyte at
once took three gigabytes, of which the C library kept two.
"""

from __future__ import annotations

import threading
from typing import Any

from transformers_api.heap import trim_memory

LARGE_CHARACTERS = 1 << 16
_TURN = threading.Lock()


def token_ids(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    """The ids of ``text``, however many."""
    if len(text) <= LARGE_CHARACTERS:
        return _token_ids(tokenizer, text, add_special_tokens)
    with _TURN:
        ids = _token_ids(tokenizer, text, add_special_tokens)
        trim_memory()
    return ids


def _token_ids(tokenizer: Any, text: str, add_special_tokens: bool) -> list[int]:
    # verbose=False: whether it fits is our question, and asked elsewhere.
    return list(tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False))
