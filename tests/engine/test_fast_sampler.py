"""What is drawn quickly is what the definition draws, or nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.test_sampling import sequence
from transformers_api.engine.native.sampler import NativeSampler
from transformers_api.engine.sampling import rng
from transformers_api.engine.sampling.fast_sampler import (
    UNSURE,
    TorchFastSampler,
    largest,
    likeliest,
)
from transformers_api.engine.sampling.sampler import Sampler, by_definition
from transformers_api.kernels.provider import kernel_provider


@pytest.fixture(scope="session", params=["torch", "native"])
def fast_sampler(request):
    """Each of the two ways."""
    if request.param == "torch":
        return TorchFastSampler()
    return NativeSampler(kernel_provider(request.getfixturevalue("native_cache"), 2).library())


@st.composite
def rows(draw):
    """Logits (B, V): flat, peaked, with equals, with tokens that are forbidden, some broken."""
    size = draw(st.sampled_from([1, 2, 16, 17, 127, 128, 129, 1000, 5000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    made = torch.randn(draw(st.integers(1, 3)), size, generator=generator)
    made *= draw(st.sampled_from([0, 1e-5, 0.1, 1, 4, 30, 1e4]))
    if draw(st.booleans()):
        made[:, : size // 50 + 1] += draw(st.sampled_from([3, 10, 60]))
    if draw(st.integers(0, 3)) == 0:
        made = made.round()
    if draw(st.integers(0, 2)) == 0:
        made[torch.rand(made.shape, generator=generator) < 0.5] = -torch.inf
    if draw(st.integers(0, 7)) == 0:
        made[0, size // 2] = draw(st.sampled_from([math.nan, math.inf, 3e38]))
    return made


PARAMS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 2**64),
        "temperature": st.sampled_from([0.0, 1e-40, 1e-5, 0.1, 0.7, 1.0, 1.0, 2.0, 1e4, 1e35]),
        "top_k": st.sampled_from([0, 0, 0, 1, 2, 50, 400]),
        "top_p": st.sampled_from([1.0, 1.0, 0.9, 0.5, 0.999999, 1e-9]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 1.0]),
        "typical_p": st.sampled_from([1.0, 1.0, 1.0, 0.5]),
    }
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), logits=rows())
def test_what_is_drawn_quickly_is_what_the_definition_draws(fast_sampler, data, logits):
    sequences = [sequence(**data.draw(PARAMS)) for _ in logits]
    expected = by_definition(logits, sequences)
    for quick, defined in zip(fast_sampler(logits, sequences), expected, strict=True):
        assert quick in (UNSURE, defined)


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize(
    "params", [{}, {"top_p": 0.9}, {"min_p": 0.02}, {"temperature": 0.0}, {"temperature": 0.3}]
)
def test_it_is_nearly_always_sure(fast_sampler, params, scale):
    logits = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(1)) * scale
    sequences = [sequence(seed=seed, **params) for seed in range(40)]
    found = fast_sampler(logits, sequences)
    assert found.count(UNSURE) <= 1
    expected = by_definition(logits, sequences)
    assert all(x in (UNSURE, y) for x, y in zip(found, expected, strict=True))


def test_the_kernel_is_sure_of_the_k_likeliest_too(native_cache):
    logits = torch.randn(40, 20_000, generator=torch.Generator().manual_seed(1))
    sequences = [sequence(seed=s, top_k=s + 2, top_p=0.8 + s / 200) for s in range(40)]
    found = NativeSampler(kernel_provider(native_cache, 2).library())(logits, sequences)
    assert found.count(UNSURE) <= 1
    expected = by_definition(logits, sequences)
    assert all(x in (UNSURE, y) for x, y in zip(found, expected, strict=True))


def test_of_equals_the_first_is_the_likeliest(fast_sampler):
    logits = torch.zeros(2, 300)
    logits[0, [131, 200, 299]] = 5
    logits[1, 299] = 5
    assert fast_sampler(logits, [sequence(temperature=0.0)] * 2) == [131, 299]


def test_rows_that_lie_apart_in_memory_are_drawn_alike(fast_sampler):
    whole = torch.randn(4, 3, 700, generator=torch.Generator().manual_seed(2))
    sequences = [sequence(seed=seed) for seed in range(4)]
    part = whole[:, -1, :600]
    assert fast_sampler(part, sequences) == by_definition(part.clone(), sequences)


def test_what_is_not_sure_of_its_order_is_left_to_the_definition(fast_sampler):
    """A tie where the nucleus ends."""
    logits = torch.tensor([0.4, 0.3, 0.3]).log()[None]
    found = [fast_sampler(logits, [sequence(seed=s, top_p=0.6)])[0] for s in range(50)]
    assert UNSURE in found
    expected = [by_definition(logits, [sequence(seed=s, top_p=0.6)])[0] for s in range(50)]
    assert all(x in (UNSURE, y) for x, y in zip(found, expected, strict=True))


def test_a_token_without_any_noise_is_left_to_the_definition(fast_sampler, monkeypatch):
    """The luckiest number of all is rounded to 1, whose logarithm is 0."""
    key = _luckiest(token=3)
    monkeypatch.setattr(rng, "step_key", lambda _seed, _step: key)
    assert rng.exponential(torch.tensor([key]), torch.tensor([3])).item() == 0
    assert fast_sampler(torch.zeros(1, 40), [sequence()]) == [UNSURE]


def test_a_broken_row_fails_alone(fast_sampler):
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(3))
    logits[1, 400], logits[2, :] = torch.nan, -torch.inf
    sampled = Sampler(fast_sampler).sample(
        logits, [sequence(temperature=t) for t in (1.0, 1.0, 0, 0)]
    )
    assert [token.error is not None for token in sampled] == [False, True, True, False]


def test_a_row_that_holds_nothing_finite_is_not_usable():
    logits = torch.full((3, 200), -torch.inf)
    logits[0, 150], logits[1, 150] = 1.0, torch.inf
    tokens, usable = likeliest(logits)
    assert tokens[0] == 150
    assert usable == [True, False, False]


def _luckiest(token: int) -> int:
    """The key with which a token's bits are all ones: SplitMix64, backwards."""
    mask, x = (1 << 64) - 1, (1 << 64) - 1
    for bits, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, 1)):
        undone = x
        for _ in range(64 // bits):
            undone = x ^ (undone >> bits)
        x = undone * pow(factor, -1, 1 << 64) & mask
    return rng.signed((x - token * rng.GAMMA) & mask)


@pytest.mark.parametrize("size", [3, 128 * 40, 128 * 40 + 5])
@pytest.mark.parametrize("place", [0, -1])
def test_the_largest_are_found_wherever_they_are(size, place):
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size))
    numbers[place] = 9.0
    values, places = largest(numbers, 3)
    assert torch.equal(values, numbers.sort(descending=True).values[:3])
    assert torch.equal(numbers[places], values)
    assert int(places[0]) == place % size
