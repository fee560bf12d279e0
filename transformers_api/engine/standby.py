"""Unloaded models that may come back: a small pool of what a load found out, without weights."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

log = logging.getLogger(__name__)


class StandbyModel(Protocol):
    """A runner, with its model, whose memory can be given back and filled again."""

    @property
    def runner(self) -> Any:
        """The runner, which has the model."""
        ...

    def sleep(self) -> None:
        """Give the memory of weights and KV cache back."""
        ...

    def wake(self) -> str | None:
        """Read the weights again. The reason why it may not be used, None where it may."""
        ...


class Conversation(Protocol):
    """A text whose keys and values are kept; see conversations.py."""

    @property
    def bytes(self) -> int:
        """Its memory."""
        ...


class StandbyModels:
    """The ``most`` models that were unloaded last, by all that a load of theirs depends on.

    ``conversation_bytes``: of the conversations of all, which stay as long as their models do.
    """

    def __init__(self, most: int = 0, conversation_bytes: int = 0) -> None:
        self._most = most
        self.conversation_bytes = conversation_bytes
        self._models: OrderedDict[Hashable, StandbyModel] = OrderedDict()
        self._conversations: dict[Hashable, Sequence[Any]] = {}

    def keep(
        self, key: Hashable, model: StandbyModel, conversations: Sequence[Conversation] = ()
    ) -> None:
        """Put it to sleep, with conversations that take ``conversation_bytes`` at most."""
        model.sleep()
        self._models[key] = model
        self._models.move_to_end(key)
        while len(self._models) > self._most:
            self._conversations.pop(self._models.popitem(last=False)[0], None)
        if key in self._models:
            self._conversations[key] = conversations
        for other in self._models:  # of the model that went first, first
            if self._bytes() > self.conversation_bytes:
                self._conversations.pop(other, None)

    def _bytes(self) -> int:
        return sum(each.bytes for own in self._conversations.values() for each in own)

    def conversations(self, key: Hashable) -> Sequence[Any]:
        """Give the conversations of a model away, that which was used last first."""
        return self._conversations.pop(key, ())

    def forget_conversations(self) -> None:
        """Give back the memory of all conversations."""
        self._conversations.clear()

    def wake(self, key: Hashable) -> StandbyModel | None:
        """Return that model, awake; None if it is not here, or does not wake up."""
        model = self._models.pop(key, None)
        if model is None:
            return None
        reason = model.wake()
        if reason is None:
            return model
        log.warning("A model is loaded anew, as it was not the same again: %s", reason)
        model.sleep()
        return None
