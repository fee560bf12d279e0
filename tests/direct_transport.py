"""A cluster without Ray: replicas in this process; all that passes is pickled both ways."""

from __future__ import annotations

import pickle
from collections.abc import AsyncGenerator
from typing import Any

from transformers_api.cluster.replica import Replica
from transformers_api.cluster.transport import checked
from transformers_api.errors import ReplicaFailed
from transformers_api.serving.upstream.loop import BackgroundLoop


def sent(message: Any) -> Any:
    return pickle.loads(pickle.dumps(message))


class DirectTransport:
    """Meets ``cluster.transport.Transport``; ``models`` says which replica has which."""

    def __init__(self, *replicas: Replica) -> None:
        self.start = BackgroundLoop("direct").start
        self.name, self.answers = "front", {}
        self.replicas = list(replicas)
        self.calls: list[tuple[str, str]] = []
        self.dies_after: int | None = None  # so many messages of a stream
        self.models: dict[str, Replica] = {}
        self.in_flight: dict[str, int] = {}
        self.lost = False  # its head is
        self.silent: list[str] = []
        self.hung: set[str] = set()  # replicas that answer no broadcast

    async def call(self, method: str, model: str, *arguments: Any) -> Any:
        self.calls.append((method, model))
        return checked(sent(await getattr(self._chosen(model), method)(*sent(arguments))))

    async def stream(self, method: str, model: str, *arguments: Any) -> AsyncGenerator[Any]:
        self.calls.append((method, model))
        messages = getattr(self._chosen(model), method)(*sent(arguments))
        count = 0
        try:
            async for message in messages:
                count += 1
                if self.dies_after is not None and count > self.dies_after:
                    raise ReplicaFailed("The replica of this answer has ended")
                yield sent(message)
        finally:
            await messages.aclose()

    async def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        return [
            None if each.name in self.hung else sent(await getattr(each, method)(*sent(arguments)))
            for each in self.replicas
        ]

    def note(self, in_flight: Any, silent: Any) -> None:
        self.in_flight, self.silent = dict(in_flight), list(silent)

    def is_lost(self) -> bool:
        return self.lost

    def fault(self) -> str | None:
        return None

    def _chosen(self, model: str) -> Replica:
        taken = set(map(id, self.models.values()))
        free = (each for each in self.replicas if id(each) not in taken)
        return self.models.setdefault(model, next(free, self.replicas[0]))
