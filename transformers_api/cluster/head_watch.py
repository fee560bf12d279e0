"""The head of the cluster, as a front sees it from outside of Ray, which itself waits for a minute.

Without it replicas that live go on with their answers and take new ones, but Ray tells nobody
which do not live. So what is asked then has a few seconds to be accepted.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Awaitable
from typing import TypeVar

from transformers_api.errors import Unavailable

T = TypeVar("T")
log = logging.getLogger(__name__)
LOOK_S = 0.5  # between two looks
REACH_S = 2.0  # how long one may take
PATIENCE_S = 3.0  # for an answer's first message, from when the head was last there
LOST_S = 5.0  # after which it is not waited for any more
COME_BACK_S = 5  # after which clients are told to come again


class HeadWatch:
    """Tries the head's port again and again. ``address``: host:port."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._last = time.monotonic()
        self._is_away = False

    def reach(self) -> None:
        """Connect once. Raises OSError: sooner than Ray, which hears no signal meanwhile."""
        host, _, port = self._address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), REACH_S).close()

    def begin(self) -> None:
        """Begin, once the cluster was reached."""
        self._last = time.monotonic()
        threading.Thread(target=self._run, name="cluster-head", daemon=True).start()

    @property
    def away_s(self) -> float:
        """Seconds since it was last there; 0 while it is."""
        return time.monotonic() - self._last if self._is_away else 0.0

    @property
    def fault(self) -> str | None:
        """The words for its absence."""
        return f"The head of the cluster at {self._address} is away" if self._is_away else None

    async def accepted(self, first: Awaitable[T]) -> T:
        """The first message of an answer. Raises Unavailable where the head is away meanwhile."""
        task = asyncio.ensure_future(first)
        try:
            while not (await asyncio.wait({task}, timeout=LOOK_S))[0]:
                if self.away_s > PATIENCE_S:
                    raise Unavailable(str(self.fault), retry_after=COME_BACK_S)
            return task.result()
        finally:
            task.cancel()

    def _run(self) -> None:
        while True:
            try:
                self.reach()
                self._last, is_away = time.monotonic(), False
            except OSError:
                is_away = True
            if is_away != self._is_away:
                self._is_away = is_away
                log.warning("%s", self.fault or f"The head at {self._address} is back")
            time.sleep(LOOK_S)
