"""How many threads torch has beside other programs."""

from __future__ import annotations

import threading

import pytest
import torch

from transformers_api.engine import sharing
from transformers_api.engine.sharing import LONGEST_PAUSE_S, PAUSE_S, SharingRunner, thread_waits


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Machine:
    """Passes of 150 ms with ``free`` cores: every thread too many waits all the time."""

    cache = None

    def __init__(self, free: int):
        self.free = free
        self.now, self.waited = 0.0, 0.0
        self.runner = SharingRunner(self, lambda: self.now, lambda: {"1": self.waited})

    def forward(self, batch, keep=1):
        self.now += 0.15
        self.waited += 0.15 * max(0, torch.get_num_threads() - self.free)
        return batch, keep

    def threads(self, passes: int) -> list[int]:
        """After each pass."""
        seen = []
        for _ in range(passes):
            assert self.runner.forward("batch", 3) == ("batch", 3)
            seen.append(torch.get_num_threads())
        return seen


@pytest.mark.usefixtures("four_threads")
def test_alone_torch_keeps_its_threads():
    assert set(Machine(free=4).threads(100)) == {4}


@pytest.mark.usefixtures("four_threads")
def test_beside_others_it_has_as_many_as_find_a_core():
    machine = Machine(free=2)
    assert machine.threads(3) == [3, 2, 2]
    machine.free = 0
    assert machine.threads(3) == [1, 1, 1]


@pytest.mark.usefixtures("four_threads")
def test_it_gets_them_back_when_the_others_are_gone():
    machine = Machine(free=3)
    machine.threads(20)
    machine.free = 4
    assert 4 in machine.threads(round(PAUSE_S * 8 / 0.15) + 2)
    assert set(machine.threads(100)) == {4}


@pytest.mark.usefixtures("four_threads")
def test_it_tries_less_often_the_longer_the_others_stay():
    machine = Machine(free=3)
    seen = machine.threads(1000)
    tried = [index for index, threads in enumerate(seen) if threads == 4]
    assert all(seen[index + 1] == 3 for index in tried)
    assert 0.15 * (tried[-1] - tried[-2]) == pytest.approx(LONGEST_PAUSE_S, abs=0.5)


@pytest.mark.usefixtures("four_threads")
def test_a_short_pass_is_not_judged_by_itself():
    machine = Machine(free=3)
    machine.runner = SharingRunner(
        machine, lambda: machine.now / 10, lambda: {"1": machine.waited / 10}
    )
    assert machine.threads(8) == [4] * 6 + [3] * 2


@pytest.mark.usefixtures("four_threads")
def test_threads_that_came_or_went_meanwhile_are_left_out():
    waits = iter([{"1": 0.0, "2": 900.0}, {"1": 0.0, "3": 900.0}, {}])
    machine = Machine(free=4)
    machine.runner = SharingRunner(machine, lambda: machine.now, lambda: next(waits))
    assert machine.threads(2) == [4, 4]


def test_only_this_thread_and_those_of_libraries_are_looked_at():
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        found = thread_waits()
    finally:
        ended.set()
        other.join()
    assert str(threading.get_native_id()) in found
    assert str(other.native_id) not in found
    assert all(seconds >= 0 for seconds in found.values())


def test_where_the_system_does_not_tell_nobody_waits(monkeypatch, tmp_path):
    monkeypatch.setattr(sharing, "TASKS", tmp_path / "absent")
    assert thread_waits() == {}
