"""Leases on adapters: one base for all, checked before it is asked for, given back together."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.fakes import FakeLoader, fake_spec
from transformers_api.errors import (
    ClientGone,
    InsufficientMemory,
    ModelLoadFailed,
    ModelNotFound,
    ModelNotLoaded,
    ServerShuttingDown,
    Unavailable,
)
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import AdapterEntry, ModelSpec, PathSource
from transformers_api.serving.swap.adapters import AdapterSwapper
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.residency import SwapperListener

A, B = fake_spec("a"), fake_spec("b")
ADAPTERS = {
    name: AdapterEntry(name=name, files=PathSource(Path(name)), base=base.name).on(base)
    for name, base in (("a1", A), ("a2", A), ("b1", B))
}
SPECS = {"a": A, "b": B, **ADAPTERS}


class Registry:
    def resolve(self, model_id: str) -> ModelSpec:
        if model_id not in SPECS:
            raise ModelNotFound(model_id)
        return SPECS[model_id]


class Ear(SwapperListener):
    def __init__(self) -> None:
        self.failed: list[str] = []
        self.noted = threading.Event()

    def on_load_failed(self, model_id, error):
        self.failed.append(model_id)
        self.noted.set()


@pytest.fixture
def loader():
    return FakeLoader()


@pytest.fixture
def ear():
    return Ear()


@pytest.fixture
def make(loader, ear):
    swappers = []

    def make(**options):
        rules = SwapRules(swap_after_s=0.0, drain_s=10.0)
        swappers.append(
            AdapterSwapper(Registry(), loader, rules, **{"wait_s": 10.0, "listener": ear} | options)
        )
        return swappers[-1]

    yield make
    for swapper in swappers:
        swapper.close()


def test_base_and_adapters_share_one_load(make, loader):
    swapper = make()
    leases = [swapper.lease(SPECS[name]) for name in ("a1", "a", "a2", "a1")]
    assert [lease.model.spec.name for lease in leases] == ["a1", "a", "a2", "a1"]
    assert loader.count("load") == 1
    assert swapper.status().model == "a"
    assert swapper.status().leases == 4
    assert leases[0].model.template is leases[1].model.template
    assert len({lease.model.fingerprint for lease in leases}) == 3


def test_a_lease_gives_back_adapter_and_base_once(make):
    swapper = make()
    lease = swapper.lease(ADAPTERS["a1"])
    engine, base = lease.model.engine, swapper.resident()
    lease.release()
    lease.release()
    assert engine.closed.is_set()
    assert not base.engine.closed.is_set()
    assert swapper.status().leases == 0


def test_an_adapter_that_cannot_be_had_switches_nothing(make, loader, ear):
    swapper = make()
    swapper.lease(B).release()
    loader.fail["prepare_adapter", "a1"] = ModelLoadFailed("adapter_config.json: use_dora")
    with pytest.raises(ModelLoadFailed, match="use_dora"):
        swapper.lease(ADAPTERS["a1"])
    assert swapper.status().model == "b"
    assert swapper.status().last_errors == {"a1": "adapter_config.json: use_dora"}
    assert ear.failed == ["a1"]
    assert loader.count("prepare", "a") == 0
    del loader.fail["prepare_adapter", "a1"]
    swapper.lease(ADAPTERS["a1"]).release()
    assert swapper.status().last_errors == {}


def test_memory_for_base_and_adapter_is_looked_for_before_the_switch(make, loader):
    swapper = make()
    swapper.lease(B).release()
    resident = swapper.resident().bytes
    loader.fail["check_memory", "a"] = InsufficientMemory("no room")
    with pytest.raises(InsufficientMemory):
        swapper.lease(ADAPTERS["a1"])
    assert loader.freed_bytes[-1] == resident - 10
    assert swapper.status().model == "b"


def test_numbers_that_the_base_refuses_are_not_tried_again_at_once(make, loader):
    swapper = make()
    loader.fail["adapt", "a1"] = ModelLoadFailed("no layer")
    with pytest.raises(ModelLoadFailed, match="no layer"):
        swapper.lease(ADAPTERS["a1"])
    assert swapper.status().leases == 0
    with pytest.raises(ModelLoadFailed, match="the next try is possible in"):
        swapper.lease(ADAPTERS["a1"])
    assert loader.count("adapt") == 1
    del loader.fail["adapt", "a1"]
    mended = AdapterEntry(name="a1", files=PathSource(Path("elsewhere")), base="a").on(A)
    swapper.lease(mended).release()
    swapper.lease(ADAPTERS["a2"]).release()
    swapper.lease(A).release()


def test_who_waits_for_files_is_counted_shares_them_and_may_leave(make, loader):
    swapper = make()
    gate = loader.hold["prepare_adapter", "a1"] = threading.Event()
    leaving = Cancellation()
    with ThreadPoolExecutor(3) as pool:
        staying = [pool.submit(swapper.lease, ADAPTERS["a1"]) for _ in range(2)]
        gone = pool.submit(swapper.lease, ADAPTERS["a1"], cancellation=leaving)
        assert loader.entered["prepare_adapter"].acquire(timeout=30)
        leaving.cancel()
        with pytest.raises(ClientGone):
            gone.result(30)
        while swapper.status().waiting.get("a1") != 2:
            pass
        gate.set()
        for each in staying:
            each.result(30).release()
    assert loader.count("prepare_adapter") <= 2
    assert swapper.status().waiting == {}
    assert "a1" not in swapper.status().last_errors


def test_files_that_take_too_long_are_given_up(make, loader):
    swapper = make()
    gate = loader.hold["prepare_adapter", "a1"] = threading.Event()
    with pytest.raises(Unavailable, match="did not become available in time"):
        swapper.lease(ADAPTERS["a1"], timeout=0.01)
    gate.set()


def test_a_fault_while_files_are_looked_at_is_told_to_all(make, loader):
    swapper = make()
    loader.fail["prepare_adapter", "a1"] = ZeroDivisionError("oh")
    with pytest.raises(ModelLoadFailed, match="Model 'a1' could not be loaded: ZeroDivisionError"):
        swapper.lease(ADAPTERS["a1"])


def test_without_auto_load_an_adapter_needs_its_base_in_memory(make, loader):
    swapper = make(auto_load=False)
    with pytest.raises(ModelNotLoaded, match="a1"):
        swapper.lease(ADAPTERS["a1"], model_id="a1")
    assert loader.calls == []
    assert swapper.load("a1")
    swapper.lease(ADAPTERS["a2"]).release()
    with pytest.raises(ModelNotLoaded):
        swapper.lease(ADAPTERS["b1"])


def test_to_unload_an_adapter_leaves_its_base(make, loader):
    swapper = make()
    swapper.lease(ADAPTERS["a1"]).release()
    evicted = []
    swapper.resident().engine.evict_adapter = lambda name: evicted.append(name) or True
    assert swapper.evict("a1")
    assert not swapper.evict("b1")
    assert evicted == ["a1"]
    assert swapper.status().model == "a"
    assert swapper.evict("a")
    assert not swapper.evict("a1")


def test_a_load_in_the_background_says_why_it_failed(make, loader, ear):
    swapper = make()
    loader.fail["load", "a"] = ModelLoadFailed("broken")
    assert swapper.load("a1", wait=False)
    assert ear.noted.wait(30)
    swapper.status()
    assert "a" in ear.failed


def test_after_the_end_nothing_is_prepared(make, loader):
    swapper = make()
    swapper.close()
    with pytest.raises(ServerShuttingDown):
        swapper.lease(ADAPTERS["a1"])
    assert loader.calls == []
