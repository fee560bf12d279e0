from __future__ import annotations

import gc
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import FakeEngine, FakeLoader, fake_model, fake_spec
from tests.repeats import slow
from transformers_api.errors import (
    ApiError,
    ClientGone,
    InsufficientMemory,
    ModelLoadFailed,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnloaded,
    ServerShuttingDown,
    Unavailable,
)
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, PathSource
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.residency import Lease, SwapperListener
from transformers_api.serving.swap.swapper import Swapper

WAIT_S = 30.0


class Registry:
    names = ("a", "b", "c")

    def resolve(self, model_id: str) -> ModelSpec:
        if model_id not in self.names:
            raise ModelNotFound(model_id)
        return fake_spec(model_id)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.looks = 0  # of the swapper's thread

    def __call__(self) -> float:
        self.looks += threading.current_thread().name == "swapper"
        return self.now


class Ear(SwapperListener):
    def __init__(self) -> None:
        self.heard: list[tuple[str, str]] = []
        self.changed = threading.Condition()

    def on_load(self, model_id: str, seconds: float) -> None:
        self._hear("load", model_id)

    def on_evict(self, model_id: str) -> None:
        self._hear("evict", model_id)

    def on_load_failed(self, model_id: str, error: ApiError) -> None:
        self._hear("failed", model_id)

    def _hear(self, *event: str) -> None:
        with self.changed:
            self.heard.append(event)  # type: ignore[arg-type]
            self.changed.notify_all()

    def wait_for(self, *events: tuple[str, str]) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.heard == list(events), WAIT_S), self.heard


class ByName(Swapper):
    """Leases by name, as requests do: what is unknown is refused before anything happens."""

    def lease(self, model_id: str, **options: Any) -> Lease:  # type: ignore[override]
        return super().lease(Registry().resolve(model_id), model_id=model_id, **options)


class Bench:
    """A swapper over fakes, a pool of callers, and ways to wait for what they do."""

    def __init__(self) -> None:
        self.loader = FakeLoader(lambda spec: fake_model(spec, tokenizer=object()))
        self.ear = Ear()
        self.clock = Clock()
        self.pool = ThreadPoolExecutor(64)
        self.swappers: list[Swapper] = []

    def swapper(self, **options: Any) -> Swapper:
        """A swapper; ``options`` are those of its rules and its own."""
        times = {"swap_after_s": 10, "drain_s": 300}
        times |= {f.name: options.pop(f.name) for f in fields(SwapRules) if f.name in options}
        own = {"wait_s": WAIT_S, "clock": self.clock, "listener": self.ear} | options
        self.swappers.append(ByName(Registry(), self.loader, SwapRules(**times), **own))
        return self.swappers[-1]

    def start(self, call: Callable[..., Any], *args: Any, **options: Any) -> Future[Any]:
        return self.pool.submit(call, *args, **options)

    def reached(self, stage: str, times: int = 1) -> None:
        for _ in range(times):
            assert self.loader.entered[stage].acquire(timeout=WAIT_S), f"{stage} was not reached"

    def close(self) -> None:
        for held in self.loader.hold.values():
            held.set()
        for swapper in self.swappers:
            swapper.close()
        self.pool.shutdown()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        threading.Event().wait(0.001)


def queued(swapper: Swapper, **waiting: int) -> None:
    until(lambda: swapper.status().waiting == waiting)


def engine(lease: Lease) -> FakeEngine:
    found = lease.model.engine
    assert isinstance(found, FakeEngine)
    return found


def nudge(swapper: Swapper) -> None:
    """Wake the swapper, so that it looks at the test's clock."""
    gone = Cancellation()
    waiting = threading.Thread(target=lambda: _lease_and_drop(swapper, gone))
    waiting.start()
    until(lambda: swapper.status().waiting.get("c"))
    gone.cancel()
    waiting.join(WAIT_S)


def _lease_and_drop(swapper: Swapper, cancellation: Cancellation) -> None:
    with pytest.raises(ClientGone):
        swapper.lease("c", cancellation=cancellation)


# One model.


def test_a_lease_gives_the_model_that_was_asked_for(bench: Bench) -> None:
    with bench.swapper().lease("a") as lease:
        assert lease.model.spec.name == "a"
    assert bench.ear.heard == [("load", "a")]


