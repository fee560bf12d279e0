from __future__ import annotations

import threading

import pytest

from transformers_api.errors import ApiError, DeadlineExceeded, Overloaded, ServerShuttingDown
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.limits.cancellation import Cancellation

WAIT_S = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def entered(admission: Admission, count: int) -> list[Cancellation]:
    requests = [Cancellation() for _ in range(count)]
    for request in requests:
        admission.enter(request)
    return requests


def refused(admission: Admission) -> int:
    """Retry-After of a request that is one too many."""
    with pytest.raises(Overloaded) as refusal:
        admission.enter(Cancellation())
    assert refusal.value.code == "queue_full"
    assert refusal.value.retry_after is not None
    return refusal.value.retry_after


def test_one_too_many_is_refused_and_takes_no_place(clock: Clock) -> None:
    admission = Admission(2, 1, clock=clock)
    first, *_ = entered(admission, 3)
    refused(admission)
    assert len(admission) == 3
    admission.leave(first)
    admission.leave(first)
    assert len(admission) == 2
    entered(admission, 1)
    refused(admission)


def test_the_wait_follows_what_waits_and_how_fast_answers_finish(clock: Clock) -> None:
    admission = Admission(slots=2, waiting=18, clock=clock)
    requests = entered(admission, 20)
    for request in requests[:10]:
        clock.now += 2
        admission.leave(request)
    entered(admission, 10)
    assert refused(admission) == pytest.approx(18 * 2, abs=4)  # 18 wait, one ends every 2 s


def test_a_fast_server_asks_for_a_second(clock: Clock) -> None:
    admission = Admission(slots=2, waiting=2, clock=clock)
    for _ in range(500):
        request, *_ = entered(admission, 1)
        clock.now += 0.01
        admission.leave(request)
    entered(admission, 4)
    assert refused(admission) == 1


def test_a_server_that_has_finished_nothing_promises_nothing_soon(clock: Clock) -> None:
    admission = Admission(slots=2, waiting=10, clock=clock)
    entered(admission, 12)
    assert refused(admission) == 1
    clock.now += 5
    assert refused(admission) == 50
    clock.now += 600
    assert refused(admission) == 120


def test_time_without_requests_does_not_count(clock: Clock) -> None:
    admission = Admission(slots=1, waiting=1, clock=clock)
    for request in entered(admission, 2):
        clock.now += 5
        admission.leave(request)
    clock.now += 3600
    entered(admission, 2)
    assert refused(admission) == 5
    clock.now += 100
    assert refused(admission) == 60  # for a minute nothing has finished


def test_a_request_that_takes_too_long_is_cancelled_with_the_reason() -> None:
    admission = Admission(4, 4, timeout_s=0.05)
    requests = entered(admission, 3)
    ended = threading.Barrier(4)
    for request in requests:
        request.on_cancel(lambda: threading.Thread(target=ended.wait, args=(WAIT_S,)).start())
    ended.wait(WAIT_S)
    for request in requests:
        with pytest.raises(DeadlineExceeded, match=r"after 0\.05 s"):
            request.check()
        admission.leave(request)
    later, *_ = entered(admission, 1)
    over = threading.Event()
    later.on_cancel(over.set)
    assert over.wait(WAIT_S)


def test_a_request_that_has_ended_is_not_cancelled() -> None:
    admission = Admission(4, 4, timeout_s=0.05)
    quick, slow = entered(admission, 2)
    admission.leave(quick)
    over = threading.Event()
    slow.on_cancel(over.set)
    assert over.wait(WAIT_S)
    assert not quick.is_cancelled


def test_all_can_be_ended_at_once() -> None:
    admission = Admission(4, 4)
    requests = entered(admission, 3)
    admission.end_all(ServerShuttingDown("The server is shutting down"))
    errors: list[ApiError] = [request.error for request in requests]
    assert {error.code for error in errors} == {"server_shutting_down"}


def test_the_first_reason_holds() -> None:
    request = Cancellation()
    request.cancel(DeadlineExceeded("too long"))
    request.cancel()
    assert request.error.code == "deadline_exceeded"
