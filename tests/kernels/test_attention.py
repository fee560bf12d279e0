"""Attention over cached keys: right, and the same to the bit for any chunking and company."""

from __future__ import annotations

import math

import pytest
import torch

from transformers_api.kernels.modules.attention import (
    CausalRows,
    describing,
    native_attention,
    write_cache,
)
from transformers_api.kernels.stats import attention_probs

CASES = {
    "decode": {},
    "odd-size": {"heads": 4, "kv_heads": 4, "width": 33, "size": 20},
    "tiny": {"heads": 2, "kv_heads": 1, "width": 9, "size": 8},
    "window": {"heads": 8, "kv_heads": 2, "width": 100, "size": 80, "window": 17, "softcap": 30.0},
    "sinks": {"heads": 6, "kv_heads": 1, "width": 40, "size": 128, "window": 64, "sinks": True},
    "large": {"heads": 2, "kv_heads": 2, "width": 7, "size": 256, "softcap": 5.0, "sinks": True},
    "alibi": {"heads": 6, "kv_heads": 2, "width": 70, "length": 300, "slopes": True},
    "alibi-decode": {"heads": 4, "kv_heads": 4, "size": 32, "window": 90, "slopes": True},
    "chunks": {"heads": 4, "kv_heads": 2, "width": 90, "size": 32, "window": -48},
    "long": {"rows": 1, "width": 150, "length": 400},
}
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3}  # of the coarser of both types


class Case:
    """Random queries over random rows, and what comes of them in float64."""

    def __init__(
        self, dtype=torch.float32, kv_dtype=torch.float32, *, rows=3, heads=9, kv_heads=3, width=1,
        size=64, length=200, window=0, softcap=0.0, sinks=False, slopes=False,
    ):  # fmt: skip
        seeded = torch.Generator().manual_seed(size)
        shape = (2, rows + 2, kv_heads, length, size)
        cache = torch.randn(shape, generator=seeded).to(kv_dtype)
        self.key, self.value = cache[0][1 : rows + 1], cache[1][1 : rows + 1]
        query = 2 * torch.randn(rows, width, heads, size, generator=seeded)
        self.query = query.to(dtype).transpose(1, 2)
        self.starts = torch.randint(0, length - width + 1, (rows,), generator=seeded)
        self.starts[0] = length - width
        self.window, self.scale, self.group = window, 1 / math.sqrt(size), heads // kv_heads
        self.options = {"softcap": softcap or None, "s_aux": None}
        if slopes:
            self.options["slopes"] = 2.0 ** -torch.arange(1.0, heads + 1)
        if sinks:
            self.options["s_aux"] = torch.randn(heads, generator=seeded)

    def visible(self):
        positions = self.starts[:, None] + torch.arange(self.query.shape[2])
        distance = positions[:, None, :, None] - torch.arange(self.key.shape[2])
        visible = distance >= 0
        if self.window < 0:
            return visible & (distance <= (positions % -self.window)[:, None, :, None])
        return visible & (distance < self.window) if self.window else visible

    def weights(self, dtype=torch.float32):
        """Of all keys (B, H, T, S), in float64; of queries that are rounded to ``dtype`` before."""
        key = self.key.double().repeat_interleave(self.group, 1)
        scores = self.query.to(dtype).double() @ key.transpose(-1, -2) * self.scale
        if cap := self.options["softcap"]:
            scores = cap * torch.tanh(scores / cap)
        if (slopes := self.options.get("slopes")) is not None:
            queries = self.starts[:, None] + torch.arange(self.query.shape[2])
            distance = torch.arange(self.key.shape[2]) - queries[:, None, :, None]
            scores = scores + slopes.double()[:, None, None] * distance
        scores = scores.masked_fill(~self.visible(), -torch.inf)
        if (sinks := self.options["s_aux"]) is not None:
            column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        return scores.softmax(-1)[..., : self.key.shape[2]]

    def wanted(self):
        value = self.value.double().repeat_interleave(self.group, 1)
        return (self.weights() @ value).transpose(1, 2)

    def given(self, library, row=None, begin=0, end=None):
        """By the kernel; for one row and some of its queries if ``row`` is given."""
        rows = slice(None) if row is None else slice(row, row + 1)
        query = self.query[rows, :, begin:end]
        starts = (self.starts[rows] + begin).contiguous()
        mask, causal = self.visible(), CausalRows(library, starts, self.window)
        key, value = self.key[rows], self.value[rows]
        module = torch.nn.Module()
        module.num_key_value_groups = query.shape[1] // self.key.shape[1]
        with describing([(mask, causal)]):
            return native_attention(
                module, query, key, value, mask, scaling=self.scale, **self.options
            )[0]


