"""The time that a load may take: looked at between two tensors, and from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers_api.errors import ModelLoadFailed


class LoadDeadline:
    """The end of the load in progress, ``limit_s`` seconds after it began. From any thread."""

    def __init__(self, limit_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit_s = limit_s
        self._clock = clock
        self._ends_at: float | None = None  # None: nothing is loaded

    @contextmanager
    def running(self) -> Iterator[None]:
        """A load takes as long as the block."""
        self._ends_at = self._clock() + self.limit_s
        try:
            yield
        finally:
            self._ends_at = None

    @property
    def overrun_s(self) -> float:
        """Seconds that the load in progress has taken beyond its limit."""
        ends_at = self._ends_at
        return 0.0 if ends_at is None else max(self._clock() - ends_at, 0.0)

    def check(self) -> None:
        """Give the load up where it is over. Raises ModelLoadFailed."""
        if self.overrun_s:
            raise ModelLoadFailed(
                f"The model was not loaded within {self.limit_s:g} s (MODEL_WAIT_S)"
            )

    @contextmanager
    def between_tensors(self) -> Iterator[None]:
        """In the block, and on this thread, ``check`` before each weight and each module."""
        from torch.nn.modules import module

        own = threading.get_ident()

        def look(*_: Any) -> None:
            if threading.get_ident() == own:
                self.check()

        with ExitStack() as hooks:
            for register in (
                module.register_module_parameter_registration_hook,
                module.register_module_module_registration_hook,
            ):
                hooks.callback(register(look).remove)
            yield
