"""The scheduler without torch: what runs where, whatever comes and goes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.reading import ask
from transformers_api.engine.base import TokenStream
from transformers_api.engine.cached_rows import common_prefix
from transformers_api.engine.scheduler import Scheduler
from transformers_api.engine.sequence import SampledToken, Sequence


class Rows:
    """A cache whose rows hold token ids, so that a test can see what attention would see."""

    reuses_prefixes = in_pieces = True
    bytes = budget_bytes = 0

    def __init__(self, rows: int, length: int, budget: int, mixes: bool = False) -> None:
        self.data = [[None] * length for _ in range(rows)]
        self.budget = budget  # tokens
        self.mixes = mixes  # reads a batch of any sequences and widths
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
        if not self.mixes:
            slots = [seq.slot for seq in batch.sequences]
            assert slots == list(range(slots[0], slots[0] + len(slots))), "neighbours"
            assert len(set(batch.widths)) == 1
        for seq, width in zip(batch.sequences, batch.widths, strict=True):
            end = seq.num_cached + width
            self.data[seq.slot][seq.num_cached : end] = seq.upcoming(width)
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
    st.booleans(),
    st.sampled_from([64, 100, 256]),
)
def test_every_row_holds_its_sequence_whatever_comes_and_goes(
    requests, slots, chunk, mixes, budget
):
    """Prompts that begin alike, sequences that slide, clients that leave, too little memory."""
    cache = Rows(slots, 64, budget, mixes)
    scheduler = Scheduler(cache, slots, chunk, mixes=mixes)
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
        scheduler.budget.times.observe(scheduler.budget.load_of(batch), 1 + batch.tokens)
        for seq, width, ends in zip(batch.sequences, batch.widths, batch.ends, strict=True):
            seq.advance(width, SampledToken(sum(seq.tokens) % 3) if ends else None)
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
        running.advance(*batch.widths, SampledToken(1))
        scheduler.settle(running)
    scheduler.finish(running)
    assert scheduler.schedule().sequences == [big]


def timed(slots, seconds, **options):
    """A scheduler whose passes of n tokens take ``seconds(n)``."""
    options = {"prefill_chunk": 100} | options
    scheduler = Scheduler(Rows(slots, 512, 1 << 20), slots, **options)
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        scheduler.budget.times.observe(tokens, seconds(tokens))
    return scheduler


def weights_or_tokens(tokens):
    """A pass takes 10 to read the weights, and 1 a token where that is more."""
    return max(10, tokens)


def steps(scheduler, count):
    """(sequences, widths) of the next steps, which are done."""
    done = []
    for _ in range(count):
        batch = scheduler.schedule()
        done.append((batch.sequences, batch.widths))
        for seq, width, ends in zip(batch.sequences, batch.widths, batch.ends, strict=True):
            seq.advance(width, SampledToken(1) if ends else None)
        for seq in reversed(batch.sequences):
            scheduler.settle(seq)
    return done


def decoding_of(scheduler, count, tokens=7):
    """So many sequences that have been read and decode, each at least so many tokens by now."""
    sequences = [sequence([token], 300, 512) for token in range(count)]
    for seq in sequences:
        scheduler.add(seq)
    while any(seq.num_output < tokens for seq in sequences):
        steps(scheduler, 1)
    return sequences


def test_a_piece_of_a_prompt_takes_twice_the_time_of_a_token_between_two_steps():
    scheduler = timed(8, weights_or_tokens)
    one, two = sequence([1] * 150, 90, 512), sequence([2] * 150, 90, 512)
    scheduler.add(one)
    assert [widths for _, widths in steps(scheduler, 7)] == [[100], [50], *[[1]] * 5]
    scheduler.add(two)
    for _ in range(2):
        (of_two, (width,)), of_one = steps(scheduler, 2)
        assert (of_two, of_one) == ([two], ([one], [1]))
        assert 20 <= width <= 21, "a little was saved"


def test_a_mixed_pass_reads_what_fits_into_the_time():
    scheduler = timed(8, weights_or_tokens, mixes=True)
    one, two = sequence([1] * 150, 90, 512), sequence([2] * 150, 90, 512)
    scheduler.add(one)
    assert [widths for _, widths in steps(scheduler, 7)] == [[100], [50], *[[1]] * 5]
    scheduler.add(two)
    for both, (one_token, width) in steps(scheduler, 2):
        assert (both, one_token) == ([one, two], 1)
        assert 29 <= width <= 30, "10 for a step, 20 for a prompt, and a little that was saved"


@pytest.mark.parametrize("decoding", [40, 60, 90])
def test_a_mixed_pass_takes_half_as_long_again_as_a_step_of_many(decoding):
    scheduler = timed(100, weights_or_tokens, mixes=True)
    decoding_of(scheduler, decoding)
    scheduler.add(sequence([200] * 500, 9, 512))
    lengths = [sum(widths) for _, widths in steps(scheduler, 8)]
    assert all(1.3 * decoding < length < 1.6 * decoding for length in lengths[2:])


def test_a_short_prompt_is_read_at_once_if_there_was_none_for_a_while():
    scheduler = timed(64, weights_or_tokens, mixes=True)
    decoding_of(scheduler, 40)
    steps(scheduler, 80)
    read = []
    for token in range(8):
        scheduler.add(sequence([100 + token] * 60, 90, 512))
        ((_, widths),) = steps(scheduler, 1)
        read.append(sum(widths) - len(widths) + 1)
    assert read[0] == 60
    assert max(read[3:]) < 30, "those who decode wait seldom"


@pytest.mark.parametrize(
    ("decoding", "waiting", "most"), [(1, 1, 29), (1, 2, 49), (1, 4, 89), (8, 4, 22), (8, 6, 100)]
)
def test_few_who_decode_wait_for_many_prompts(decoding, waiting, most):
    scheduler = timed(16, weights_or_tokens, mixes=True)
    decoders = decoding_of(scheduler, decoding)
    for token in range(waiting):
        scheduler.add(sequence([100 + token] * 150, 90, 512))
    ((sequences, widths),) = steps(scheduler, 1)
    assert set(sequences[:-1]) == set(decoders)
    assert most - 1 <= widths[-1] <= most + decoding + 1, "a few that were saved"


def test_answers_that_have_just_begun_wait_a_few_times_for_prompts_that_came_with_them():
    scheduler = timed(64, weights_or_tokens, mixes=True)
    together = [sequence([token] * 40, 90, 512) for token in range(24)]
    for seq in together:
        scheduler.add(seq)
    steps(scheduler, 1)
    first = next(seq for seq in together if seq.num_output)
    waits, spent = [], 0
    while first.num_output < 60:
        output = first.num_output
        ((_, widths),) = steps(scheduler, 1)
        spent += max(10, sum(widths))
        if first.num_output > output:
            waits.append(spent)
            spent = 0
    assert [wait > 60 for wait in waits] == [True] * 5 + [False] * (len(waits) - 5)
    assert max(waits) < 2 * 100 + 24, "two pieces of a prompt, and a step of all"
    assert max(waits[1:5]) < 1.2 * min(waits[1:5]), "each as long as the others"
    assert max(waits[5:]) < 2 * 24, "a step of all, and prompts for less than another"


def test_an_answer_on_its_way_does_not_wait_for_answers_that_begin_again_and_again():
    scheduler = timed(64, weights_or_tokens, mixes=True)
    others = decoding_of(scheduler, 12)
    waits, spent = [], 0
    for number in range(300):
        if len(scheduler.waiting) < 2:  # short ones, and now and then a long prompt
            scheduler.add(sequence([20 + number] * (9 if number % 8 else 90), 90, 512))
        output = others[0].num_output
        ((sequences, widths),) = steps(scheduler, 1)
        for seq in {*sequences} - {*others}:
            if seq.num_output > seq.prompt_len % 4:
                scheduler.finish(seq)
        spent += max(10, sum(widths))
        if others[0].num_output > output:
            waits.append(spent)
            spent = 0
    step = 12 + 4  # and some that have begun
    most = step + 2 * 10 + 2  # two passes of a token more, and a few that were saved
    assert sorted(waits)[len(waits) * 19 // 20] <= most
    assert max(waits) <= most + step, "a short prompt now and then"


def test_short_prompts_share_a_pass_that_takes_as_long_for_one():
    scheduler = timed(8, weights_or_tokens, mixes=True)
    prompts = [sequence([token] * 8, 90, 512) for token in range(4)]
    for seq in prompts:
        scheduler.add(seq)
    assert steps(scheduler, 1) == [(prompts[:2], [8, 8])]


@pytest.mark.parametrize(("waiting", "together"), [(2, 1), (8, 2), (32, 4)])
def test_prompts_are_read_in_groups_where_a_pass_takes_long_whatever_it_reads(waiting, together):
    scheduler = timed(64, lambda tokens: 40 + tokens, mixes=True, prefill_chunk=256)
    for token in range(waiting):
        scheduler.add(sequence([token] * 60, 90, 512))
    ((_, widths),) = steps(scheduler, 1)
    assert sum(width == 60 for width in widths) == together


def test_a_prompt_whose_scores_are_asked_for_has_its_passes_to_itself():
    scheduler = timed(8, weights_or_tokens, mixes=True)
    (one,) = decoding_of(scheduler, 1)
    scored, plain = sequence([2] * 40, 9, 512), sequence([3] * 12, 9, 512)
    scored.params = replace(scored.params, prompt_logprobs=0)
    scheduler.add(scored)
    scheduler.add(plain)
    done = steps(scheduler, 12)
    assert all(sequences == [scored] for sequences, _ in done if scored in sequences[:1])
    assert {len(sequences) for sequences, _ in done if scored in sequences and one in sequences}
    assert not scored.is_prefilling
    assert not plain.is_prefilling


def test_a_short_prompt_does_not_wait_for_a_long_one():
    scheduler = timed(4, weights_or_tokens)
    long, short, other = (sequence([n] * k, 90, 512) for n, k in ((1, 400), (2, 10), (3, 10)))
    scheduler.add(long)
    steps(scheduler, 1)
    scheduler.add(short)
    scheduler.add(other)
    read = [seqs[0] for seqs, widths in steps(scheduler, 8) if widths != [1] * len(widths)]
    assert read.index(short) < 2
    assert read.count(long) > 1, "nor does the long one for many short ones"


def test_before_a_pass_was_timed_prompts_are_read_nevertheless():
    scheduler = Scheduler(Rows(4, 512, 1 << 20), 4, 100, mixes=True)
    scheduler.add(sequence([1] * 30, 90, 512))
    steps(scheduler, 2)
    scheduler.add(sequence([2] * 30, 90, 512))
    assert [widths for _, widths in steps(scheduler, 1)] == [[1, 30]]


def alone(tokens, pass_s=0.01, token_s=0.00025, **options):
    """The scheduler of a prompt that is alone, on a machine of such times, and the prompt."""
    options = {"prefill_chunk": 256, "prefill_alone": 1024} | options
    scheduler = timed(4, lambda n: pass_s + n * token_s, mixes=True, **options)
    prompt = sequence([1] * tokens, 9, 4096)
    scheduler.add(prompt)
    return scheduler, prompt


@pytest.mark.parametrize(
    ("tokens", "widths"), [(300, [300]), (800, [800]), (1000, [500, 500]), (2000, [667, 667, 666])]
)
def test_a_prompt_that_is_alone_is_read_in_few_passes_that_are_equally_long(tokens, widths):
    scheduler, _ = alone(tokens)
    assert [w for _, (w,) in steps(scheduler, len(widths))] == widths


def test_pieces_of_a_prompt_that_is_alone_get_shorter_where_much_is_before_them():
    scheduler, _ = alone(1000, costly_context=1000)
    widths = [width for _, (width,) in steps(scheduler, 2)]
    assert sum(widths) == 1000
    assert scheduler.running[0].num_output == 1
    assert widths[0] > 1.2 * widths[1]


@pytest.mark.parametrize("slow", [{"token_s": 0.01}, {"prefill_alone": 0}, {"prefill_alone": 100}])
def test_pieces_are_as_ever_where_they_take_long_or_more_is_not_allowed(slow):
    scheduler, _ = alone(600, **slow)
    assert [w for _, (w,) in steps(scheduler, 3)] == [256, 256, 88]


def test_a_prompt_is_read_in_pieces_again_as_soon_as_another_one_is_there():
    scheduler, long = alone(2000)
    steps(scheduler, 1)
    scheduler.add(sequence([2] * 1500, 9, 4096))
    (sequences, widths), *_ = steps(scheduler, 1)
    assert (sequences, widths) == ([long], [256])


def test_nothing_is_read_at_once_before_a_pass_was_measured():
    scheduler = Scheduler(Rows(4, 512, 1 << 20), 4, 256, mixes=True, prefill_alone=1024)
    scheduler.add(sequence([1] * 400, 9, 512))
    assert [w for _, (w,) in steps(scheduler, 2)] == [256, 144]
