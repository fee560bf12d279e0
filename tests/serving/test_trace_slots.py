"""Places for traces: so many at once, and a line of those who wait."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.metrics_app import wait_for
from transformers_api.errors import ClientGone, TraceBusy
from transformers_api.serving.inspect.trace_slots import LIGHT, WHOLE, TraceSlots
from transformers_api.serving.limits.cancellation import Cancellation


def test_as_many_as_may_be_traced_and_no_more():
    slots = TraceSlots()
    first, _ = slots.take(2), slots.take(2)
    with pytest.raises(TraceBusy) as caught:
        slots.take(2)
    assert caught.value.retry_after == 1
    first()
    slots.take(2)


def test_who_comes_too_many_hears_how_long_traces_have_been_taking():
    now = [0.0]
    slots = TraceSlots(lambda: now[0])
    for _ in range(3):
        end = slots.take(1)
        now[0] += 5.0
        end()
    slots.take(1)
    now[0] += 1.0
    with pytest.raises(TraceBusy) as caught:
        slots.take(1)
    assert caught.value.retry_after == 6  # three in 16 seconds


def test_a_place_is_given_back_once_however_often():
    slots = TraceSlots()
    first, _ = slots.take(2), slots.take(2)
    barrier = threading.Barrier(8)

    def end():
        barrier.wait()
        first()

    threads = [threading.Thread(target=end) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    slots.take(2)
    with pytest.raises(TraceBusy):
        slots.take(2)


def test_places_are_given_in_the_order_of_the_line_and_a_large_one_is_not_passed_by():
    slots, order = TraceSlots(), []
    running = [slots.take(1, LIGHT) for _ in range(8)]

    def ask(name, cost):
        end = slots.take(1, cost, waiting=8)
        order.append(name)
        end()

    with ThreadPoolExecutor(3) as pool:
        asked = []
        for place, (name, cost) in enumerate(
            [("large", WHOLE), ("small", LIGHT), ("other", LIGHT)]
        ):
            asked.append(pool.submit(ask, name, cost))
            wait_for(lambda place=place: len(slots) == place + 1)
        for end in running[:7]:
            end()
        assert order == []  # there is room for the small ones
        running[7]()
        for each in asked:
            each.result(20)
    assert order[0] == "large"
    assert sorted(order[1:]) == ["other", "small"]


def test_who_leaves_the_line_makes_way():
    slots, cancellation = TraceSlots(), Cancellation()
    first = slots.take(1)
    with ThreadPoolExecutor(2) as pool:
        gone = pool.submit(slots.take, 1, WHOLE, waiting=2, cancellation=cancellation)
        wait_for(lambda: len(slots) == 1)
        stays = pool.submit(slots.take, 1, LIGHT, waiting=2)
        wait_for(lambda: len(slots) == 2)
        cancellation.cancel()
        with pytest.raises(ClientGone):
            gone.result(20)
        first()
        stays.result(20)()
    slots.take(1)


def test_the_line_is_bounded():
    slots = TraceSlots()
    first = slots.take(1)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(slots.take, 1, waiting=1)
        wait_for(lambda: len(slots) == 1)
        with pytest.raises(TraceBusy):
            slots.take(1, waiting=1)
        first()
        waits.result(20)
