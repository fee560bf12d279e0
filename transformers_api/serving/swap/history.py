"""The last loads, failures and unloads: what changed in memory, and how long it took."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

LENGTH = 32
NAMES = 1024  # ids of the Hub come from requests: their number must not grow without end


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapEvent:
    """One change of what is in memory, or an attempt."""

    model: str
    outcome: Literal["loaded", "failed", "unloaded"]
    at: float  # when it was over; seconds since 1970
    load_s: float | None = None  # seconds that loading took
    evicted: str | None = None  # the model that made way
    error: str | None = None


class SwapHistory:
    """The last ``LENGTH`` events, and what the last load of each model took."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.events: deque[SwapEvent] = deque(maxlen=LENGTH)
        self._load_s: dict[str, float] = {}
        self._clock = clock

    def load_s(self, model: str) -> float | None:
        """Seconds that its last load took; None where it has not been loaded."""
        return self._load_s.get(model)

    def loaded(self, model: str, load_s: float, evicted: str | None) -> None:
        """A model has become resident."""
        self._load_s.pop(model, None)
        self._load_s[model] = load_s
        if len(self._load_s) > NAMES:
            del self._load_s[next(iter(self._load_s))]
        self._note(model=model, outcome="loaded", load_s=load_s, evicted=evicted)

    def failed(self, model: str, error: str, evicted: str | None) -> None:
        """A model could not be prepared or loaded."""
        self._note(model=model, outcome="failed", error=error, evicted=evicted)

    def unloaded(self, model: str) -> None:
        """A model has gone, and none comes in its place."""
        self._note(model=model, outcome="unloaded")

    def _note(self, **fields: object) -> None:
        self.events.append(SwapEvent(at=self._clock(), **fields))  # type: ignore[arg-type]