def error(given, wanted):
    return float((given.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_attention_is_right_within_its_precision(library, case, dtype, kv_dtype):
    made = Case(dtype, kv_dtype, **CASES[case])
    given = made.given(library)
    assert given.dtype == dtype
    assert error(given, made.wanted()) < max(TOLERANCE[dtype], TOLERANCE[kv_dtype])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_a_query_is_the_same_to_the_bit_for_any_chunking_and_company(library, case, kv_dtype):
    made = Case(kv_dtype=kv_dtype, **CASES[case])
    together = made.given(library)
    rows, width = together.shape[:2]
    for row in range(rows):
        for chunk in (1, 5, 16, 64):
            pieces = [
                made.given(library, row, begin, min(begin + chunk, width))
                for begin in range(0, width, chunk)
            ]
            assert torch.equal(torch.cat(pieces, 1)[0], together[row]), chunk


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_tokens_of_several_sequences_that_share_a_call_get_the_bits_of_their_own(
    library, case, kv_dtype
):
    """Pieces of any widths, in any order, from anywhere in the cache."""
    made = Case(kv_dtype=kv_dtype, **CASES[case])
    separate = made.given(library)
    rows, width = separate.shape[:2]
    chosen = [
        (row, query)
        for row in reversed(range(rows))
        for query in range(width * row // (2 * rows), width)
    ]
    query = torch.stack([made.query[row, :, query] for row, query in chosen])[:, :, None]
    starts = torch.stack([made.starts[row] + query for row, query in chosen])
    mask = torch.ones(1, dtype=torch.bool)
    causal = CausalRows(library, starts, made.window, torch.tensor([row for row, _ in chosen]))
    with describing([(mask, causal)]):
        together, _ = native_attention(
            torch.nn.Module(), query, made.key, made.value, mask, made.scale, **made.options
        )
    for place, (row, position) in enumerate(chosen):
        assert torch.equal(together[place, 0], separate[row, position])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_the_number_of_threads_changes_no_bit(library, case, kv_dtype):
    made = Case(kv_dtype=kv_dtype, **CASES[case])
    results = []
    for threads in (1, 2, 3, 5):
        library.set_threads(threads)
        results.append(made.given(library))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kv_dtype", TOLERANCE)
@pytest.mark.parametrize("width", [1, 3, 40])
def test_keys_that_a_query_does_not_see_may_be_anything(library, kv_dtype, width):
    made = Case(kv_dtype=kv_dtype, window=20, width=width)
    wanted = made.given(library)
    hidden = ~made.visible().any(2)[:, 0]  # (rows, length)
    for row in range(len(hidden)):
        made.key[row, :, hidden[row]] = float("nan")
        made.value[row, :, hidden[row]] = float("inf")
    assert torch.equal(made.given(library), wanted)


@pytest.mark.parametrize("kv_dtype", TOLERANCE)
@pytest.mark.parametrize("width", [4, 40])
@pytest.mark.parametrize("part", ["key", "value"])
def test_a_nan_reaches_the_queries_that_see_it_and_no_others(library, kv_dtype, width, part):
    made = Case(kv_dtype=kv_dtype, width=width, rows=1)
    wanted = made.given(library)
    getattr(made, part)[0, :, made.starts[0] + 2] = float("nan")
    given = made.given(library)
    assert torch.equal(given[:, :2], wanted[:, :2])
    assert given[:, 2:].isnan().all()


def test_scores_far_apart_neither_overflow_nor_vanish(library):
    made = Case()
    made.query *= 1000
    assert error(made.given(library), made.wanted()) < 1e-3
    made.key.zero_()
    assert error(made.given(library), made.wanted()) < 1e-6


def test_a_mask_without_a_description_is_left_to_sdpa(library):
    made = Case(width=5)
    mask = made.visible()
    mask[0, :, :, 0] = False  # a mask of the model's own
    module = torch.nn.Module()
    module.num_key_value_groups = 3
    result, _ = native_attention(
        module, made.query, made.key.bfloat16(), made.value.bfloat16(), mask, scaling=made.scale
    )
    seen = made.visible
    made.visible = lambda: seen() & mask
    assert error(result, made.wanted()) < 5e-3


@pytest.mark.parametrize("case", ["decode", "window", "sinks"])
def test_what_the_kernel_cannot_do_is_done_by_torch(library, case):
    made = Case(**CASES[case])
    made.query.requires_grad_()
    result = made.given(library)
    assert result.requires_grad
    assert error(result.detach(), made.wanted().detach()) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_keys_go_to_the_positions_of_their_rows(library, dtype):
    cache = torch.zeros(4, 2, 50, 20, dtype=dtype)
    states = torch.randn(3, 7, 2, 20).transpose(1, 2)
    starts = torch.tensor([0, 43, 11])
    write_cache(library, states, cache[1:], starts)
    wanted = torch.zeros_like(cache)
    for row, start in enumerate(starts.tolist()):
        wanted[row + 1, :, start : start + 7] = states[row].to(dtype)
    assert torch.equal(cache, wanted)


def test_new_keys_of_several_sequences_go_to_their_rows(library):
    cache, states = torch.zeros(4, 2, 50, 20), torch.randn(5, 2, 1, 20)
    starts, rows = torch.tensor([7, 8, 9, 0, 49]), torch.tensor([2, 2, 2, 0, 3])
    write_cache(library, states, cache, starts, rows)
    wanted = torch.zeros_like(cache)
    wanted[rows, :, starts] = states[:, :, 0]
    assert torch.equal(cache, wanted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kv_dtype", TOLERANCE)
def test_shares_that_are_shown_are_those_of_the_numbers_that_are_multiplied(
    library, name, kv_dtype
):
    case = Case(kv_dtype=kv_dtype, **CASES[name])
    rows = CausalRows(library, case.starts, case.window)
    for row, wanted in enumerate(case.weights(kv_dtype)):
        queries = range(wanted.shape[1])[-3:]
        options = {"scaling": case.scale, **case.options}
        found, sinks = attention_probs(rows, case.query, case.key, row, queries, options)
        torch.testing.assert_close(found.double(), wanted[:, -3:], atol=1e-6, rtol=1e-4)
        if case.options["s_aux"] is None:
            assert sinks is None
        else:
            taken = 1 - wanted[:, -3:].sum(-1)
            torch.testing.assert_close(sinks.double(), taken, atol=1e-5, rtol=0)
