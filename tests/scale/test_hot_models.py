"""A model with replicas of its own: always some, more while many ask for it."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter

from tests.scale.conftest import OF_HOT, wait_for


def test_a_model_with_replicas_of_its_own_is_in_memory_before_anybody_asks(cluster, front):
    def holders() -> list[int]:
        return [each["pid"] for each in front.all_replicas() if each["model"] == "hot"]

    # A machine may have left just before, and the status is a second old.
    wait_for(lambda: len(holders()) == 1 and holders() == cluster.pids(OF_HOT))
    (own,) = holders()
    for model in ("hot", "one", "two"):
        assert isinstance(front.chat(model), dict)
    wait_for(lambda: {"one", "two"} <= {each["model"] for each in front.all_replicas()})
    assert holders() == cluster.pids(OF_HOT) == [own]


def test_its_replica_comes_back_with_the_model(cluster, front, measured):
    (own,) = cluster.pids(OF_HOT)
    os.kill(own, signal.SIGKILL)
    killed = time.monotonic()
    assert isinstance(front.chat("hot"), dict)
    measured(f"its only replica killed: the next answer after {time.monotonic() - killed:.1f} s")
    (back,) = cluster.pids(OF_HOT)
    assert back != own
    wait_for(lambda: back in [each["pid"] for each in front.all_replicas()])
    (swaps,) = (each["swaps"] for each in front.all_replicas() if each["pid"] == back)
    assert swaps == 1


def test_it_has_more_of_them_while_many_ask(cluster, front, measured):
    wait_for(lambda: len(cluster.pids(OF_HOT)) == 1)
    began = time.monotonic()
    answers: list[str] = []

    def is_held_twice() -> bool:
        streams = [front.stream("hot", 1000) for _ in range(12)]
        answers.extend(stream.end() for stream in streams)
        return sum(each["model"] == "hot" for each in front.all_replicas()) == 2

    wait_for(is_held_twice)
    measured(f"a second replica after {time.monotonic() - began:.0f} s of 12 streams at once")
    assert Counter(answers) == {"done": len(answers)}
    assert len(front.replicas()) == 2


def test_a_model_of_all_is_taken_by_a_second_replica_where_the_first_is_full(front):
    for model in ("one", "two", "one"):
        front.chat(model)
    wait_for(lambda: Counter(each["model"] for each in front.replicas()) == {"one": 1, "two": 1})
    streams = [front.stream("one", 1500) for _ in range(18)]  # MAX_INFLIGHT is 16
    wait_for(lambda: sum(stream.has_begun() for stream in streams) >= 16)
    streams += [front.stream("one", 300) for _ in range(4)]
    wait_for(lambda: [each["model"] for each in front.replicas()] == ["one", "one"])
    assert Counter(stream.end() for stream in streams) == {"done": 22}
    front.chat("two")  # and a model that others want finds a place again
    wait_for(lambda: {each["model"] for each in front.replicas()} == {"one", "two"})
