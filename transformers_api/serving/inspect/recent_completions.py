"""The tokens of recent completions, so that they can be looked into afterwards."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers_api.errors import InvalidRequest, UnknownCompletion
from transformers_api.serving.swap.loaded_model import LoadedModel

MAX_COMPLETIONS = 64
MAX_AGE_S = 600.0


@dataclass(frozen=True, slots=True)
class Completion:
    """One choice: what the model read and what it wrote, the token that ended it included."""

    model: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    owner: str = ""  # whoever asked for it
    is_edited: bool = False  # written with edits


class Completions:
    """Remembers the last ``most`` of them for ``max_age_s`` seconds. From any thread."""

    def __init__(
        self,
        most: int = MAX_COMPLETIONS,
        max_age_s: float = MAX_AGE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = self._bound = most  # bound: as clients are told
        self._max_age_s = max_age_s
        self._clock = clock
        self._lock = threading.Lock()
        self._completions: OrderedDict[str, tuple[float, list[Completion]]] = OrderedDict()

    def remember(
        self,
        completion_id: str,
        model: LoadedModel,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[int]],
        owner: str = "",
        edited: int = 0,
    ) -> None:
        """Keep the ids of all choices: those of the first prompt, then those of the second one.

        ``edited``: so many of each prompt's, the first ones, were written with edits.
        """
        per_prompt = max(len(choices) // len(prompts), 1)
        completions = [
            Completion(
                model.spec.name,
                tuple(prompts[place // per_prompt]),
                tuple(ids),
                owner,
                place % per_prompt < edited,
            )
            for place, ids in enumerate(choices)
        ]
        self._put(completion_id, completions)

    def find(
        self,
        completion_id: str,
        choice: int = 0,
        owner: str | None = None,
        param: str = "completion_id",
    ) -> Completion:
        """One of ``owner``; None: of anybody who was told its id.

        Raises UnknownCompletion; InvalidRequest where it has not so many choices.
        """
        choices = self._get(completion_id)
        if not choices or owner not in (None, choices[0].owner):
            raise UnknownCompletion(
                f"Completion '{completion_id}' is not known; the last {self._bound} are, for "
                f"{self._max_age_s / 60:g} minutes",
                param=param,
            )
        if not 0 <= choice < len(choices):
            raise InvalidRequest(f"choice must be in [0, {len(choices) - 1}]", param="choice")
        return choices[choice]

    def _put(self, completion_id: str, choices: list[Completion]) -> None:
        with self._lock:
            self._forget()
            self._completions[completion_id] = (self._clock(), choices)
            while len(self._completions) > self._most:
                self._completions.popitem(last=False)

    def _get(self, completion_id: str) -> list[Completion]:
        """All choices of a completion; none where it is not here."""
        with self._lock:
            self._forget()
            _, choices = self._completions.get(completion_id, (0.0, []))
        return choices

    def _forget(self) -> None:
        """Drop what is too old; the oldest stands first."""
        limit = self._clock() - self._max_age_s
        while self._completions and next(iter(self._completions.values()))[0] < limit:
            self._completions.popitem(last=False)
