"""Readiness to serve requests, and the way out at shutdown."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from transformers_api.engine.load_deadline import LoadDeadline
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ApiError, ServerShuttingDown
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.swap.residency import SwapperListener
from transformers_api.serving.swap.swapper import Swapper

LAST_WORDS_S = 2.0  # between the end of running answers at shutdown and the end of the process


class Readiness(SwapperListener):
    """Listens to the swapper: ready once the model of the start is there, until the end begins."""

    def __init__(
        self,
        awaited: str | None,
        thread: EngineThread | None,
        step_timeout_s: float | None = None,
        loads: Sequence[LoadDeadline] = (),
    ) -> None:
        self._awaited = awaited  # the model that is loaded at start
        self._reason = f"Loading {awaited}" if awaited else ""
        self._thread = thread
        self._step_timeout_s = step_timeout_s
        self._loads = loads

    def __call__(self) -> tuple[bool, str]:
        """(ready, why not)."""
        reason = self.fault() or self._reason
        return not reason, reason or "ready"

    def fault(self) -> str | None:
        """Why only a restart of the process helps; None while it does what it should."""
        thread, most = self._thread, self._step_timeout_s
        if thread is not None and not thread.is_alive:
            return "The engine has stopped; restart the process"
        if thread is not None and most is not None and thread.step_s > most:
            return f"A step of the engine takes longer than {most:g} s; restart the process"
        if most is not None and any(load.overrun_s > most for load in self._loads):
            return f"A load cannot be given up, {most:g} s after its end; restart the process"
        return None

    def on_load(self, model_id: str, seconds: float) -> None:
        """Any model will do: requests are served."""
        if self._awaited:
            self._awaited, self._reason = None, ""

    def on_load_failed(self, model_id: str, error: ApiError) -> None:
        """Stay unready with the reason when it is the model of the start."""
        if model_id == self._awaited:
            self._reason = error.message

    def drain(self, swappers: Sequence[Swapper], admission: Admission, grace_s: float) -> None:
        """Refuse new work at once; end what has not finished shortly before the grace is over."""
        self._awaited, self._reason = None, "The server is shutting down"
        error = ServerShuttingDown(self._reason, retry_after=5)
        for swapper in swappers:
            swapper.refuse(error)

        def end() -> None:
            admission.end_all(error)  # also those whose engine does not come to hear of it
            for swapper in swappers:
                swapper.close(error)

        timer = threading.Timer(max(grace_s - LAST_WORDS_S, 0.0), end)
        timer.daemon = True
        timer.start()
