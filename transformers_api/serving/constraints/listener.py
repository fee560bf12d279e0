"""The listener to constraints, for metrics."""

from __future__ import annotations

from typing import Protocol


class ConstraintListener(Protocol):
    """Hears of times; quick, and it never raises."""

    def on_compile(self, seconds: float) -> None:
        """A grammar has been compiled, or refused. From any thread."""
        return

    def on_wait(self, seconds: float) -> None:
        """The engine thread, which calls, has waited for a mask."""
        return


class SilentConstraintListener(ConstraintListener):
    """Does nothing."""
