"""Prompts share the engine by turns: of clients, and of short ones and long ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from tests.engine.test_scheduler import Rows, sequence
from transformers_api.engine.scheduler import Scheduler
from transformers_api.engine.sequence import SampledToken, Sequence

PIECE = 100  # tokens of a prompt in one step


def scheduler_of(slots: int) -> Scheduler:
    return Scheduler(Rows(slots, 4096, 1 << 20), slots, PIECE)


def long_prompt(client: str, token: int, tokens: int = 3000) -> Sequence:
    return sequence([token] * tokens, 1, 4096, client=client)


def pieces(scheduler: Scheduler, count: int) -> list[tuple[Sequence, int]]:
    """(prompt, tokens read) of the next pieces; whoever has been read writes one token."""
    read = []
    while len(read) < count and (batch := scheduler.schedule()) is not None:
        (seq,) = batch.sequences
        read.append((seq, batch.width))
        seq.advance(batch.width, SampledToken(1) if batch.ending else None)
        if seq.is_finished:
            scheduler.finish(seq)
        else:
            scheduler.settle(seq)
    return read


def by_client(read: list[tuple[Sequence, int]]) -> Counter[str]:
    tokens: Counter[str] = Counter()
    for seq, width in read:
        tokens[seq.client] += width
    return tokens


@pytest.mark.parametrize("clients", [("a",), ("a", "b", "c", "d", "e")])
@pytest.mark.parametrize("own", ["a", "z"])
@pytest.mark.parametrize("begun", range(1, 8))
def test_a_short_prompt_is_read_within_two_pieces_though_long_ones_came_first(clients, own, begun):
    scheduler = scheduler_of(16)
    for place in range(10):
        scheduler.add(long_prompt(clients[place % len(clients)], place))
    pieces(scheduler, begun)
    short = sequence([99] * 60, 1, 4096, client=own)
    scheduler.add(short)
    assert short in [seq for seq, _ in pieces(scheduler, 2)]


def test_also_where_every_client_reads_a_long_one():
    """The last slot is for those who soon give it back."""
    scheduler = scheduler_of(8)
    for place in range(12):
        scheduler.add(long_prompt(f"client {place}", place))
    pieces(scheduler, 40)
    short = sequence([99] * 60, 1, 4096, client="another")
    scheduler.add(short)
    assert short in [seq for seq, _ in pieces(scheduler, 2)]


def test_ten_long_prompts_of_a_client_leave_half_to_the_one_of_another():
    scheduler = scheduler_of(16)
    for place in range(10):
        scheduler.add(long_prompt("many", place))
    pieces(scheduler, 5)
    scheduler.add(long_prompt("one", 99))
    shares = by_client(pieces(scheduler, 40))
    assert abs(shares["many"] - shares["one"]) <= PIECE


def test_a_client_has_no_turns_saved_from_when_it_asked_for_nothing():
    scheduler = scheduler_of(16)
    scheduler.add(long_prompt("early", 1))
    pieces(scheduler, 10)
    scheduler.add(long_prompt("late", 2))
    shares = by_client(pieces(scheduler, 10))
    assert shares["early"] == shares["late"]


def test_prompts_of_one_client_are_read_one_after_the_other():
    """All at once would be the last to be done, each of them."""
    scheduler = scheduler_of(16)
    first, second = long_prompt("a", 1, 1000), long_prompt("a", 2, 1000)
    scheduler.add(first)
    scheduler.add(second)
    assert [seq for seq, _ in pieces(scheduler, 20)] == [first] * 10 + [second] * 10


def test_a_long_prompt_has_half_of_the_pieces_beside_short_ones_without_end():
    scheduler = scheduler_of(16)
    long = long_prompt("a", 1)
    scheduler.add(long)
    read = []
    for place in range(2, 60):
        scheduler.add(sequence([place] * 60, 1, 4096, client="a"))
        read += pieces(scheduler, 1)
    assert sum(seq is long for seq, _ in read) >= len(read) // 2


def test_a_prompt_of_middle_length_does_not_wait_for_a_longer_one():
    scheduler = scheduler_of(16)
    scheduler.add(long_prompt("a", 1))
    pieces(scheduler, 3)
    middle = long_prompt("a", 2, 500)
    scheduler.add(middle)
    assert middle in [seq for seq, _ in pieces(scheduler, 10) if seq.is_finished]


def test_a_prompt_that_is_mostly_in_the_cache_is_a_short_one():
    scheduler = scheduler_of(16)
    turns = list(range(2000))
    scheduler.add(sequence(turns, 1, 4096))
    pieces(scheduler, 20)
    scheduler.add(long_prompt("a", 1))
    pieces(scheduler, 3)
    follow_up = sequence([*turns, 7, 7, 7], 1, 4096)
    scheduler.add(follow_up)
    assert follow_up in [seq for seq, _ in pieces(scheduler, 2)]


@pytest.mark.parametrize("clients", [("a",), ("a", "b")])
def test_a_prompt_that_many_ask_at_once_is_read_once(clients):
    scheduler = scheduler_of(16)
    for place in range(8):
        scheduler.add(sequence(list(range(900)), 1, 4096, client=clients[place % len(clients)]))
    read = pieces(scheduler, 100)
    assert sum(width for _, width in read) == 900 + 7


def test_prompts_that_begin_alike_share_what_they_begin_with():
    scheduler = scheduler_of(16)
    document = list(range(1000))
    for place in range(4):
        scheduler.add(sequence([*document, *[2000 + place] * 50], 1, 4096, client=str(place)))
    read = pieces(scheduler, 100)
    assert sum(width for _, width in read) == 1000 + 4 * 50


def test_pieces_of_scored_prompts_are_half_as_long():
    scheduler = Scheduler(Rows(4, 4096, 1 << 20), 4, PIECE, costly_context=1 << 20)
    scored = sequence([1] * 200, 1, 4096)
    scored.params = replace(scored.params, prompt_logprobs=0)
    scheduler.add(scored)
    assert [width for _, width in pieces(scheduler, 9)] == [50] * 4


def test_pieces_are_shorter_where_more_comes_before_them():
    """So that all take about as long: attention looks at all of it."""
    scheduler = Scheduler(Rows(4, 4096, 1 << 20), 4, PIECE, costly_context=500)
    scheduler.add(long_prompt("a", 1))
    widths = [width for _, width in pieces(scheduler, 200)]
    assert sum(widths) == 3000
    done = 0
    for width in widths[:-1]:
        assert width * (500 + done) <= PIECE * 500 + 500 + done or width == 16
        done += width
