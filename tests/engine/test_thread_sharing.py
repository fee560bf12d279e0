"""How many threads torch has beside other programs."""

from __future__ import annotations

import math
import os
import threading

import pytest
import torch

from transformers_api.engine.runners import thread_sharing
from transformers_api.engine.runners.thread_sharing import (
    LONGEST_PAUSE_S,
    PAUSE_S,
    SharingRunner,
    idle_s,
    thread_waits,
)


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


class Machine:
    """Passes of 150 ms with ``free`` cores: every thread too many waits all the time.

    Cores that are ``unused`` are told of, and not used by others.
    """

    cache = None

    def __init__(self, free: int):
        self.free, self.unused = free, 0
        self.now, self.waited, self.idle = 0.0, 0.0, 0.0
        self.runner = self.watched()

    def watched(self, **given):
        seen = {
            "clock": lambda: self.now,
            "waits": lambda: {"1": self.waited},
            "idle": lambda: self.idle,
        }
        return SharingRunner(self, **(seen | given))

    def forward(self, batch, keep=1):
        self.pass_time(0.15)
        self.waited += 0.15 * max(0, torch.get_num_threads() - self.free)
        return batch, keep

    def pass_time(self, seconds):
        self.now += seconds
        self.idle += seconds * self.unused

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
    machine.free, machine.unused = 4, 0.5
    assert 4 in machine.threads(round(PAUSE_S * 8 / 0.15) + 2)
    assert set(machine.threads(100)) == {4}


@pytest.mark.usefixtures("four_threads")
def test_it_tries_less_often_the_longer_the_others_stay():
    machine = Machine(free=3)
    machine.unused = 0.5
    seen = machine.threads(1000)
    tried = [index for index, threads in enumerate(seen) if threads == 4]
    assert all(seen[index + 1] == 3 for index in tried)
    assert 0.15 * (tried[-1] - tried[-2]) == pytest.approx(LONGEST_PAUSE_S, abs=0.5)


@pytest.mark.usefixtures("four_threads")
def test_it_tries_none_while_every_core_is_busy():
    assert set(Machine(free=3).threads(1000)) == {3}


@pytest.mark.usefixtures("four_threads")
def test_where_nobody_tells_of_idle_cores_it_tries_as_well():
    machine = Machine(free=3)
    machine.idle = math.nan
    assert {3, 4} <= set(machine.threads(round(2 * PAUSE_S / 0.15)))


@pytest.mark.usefixtures("four_threads")
def test_a_short_pass_is_not_judged_by_itself():
    machine = Machine(free=3)
    machine.runner = machine.watched(
        clock=lambda: machine.now / 10, waits=lambda: {"1": machine.waited / 10}
    )
    assert machine.threads(8) == [4] * 6 + [3] * 2


@pytest.mark.usefixtures("four_threads")
def test_threads_that_came_or_went_meanwhile_are_left_out():
    waits = iter([{"1": 0.0, "2": 900.0}, {"1": 0.0, "3": 900.0}, {}, {"3": 900.0}, {}])
    machine = Machine(free=4)
    machine.runner = machine.watched(waits=lambda: next(waits))
    assert machine.threads(2) == [4, 4]


@pytest.mark.usefixtures("four_threads")
def test_a_core_that_is_seen_to_be_idle_is_used_at_once():
    machine = Machine(free=2)
    machine.threads(3)
    machine.free, machine.unused = 4, 1
    assert machine.threads(2) == [3, 4]


@pytest.mark.usefixtures("four_threads")
def test_cores_that_were_idle_because_nobody_asked_are_no_sign():
    machine = Machine(free=2)
    machine.threads(3)
    machine.unused = 2  # its own, while it has nothing to do
    machine.pass_time(PAUSE_S / 2)
    machine.unused = 0
    assert machine.threads(1) == [2]


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


def test_where_the_system_does_not_tell_nobody_waits_and_no_core_is_known_to_be_idle(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(thread_sharing, "TASKS", tmp_path / "absent")
    monkeypatch.setattr(thread_sharing, "CORES", tmp_path / "absent")
    assert thread_waits() == {}
    assert math.isnan(idle_s())


def test_the_idle_time_of_cores_is_read_where_linux_tells_it(monkeypatch, tmp_path):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 3})
    told = tmp_path / "stat"
    rows = [f"cpu{number} 5 6 7 {1000 * number} 8 9" for number in range(4)]
    told.write_text("\n".join(["cpu 5 6 7 6000 8 9", *rows, "ctxt 77"]))
    monkeypatch.setattr(thread_sharing, "CORES", told)
    assert idle_s() == pytest.approx(4000 / os.sysconf("SC_CLK_TCK"))
