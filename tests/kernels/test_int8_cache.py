"""Keys and values as codes of 8 bits: what is stored, and attention over it, right and bit by bit."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.test_attention import CASES, Case, error
from tests.repeats import slow
from transformers_api.kernels.modules.attention import (
    CausalRows,
    code_bytes,
    describing,
    native_attention,
    numbers_of,
    write_cache,
)
from transformers_api.kernels.stats import attention_probs

SIZES = [8, 20, 64, 80, 128]
NAMES = [*CASES][::3]
EVERY = [*NAMES, *slow(*(name for name in CASES if name not in NAMES))]
STEP = 0.5 * (1 + 2**-8) / 127 + 2**-8  # of a group's largest number: a code, and its bfloat16


def stored(library, states, length=None):
    """States (B, G, T, D) as a view of rows of codes that are a little longer."""
    batch, heads, width, size = states.shape
    rows = torch.zeros(batch, heads, (length or width) + 3, code_bytes(size), dtype=torch.int8)
    write_cache(library, states, rows, torch.zeros(batch, dtype=torch.int64))
    return rows[:, :, :width, :size]


def coded(library, dtype=torch.float32, **options):
    """A case whose keys and values are codes, and the same with the numbers that these mean."""
    case, meant = Case(dtype, **options), Case(dtype, **options)
    case.key, case.value = stored(library, case.key), stored(library, case.value)
    meant.key, meant.value = numbers_of(case.key).float(), numbers_of(case.value).float()
    return case, meant


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e30])
def test_a_number_is_stored_within_a_step_of_its_group(library, size, dtype, scale):
    states = (scale * torch.randn(2, 3, 9, size)).to(dtype)
    numbers = numbers_of(stored(library, states)).double()
    for at in range(0, size, 32):
        group = states[..., at : at + 32].double()
        apart = (numbers[..., at : at + 32] - group).abs().amax(-1)
        assert (apart <= STEP * group.abs().amax(-1)).all()


def test_zeros_stay_zeros_and_what_is_not_finite_spoils_its_group_alone(library):
    states = torch.zeros(1, 1, 3, 64)
    states[0, 0, 1, 5], states[0, 0, 2, 40] = float("inf"), float("nan")
    states[0, 0, 1, 33] = 1e-36
    numbers = numbers_of(stored(library, states))[0, 0]
    assert not numbers[0].any()
    assert numbers[1, :32].isnan().all()
    assert not numbers[1, 32:].any()
    assert not numbers[2, :32].any()
    assert numbers[2, 32:].isnan().all()


def test_codes_of_a_token_are_the_same_in_any_company(library):
    states = torch.randn(5, 7, 2, 80).transpose(1, 2)
    rows = torch.zeros(6, 2, 20, code_bytes(80), dtype=torch.int8)
    starts, places = torch.tensor([3, 0, 9, 1, 13]), torch.tensor([4, 0, 5, 2, 1])
    write_cache(library, states, rows, starts, places)
    alone = torch.zeros_like(rows)
    for state, start, place in zip(states, starts, places, strict=True):
        for token in range(7):
            one = state[None, :, token : token + 1]
            write_cache(library, one, alone, start[None] + token, place[None])
    assert rows.any()
    assert torch.equal(rows, alone)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_multiplies_the_numbers_that_codes_mean(library, name, dtype):
    case, meant = coded(library, dtype, **CASES[name])
    given = case.given(library)
    assert given.dtype == dtype
    assert error(given, meant.wanted()) < 4e-3


@pytest.mark.parametrize("name", EVERY)
def test_attention_is_near_that_over_numbers_that_were_never_coded(library, name):
    case, _ = coded(library, **CASES[name])
    assert error(case.given(library), Case(**CASES[name]).wanted()) < 0.02


@pytest.mark.parametrize("name", EVERY)
def test_a_query_is_the_same_to_the_bit_for_any_chunking_and_company(library, name):
    case, _ = coded(library, **CASES[name])
    together = case.given(library)
    rows, width = together.shape[:2]
    for row in range(rows):
        for chunk in (1, 5, 64):
            pieces = [
                case.given(library, row, begin, min(begin + chunk, width))
                for begin in range(0, width, chunk)
            ]
            assert torch.equal(torch.cat(pieces, 1)[0], together[row]), chunk


@pytest.mark.parametrize("name", EVERY)
def test_tokens_of_several_sequences_that_share_a_call_get_the_bits_of_their_own(library, name):
    case, _ = coded(library, **CASES[name])
    separate = case.given(library)
    rows, width = separate.shape[:2]
    chosen = [(row, query) for row in reversed(range(rows)) for query in range(width // 2, width)]
    query = torch.stack([case.query[row, :, query] for row, query in chosen])[:, :, None]
    starts = torch.stack([case.starts[row] + query for row, query in chosen])
    mask = torch.ones(1, dtype=torch.bool)
    causal = CausalRows(library, starts, case.window, torch.tensor([row for row, _ in chosen]))
    with describing([(mask, causal)]):
        together, _ = native_attention(
            torch.nn.Module(), query, case.key, case.value, mask, case.scale, **case.options
        )
    for place, (row, position) in enumerate(chosen):
        assert torch.equal(together[place, 0], separate[row, position])


@pytest.mark.parametrize("name", ["decode", "odd-size", "long"])
def test_the_number_of_threads_changes_no_bit(library, name):
    case, _ = coded(library, **CASES[name])
    results = []
    for threads in (1, 2, 5):
        library.set_threads(threads)
        results.append(case.given(library))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("width", [1, 40])
def test_keys_that_a_query_does_not_see_may_be_anything(library, width):
    case, _ = coded(library, window=20, width=width)
    wanted = case.given(library)
    hidden = ~case.visible().any(2)[:, 0]  # (rows, length)
    broken = stored(library, torch.full((1, 3, 1, 64), float("nan")))[0]
    for row in range(len(hidden)):
        for states in (case.key, case.value):
            whole = states.as_strided((*states.shape[:3], code_bytes(64)), states.stride())
            whole[row, :, hidden[row]] = broken.as_strided((3, 1, code_bytes(64)), broken.stride())
    assert torch.equal(case.given(library), wanted)


@pytest.mark.parametrize("part", ["key", "value"])
def test_a_nan_reaches_the_queries_that_see_it_and_no_others(library, part):
    case, _ = coded(library, width=40, rows=1)
    wanted = case.given(library)
    spoilt = Case(width=40, rows=1)
    getattr(spoilt, part)[0, :, spoilt.starts[0] + 2] = float("nan")
    setattr(case, part, stored(library, getattr(spoilt, part)))
    given = case.given(library)
    assert torch.equal(given[:, :2], wanted[:, :2])
    assert given[:, 2:].isnan().all()


@pytest.mark.parametrize("name", EVERY)
def test_shares_that_are_shown_are_those_of_the_numbers_that_codes_mean(library, name):
    case, meant = coded(library, **CASES[name])
    rows = CausalRows(library, case.starts, case.window)
    for row, wanted in enumerate(meant.weights(torch.bfloat16)):
        queries = range(wanted.shape[1])[-3:]
        options = {"scaling": case.scale, **case.options}
        found, _ = attention_probs(rows, case.query, case.key, row, queries, options)
        torch.testing.assert_close(found.double(), wanted[:, -3:], atol=1e-6, rtol=1e-4)


def test_what_the_kernel_cannot_do_is_done_by_torch(library):
    case, meant = coded(library, width=5)
    case.query.requires_grad_()
    mask = case.visible()
    module = torch.nn.Module()
    module.num_key_value_groups = case.group
    result, _ = native_attention(module, case.query, case.key, case.value, mask, scaling=case.scale)
    assert result.requires_grad
    assert error(result.detach(), meant.wanted()) < 2e-6
