"""The way from a front to the replicas. ``RayTransport`` is the one over Ray Serve."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from transformers_api.cluster import applications, ray_runtime, routing
from transformers_api.cluster.head_watch import LOST_S, HeadWatch
from transformers_api.cluster.messages import Failure, error_of
from transformers_api.config.settings import Settings
from transformers_api.errors import ApiError, Overloaded, ReplicaFailed, Unavailable
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.upstream.loop import BackgroundLoop, result

log = logging.getLogger(__name__)
RETRY_S = 2.0  # between two tries to reach the cluster
LOOK_S = 10.0  # between two looks at which models have replicas of their own
ASKING = 64  # threads, on which all replicas of a model are asked; they wait for those that hang
BUSY_S = 2  # after which those are told to come again who find all replicas full


class Answer(Protocol):
    """An answer that is on its way. Called on the transport's loop."""

    def carried(self, position: int, ids: Sequence[int]) -> None:
        """Take tokens that came with another answer."""
        ...

    def looked(self) -> None:
        """Count a look without a message; after too many the answer fails. From any thread."""
        ...


class Transport(Protocol):
    """Asks replicas. ``place`` chooses one: that which has the model, else one that is free.

    It is the text of ``messages.place_of``; with an empty one any replica is asked.
    ``name`` is that of this process; ``answers`` are those that it waits for, by their names.
    """

    name: str
    answers: dict[str, Answer]

    def start(self, work: Any) -> Future[Any]:
        """Run a coroutine on the transport's loop; cancelling the future cancels it."""
        ...

    async def call(self, method: str, place: str, *arguments: Any) -> Any:
        """The answer of one replica. Raises the ApiError that it is, and ReplicaFailed."""
        ...

    def stream(self, method: str, place: str, *arguments: Any) -> AsyncGenerator[Any]:
        """The messages of one replica, failures among them. Raises ReplicaFailed."""
        ...

    async def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all replicas; None of each that does not answer soon."""
        ...

    def note(self, in_flight: Mapping[str, int], silent: Sequence[str]) -> None:
        """Route by the requests of each replica; the silent are asked where there are no others."""
        ...

    def fault(self) -> str | None:
        """Why nobody can be asked."""
        ...

    def is_lost(self) -> bool:
        """True where this process will not reach the cluster again; another one may."""
        ...


def ask(
    transport: Transport, cancellation: Cancellation, method: str, place: str, *arguments: Any
) -> Any:
    """The answer of one replica, waited for on this thread. Raises ApiError."""
    return result(transport.start(transport.call(method, place, *arguments)), cancellation)


def checked(answer: Any) -> Any:
    """``answer``. Raises the error that it is."""
    if isinstance(answer, Failure):
        raise error_of(answer)
    return answer


def check_own() -> None:
    """Raises ReplicaFailed where a cancellation is not this task's own but the replica's."""
    task = asyncio.current_task()
    if task is not None and not task.cancelling():
        raise ReplicaFailed("The replica has given this answer up", retry_after=1) from None


class RayTransport:
    """Meets Transport over the handle of a Serve deployment. From any thread.

    The cluster is looked for in the background, again and again: a front may start before it.
    ``on_connect`` is called once it is there. ``own``: the models that may have replicas of their
    own; all others, and these where they have none, go to those that share.
    """

    def __init__(
        self, settings: Settings, own: Sequence[str], on_connect: Callable[[], object]
    ) -> None:
        self.start = BackgroundLoop("cluster").start
        self.name, self.answers = uuid.uuid4().hex, dict[str, Answer]()
        self._settings = settings
        self._own = own
        self._on_connect = on_connect
        self._handles: Mapping[str, Any] = {}
        self._counts: dict[str, int] = {}  # replicas of each, when they were last asked
        self._asking = ThreadPoolExecutor(ASKING, "cluster-ask")
        self._fault: str | None = "Looking for the cluster"
        self._head = HeadWatch(settings.cluster_address)
        self._lost: tuple[type[Exception], ...] = ()
        self._full: tuple[type[Exception], ...] = ()

    def connect(self) -> None:
        """Begin to look for the cluster."""
        threading.Thread(target=self._connect, name="cluster-connect", daemon=True).start()

    def fault(self) -> str | None:
        """See Transport."""
        return self._fault or self._head.fault

    def is_lost(self) -> bool:
        """See Transport."""
        return self._head.away_s > LOST_S

    async def call(self, method: str, place: str, *arguments: Any) -> Any:
        """See Transport."""
        response = self._handle(place, method).remote(*arguments)
        try:
            return checked(await self._head.accepted(response))
        except asyncio.CancelledError:
            response.cancel()
            check_own()
            raise
        except Exception as error:
            raise self._error(error) from None

    async def stream(self, method: str, place: str, *arguments: Any) -> AsyncGenerator[Any]:
        """See Transport."""
        messages = self._handle(place, method, **ray_runtime.STREAM).remote(*arguments)
        is_over = False
        try:
            yield await self._head.accepted(anext(messages))
            async for message in messages:
                yield message
            is_over = True
        except ApiError:
            raise
        except asyncio.CancelledError:
            check_own()
            raise
        except Exception as error:
            is_over = True
            raise self._error(error) from None
        finally:
            if not is_over:
                messages.cancel()

    async def broadcast(self, method: str, *arguments: Any) -> list[Any]:
        """See Transport. Where those of a model cannot be asked, None of as many as there were."""
        loop, handles = asyncio.get_running_loop(), dict(self._handles)
        futures = [
            loop.run_in_executor(self._asking, ray_runtime.broadcast, handle, method, arguments)
            for handle in handles.values()
        ]
        outcomes = await asyncio.gather(*futures, return_exceptions=True)
        errors = [each for each in outcomes if isinstance(each, BaseException)]
        if errors and len(errors) == len(outcomes):
            raise errors[0]
        answers: list[Any] = []
        for model, outcome in zip(handles, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                log.info("Replicas of '%s' cannot be asked: %r", model or "all models", outcome)
                answers += [None] * self._counts.get(model, 0)
            else:
                self._counts[model] = len(outcome)
                answers += outcome
        return answers

    def note(self, in_flight: Mapping[str, int], silent: Sequence[str]) -> None:
        """See Transport."""
        routing.note(in_flight, silent)

    def _handle(self, place: str, method: str, **options: Any) -> Any:
        handles = self._handles
        name = place.rpartition("@")[0]
        if name and (own := handles.get(name)) is not None:
            return own.options(method_name=method, **options)
        if not handles:
            raise Unavailable(self._fault or "The cluster is away", retry_after=5)
        return handles[""].options(method_name=method, multiplexed_model_id=place, **options)

    def _error(self, error: Exception) -> ApiError:
        if isinstance(error, ApiError):
            return error
        if isinstance(error, self._full):
            return Overloaded("All replicas have as much as they take", retry_after=BUSY_S)
        if isinstance(error, self._lost):
            return ReplicaFailed("The replica of this answer has ended", retry_after=1)
        log.error("A replica could not be asked", exc_info=error)
        return Unavailable("The cluster cannot serve this now", retry_after=5)

    def _connect(self) -> None:
        while True:
            try:
                self._head.reach()
                ray_runtime.connect(self._settings)
                self._look()
                self._full, self._lost = ray_runtime.kinds_of_errors()
                break
            except Exception as error:
                kind = type(error).__name__
                self._fault = f"The cluster at {self._settings.cluster_address} is away ({kind})"
                log.info("%s: %s", self._fault, error)
                time.sleep(RETRY_S)
        self._fault = None
        self._head.begin()
        log.info("The cluster at %s is there", self._settings.cluster_address)
        self._on_connect()
        while self._own:
            time.sleep(LOOK_S)
            try:
                self._look()
            except Exception as error:
                log.warning("Which models have replicas of their own is not told: %s", error)

    def _look(self) -> None:
        """Raises KeyError where nothing is deployed."""
        handles = applications.handles(self._own)
        same = {model: each for model, each in self._handles.items() if model in handles}
        self._handles = {"": handles[""]} | handles | same
