"""The memory of recent completions: what is in it, how much and for how long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.fakes import fake_model, fake_spec
from transformers_api.errors import InvalidRequest, UnknownCompletion
from transformers_api.serving.inspect.recent_completions import Completion, Completions

MODEL = fake_model(fake_spec("owner/model"))


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_a_completion_is_found_by_its_id_with_the_ids_of_prompt_and_answer():
    completions = Completions()
    completions.remember("cmpl-1", MODEL, [[1, 2, 3]], [[4, 5]])
    assert completions.find("cmpl-1") == Completion("owner/model", (1, 2, 3), (4, 5))


def test_each_choice_belongs_to_its_prompt():
    completions = Completions()
    completions.remember("cmpl-1", MODEL, [[1], [2]], [[10], [11], [20], [21]])
    choices = [completions.find("cmpl-1", choice) for choice in range(4)]
    assert [(one.prompt_ids, one.token_ids) for one in choices] == [
        ((1,), (10,)),
        ((1,), (11,)),
        ((2,), (20,)),
        ((2,), (21,)),
    ]


@pytest.mark.parametrize("choice", [-1, 2, 99])
def test_a_choice_that_is_not_there_is_out_of_range(choice):
    completions = Completions()
    completions.remember("cmpl-1", MODEL, [[1]], [[2], [3]])
    with pytest.raises(InvalidRequest, match=r"choice must be in \[0, 1\]") as caught:
        completions.find("cmpl-1", choice)
    assert caught.value.param == "choice"


def test_an_id_that_was_never_given_is_unknown():
    with pytest.raises(
        UnknownCompletion, match=r"'cmpl-2' is not known; the last 64 .* 10 minutes"
    ):
        Completions().find("cmpl-2")


def test_only_the_last_ones_are_kept():
    completions = Completions(most=3)
    for number in range(5):
        completions.remember(f"cmpl-{number}", MODEL, [[number]], [[number]])
    for number in (0, 1):
        with pytest.raises(UnknownCompletion):
            completions.find(f"cmpl-{number}")
    assert [completions.find(f"cmpl-{n}").prompt_ids for n in (2, 3, 4)] == [(2,), (3,), (4,)]


def test_they_are_forgotten_after_ten_minutes():
    clock = Clock()
    completions = Completions(clock=clock)
    completions.remember("cmpl-1", MODEL, [[1]], [[2]])
    clock.now += 599
    completions.remember("cmpl-2", MODEL, [[1]], [[2]])
    assert completions.find("cmpl-1")
    clock.now += 2
    with pytest.raises(UnknownCompletion):
        completions.find("cmpl-1")
    assert completions.find("cmpl-2")


def test_many_threads_may_remember_and_find():
    completions = Completions(most=8)

    def work(number):
        completions.remember(f"cmpl-{number}", MODEL, [[number]], [[number]])
        try:
            return completions.find(f"cmpl-{number}").prompt_ids == (number,)
        except UnknownCompletion:  # the others were faster
            return True

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))
