"""Small operations of a pass are done together, token by token, where that changes nothing."""

from __future__ import annotations

import pytest
import torch

from transformers_api.kernels.capture import record
from transformers_api.kernels.graph.executor import RecordedPass
from transformers_api.kernels.graph.tiling import step_groups

WIDTH = 24
SIZES = [1, 2, 9, 64, 700, 3000]


def norm_and_gate(x):
    scaled = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5)
    return torch.nn.functional.silu(scaled) * x + scaled


def heads_turned(x):
    heads = x.view(-1, 4, WIDTH // 4).transpose(0, 1)
    half = WIDTH // 8
    turned = torch.cat([torch.empty(0), -heads[..., half:], heads[..., :half]], -1)
    return (heads * 0.5 + turned).transpose(0, 1).reshape(-1, WIDTH) * 2.0


def first_token_for_all(x):
    doubled = x * 2
    return doubled + doubled[:1]


def last_token_for_all(x):
    doubled = x * 2
    return doubled * doubled[-1:]


def the_token_before(x):
    doubled = x * 2
    out = doubled + 1
    out[1:] += doubled[:-1]
    return out


def columns_read_as_rows(x):
    turned = (x * 2).t().contiguous()
    return turned.view(-1).view(-1, WIDTH) + 1


def mean_over_tokens(x):
    doubled = (x * 2).t().contiguous()
    return x + doubled.mean(-1, keepdim=True).view(-1)


LOCAL = [norm_and_gate, heads_turned]
MIXED = [
    first_token_for_all,
    last_token_for_all,
    the_token_before,
    columns_read_as_rows,
    mean_over_tokens,
]


def tokens(count):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def learned(library, function):
    taught = RecordedPass(library)
    for size in (5, 7):
        inputs = [tokens(size)]
        taught.record(size, inputs, [], lambda given=inputs[0]: function(given))
    assert not taught.failure
    return taught


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("function", LOCAL + MIXED)
def test_any_number_of_tokens_gives_what_torch_gives(library, function, threads):
    library.set_threads(threads)
    taught = learned(library, function)
    for size in SIZES:
        x = tokens(size)
        given = taught.run(size, [x], [])
        assert torch.allclose(given, function(x), rtol=1e-5, atol=1e-5), size


@pytest.mark.parametrize("function", LOCAL)
def test_a_token_is_the_same_to_the_bit_in_any_company(library, function):
    taught, x = learned(library, function), tokens(700)
    together = taught.run(700, [x], []).clone()
    for begin, size in ((0, 1), (13, 9), (699, 1), (100, 300)):
        given = taught.run(size, [x[begin : begin + size].contiguous()], [])
        assert torch.equal(given, together[begin : begin + size])


@pytest.mark.parametrize(
    "function",
    [torch.tanh, torch.exp, torch.nn.functional.gelu, torch.sigmoid, torch.nn.functional.silu],
    ids=lambda function: function.__name__,
)
def test_functions_are_those_of_torch_near_zero_far_from_it_and_beyond(library, function):
    taught = learned(library, function)
    odd = torch.tensor([1e30, float("nan"), 0.0, 1e-30, -1e-30, 88.0, -88.0, 0.625])
    x = torch.cat([torch.linspace(-12, 12, 997), torch.logspace(-9, 0, 75), odd]).view(-1, WIDTH)
    given = taught.run(len(x), [x], [])
    assert torch.allclose(given, function(x), rtol=2e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(given.isnan(), function(x).isnan())


def groups(function):
    """How many steps are done together, group by group."""
    recorders = []
    for size in (5, 7):
        x = tokens(size)
        with record([x]) as recorder:
            function(x)
        recorders.append(recorder)
    pairs = list(zip(recorders[0].steps, recorders[1].steps, strict=True))
    return [unit.end - unit.begin if unit.loops else 0 for unit in step_groups(pairs, (5, 7))]


@pytest.mark.parametrize("function", LOCAL)
def test_what_a_token_needs_of_itself_alone_is_one_group(function):
    assert len(groups(function)) == 1


@pytest.mark.parametrize("function", MIXED)
def test_what_needs_other_tokens_waits_for_them(function):
    assert len(groups(function)) > 1