def test_unknown_model_is_not_found_and_evicts_nothing(bench: Bench) -> None:
    swapper = bench.swapper()
    swapper.lease("a").release()
    with pytest.raises(ModelNotFound):
        swapper.lease("nonsense")
    with pytest.raises(ModelNotFound):
        swapper.load("nonsense", wait=False)
    with pytest.raises(ModelNotFound):
        swapper.evict("nonsense")
    assert swapper.status().model == "a"
    assert bench.loader.count("prepare") == 1


def test_fifty_first_requests_share_one_load(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["prepare"] = threading.Event()
    calls = [bench.start(swapper.lease, "a") for _ in range(50)]
    queued(swapper, a=50)
    bench.loader.hold["prepare"].set()
    leases = [call.result(WAIT_S) for call in calls]
    assert len({id(lease.model) for lease in leases}) == 1
    assert bench.loader.calls == [("prepare", "a"), ("check_memory", "a"), ("load", "a")]
    assert swapper.status().leases == 50
    for lease in leases:
        lease.release()
    assert swapper.status().leases == 0


def test_release_is_idempotent_and_a_released_lease_keeps_nothing_alive(bench: Bench) -> None:
    swapper = bench.swapper()
    lease, other = swapper.lease("a"), swapper.lease("a")
    lease.release()
    lease.release()
    assert swapper.status().leases == 1
    with pytest.raises(RuntimeError):
        _ = lease.model
    other.release()


def test_an_evicted_model_is_referenced_by_nobody(bench: Bench) -> None:
    swapper = bench.swapper()
    lease = swapper.lease("a", cancellation=Cancellation())
    model = weakref.ref(lease.model)
    bench.loader.loaded.clear()
    lease.release()
    swapper.lease("b").release()
    gc.collect()
    assert model() is None


def test_load_says_whether_it_loaded(bench: Bench) -> None:
    swapper = bench.swapper()
    assert swapper.load("a") is True
    assert swapper.load("a") is False
    assert swapper.status().leases == 0
    assert swapper.status().model == "a"


def test_load_in_the_background_returns_at_once(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["load"] = threading.Event()
    assert swapper.load("a", wait=False) is True
    bench.reached("load")
    assert swapper.status().state == "loading"
    assert swapper.status().loading == "a"
    bench.loader.hold["load"].set()
    bench.ear.wait_for(("load", "a"))


def test_the_same_model_on_another_device_is_another_model(bench: Bench) -> None:
    bench.loader.build = lambda spec: fake_model(
        spec, device="cpu" if spec.device == "auto" else spec.device, tokenizer=object()
    )
    swapper = bench.swapper()
    assert swapper.load("a") is True
    assert swapper.load("a", device="cpu") is False  # that is what auto came to
    assert swapper.load("a", device="cuda") is True
    assert swapper.status().device == "cuda"
    assert swapper.load("a") is False
    with swapper.lease("a") as lease:  # requests take it where it is
        assert lease.model.device == "cuda"


def test_without_auto_load_only_the_resident_model_is_served(bench: Bench) -> None:
    swapper = bench.swapper(auto_load=False)
    with pytest.raises(ModelNotLoaded, match="Model 'a' is not loaded"):
        swapper.lease("a")
    swapper.load("a")
    swapper.lease("a").release()
    with pytest.raises(ModelNotLoaded):
        swapper.lease("b")
    assert swapper.status().model == "a"


def test_without_auto_load_a_request_joins_a_load_that_was_asked_for(bench: Bench) -> None:
    swapper = bench.swapper(auto_load=False)
    bench.loader.hold["load"] = threading.Event()
    swapper.load("a", wait=False)
    bench.reached("load")
    call = bench.start(swapper.lease, "a")
    queued(swapper, a=2)
    bench.loader.hold["load"].set()
    with call.result(WAIT_S) as lease:
        assert lease.model.spec.name == "a"
    assert bench.loader.count("load") == 1


# Leaving the queue.


def test_a_timeout_leaves_the_queue_and_no_lease(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["load"] = threading.Event()
    with pytest.raises(Unavailable, match="did not become available") as caught:
        swapper.lease("a", timeout=0.01)
    assert caught.value.retry_after
    assert swapper.status().waiting == {}
    bench.loader.hold["load"].set()
    until(lambda: swapper.status().state in ("ready", "empty"))
    assert swapper.status().leases == 0


def test_cancellation_while_waiting_raises_at_once_and_leaks_nothing(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["load"] = threading.Event()
    gone = Cancellation()
    calls = [bench.start(swapper.lease, "a", cancellation=gone), bench.start(swapper.lease, "a")]
    queued(swapper, a=2)
    gone.cancel()
    with pytest.raises(ClientGone):
        calls[0].result(WAIT_S)
    bench.loader.hold["load"].set()
    lease = calls[1].result(WAIT_S)
    assert swapper.status().leases == 1
    lease.release()


def test_a_preparation_goes_on_for_those_who_come_later(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["prepare"] = threading.Event()
    with pytest.raises(Unavailable):
        swapper.lease("a", timeout=0.01)
    call = bench.start(swapper.lease, "a")
    queued(swapper, a=1)
    bench.loader.hold["prepare"].set()
    call.result(WAIT_S).release()
    assert bench.loader.count("prepare") == 1


def test_a_cancelled_caller_starts_nothing(bench: Bench) -> None:
    gone = Cancellation()
    gone.cancel()
    with pytest.raises(ClientGone):
        bench.swapper().lease("a", cancellation=gone)
    assert bench.loader.calls == []


def test_a_switch_that_nobody_waits_for_any_more_is_taken_back(bench: Bench) -> None:
    swapper = bench.swapper(swap_after_s=0)
    bench.loader.build = lambda spec: fake_model(spec, load_s=0.0, tokenizer=object())
    held = swapper.lease("a")
    gone = Cancellation()
    switch = bench.start(swapper.lease, "b", cancellation=gone)
    until(lambda: swapper.status().state == "draining")
    behind = bench.start(swapper.lease, "a")
    queued(swapper, a=1, b=1)
    gone.cancel()
    behind.result(WAIT_S).release()
    with pytest.raises(ClientGone):
        switch.result(WAIT_S)
    held.release()
    assert bench.ear.heard == [("load", "a")]


# Switching.


def test_the_old_model_serves_while_the_new_one_is_prepared_and_checked(bench: Bench) -> None:
    swapper = bench.swapper()
    swapper.lease("a").release()
    stages = ("prepare", "check_memory")
    for stage in stages:
        bench.loader.hold[stage, "b"] = threading.Event()
    call = bench.start(swapper.lease, "b")
    for stage in stages:
        bench.reached(stage, 2)
        assert swapper.status().state == "ready"
        assert swapper.status().loading == "b"
        with swapper.lease("a") as lease:
            assert not engine(lease).closed.is_set()
            bench.loader.hold[stage, "b"].set()
    call.result(WAIT_S).release()
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("load", "b"))


def test_a_long_preparation_does_not_keep_another_model_waiting(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["prepare", "b"] = threading.Event()
    slow = bench.start(swapper.lease, "b")
    bench.reached("prepare")
    swapper.lease("c").release()
    assert bench.loader.count("load", "c") == 1
    assert not slow.done()
    bench.loader.hold["prepare", "b"].set()
    slow.result(WAIT_S).release()


def test_eviction_waits_for_the_last_lease(bench: Bench) -> None:
    swapper = bench.swapper(swap_after_s=0)
    bench.loader.build = lambda spec: fake_model(spec, load_s=0.0, tokenizer=object())
    first, second = swapper.lease("a"), swapper.lease("a")
    old = engine(first)
    call = bench.start(swapper.lease, "b")
    until(lambda: swapper.status().state == "draining")
    first.release()
    assert not old.closed.is_set()
    second.release()
    call.result(WAIT_S).release()
    assert old.closed.is_set()
    assert old.closed_with is None  # nothing was running


@pytest.fixture
def compiled(bench: Bench) -> threading.Event:
    """Makes the first model that was loaded outdated, and those after it current."""
    compiled = threading.Event()

    def build(spec: ModelSpec) -> LoadedModel:
        is_first = not bench.loader.loaded
        return fake_model(
            spec, tokenizer=object(), is_outdated=compiled.is_set if is_first else bool
        )

    bench.loader.build = build
    return compiled


def test_an_outdated_model_is_loaded_anew_once_nobody_holds_it(
    bench: Bench, compiled: threading.Event
) -> None:
    swapper = bench.swapper()
    first, second = swapper.lease("a"), swapper.lease("a")
    compiled.set()
    swapper.wake()
    first.release()
    with swapper.lease("a") as still:  # it goes on serving meanwhile
        assert engine(still) is engine(second)
    assert bench.loader.count("load") == 1
    old = engine(second)
    second.release()
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("load", "a"))
    assert old.closed.is_set()
    assert old.closed_with is None
    with swapper.lease("a") as renewed:
        assert engine(renewed) is not old
    assert bench.loader.count("load") == 2


def test_a_model_that_becomes_outdated_at_rest_is_loaded_anew_at_once(
    bench: Bench, compiled: threading.Event
) -> None:
    swapper = bench.swapper()
    swapper.load("a")
    compiled.set()
    swapper.wake()
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("load", "a"))


def test_who_comes_while_a_model_is_loaded_anew_gets_it_also_without_auto_load(
    bench: Bench, compiled: threading.Event
) -> None:
    swapper = bench.swapper(auto_load=False)
    swapper.load("a")
    bench.reached("load")
    bench.loader.hold["load"] = threading.Event()
    compiled.set()
    swapper.wake()
    bench.reached("load")
    call = bench.start(swapper.lease, "a")
    queued(swapper, a=1)
    bench.loader.hold["load"].set()
    call.result(WAIT_S).release()
    assert bench.loader.count("load") == 2


def test_another_model_that_is_wanted_comes_before_the_renewal(
    bench: Bench, compiled: threading.Event
) -> None:
    swapper = bench.swapper(swap_after_s=0)
    lease = swapper.lease("a")
    call = bench.start(swapper.lease, "b")
    queued(swapper, b=1)
    compiled.set()
    swapper.wake()
    lease.release()
    other = call.result(WAIT_S)  # held: at rest it would be renewed as well
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("load", "b"))
    other.release()


def test_a_busy_resident_is_kept_until_the_other_has_waited_long_enough(bench: Bench) -> None:
    bench.loader.build = lambda spec: fake_model(spec, load_s=1.0, tokenizer=object())
    swapper = bench.swapper(swap_after_s=10)
    held = swapper.lease("a")
    call = bench.start(swapper.lease, "b")
    bench.reached("check_memory", 2)
    bench.clock.now += 9.9
    nudge(swapper)
    swapper.lease("a").release()
    assert swapper.status().state == "ready"
    bench.clock.now += 0.2
    nudge(swapper)
    until(lambda: swapper.status().state == "draining")
    behind = bench.start(swapper.lease, "a")
    queued(swapper, a=1, b=1)
    held.release()
    with call.result(WAIT_S) as lease:
        assert lease.model.spec.name == "b"
    behind.result(WAIT_S).release()


def test_a_new_model_that_others_go_on_asking_for_is_kept_for_a_while_but_not_for_ever(
    bench: Bench,
) -> None:
    bench.loader.build = lambda spec: fake_model(spec, load_s=1.0, tokenizer=object())
    swapper = bench.swapper(min_resident_s=5)
    held = swapper.lease("a")
    call = bench.start(swapper.lease, "b")
    bench.reached("check_memory", 2)
    for _ in range(9):
        bench.clock.now += 0.5
        swapper.lease("a").release()
        held.release()
        nudge(swapper)
        assert swapper.status().state == "ready"
    bench.clock.now += 0.6
    nudge(swapper)
    call.result(WAIT_S).release()


def test_a_model_that_nobody_goes_on_asking_for_gives_way_at_once(bench: Bench) -> None:
    swapper = bench.swapper(min_resident_s=5)
    held = swapper.lease("a")
    call = bench.start(swapper.lease, "b")
    bench.reached("check_memory", 2)
    held.release()
    call.result(WAIT_S).release()
    swapper.lease("a").release()


@pytest.mark.parametrize(("load_s", "hold_s"), [(2.0, 10.0), (100.0, 30.0)])
def test_a_load_is_held_for_five_times_its_cost_but_not_for_ever(
    bench: Bench, load_s: float, hold_s: float
) -> None:
    bench.loader.build = lambda spec: fake_model(spec, load_s=load_s, tokenizer=object())
    swapper = bench.swapper(swap_after_s=0)
    held = swapper.lease("a")
    call = bench.start(swapper.lease, "b")
    bench.reached("check_memory", 2)
    bench.clock.now += hold_s - 0.1
    nudge(swapper)
    assert swapper.status().state == "ready"
    bench.clock.now += 0.2
    nudge(swapper)
    until(lambda: swapper.status().state == "draining")
    held.release()
    call.result(WAIT_S).release()


def test_24_mixed_requests_over_two_models_need_two_loads(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["prepare"] = threading.Event()
    barrier = threading.Barrier(24)

    def ask(name: str) -> str:
        barrier.wait(WAIT_S)
        with swapper.lease(name) as lease:
            return lease.model.spec.name

    names = ["a", "b"] * 12
    calls = [bench.start(ask, name) for name in names]
    queued(swapper, a=12, b=12)
    bench.loader.hold["prepare"].set()
    assert [call.result(WAIT_S) for call in calls] == names
    assert bench.loader.count("load") == 2


def test_waiting_models_come_in_the_order_of_their_oldest_request(bench: Bench) -> None:
    bench.loader.build = lambda spec: fake_model(spec, load_s=0.0, tokenizer=object())
    swapper = bench.swapper()
    held = swapper.lease("a")
    second = bench.start(swapper.load, "c")
    bench.reached("check_memory", 2)
    bench.clock.now += 1
    third = bench.start(swapper.load, "b")
    bench.reached("check_memory", 1)
    held.release()
    second.result(WAIT_S)
    third.result(WAIT_S)
    until(lambda: len(loads(bench)) == 3)  # the listener hears of a load after its callers
    assert loads(bench) == ["a", "c", "b"]


def loads(bench: Bench) -> list[str]:
    """The models that the listener has heard of, in order."""
    return [name for event, name in bench.ear.heard if event == "load"]


def test_the_memory_is_checked_anew_when_another_model_has_become_resident(bench: Bench) -> None:
    swapper = bench.swapper()
    held = swapper.lease("a")
    calls = [bench.start(swapper.load, name) for name in ("b", "c")]
    bench.reached("check_memory", 3)
    held.release()
    for call in calls:
        call.result(WAIT_S)
    checks = [name for stage, name in bench.loader.calls if stage == "check_memory"]
    until(lambda: len(loads(bench)) == 3)
    assert len(checks) == 4
    assert checks[-1] == loads(bench)[-1]


def test_after_the_drain_time_running_sequences_end_with_a_clear_error(bench: Bench) -> None:
    swapper = bench.swapper(swap_after_s=0, drain_s=5)
    bench.loader.build = lambda spec: fake_model(spec, load_s=0.0, tokenizer=object())
    stuck = swapper.lease("a")
    old = engine(stuck)
    call = bench.start(swapper.lease, "b")
    until(lambda: swapper.status().state == "draining")
    bench.clock.now += 5.1
    nudge(swapper)
    with call.result(WAIT_S):
        assert isinstance(old.closed_with, ModelUnloaded)
        assert str(old.closed_with) == "Model 'a' was unloaded to load 'b'"
        stuck.release()  # late, and harmless
        assert swapper.status().leases == 1
    assert swapper.status().leases == 0


def test_a_busy_model_is_not_unloaded_for_idleness(bench: Bench) -> None:
    swapper = bench.swapper(idle_unload_s=60)
    held = swapper.lease("a")
    bench.clock.now += 100
    nudge(swapper)
    assert swapper.status().state == "ready"
    looks = bench.clock.looks
    held.release()  # idle from now on
    until(lambda: bench.clock.looks > looks)
    assert swapper.status().state == "ready"


def test_an_idle_model_is_unloaded(bench: Bench) -> None:
    swapper = bench.swapper(idle_unload_s=0.01, clock=time.monotonic)
    swapper.lease("a").release()
    bench.ear.wait_for(("load", "a"), ("evict", "a"))
    assert swapper.status().state == "empty"


# Unloading.


def test_evict_drains_first_and_says_whether_there_was_anything(bench: Bench) -> None:
    swapper = bench.swapper()
    assert swapper.evict() is False
    held = swapper.lease("a")
    assert swapper.evict("b") is False
    call = bench.start(swapper.evict, "a")
    until(lambda: swapper.status().state == "draining")
    assert not call.done()
    held.release()
    assert call.result(WAIT_S) is True
    assert swapper.status().state == "empty"


def test_forced_eviction_ends_running_sequences_at_once(bench: Bench) -> None:
    swapper = bench.swapper()
    held = swapper.lease("a")
    old = engine(held)
    assert swapper.evict(force=True) is True
    assert isinstance(old.closed_with, ModelUnloaded)
    held.release()
    assert swapper.status().leases == 0


def test_a_request_during_an_unload_brings_the_model_back_after_it(bench: Bench) -> None:
    swapper = bench.swapper()
    held = swapper.lease("a")
    assert swapper.evict(wait=False) is True
    call = bench.start(swapper.lease, "a")
    queued(swapper, a=1)
    held.release()
    call.result(WAIT_S).release()
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("load", "a"))


def test_what_was_unloaded_on_request_is_not_brought_back(bench: Bench) -> None:
    swapper = bench.swapper(swap_after_s=0)
    bench.loader.build = lambda spec: fake_model(spec, load_s=0.0, tokenizer=object())
    bench.loader.fail["load", "b"] = ModelLoadFailed("3 weights are missing")
    held = swapper.lease("a")
    call = bench.start(swapper.lease, "b")
    until(lambda: swapper.status().state == "draining")
    assert swapper.evict("a", wait=False) is True
    held.release()
    assert isinstance(call.exception(WAIT_S), ModelLoadFailed)
    swapper.load("c")
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("failed", "b"), ("load", "c"))


# Failures.


@pytest.mark.parametrize("stage", ["prepare", "check_memory"])
def test_a_failure_before_the_eviction_disturbs_nobody(bench: Bench, stage: str) -> None:
    swapper = bench.swapper()
    held = swapper.lease("a")
    bench.loader.fail[stage, "b"] = InsufficientMemory("needs 9 GiB, 2 GiB are free")
    for _ in range(3):
        with pytest.raises(InsufficientMemory, match="needs 9 GiB"):
            swapper.lease("b")
    assert not engine(held).closed.is_set()
    assert swapper.status().state == "ready"
    assert swapper.status().last_errors == {"b": "needs 9 GiB, 2 GiB are free"}
    held.release()
    del bench.loader.fail[stage, "b"]
    swapper.lease("b").release()  # no negative cache
    assert swapper.status().last_errors == {}


def test_a_failed_load_tells_everybody_and_brings_the_old_model_back(bench: Bench) -> None:
    swapper = bench.swapper()
    swapper.lease("a").release()
    bench.loader.fail["load", "b"] = ModelLoadFailed("3 weights are missing")
    bench.loader.hold["load", "b"] = threading.Event()
    calls = [bench.start(swapper.lease, "b") for _ in range(5)]
    queued(swapper, b=5)
    bench.loader.hold["load", "b"].set()
    errors = [call.exception(WAIT_S) for call in calls]
    assert {str(error) for error in errors} == {"3 weights are missing"}
    assert len({id(error) for error in errors}) == 5
    events = ("load", "a"), ("evict", "a"), ("failed", "b"), ("load", "a")
    bench.ear.wait_for(*events)
    assert swapper.status().model == "a"


def test_a_failed_load_is_not_repeated_for_a_minute(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.fail["load", "b"] = ModelLoadFailed("3 weights are missing")
    for _ in range(5):
        with pytest.raises(ModelLoadFailed) as caught:
            swapper.lease("b")
        assert caught.value.retry_after == 60
    assert "next try" in str(caught.value)
    assert bench.loader.count("load") == 1
    bench.clock.now += 45
    with pytest.raises(ModelLoadFailed, match="15 s"):
        swapper.lease("b")
    del bench.loader.fail["load", "b"]
    assert swapper.load("b") is True  # whoever asks for the load itself is not refused
    swapper.lease("b").release()


def test_a_model_of_other_files_is_not_refused_for_those_that_failed(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.fail["load", "b"] = ModelLoadFailed("3 weights are missing")
    with pytest.raises(ModelLoadFailed):
        swapper.lease("b")
    del bench.loader.fail["load", "b"]
    mended = fake_spec("b", source=PathSource(Path("elsewhere")))
    Swapper.lease(swapper, mended).release()
    with pytest.raises(ModelLoadFailed, match="next try"):
        swapper.lease("b")


def test_after_a_minute_a_failed_load_is_tried_again(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.fail["load", "b"] = ModelLoadFailed("3 weights are missing")
    with pytest.raises(ModelLoadFailed):
        swapper.lease("b")
    del bench.loader.fail["load", "b"]
    bench.clock.now += 60
    swapper.lease("b").release()


def test_when_the_old_model_cannot_come_back_either_the_next_request_is_served(
    bench: Bench,
) -> None:
    swapper = bench.swapper()
    swapper.lease("a").release()
    bench.loader.fail["load"] = ModelLoadFailed("the disk is gone")
    with pytest.raises(ModelLoadFailed):
        swapper.lease("b")
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("failed", "b"), ("failed", "a"))
    del bench.loader.fail["load"]
    swapper.lease("a").release()


@pytest.mark.parametrize("stage", FakeLoader.STAGES)
def test_an_unexpected_error_becomes_a_failed_load_and_is_logged(
    bench: Bench, stage: str, caplog: pytest.LogCaptureFixture
) -> None:
    swapper = bench.swapper()
    bench.loader.fail[stage] = ZeroDivisionError("oops")
    with pytest.raises(ModelLoadFailed, match="'a' could not be loaded: ZeroDivisionError: oops"):
        swapper.lease("a")
    bench.ear.wait_for(("failed", "a"))
    assert any(record.exc_info for record in caplog.records)
    del bench.loader.fail[stage]
    swapper.load("a")


def test_a_listener_or_an_engine_that_raises_does_no_harm(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(FakeEngine):
        def close(self, error: ApiError | None = None) -> None:
            raise ZeroDivisionError

    class Deaf(SwapperListener):
        def on_load(self, model_id: str, seconds: float) -> None:
            raise ZeroDivisionError

    bench.loader.build = lambda spec: fake_model(spec, Broken(), tokenizer=object())
    swapper = bench.swapper(listener=Deaf())
    swapper.lease("a").release()
    swapper.lease("b").release()
    assert "listener" in caplog.text


# Two at once.


def test_with_overlap_the_old_model_serves_until_the_new_one_is_there(bench: Bench) -> None:
    swapper = bench.swapper(overlap=True)
    bench.loader.fits_beside = True
    bench.loader.hold["load", "b"] = threading.Event()
    first = swapper.lease("a")
    old = engine(first)
    first.release()
    call = bench.start(swapper.lease, "b")
    bench.reached("load", 2)
    running = swapper.lease("a")
    bench.loader.hold["load", "b"].set()
    call.result(WAIT_S).release()
    assert not old.closed.is_set()
    assert swapper.status().model == "b"
    running.release()
    assert old.closed.wait(WAIT_S)
    bench.ear.wait_for(("load", "a"), ("load", "b"), ("evict", "a"))


def test_with_overlap_a_failed_load_costs_nothing(bench: Bench) -> None:
    swapper = bench.swapper(overlap=True)
    bench.loader.fits_beside = True
    swapper.lease("a").release()
    bench.loader.fail["load", "b"] = ModelLoadFailed("3 weights are missing")
    with pytest.raises(ModelLoadFailed):
        swapper.lease("b")
    swapper.lease("a").release()
    bench.ear.wait_for(("load", "a"), ("failed", "b"))


def test_with_overlap_two_that_do_not_fit_are_switched_as_ever(bench: Bench) -> None:
    swapper = bench.swapper(overlap=True)
    swapper.lease("a").release()
    swapper.lease("b").release()
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("load", "b"))


def test_with_overlap_the_memory_is_checked_again_right_before_the_load(bench: Bench) -> None:
    swapper = bench.swapper(overlap=True)
    bench.loader.fits_beside = True
    held = swapper.lease("a")
    call = bench.start(swapper.load, "b")
    bench.reached("check_memory", 2)
    bench.loader.fits_beside = False  # the resident's cache has grown
    held.release()
    call.result(WAIT_S)
    bench.ear.wait_for(("load", "a"), ("evict", "a"), ("load", "b"))


def test_the_memory_check_is_told_what_the_eviction_gives_back(bench: Bench) -> None:
    swapper = bench.swapper()
    swapper.lease("a").release()
    swapper.lease("b").release()
    assert bench.loader.freed_bytes == [0, 1000]


# The end.


def test_refuse_turns_new_requests_away_and_lets_the_others_finish(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["load"] = threading.Event()
    call = bench.start(swapper.lease, "a")
    bench.reached("load")
    swapper.refuse(ServerShuttingDown("going"))
    with pytest.raises(ServerShuttingDown):
        swapper.lease("a")
    bench.loader.hold["load"].set()
    call.result(WAIT_S).release()


def test_close_ends_waiters_and_running_sequences(bench: Bench) -> None:
    swapper = bench.swapper()
    held = swapper.lease("a")
    old = engine(held)
    bench.loader.hold["prepare", "b"] = threading.Event()
    call = bench.start(swapper.lease, "b")
    bench.reached("prepare", 2)
    swapper.close()
    swapper.close()
    with pytest.raises(ServerShuttingDown):
        call.result(WAIT_S)
    with pytest.raises(ServerShuttingDown):
        swapper.lease("a")
    assert isinstance(old.closed_with, ServerShuttingDown)
    held.release()
    assert swapper.evict() is False


def test_a_load_that_ends_after_close_is_closed_at_once(bench: Bench) -> None:
    swapper = bench.swapper()
    bench.loader.hold["load"] = threading.Event()
    call = bench.start(swapper.lease, "a")
    bench.reached("load")
    swapper.close()
    with pytest.raises(ServerShuttingDown):
        call.result(WAIT_S)
    bench.loader.hold["load"].set()
    until(lambda: bench.loader.loaded)
    late = bench.loader.loaded[0].engine
    assert isinstance(late, FakeEngine)
    assert late.closed.wait(WAIT_S)
    assert swapper.status().state == "empty"


# All of it at once.


class CountingLoader:
    """Fails now and then, and knows how many models are in memory."""

    def __init__(self, seed: int, fits_beside: bool) -> None:
        self.dice = random.Random(seed)
        self.fits_beside = fits_beside
        self.lock = threading.Lock()
        self.in_memory = 0
        self.most = 0
        self.loading = 0

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        return FakeLoader().prepare(spec, progress)

    def check_memory(self, spec: ModelSpec, files: ModelFiles, freed_bytes: int) -> bool:
        return self.fits_beside

    def load(self, spec: ModelSpec, files: ModelFiles, progress: Any) -> Any:
        with self.lock:
            self.loading += 1
            assert self.loading == 1, "two loads at once"
            self.in_memory += 1
            self.most = max(self.most, self.in_memory)
            fails = self.dice.random() < 0.1
            self.loading -= 1
        if fails:
            with self.lock:
                self.in_memory -= 1
            raise ModelLoadFailed("bad luck")
        return fake_model(spec, CountedEngine(self), load_s=0.0, tokenizer=object())


class CountedEngine(FakeEngine):
    def __init__(self, loader: CountingLoader) -> None:
        super().__init__()
        self.loader = loader

    def close(self, error: ApiError | None = None) -> None:
        with self.loader.lock:
            self.loader.in_memory -= not self.closed.is_set()
        super().close(error)


@pytest.mark.parametrize("overlap", [*slow(False), True])
def test_a_random_crowd_is_answered_rightly_and_leaves_nothing_behind(overlap: bool) -> None:
    loader = CountingLoader(seed=7, fits_beside=overlap)
    tick = iter(range(10**9))
    swapper = ByName(
        Registry(),
        loader,
        SwapRules(swap_after_s=40, drain_s=4000, min_resident_s=20, overlap=overlap),
        wait_s=WAIT_S,
        clock=lambda: next(tick) * 0.5,  # so that the hysteresis and the negative cache turn over
    )
    answers: list[str] = []

    def client(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(60):
            answers.append(one_request(swapper, dice))

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a caller was never answered"
    assert len(answers) == 16 * 60
    assert {"served", "ClientGone", "Unavailable", "ModelLoadFailed"} <= set(answers)
    until(lambda: not swapper.status().waiting)
    assert swapper.status().leases == 0
    assert loader.most <= 1 + overlap
    swapper.close()
    until(lambda: loader.in_memory == 0)


def one_request(swapper: Swapper, dice: random.Random) -> str:
    name = dice.choice("abc")
    cancellation = Cancellation()
    canceller = threading.Timer(dice.random() * 0.002, cancellation.cancel)
    if dice.random() < 0.2:
        canceller.start()
    try:
        timeout = dice.choice([None, None, None, 0.0005])
        if dice.random() < 0.03:
            swapper.evict(wait=False, force=dice.random() < 0.5)
        with swapper.lease(name, cancellation=cancellation, timeout=timeout) as lease:
            assert lease.model.spec.name == name
            return "served"
    except ApiError as error:
        return type(error).__name__
    finally:
        canceller.cancel()
        cancellation.cancel()
