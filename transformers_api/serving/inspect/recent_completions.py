"""The tokens of recent completions, so that they can be looked into afterwards."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from transformers_api.errors import InvalidRequest, UnknownCompletion
from transformers_api.serving.generation import Generation
from transformers_api.serving.models.spec import LoadedModel

T = TypeVar("T")
MOST = 64
KEPT_S = 600.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice: what the model read and what it wrote, the token that ended it included."""

    model: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class Completions:
    """Remembers the last ``most`` of them for ``kept_s`` seconds. From any thread."""

    def __init__(
        self,
        most: int = MOST,
        kept_s: float = KEPT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._kept_s = kept_s
        self._clock = clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, tuple[float, list[Completion]]] = OrderedDict()

    def remember(
        self,
        completion_id: str,
        model: LoadedModel,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[int]],
    ) -> None:
        """Keep the ids of all choices: those of the first prompt, then those of the second one."""
        per_prompt = max(len(choices) // len(prompts), 1)
        kept = [
            Completion(model.spec.name, tuple(prompts[place // per_prompt]), tuple(ids))
            for place, ids in enumerate(choices)
        ]
        with self._lock:
            self._forget()
            self._known[completion_id] = (self._clock(), kept)
            while len(self._known) > self._most:
                self._known.popitem(last=False)

    def after(
        self, events: Iterable[T], completion_id: str, model: LoadedModel, generation: Generation
    ) -> Iterator[T]:
        """``events`` as they come; when they have come to their end, what was generated is kept."""
        yield from events
        written = [choice.token_ids for choice in generation.choices]
        self.remember(completion_id, model, generation.request.prompts, written)

    def find(self, completion_id: str, choice: int = 0) -> Completion:
        """Raises UnknownCompletion; InvalidRequest where it has not so many choices."""
        with self._lock:
            self._forget()
            _, choices = self._known.get(completion_id, (0.0, []))
        if not choices:
            raise UnknownCompletion(
                f"Completion '{completion_id}' is not known; the last {self._most} are, for "
                f"{self._kept_s / 60:g} minutes",
                param="completion_id",
            )
        if not 0 <= choice < len(choices):
            raise InvalidRequest(f"choice must be in [0, {len(choices) - 1}]", param="choice")
        return choices[choice]

    def _forget(self) -> None:
        """Drop what is too old; the oldest stands first."""
        limit = self._clock() - self._kept_s
        while self._known and next(iter(self._known.values()))[0] < limit:
            self._known.popitem(last=False)
