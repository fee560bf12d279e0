"""An activation that a model writes out is done as one operation, and only where nobody sees it."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from transformers_api.kernels.capture import record
from transformers_api.kernels.graph.executor import RecordedPass
from transformers_api.kernels.graph.fusion import fuse

WRITTEN_OUT = ["gelu_new", "gelu_fast", "gelu_accurate"]


def curve(x):
    return torch.tanh(0.7978845608 * (x + 0.044715 * torch.pow(x, 3.0)))


def with_a_part_that_is_used_again(x):
    part = curve(x)
    return 0.5 * x * (1.0 + part) + part


def with_another_factor(x):
    return 0.6 * x * (1.0 + curve(x))


def of_two_inputs(x):
    return 0.5 * (x + 1) * (1.0 + curve(x))


def in_its_own_place(x):
    half = 0.5 * x
    return half.mul_(1.0 + curve(x))


def into_its_operand(x):
    doubled = x * 2
    part = 0.5 * doubled
    doubled += 1
    return part * (1.0 + curve(doubled))


OTHERS = [
    with_a_part_that_is_used_again,
    with_another_factor,
    of_two_inputs,
    in_its_own_place,
    into_its_operand,
]


def numbers(rows):
    return torch.linspace(-9, 9, rows * 24).view(rows, 24)


def operations(function):
    with record([x := numbers(5)]) as recorder:
        result = function(x)
    return [step.op for step in fuse(recorder, result).steps]


def check_result(library, function):
    taught = RecordedPass(library)
    for size in (5, 7):
        x = numbers(size)
        taught.record(size, [x], [], lambda x=x: function(x))
    assert not taught.failure
    for size in (1, 40):
        x = numbers(size)
        given = taught.run(size, [x], [])
        assert torch.allclose(given, function(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_an_activation_that_is_written_out_is_one_operation(library, name):
    activation = ACT2FN[name]
    assert operations(lambda x: activation(x - 1) * 3) == ["sub", "gelu_tanh", "mul"]
    check_result(library, lambda x: activation(x - 1) * 3)


@pytest.mark.parametrize("function", OTHERS)
def test_what_is_nearly_one_stays_as_it_is(library, function):
    assert "gelu_tanh" not in operations(function)
    check_result(library, function)


def test_what_is_shown_is_shown_after_as_many_operations_as_are_left():
    activation = ACT2FN["gelu_new"]
    with record([x := numbers(5)]) as recorder:
        made = activation(x)
        recorder.add_module_call(None, [x, made])
        result = activation(made) + 1
        recorder.add_module_call(None, [made, result])
    shown = fuse(recorder, result).module_calls
    assert [one.at for one in shown] == [1, 3]
    assert [one.at for one in recorder.module_calls] == [8, 17]


def test_what_is_shown_in_the_middle_is_still_made():
    with record([x := numbers(5)]) as recorder:
        half = 0.5 * x
        recorder.add_module_call(None, [x, x])
        result = half * (1.0 + curve(x))
    assert fuse(recorder, result) is recorder
