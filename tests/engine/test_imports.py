"""Imports without what takes their time: garbage, and methods that nobody calls."""

from __future__ import annotations

import gc
import inspect
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import pytest

from transformers_api.engine.platform.dataclass_methods import compiled_later
from transformers_api.engine.platform.imports import without_collection


@pytest.mark.parametrize("first_out", [0, 1])
def test_collection_goes_on_when_the_last_of_several_has_come_to_its_end(first_out):
    loads = [ExitStack(), ExitStack()]
    for load in loads:
        load.enter_context(without_collection())
    loads.pop(first_out).close()
    assert not gc.isenabled()
    loads.pop().close()
    assert gc.isenabled()


def test_where_collection_is_off_already_it_stays_off():
    gc.disable()
    try:
        with without_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def made(**options):
    @dataclass(**options)
    class Point:
        x: int
        y: list[int] = field(default_factory=list)

    return Point


@pytest.mark.parametrize(
    "options",
    [{}, {"frozen": True}, {"order": True}, {"frozen": True, "slots": True}, {"unsafe_hash": True}],
)
def test_dataclasses_whose_methods_are_compiled_later_do_what_others_do(options):
    plain = made(**options)
    with compiled_later():
        later = made(**options)
    other = made(**options)

    def outcomes(kind):
        a, b = kind(1, y=[2]), kind(1, [2])
        questions = [
            *(lambda: repr(a), lambda: a == b, lambda: a == kind(2), lambda: a == 1),
            *(lambda: a < kind(2), lambda: a >= kind(2), lambda: setattr(a, "x", 3)),
            *(lambda: delattr(a, "x"), lambda: hash(kind(1, (2,))), lambda: hash(a)),
            *(lambda: str(inspect.signature(kind)), lambda: replace(b, x=4), lambda: a.x),
        ]
        answers = []
        for question in [*questions, *questions]:
            try:
                answers.append(repr(question()))
            except Exception as error:
                answers.append(f"{type(error).__name__}: {error}")
        return answers

    assert outcomes(later) == outcomes(plain) == outcomes(other)
    assert later.__eq__.__qualname__ == plain.__eq__.__qualname__
