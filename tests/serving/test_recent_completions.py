"""What is remembered of completions, how much of it and for how long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fakes import FakeEngine, fake_model, fake_spec, say
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import InvalidRequest, UnknownCompletion
from transformers_api.serving import generation
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect.recent_completions import Completion, Completions
from transformers_api.serving.limits.cancellation import Cancellation

MODEL = fake_model(fake_spec("owner/model"))


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_completion_is_found_by_its_id_with_the_ids_of_prompt_and_answer():
    known = Completions()
    known.remember("cmpl-1", MODEL, [[1, 2, 3]], [[4, 5]])
    assert known.find("cmpl-1") == Completion("owner/model", (1, 2, 3), (4, 5))


def test_each_choice_belongs_to_its_prompt():
    known = Completions()
    known.remember("cmpl-1", MODEL, [[1], [2]], [[10], [11], [20], [21]])
    found = [known.find("cmpl-1", choice) for choice in range(4)]
    assert [(one.prompt_ids, one.token_ids) for one in found] == [
        ((1,), (10,)),
        ((1,), (11,)),
        ((2,), (20,)),
        ((2,), (21,)),
    ]


@pytest.mark.parametrize("choice", [-1, 2, 99])
def test_a_choice_that_is_not_there_is_out_of_range(choice):
    known = Completions()
    known.remember("cmpl-1", MODEL, [[1]], [[2], [3]])
    with pytest.raises(InvalidRequest, match=r"choice must be in \[0, 1\]") as caught:
        known.find("cmpl-1", choice)
    assert caught.value.param == "choice"


def test_an_id_that_was_never_given_is_unknown():
    with pytest.raises(
        UnknownCompletion, match=r"'cmpl-2' is not known; the last 64 .* 10 minutes"
    ):
        Completions().find("cmpl-2")


def test_only_the_last_ones_are_kept():
    known = Completions(most=3)
    for number in range(5):
        known.remember(f"cmpl-{number}", MODEL, [[number]], [[number]])
    for number in (0, 1):
        with pytest.raises(UnknownCompletion):
            known.find(f"cmpl-{number}")
    assert [known.find(f"cmpl-{n}").prompt_ids for n in (2, 3, 4)] == [(2,), (3,), (4,)]


def test_they_are_forgotten_after_ten_minutes():
    clock = Clock()
    known = Completions(clock=clock)
    known.remember("cmpl-1", MODEL, [[1]], [[2]])
    clock.now += 599
    known.remember("cmpl-2", MODEL, [[1]], [[2]])
    assert known.find("cmpl-1")
    clock.now += 2
    with pytest.raises(UnknownCompletion):
        known.find("cmpl-1")
    assert known.find("cmpl-2")


def test_many_threads_may_remember_and_find():
    known = Completions(most=8)

    def work(number):
        known.remember(f"cmpl-{number}", MODEL, [[number]], [[number]])
        try:
            return known.find(f"cmpl-{number}").prompt_ids == (number,)
        except UnknownCompletion:  # the others were faster
            return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def begin(text="Hello", **options):
    model = fake_model(engine=FakeEngine(say(text)))
    request = GenerationRequest([[65, 66]], SamplingParams(max_tokens=10), **options)
    return model, generation.start(model, request, Cancellation(), stream=True)


def test_a_stream_is_remembered_at_its_end_with_the_token_that_ended_it():
    known = Completions()
    model, begun = begin()
    events = known.after((delta.text for delta in begun), "cmpl-1", model, begun)
    assert next(events) == "H"
    with pytest.raises(UnknownCompletion):
        known.find("cmpl-1")
    assert "".join(events) == "ello"
    (end,) = model.engine.eos_token_ids
    assert known.find("cmpl-1") == Completion("fake", (65, 66), (*b"Hello", end))


def test_a_stream_that_its_reader_leaves_is_not_remembered():
    known = Completions()
    model, begun = begin()
    events = known.after((delta.text for delta in begun), "cmpl-1", model, begun)
    next(events)
    events.close()
    with pytest.raises(UnknownCompletion):
        known.find("cmpl-1")


def test_all_choices_of_a_stream_are_remembered():
    known = Completions()
    model, begun = begin("ab", n=2)
    list(known.after(begun, "cmpl-1", model, begun))
    assert known.find("cmpl-1", 1).token_ids[:2] == (*b"ab",)
