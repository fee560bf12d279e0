"""Answers of /v1/responses that are kept, so that a later request can go on from one."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

MOST_RESPONSES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredResponse:
    """One answer, and the conversation up to its end."""

    body: Mapping[str, Any]  # as the client got it
    items: Sequence[Mapping[str, Any]]  # of the input of this request
    messages: Sequence[Mapping[str, Any]]  # of the whole conversation, as chat completions have it
    owner: str


class ResponseStore:
    """In memory, bounded by number, bytes and age; the least recently used goes first.

    As JSON: what it is in Python takes up to thirty times the bytes that are counted.
    """

    def __init__(
        self,
        most_bytes: int,
        most_age_s: float,
        most: int = MOST_RESPONSES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.keeps_any = most_bytes > 0
        self._most_bytes = most_bytes
        self._most = most
        self._most_age_s = most_age_s
        self._clock = clock
        self._lock = threading.Lock()
        # by id: when it was used last, the owner, and the rest as JSON
        self._entries: OrderedDict[str, tuple[float, str, bytes]] = OrderedDict()
        self._bytes = 0

    def put(self, response_id: str, response: StoredResponse) -> None:
        """Keep an answer; one that is larger than the whole store is not."""
        content = [response.body, response.items, response.messages]
        text = orjson.dumps(content, default=str)
        if len(text) > self._most_bytes:
            return
        with self._lock:
            self._remove(response_id)
            self._entries[response_id] = (self._clock(), response.owner, text)
            self._bytes += len(text)
            self._forget()

    def get(self, response_id: str, owner: str) -> StoredResponse | None:
        """The answer, where ``owner`` asked for it and it is still there."""
        with self._lock:
            self._forget()
            entry = self._entries.get(response_id)
            if entry is None or entry[1] != owner:
                return None
            self._entries[response_id] = (self._clock(), *entry[1:])
            self._entries.move_to_end(response_id)
        body, items, messages = orjson.loads(entry[2])
        return StoredResponse(body=body, items=items, messages=messages, owner=owner)

    def delete(self, response_id: str, owner: str) -> bool:
        """Forget an answer of ``owner``; False where there is none."""
        with self._lock:
            entry = self._entries.get(response_id)
            if entry is None or entry[1] != owner:
                return False
            self._remove(response_id)
            return True

    def usage(self) -> tuple[int, int]:
        """The answers that are kept, and their bytes."""
        with self._lock:
            self._forget()
            return len(self._entries), self._bytes

    def __len__(self) -> int:
        return len(self._entries)

    def _remove(self, response_id: str) -> None:
        entry = self._entries.pop(response_id, None)
        self._bytes -= 0 if entry is None else len(entry[2])

    def _forget(self) -> None:
        oldest = self._clock() - self._most_age_s
        while self._entries:
            name, (used_at, _, _) = next(iter(self._entries.items()))
            if used_at >= oldest and self._bytes <= self._most_bytes and len(self) <= self._most:
                return
            self._remove(name)
