"""The scheduler without torch: what runs where, whatever comes and goes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.reading import ask
from transformers_api.engine.base import TokenStream
from transformers_api.engine.scheduler import Scheduler, common_prefix
from transformers_api.engine.sequence import SampledToken, Sequence


class Rows:
    """A cache whose rows hold token ids, so that a test can see what attention would see."""

    reuses_prefixes = True
    bytes = budget_bytes = 0

    def __init__(self, rows: int, length: int, budget: int) -> None:
        self.data = [[None] * length for _ in range(rows)]
        self.budget = budget  # tokens
        self.length = 1

    def reserve(self, rows: int, length: int, kept: dict[int, int]) -> tuple[int, int] | None:
        """Longer rows are fewer rows, and the other way round.

        What does not fit is lost, and so is what was not said to be worth keeping.
        """
        if rows > len(self.data) or rows * length > self.budget:
            return None
        if rows * self.length > self.budget or length > self.length:
            self.length = length
        fitting = min(len(self.data), self.budget // self.length)
        for place, row in enumerate(self.data):
            left = min(kept.get(place, 0), self.length) if place < fitting else 0
            row[left:] = [None] * (len(row) - left)
        return fitting, self.length

    def copy(self, src: int, dst: int, length: int) -> None:
        self.data[dst][:length] = self.data[src][:length]

    def swap(self, a: int, b: int, length: int) -> None:
        row_a, row_b = self.data[a], self.data[b]
        row_a[:length], row_b[:length] = row_b[:length], row_a[:length]

    def wipe(self, row: int) -> None:
        self.data[row] = [None] * len(self.data[row])

    def forward(self, batch) -> None:
        for offset, seq in enumerate(batch.sequences):
            assert seq.slot == batch.first_slot + offset, "a batch is a contiguous range of rows"
            end = seq.num_cached + batch.width
            self.data[seq.slot][seq.num_cached : end] = seq.upcoming(batch.width)
            seen = seq.tokens[seq.start : seq.start + end]
            assert self.data[seq.slot][:end] == seen, "the row holds what the sequence sees"


def sequence(prompt, max_tokens, window=64, slides=False, client="") -> Sequence:
    return Sequence(
        replace(ask(prompt, max_tokens=max_tokens, temperature=0.0), client=client),
        TokenStream(1, lambda _: None),
        0,
        eos_token_ids=frozenset(),
        max_model_len=window,
        slides=slides,
    )


TALK = [1, 2, 0, 1, 1, 0, 2, 2, 1, 0] * 3
prompts = st.builds(  # many begin alike, as the turns of one conversation do
    lambda shared, own: TALK[:shared] + own,
    st.integers(0, 30),
    st.lists(st.integers(0, 2), min_size=1, max_size=6),
)
arrivals = st.lists(
    st.tuples(
        prompts,
        st.integers(1, 20),
        st.integers(0, 6),
        st.one_of(st.none(), st.integers(0, 30)),
        st.sampled_from([None, None, 5, 24]),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=300, deadline=None)
@given(
    arrivals,
    st.integers(1, 4),
    st.integers(1, 9),
    st.sampled_from([None, 1, 3]),
    st.sampled_from([64, 100, 256]),
)
def test_every_row_holds_its_sequence_whatever_comes_and_goes(requests, slots, chunk, busy, budget):
    """Prompts that begin alike, sequences that slide, clients that leave, too little memory."""
    cache = Rows(slots, 64, budget)
    scheduler = Scheduler(cache, slots, chunk, busy)
    due = [
        (step, sequence(p, n, window or 64, window is not None), leave)
        for p, n, step, leave, window in requests
    ]
    step = 0
    while scheduler.has_work or any(not seq.is_finished for _, seq, _ in due):
        for arrival, seq, leave in due:
            if arrival == step:
                scheduler.add(seq)
            if leave is not None and leave == step:
                seq.cancelled = True
        batch = scheduler.schedule()
        step += 1
        assert step < 20_000, "no progress"
        if batch is None:
            continue
        cache.forward(batch)
        ends = batch.reaches_end
        for seq in batch.sequences:
            seq.advance(batch.width, SampledToken(sum(seq.tokens) % 3) if ends else None)
        for seq in reversed(batch.sequences):
            if seq.is_finished:
                scheduler.finish(seq)
            else:
                scheduler.settle(seq)
        assert [seq.slot for seq in scheduler.running] == list(range(len(scheduler.running)))
        phases = [seq.is_prefilling for seq in scheduler.running]
        assert phases == sorted(phases), "those who decode come first"
    assert all(seq.is_finished for _, seq, _ in due)
    assert all(seq.cancelled or seq.num_output == seq.params.max_tokens for _, seq, _ in due)


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common_prefix_is_where_two_lists_part(a, b):
    shared = common_prefix(a, b)
    assert a[:shared] == b[:shared]
    assert shared in (len(a), len(b)) or a[shared] != b[shared]


def test_first_come_first_served_even_when_a_later_one_would_fit():
    scheduler = Scheduler(Rows(2, 64, 64), 2, 64)
    big, small = sequence([1] * 30, 30), sequence([1], 1)
    running = sequence([2], 3)
    for seq in (running, big, small):
        scheduler.add(seq)
    while not running.is_finished:
        batch = scheduler.schedule()
        assert batch.sequences == [running]
        running.advance(batch.width, SampledToken(1))
        scheduler.settle(running)
    scheduler.finish(running)
    assert scheduler.schedule().sequences == [big]


def steps(scheduler, count):
    """(sequences, width) of the next steps, which are done."""
    done = []
    for _ in range(count):
        batch = scheduler.schedule()
        done.append((batch.sequences, batch.width))
        ends = batch.reaches_end
        for seq in batch.sequences:
            seq.advance(batch.width, SampledToken(1) if ends else None)
        for seq in reversed(batch.sequences):
            scheduler.settle(seq)
    return done


def test_a_prompt_is_read_in_smaller_pieces_while_others_decode():
    scheduler = Scheduler(Rows(8, 512, 1 << 20), 8, prefill_chunk=100, busy_chunk=16)
    one, two = sequence([1] * 150, 90, 512), sequence([2] * 150, 90, 512)
    scheduler.add(one)
    assert [width for _, width in steps(scheduler, 3)] == [100, 50, 1]
    scheduler.add(two)
    assert steps(scheduler, 4) == [([two], 16), ([one], 1)] * 2


def test_the_more_decode_the_more_of_a_prompt_is_read_between_two_steps():
    """So that its share of the time stays what it is."""
    scheduler = Scheduler(Rows(9, 512, 1 << 20), 9, prefill_chunk=100, busy_chunk=4)
    for _ in range(8):
        scheduler.add(sequence([1], 90))
    steps(scheduler, 12)
    late = sequence([2] * 150, 9, 512)
    scheduler.add(late)
    assert ([late], 24) in steps(scheduler, 2)


def test_the_more_prompts_wait_the_more_is_read_between_two_steps():
    scheduler = Scheduler(Rows(5, 512, 1 << 20), 5, prefill_chunk=100, busy_chunk=16)
    scheduler.add(sequence([1], 90))
    steps(scheduler, 2)
    for token in range(2, 12):  # four of them can have a slot
        scheduler.add(sequence([token] * 150, 90, 512))
    assert [width for _, width in steps(scheduler, 3)] == [64, 1, 64]
    scheduler.waiting.clear()
    assert [width for _, width in steps(scheduler, 3)] == [1, 16, 1]


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = Scheduler(Rows(4, 512, 1 << 20), 4, prefill_chunk=100, busy_chunk=16)
    long, short, other = (sequence([n] * k, 90, 512) for n, k in ((1, 400), (2, 10), (3, 10)))
    scheduler.add(long)
    steps(scheduler, 1)
    scheduler.add(short)
    scheduler.add(other)
    read = [seqs[0] for seqs, width in steps(scheduler, 8) if width > 1]
    assert read.index(short) < 2
    assert read.count(long) > 1, "nor does the long one for many short ones"


def test_what_one_prompt_leaves_of_its_turn_is_the_next_ones():
    scheduler = Scheduler(Rows(4, 512, 1 << 20), 4, prefill_chunk=100, busy_chunk=32)
    one, two, three = (sequence([n] * 38, 90, 512) for n in (1, 2, 3))
    for seq in (one, two, three):
        scheduler.add(seq)
    assert [width for _, width in steps(scheduler, 7)] == [38, 26, 1, 12, 20, 1, 18]
