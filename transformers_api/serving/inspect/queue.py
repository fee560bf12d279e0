"""Runs inspections on the resident model, one at a time, in slices between decode steps.

Each slice is posted when the one before it is done, so that the engine has made a step for those
who are being answered in between.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Generic, TypeVar, cast
from weakref import WeakKeyDictionary

from transformers_api.engine.base import Engine
from transformers_api.errors import InspectionBusy, InspectionTimeout
from transformers_api.inspection import questions
from transformers_api.inspection.base import Inspector, Job
from transformers_api.inspection.editable import Editable
from transformers_api.inspection.logit_share import LogitPartsQuestion
from transformers_api.inspection.questions import Inspected, Question
from transformers_api.serving.inspect.calibration import Calibration
from transformers_api.serving.inspect.stream_norms import stream_norms
from transformers_api.serving.inspect.suggested_layer import suggested_layer
from transformers_api.serving.limits.admission import Throughput
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.swap.loaded_model import LoadedModel

T = TypeVar("T")
Norms = tuple[float, ...]
OWN = Calibration()
MOST_CALIBRATIONS = 64  # whose norms are kept of a model
CHECKED = 8  # tokens


class Inspections:
    """The line of those who want to look inside. ``waiting``: how many besides the one that runs.

    ``timeout_s`` is what each may take from its first slice on.
    """

    def __init__(
        self, waiting: int, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._waiting = waiting
        self._timeout_s = timeout_s
        self._clock = clock
        self._condition = threading.Condition()
        self._line: deque[object] = deque()  # the first one runs
        self._throughput = Throughput(clock)
        self._gradients: WeakKeyDictionary[Engine, bool] = WeakKeyDictionary()
        self._layers: WeakKeyDictionary[Engine, int | None] = WeakKeyDictionary()
        self._editable: WeakKeyDictionary[Inspected, Editable] = WeakKeyDictionary()
        self._norms: WeakKeyDictionary[Inspected, dict[tuple[str, Calibration], Norms]] = (
            WeakKeyDictionary()
        )
        self._parts: WeakKeyDictionary[Inspected, set[str]] = WeakKeyDictionary()

    def run(self, model: LoadedModel, job: Job[T], cancellation: Cancellation) -> T:
        """The result of ``job``, when its turn has come.

        Raises InspectionBusy, InspectionTimeout, ClientGone, ModelUnloaded, EngineDead, and what
        the job raises.
        """
        with self._turn(cancellation):
            return self._run(model, job, cancellation)

    def ask(self, model: LoadedModel, question: Question[T], cancellation: Cancellation) -> T:
        """The answer to ``question``, when its turn has come. Raises what ``run`` does.

        A Divergence belongs to an answer that has been given a place: it waits for its turn behind
        any others, and has the time that it takes.
        """
        job = question.job(_own(model))
        either: object = question
        if isinstance(either, questions.Divergence):
            with self._turn(cancellation, is_owed=True):
                return self._run(model, job, cancellation, threading.TIMEOUT_MAX)
        return self.run(model, job, cancellation)

    def has_gradients(
        self, model: LoadedModel, inspector: Inspected, cancellation: Cancellation
    ) -> bool:
        """True where the model has gradients; found out once per loaded model, without a turn."""
        available = self._gradients.get(model.engine)
        if available is None:
            available = self._run(model, _own(model).check_gradients(), cancellation)
            self._gradients[model.engine] = available
        return available

    def suggested_layer(
        self, model: LoadedModel, inspector: Inspected, cancellation: Cancellation
    ) -> int | None:
        """See ``suggested_layer``; found out once per loaded model, without a turn."""
        if model.engine not in self._layers:
            self._layers[model.engine] = suggested_layer(
                model,
                inspector,
                lambda question: self._run(model, question.job(_own(model)), cancellation),
            )
        return self._layers[model.engine]

    def editable(
        self, model: LoadedModel, inspector: Inspected, cancellation: Cancellation
    ) -> Editable:
        """The parts that can be changed; found out once per loaded model, without a turn."""
        if inspector not in self._editable:
            job = questions.Places().job(_own(model))
            self._editable[inspector] = self._run(model, job, cancellation)
        return self._editable[inspector]

    def check_parts(
        self,
        model: LoadedModel,
        inspector: Inspected,
        question: LogitPartsQuestion,
        ids: Sequence[int],
        cancellation: Cancellation,
    ) -> None:
        """Raise ModelNotCapable where logits have no such parts; tried once, without a turn.

        ``ids``: a text, whose first tokens are enough.
        """
        checked = self._parts.setdefault(inspector, set())
        if question.by not in checked:
            job = parts_of_beginning(question, ids).job(_own(model))
            self._run(model, job, cancellation)
            checked.add(question.by)

    def stream_norms(
        self,
        model: LoadedModel,
        inspector: Inspected,
        cancellation: Cancellation,
        calibration: Calibration = OWN,
    ) -> Norms:
        """See ``stream_norms``; found out once per loaded model and texts, without a turn."""
        norms = self._norms.setdefault(inspector, {})
        key = model.fingerprint, calibration  # an adapter has norms of its own
        own = norms.get(key)
        if own is None:
            own = stream_norms(
                model,
                inspector,
                calibration,
                lambda question: self._run(model, question.job(_own(model)), cancellation),
            )
            if len(norms) >= MOST_CALIBRATIONS:
                norms.clear()
            norms[key] = own
        return own

    @contextmanager
    def _turn(self, cancellation: Cancellation, *, is_owed: bool = False) -> Iterator[None]:
        ticket = object()
        with self._condition:
            if len(self._line) > self._waiting and not is_owed:
                raise InspectionBusy(
                    "Too many inspections are waiting",
                    retry_after=self._throughput.wait_s(max(len(self._line) - 1, 1)),
                )
            self._throughput.began()
            self._line.append(ticket)
        cancellation.on_cancel(self._wake)
        try:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._line[0] is ticket or cancellation.is_cancelled
                )
            yield
        finally:
            with self._condition:
                self._line.remove(ticket)
                self._throughput.ended(len(self._line))
                self._condition.notify_all()

    def _wake(self) -> None:
        with self._condition:
            self._condition.notify_all()

    def _run(
        self,
        model: LoadedModel,
        job: Job[T],
        cancellation: Cancellation,
        timeout_s: float | None = None,
    ) -> T:
        run = _Run(model.engine, job, cancellation)
        cancellation.on_cancel(run.withdraw)
        began = self._clock()
        most_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            while not run.is_done:
                left = most_s - (self._clock() - began)
                if left <= 0 or not run.slice(left):
                    raise _timeout(self._timeout_s)
            return run.result
        finally:
            run.close()


def parts_of_beginning(question: LogitPartsQuestion, ids: Sequence[int]) -> questions.LogitParts:
    """The same question about the beginning of a text."""
    own = list(ids[:CHECKED])
    return questions.LogitParts(own, replace(question, position=len(own) - 1))


def deadline(
    seconds: float, cancellation: Cancellation, clock: Callable[[], float] = time.monotonic
) -> Callable[[], None]:
    """A check for what is computed beside the engine, which may take so long from now on.

    It raises InspectionTimeout, and the reason of a cancellation.
    """
    end = clock() + seconds

    def check() -> None:
        cancellation.check()
        if clock() > end:
            raise _timeout(seconds)

    return check


def _timeout(seconds: float) -> InspectionTimeout:
    return InspectionTimeout(f"The inspection took longer than {seconds:g} s")


def _own(model: LoadedModel) -> Inspector:
    """The inspector of a model in this process, for the model's own adapter if it has one."""
    return cast(Inspector, model.inspector).served_by(model.engine)


