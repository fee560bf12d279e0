"""Inspections that go on after their request was answered: with progress, a partial result, an end.

A job is a thread that asks one question after another, each of about half a second, so that it
never holds the engine, shares its turns with everybody else's inspections, and can be stopped. It
has a lease of its own on the model and ends with the model, or with the server.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from transformers_api.errors import ApiError, EngineFailed, NotFound, Overloaded
from transformers_api.logs import carried
from transformers_api.serving.limits.cancellation import Cancellation

Json = Mapping[str, Any]
State = Literal["running", "done", "cancelled", "failed"]
log = logging.getLogger(__name__)

MOST_RUNNING = 8  # of all owners
MOST_OF_OWNER = 4  # that run
MOST_KEPT = 16  # of an owner, those that run included
MOST_CELLS = 8 << 20  # numbers of all results together
MOST_AGE_S = 3600.0  # since it ended
BUSY = "{} jobs are running (max {}); wait for one, or cancel it"
NOTHING: Json = {}


class JobCancelled(ApiError):
    """The owner has cancelled the job."""

    status = 499
    code = "job_cancelled"


class InspectionJob:
    """One job. Its thread writes progress, others read it and wait for it.

    ``total`` and ``cells``: steps, and numbers of the result. ``result``: as far as it is there.
    """

    def __init__(
        self, owner: str, kind: str, total: int, cells: int, result: Callable[[], Json]
    ) -> None:
        self.id = f"job-{uuid.uuid4().hex[:24]}"
        self.owner = owner
        self.kind = kind
        self.total = total
        self.cells = cells
        self.cancellation = Cancellation()
        self.created = int(time.time())  # seconds since 1970
        self.done = 0
        self.state: State = "running"
        self.error: ApiError | None = None
        self.ended_at: float | None = None  # time.monotonic()
        self._began = time.monotonic()
        self._result: Callable[[], Json] | None = result
        self._final: Json = NOTHING
        self._condition = threading.Condition()

    @property
    def is_running(self) -> bool:
        """True until it has ended in one way or another."""
        return self.state == "running"

    @property
    def seconds(self) -> float:
        """The time that it has taken so far, or took."""
        return (self.ended_at or time.monotonic()) - self._began

    @property
    def left_s(self) -> float | None:
        """The time that the rest takes at this rate; None before anything is done."""
        if not self.is_running:
            return 0.0
        return self.seconds / self.done * (self.total - self.done) if self.done else None

    def result(self) -> Json:
        """The result, or what there is of it."""
        with self._condition:
            render = self._result
        return self._final if render is None else render()

    def advance(self, done: int) -> None:
        """Note that ``done`` steps are done."""
        with self._condition:
            self.done = done
            self._condition.notify_all()

    def finish(self, state: State, error: ApiError | None = None) -> None:
        """Keep the result as it is, and nothing of the model. The first end holds."""
        render = self._result
        if render is None:
            return
        final = render()
        with self._condition:
            self._final, self._result = final, None
            self.state, self.error, self.ended_at = state, error, time.monotonic()
            self._condition.notify_all()

    def wait(self, done: int, timeout_s: float, is_over: Callable[[], bool]) -> None:
        """Wait until more than ``done`` steps are done, it has ended, or ``is_over``."""
        with self._condition:
            self._condition.wait_for(
                lambda: self.done != done or not self.is_running or is_over(), timeout_s
            )

    def wake(self) -> None:
        """Have those who wait look again."""
        with self._condition:
            self._condition.notify_all()

    def pause(self, seconds: float) -> None:
        """Wait so long. Raises the reason of a cancellation at once."""
        with self._condition:
            self._condition.wait_for(lambda: self.cancellation.is_cancelled, seconds)
        self.cancellation.check()


class Jobs:
    """The jobs of all, bounded by number, numbers of their results, and age. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._jobs: OrderedDict[str, InspectionJob] = OrderedDict()
        self._refusal: ApiError | None = None

    def check_room(self, owner: str) -> None:
        """Raise Overloaded where one more would be too many."""
        with self._lock:
            self._check_room(owner)

    def start(
        self, job: InspectionJob, work: Callable[[], None], release: Callable[[], None]
    ) -> None:
        """Let ``work`` run on a thread of its own, and then ``release``.

        Raises Overloaded, and ServerShuttingDown after ``end_all``; ``release`` is called then too.
        """
        job.cancellation.on_cancel(job.wake)
        try:
            with self._lock:
                self._check_room(job.owner)
                self._jobs[job.id] = job
                self._make_room(job.owner)
        except ApiError:
            release()
            raise
        run = carried(_run)
        threading.Thread(target=run, args=(job, work, release), name=job.id, daemon=True).start()

    def get(self, owner: str, job_id: str) -> InspectionJob:
        """A job of ``owner``. Raises NotFound."""
        with self._lock:
            self._forget()
            job = self._jobs.get(job_id)
        if job is None or job.owner != owner:
            raise NotFound(f"No job '{job_id}'; it may have been forgotten", param="id")
        return job

    def of(self, owner: str) -> Sequence[InspectionJob]:
        """The jobs of ``owner``, the oldest first."""
        with self._lock:
            self._forget()
            return [job for job in self._jobs.values() if job.owner == owner]

    def delete(self, owner: str, job_id: str) -> bool:
        """Cancel a job that runs, which keeps its result; forget one that ended. True: it ran."""
        job = self.get(owner, job_id)
        if job.is_running:
            job.cancellation.cancel(JobCancelled("The job was cancelled"))
            return True
        with self._lock:
            self._jobs.pop(job_id, None)
        return False

    def end_all(self, error: ApiError) -> None:
        """End every job with ``error``, and take no more."""
        with self._lock:
            self._refusal = error
            jobs = list(self._jobs.values())
        for job in jobs:
            job.cancellation.cancel(error)

    def _check_room(self, owner: str) -> None:
        if self._refusal is not None:
            raise self._refusal
        running = [job for job in self._jobs.values() if job.is_running]
        own = sum(job.owner == owner for job in running)
        if own >= MOST_OF_OWNER:
            raise Overloaded(BUSY.format(own, MOST_OF_OWNER), retry_after=_soonest(running))
        if len(running) >= MOST_RUNNING:
            raise Overloaded(BUSY.format(len(running), MOST_RUNNING), retry_after=_soonest(running))

    def _make_room(self, owner: str) -> None:
        """Forget the oldest that have ended: the owner's, and where all have too many numbers."""
        self._forget()
        own = [job for job in self._jobs.values() if job.owner == owner]
        ended = [job for job in own if not job.is_running]
        for job in ended[: max(len(own) - MOST_KEPT, 0)]:
            del self._jobs[job.id]
        for job in [job for job in self._jobs.values() if not job.is_running]:
            if sum(each.cells for each in self._jobs.values()) <= MOST_CELLS:
                return
            del self._jobs[job.id]

    def _forget(self) -> None:
        oldest = self._clock() - MOST_AGE_S
        for job in list(self._jobs.values()):
            if job.ended_at is not None and job.ended_at < oldest:
                del self._jobs[job.id]


def _soonest(jobs: Sequence[InspectionJob]) -> int:
    """Whole seconds until one of these will have ended, as far as one can tell: 1 to 120."""
    times = [left for job in jobs if (left := job.left_s) is not None]
    return min(max(round(min(times, default=1.0)), 1), 120)


def _run(job: InspectionJob, work: Callable[[], None], release: Callable[[], None]) -> None:
    try:
        work()
        job.finish("done")
    except JobCancelled as error:
        job.finish("cancelled", error)
    except ApiError as error:
        job.finish("failed", error)
    except Exception as error:
        log.error("A job of the kind %s failed", job.kind, exc_info=error, extra={"private": True})
        job.finish("failed", EngineFailed("The job failed; the server's log says more"))
    finally:
        job.cancellation.forget()
        release()
