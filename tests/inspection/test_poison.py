"""Edited keys and values in the prefix cache: nobody is given those of other edits."""

from __future__ import annotations

import copy
import itertools
import random

import numpy
import pytest

from tests.inspection.models import tiny
from tests.inspection.test_edits import PROMPT, VECTOR, edit, plan, written
from transformers_api.engine.row_kind import RowKind

LONG = [*PROMPT, 3, 5, 7]
EDITED = edit(vector=VECTOR)
OTHER = edit(do="scale", part="mlp", by=0.0)
LATE = edit(vector=VECTOR, positions=((len(LONG), None),))
REQUESTS = {
    "plain": lambda: None,
    "edited": lambda: plan(EDITED, identity="edited"),
    "other": lambda: plan(OTHER, identity="other"),
    "late": lambda: plan(LATE, identity="late"),
}


@pytest.fixture(scope="module")
def alone():
    """What each request gets from an engine that has seen no other."""
    return {}


def ask(engine, *names):
    return written(engine, [(LONG, REQUESTS[name]()) for name in names])


@pytest.fixture
def fresh(watch, alone):
    def make(**options):
        return watch(copy.deepcopy(tiny("llama")), **options).engine

    for name in REQUESTS:
        if name not in alone:
            alone[name] = ask(make(), name)[0]
    return make


ORDERS = list(itertools.permutations(REQUESTS))


@pytest.mark.parametrize(
    "order", [ORDERS[0], *(pytest.param(o, marks=pytest.mark.slow) for o in ORDERS[1:])]
)
def test_a_request_gets_what_a_fresh_server_gives_whatever_came_before(fresh, alone, order):
    engine = fresh()
    for name in (*order, *order[::-1]):
        assert ask(engine, name) == [alone[name]], name
    both = ask(engine, *order)
    assert both == [alone[name] for name in order]
    assert ask(engine, *order[::-1]) == [alone[name] for name in order[::-1]]


def test_random_schedules_of_edited_and_unedited_requests(fresh, alone):
    chance = random.Random(7)
    for chunk in (1, 3, 8):
        engine = fresh(prefill_chunk=chunk)
        for _ in range(6):
            names = chance.choices(list(REQUESTS), k=chance.randint(1, 4))
            assert ask(engine, *names) == [alone[name] for name in names], (chunk, names)


def test_what_is_equal_is_shared(fresh):
    engine = fresh()
    for names, cached in (
        (["edited", "edited"], len(LONG) - 1),
        (["late", "plain", "late"], len(LONG) - 1),
        (["other", "plain"], 0),
    ):
        engine.call(lambda _: engine.scheduler.forget()).result()
        for name in names:
            before = engine.stats().cached_tokens
            ask(engine, name)
        assert engine.stats().cached_tokens - before == cached, names


@pytest.mark.parametrize(
    ("one", "other", "tokens"),
    [
        (RowKind(), RowKind(), 9),
        (RowKind(), RowKind(adapter="a"), 0),
        (RowKind(is_long=True), RowKind(), 0),
        (RowKind(edits="a"), RowKind(edits="a"), 9),
        (RowKind(edits="a", unedited=4), RowKind(), 4),
        (RowKind(edits="a", unedited=4), RowKind(edits="b", unedited=3), 3),
        (RowKind(edits="a", unedited=40), RowKind(edits="b", unedited=30), 9),
        (RowKind(adapter="x", edits="a"), RowKind(adapter="y", edits="a"), 0),
    ],
)
def test_rows_of_two_kinds_share_what_was_read_alike(one, other, tokens):
    assert one.shared(other, 9) == other.shared(one, 9) == tokens


def test_a_long_row_of_edits_joins_and_leaves_without_a_trace(fresh, alone):
    engine = fresh(num_slots=2)
    names = ["edited", "plain", "other", "plain", "late", "edited"]  # more than there are slots
    assert ask(engine, *names) == [alone[name] for name in names]
    assert numpy.isfinite([score.logprob for _, score in alone["edited"]]).all()