class _Run(Generic[T]):
    """One job. Its generator lives on the engine thread."""

    result: T

    def __init__(self, engine: Engine, job: Job[T], cancellation: Cancellation) -> None:
        self.is_done = False
        self._engine = engine
        self._job = job
        self._cancellation = cancellation
        self._generator: Generator[None, None, T] | None = None
        self._posted: Future[None] | None = None

    def slice(self, timeout_s: float) -> bool:
        """Run one slice; whether it began in time. One that has begun is waited for."""
        self._cancellation.check()
        posted = self._posted = self._engine.call(self._advance)
        if self._cancellation.is_cancelled:  # since the check
            posted.cancel()
        try:
            error = posted.exception(timeout_s)
        except (CancelledError, TimeoutError):
            if posted.cancel():  # it had not begun
                self._cancellation.check()
                return False
            error = posted.exception()
        if error is not None:
            raise error
        return True

    def withdraw(self) -> None:
        """Do not begin the slice that waits."""
        if self._posted is not None:
            self._posted.cancel()

    def close(self) -> None:
        """End the generator wherever it stands; on the engine thread, after its last slice."""
        if self._generator is not None and not self.is_done:
            # The callback is for a model that was unloaded meanwhile: nothing visits it any more.
            self._engine.call(self._end).add_done_callback(self._end)

    def _advance(self, model: Any) -> None:
        if self._generator is None:
            self._generator = self._job(model)
        try:
            next(self._generator)
        except StopIteration as end:
            self.result = end.value
            self.is_done = True

    def _end(self, _: Any) -> None:
        if self._generator is not None:
            self._generator.close()
