"""Whether requests can be served now, and the way out at shutdown."""

from __future__ import annotations

import threading

from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ApiError, ServerShuttingDown
from transformers_api.serving.residency import SwapperListener
from transformers_api.serving.swapper import Swapper

LAST_WORDS_S = 2.0  # between the end of running answers at shutdown and the end of the process


class Readiness(SwapperListener):
    """Listens to the swapper: ready once the model of the start is there, until the end begins."""

    def __init__(self, awaited: str | None, thread: EngineThread | None) -> None:
        self._awaited = awaited  # the model that is loaded at start
        self._reason = f"Loading {awaited}" if awaited else ""
        self._thread = thread

    def __call__(self) -> tuple[bool, str]:
        """(ready, why not)."""
        if self._thread is not None and not self._thread.is_alive:
            return False, "The engine has stopped; restart the process"
        return not self._reason, self._reason or "ready"

    def on_load(self, model_id: str, seconds: float) -> None:
        """Any model will do: requests are served."""
        if self._awaited:
            self._awaited, self._reason = None, ""

    def on_load_failed(self, model_id: str, error: ApiError) -> None:
        """Stay unready with the reason when it is the model of the start."""
        if model_id == self._awaited:
            self._reason = error.message

    def drain(self, swapper: Swapper, grace_s: float) -> None:
        """Refuse new work at once; end what has not finished shortly before the grace is over."""
        self._awaited, self._reason = None, "The server is shutting down"
        swapper.refuse(ServerShuttingDown(self._reason, retry_after=5))
        timer = threading.Timer(max(grace_s - LAST_WORDS_S, 0.0), swapper.close)
        timer.daemon = True
        timer.start()
