"""Unloaded models that may come back: a small pool of what a load found out, without weights."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
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


class StandbyModels:
    """The ``most`` models that were unloaded last, by all that a load of theirs depends on."""

    def __init__(self, most: int = 0) -> None:
        self._most = most
        self._models: OrderedDict[Hashable, StandbyModel] = OrderedDict()

    def keep(self, key: Hashable, model: StandbyModel) -> None:
        """Put it to sleep."""
        model.sleep()
        self._models[key] = model
        self._models.move_to_end(key)
        while len(self._models) > self._most:
            self._models.popitem(last=False)

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
