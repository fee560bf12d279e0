"""Inspections: one at a time, in slices between the steps of the engine, and always to an end."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.fake_inspection import FakeInspector
from tests.fakes import FakeEngine, fake_model
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import (
    ClientGone,
    InspectionBusy,
    InspectionTimeout,
    InvalidRequest,
    ModelUnloaded,
)
from transformers_api.inspection.divergence_question import DivergenceQuestion
from transformers_api.inspection.questions import Divergence
from transformers_api.serving.inspect.queue import Inspections, deadline
from transformers_api.serving.limits.cancellation import Cancellation


class Steps:
    """An engine that always has a step to make, and notes when it makes one."""

    has_work = True

    def __init__(self, log):
        self.log = log

    def step(self):
        self.log.append("step")

    def fail(self, error):
        pass


class ThreadedEngine(FakeEngine):
    """Visits run on a real engine thread, as in the real one; ``closed_with`` refuses them."""

    def __init__(self, thread):
        super().__init__(model="the model")
        self.thread = thread

    def call(self, visit):
        def run():
            if self.closed_with is not None:
                raise self.closed_with
            return visit(self.model)

        return self.thread.call(run)


@pytest.fixture
def thread():
    thread = EngineThread(1)
    yield thread
    thread.engines.clear()
    thread.stop()


@pytest.fixture
def model(thread):
    return fake_model(engine=ThreadedEngine(thread))


@pytest.fixture
def inspections():
    return Inspections(waiting=1, timeout_s=20)


class Job:
    """Three slices; notes on which thread it ran and that it was closed. ``hold`` stops a slice."""

    def __init__(self, hold=None, slices=3):
        self.hold = hold
        self.slices = slices
        self.begun = threading.Event()
        self.closed = threading.Event()
        self.threads = set()
        self.models = []

    def __call__(self, model):
        self.models.append(model)
        try:
            for _ in range(self.slices):
                self.threads.add(threading.current_thread().name)
                self.begun.set()
                if self.hold is not None:
                    assert self.hold.wait(20)
                yield
            return "found"
        finally:
            self.threads.add(threading.current_thread().name)
            self.closed.set()


def wait_for(condition):
    deadline = threading.Event()
    for _ in range(4000):
        if condition():
            return
        deadline.wait(0.005)  # polling, with a deadline
    raise AssertionError("it did not come to that")


# One inspection


def test_a_job_runs_on_the_engine_thread_only_and_its_result_comes_back(inspections, model):
    job = Job()
    assert inspections.run(model, job, Cancellation()) == "found"
    assert job.threads == {"engine"}
    assert job.models == ["the model"]
    assert job.closed.is_set()


def test_a_job_without_a_pause_is_done_in_one_slice(inspections, model):
    assert inspections.run(model, Job(slices=0), Cancellation()) == "found"


def test_the_engine_makes_a_step_between_two_slices(inspections, model, thread):
    log = []

    def job(_model):
        for _ in range(20):
            log.append("slice")
            yield

    thread.call(lambda: thread.engines.append(Steps(log))).result(30)
    inspections.run(model, job, Cancellation())
    between = "".join("x" if event == "slice" else "." for event in log)
    assert between.count("x") == 20
    assert "xx" not in between


def test_what_a_job_raises_reaches_the_one_who_asked(inspections, model):
    def job(_model):
        yield
        raise InvalidRequest("not that layer", param="layers")

    with pytest.raises(InvalidRequest, match="not that layer"):
        inspections.run(model, job, Cancellation())
    assert inspections.run(model, Job(), Cancellation()) == "found"


def test_a_timeout_of_the_job_itself_is_not_taken_for_ours(inspections, model):
    def job(_model):
        raise TimeoutError("its own")
        yield

    with pytest.raises(TimeoutError, match="its own"):
        inspections.run(model, job, Cancellation())


def test_it_ends_between_two_slices_once_its_time_is_over(model):
    job = Job(slices=9)
    inspections = Inspections(1, 30, clock=lambda: 31.0 if job.begun.is_set() else 0.0)
    with pytest.raises(InspectionTimeout, match="took longer than 30 s"):
        inspections.run(model, job, Cancellation())
    assert job.closed.wait(30)
    assert job.threads == {"engine"}


def test_a_slice_that_does_not_get_its_turn_in_time_never_begins(model, thread):
    release = threading.Event()
    thread.call(lambda: release.wait(20))
    job = Job()
    with pytest.raises(InspectionTimeout):
        Inspections(1, 0.02).run(model, job, Cancellation())
    release.set()
    thread.call(lambda: None).result(30)
    assert not job.begun.is_set()


# Those who leave, models that go


def test_a_client_that_leaves_ends_the_job_after_its_slice(inspections, model):
    cancellation, hold = Cancellation(), threading.Event()
    job = Job(hold)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(inspections.run, model, job, cancellation)
        assert job.begun.wait(30)
        cancellation.cancel()
        hold.set()
        with pytest.raises(ClientGone):
            asked.result(30)
    assert job.closed.wait(30)
    assert job.threads == {"engine"}


def test_a_client_that_leaves_before_its_slice_begins_gets_none(inspections, model, thread):
    cancellation, release, job = Cancellation(), threading.Event(), Job()
    thread.call(lambda: release.wait(20))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(inspections.run, model, job, cancellation)
        wait_for(lambda: len(inspections._line) == 1)
        cancellation.cancel()
        with pytest.raises(ClientGone):
            asked.result(30)
    release.set()
    assert not job.begun.is_set()


def test_a_model_that_is_unloaded_meanwhile_ends_it_and_the_generator_is_closed(inspections, model):
    def job(_model):
        try:
            yield
            model.engine.closed_with = ModelUnloaded("The model was unloaded")
            yield
            raise AssertionError("it went on")
        finally:
            closed.append(True)

    closed = []
    with pytest.raises(ModelUnloaded):
        inspections.run(model, job, Cancellation())
    wait_for(lambda: closed)
    model.engine.closed_with = None
    assert inspections.run(model, Job(), Cancellation()) == "found"


# Several


def test_one_runs_one_waits_and_a_third_is_refused(inspections, model):
    hold = threading.Event()
    first, second = Job(hold), Job()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(inspections.run, model, first, Cancellation())
        assert first.begun.wait(30)
        waiting = pool.submit(inspections.run, model, second, Cancellation())
        wait_for(lambda: len(inspections._line) == 2)
        with pytest.raises(InspectionBusy):
            inspections.run(model, Job(), Cancellation())
        assert not second.begun.is_set()
        hold.set()
        assert running.result(30) == waiting.result(30) == "found"
    assert inspections.run(model, Job(), Cancellation()) == "found"


def test_the_refusal_says_how_long_the_line_has_been_taking(model):
    now, hold = [100.0], threading.Event()
    inspections = Inspections(0, 1000, clock=lambda: now[0])

    class Long(Job):
        def __call__(self, model):
            now[0] += 8
            return super().__call__(model)

    for _ in range(2):
        inspections.run(model, Long(), Cancellation())
        now[0] += 60  # in which nobody asks
    second = Job(hold)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(inspections.run, model, second, Cancellation())
        assert second.begun.wait(30)
        with pytest.raises(InspectionBusy) as refused:
            inspections.run(model, Job(), Cancellation())
        hold.set()
        running.result(30)
    assert refused.value.retry_after == 8


def test_without_a_queue_the_second_is_refused(model):
    inspections, hold = Inspections(0, 20), threading.Event()
    first = Job(hold)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(inspections.run, model, first, Cancellation())
        assert first.begun.wait(30)
        with pytest.raises(InspectionBusy):
            inspections.run(model, Job(), Cancellation())
        hold.set()
        assert running.result(30) == "found"


def test_the_comparison_of_an_answer_waits_behind_any_and_has_its_time(model):
    job, hold = Job(slices=9), threading.Event()
    inspections = Inspections(0, 30, clock=lambda: 31.0 if job.begun.is_set() else 0.0)
    inspector = SimpleNamespace(diverge=lambda ids, question: job)
    inspector.served_by = lambda engine: inspector
    compared = replace(model, inspector=inspector)
    question = DivergenceQuestion(answer=[2], plan=None, topk=1)
    first = Job(hold, slices=1)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(inspections.run, model, first, Cancellation())
        assert first.begun.wait(30)
        waiting = pool.submit(inspections.ask, compared, Divergence([1], question), Cancellation())
        wait_for(lambda: len(inspections._line) == 2)
        hold.set()
        assert running.result(30) == waiting.result(30) == "found"


def test_a_client_that_leaves_the_queue_gives_its_place_away(inspections, model):
    hold, cancellation = threading.Event(), Cancellation()
    first, second, third = Job(hold), Job(), Job()
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(inspections.run, model, first, Cancellation())
        assert first.begun.wait(30)
        leaving = pool.submit(inspections.run, model, second, cancellation)
        wait_for(lambda: len(inspections._line) == 2)
        cancellation.cancel()
        with pytest.raises(ClientGone):
            leaving.result(30)
        after = pool.submit(inspections.run, model, third, Cancellation())
        hold.set()
        assert running.result(30) == after.result(30) == "found"
    assert not second.begun.is_set()


# Gradients


def test_whether_gradients_can_be_had_is_found_out_once_per_model(inspections):
    class Counting(FakeInspector):
        asked_for_gradients = 0

        def check_gradients(self):
            self.asked_for_gradients += 1
            return super().check_gradients()

    inspector = Counting(gradients=False)
    model, other = fake_model(inspector=inspector), fake_model()
    for _ in range(3):
        assert not inspections.has_gradients(model, inspector, Cancellation())
    assert inspector.asked_for_gradients == 1
    assert inspections.has_gradients(other, FakeInspector(), Cancellation())


def test_the_check_does_not_wait_in_the_line(inspections, model):
    hold = threading.Event()
    job = Job(hold)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(inspections.run, model, job, Cancellation())
        assert job.begun.wait(30)
        assert inspections.has_gradients(fake_model(), FakeInspector(), Cancellation())
        hold.set()
        assert running.result(30) == "found"


def test_a_future_of_the_engine_that_fails_is_raised(inspections):
    engine = FakeEngine()

    def call(_visit):
        future = Future()
        future.set_exception(ModelUnloaded("gone"))
        return future

    engine.call = call
    with pytest.raises(ModelUnloaded):
        inspections.run(fake_model(engine=engine), Job(), Cancellation())


def test_what_is_computed_beside_the_engine_ends_by_its_time_or_with_its_client():
    seconds, cancellation = [0.0], Cancellation()
    check = deadline(5, cancellation, lambda: seconds[0])
    check()
    seconds[0] = 5.5
    with pytest.raises(InspectionTimeout, match="took longer than 5 s"):
        check()
    cancellation.cancel(ClientGone("left"))
    with pytest.raises(ClientGone):
        check()
