"""The texts that usual numbers are measured over: ours, or those that a key has put in their place.

Means of parts, lengths of streams, what lenses read and what autoencoders explain rest on them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy

from transformers_api.errors import InvalidRequest
from transformers_api.inspection.base import Array
from transformers_api.inspection.editable import Part
from transformers_api.inspection.questions import PartNumbers, Question
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

TEXT = (
    "The library opens at nine and closes at six. Last year Anna wrote 3 letters to her brother in "
    "Lisbon; he answered none of them. Water boils at 100 degrees. def add(a, b): return a + b. "
    "Wer viel fragt, bekommt viele Antworten. La lune se lève au-dessus de la mer."
)
OWN_TOKENS = 96  # of our text that are read
MOST_TOKENS = 4096  # of other texts
MOST_TEXTS, MOST_BYTES = 256, 64 << 10
MOST_OWNERS = 256


@dataclass(frozen=True, slots=True)
class Calibration:
    """Texts, each read on its own."""

    texts: tuple[str, ...] = (TEXT,)

    @property
    def is_own(self) -> bool:
        """True for our text."""
        return self.texts == (TEXT,)

    def ids(self, model: LoadedModel) -> list[list[int]]:
        """The tokens of each text that has some, as many as are read in all."""
        left = OWN_TOKENS if self.is_own else MOST_TOKENS
        texts: list[list[int]] = []
        for text in self.texts:
            ids = chat_template.encode_text(model, text)[: min(left, model.engine.max_model_len)]
            ids = [token for token in ids if token < model.engine.vocab_size]
            left -= len(ids)
            if ids:
                texts.append(ids)
        return texts

    def numbers(
        self,
        model: LoadedModel,
        places: Sequence[tuple[int, Part]],
        ask: Callable[[Question[list[Array]]], list[Array]],
    ) -> list[Array]:
        """The numbers (n, width) of parts, of all texts one behind the other.

        Raises InvalidRequest where the texts have no tokens.
        """
        read = [ask(PartNumbers(ids, places)) for ids in self.ids(model)]
        if not read:
            raise InvalidRequest("the calibration texts have no tokens of this model")
        return [numpy.concatenate(each) for each in zip(*read, strict=True)]


class CalibrationStore:
    """The texts of each key, in memory; the least recently used goes first. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._texts: OrderedDict[str, Calibration] = OrderedDict()

    def put(self, owner: str, texts: Sequence[str]) -> None:
        """Take these texts from now on. Raises InvalidRequest for too much text."""
        size = sum(len(text.encode()) for text in texts)
        if size > MOST_BYTES:
            raise InvalidRequest(f"texts have {size} bytes (max {MOST_BYTES})", param="texts")
        with self._lock:
            self._texts[owner] = Calibration(tuple(texts))
            self._texts.move_to_end(owner)
            while len(self._texts) > MOST_OWNERS:
                self._texts.popitem(last=False)

    def get(self, owner: str) -> Calibration:
        """The texts of ``owner``: ours, where there are no others."""
        with self._lock:
            if owner not in self._texts:
                return Calibration()
            self._texts.move_to_end(owner)
            return self._texts[owner]

    def delete(self, owner: str) -> bool:
        """Take ours again; False where that is so already."""
        with self._lock:
            return self._texts.pop(owner, None) is not None
