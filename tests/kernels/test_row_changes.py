"""Rows that change in the middle of a pass become what their definitions say."""

from __future__ import annotations

import ctypes

import pytest
import torch

from transformers_api.kernels.abi import OPS, TYPES, ChangeState, RowChange

COUNT, WIDTH, LARGEST = 3, 37, 1e15


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def change(library, rows, op, vector=None, factor=1.0, columns=slice(0, WIDTH), state=None):
    """Change rows 1.. of ``rows``; the state afterwards."""
    state = state or ChangeState()
    own = rows[1 : 1 + COUNT, columns]
    made = RowChange(
        rows=own.data_ptr(),
        count=COUNT,
        stride=rows.stride(0),
        width=own.shape[1],
        type=TYPES[rows.dtype],
        op=OPS.index(op),
        vector=None if vector is None else vector.data_ptr(),
        vector_stride=vector.stride(0) if vector is not None and vector.ndim == 2 else 0,
        factor=factor,
        largest=LARGEST,
        number=7,
        state=ctypes.addressof(state),
    )
    library.without_gil.run_changed_steps(None, 0, ctypes.byref(made), 1)
    return state


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_are_added_to_scaled_and_set_and_the_others_stay(library, dtype):
    rows, columns = numbers(6, 50, dtype=dtype), slice(5, 5 + WIDTH)
    one, each = numbers(WIDTH, seed=1), numbers(COUNT, WIDTH, seed=2)
    own = rows[1 : 1 + COUNT, columns].float()
    for op, vector, factor, right in [
        ("add", one, 1.0, own + one),
        ("add", each, 1.0, own + each),
        ("mul", None, -0.3, own * torch.tensor(-0.3)),
        ("copy", one, 1.0, one.expand_as(own)),
        ("copy", each, 1.0, each),
    ]:
        changed, expected = rows.clone(), rows.clone()
        expected[1 : 1 + COUNT, columns] = right.to(dtype)
        state = change(library, changed, op, vector, factor, columns)
        assert torch.equal(changed, expected), op
        assert (state.failed, state.nanoseconds > 0) == (0, True)


def test_a_factor_of_zero_makes_zeros_of_what_is_no_number(library):
    rows = torch.full((5, WIDTH), torch.nan)
    change(library, rows, "mul", factor=0.0)
    assert not rows[1 : 1 + COUNT].any()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 2e15, -3e38])
def test_rows_stay_where_the_result_is_no_number_or_too_large(library, number):
    rows, vector = numbers(5, WIDTH), torch.zeros(WIDTH)
    vector[-1] = number
    before = rows.clone()
    state = change(library, rows, "add", vector)
    assert state.failed == 7
    change(library, rows, "mul", factor=2.0, state=state)  # nor does what comes after it
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_are_taken_in_order_or_as_asked_for(library, dtype):
    rows = numbers(6, WIDTH, dtype=dtype)
    for tokens in (None, torch.tensor([4, 0, 4])):
        target = torch.zeros(COUNT, WIDTH, dtype=dtype)
        made = RowChange(
            rows=rows.data_ptr(),
            count=COUNT,
            stride=rows.stride(0),
            width=WIDTH,
            type=TYPES[dtype],
            op=OPS.index("take"),
            target=target.data_ptr(),
            tokens=None if tokens is None else tokens.data_ptr(),
        )
        library.without_gil.run_changed_steps(None, 0, ctypes.byref(made), 1)
        assert torch.equal(target, rows[:COUNT] if tokens is None else rows[tokens])
