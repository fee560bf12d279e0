"""A prompt and what is to be generated after it: whether both fit the context."""

from __future__ import annotations

import pytest

from transformers_api.api.openai.requests import fit
from transformers_api.errors import ContextLengthExceeded


@pytest.mark.parametrize(
    ("max_tokens", "prompt", "explicit", "expected"),
    [
        (16, 10, True, 16),
        (90, 10, True, 90),
        (512, 10, False, 90),
        (0, 100, True, 0),
        (512, 99, False, 1),
    ],
)
def test_what_fits_the_context_is_generated(max_tokens, prompt, explicit, expected):
    assert fit(max_tokens, prompt, 100, explicit=explicit) == expected


@pytest.mark.parametrize(
    ("max_tokens", "prompt", "explicit", "param", "numbers"),
    [
        (512, 100, False, "prompt", ["100"]),
        (1, 250, True, "prompt", ["100", "250"]),
        (0, 101, True, "prompt", ["100", "101"]),
        (91, 10, True, "max_completion_tokens", ["100", "101", "10", "91"]),
    ],
)
def test_what_does_not_fit_is_told_with_its_numbers(max_tokens, prompt, explicit, param, numbers):
    with pytest.raises(ContextLengthExceeded) as caught:
        fit(
            max_tokens,
            prompt,
            100,
            explicit=explicit,
            param="prompt",
            max_tokens_param="max_completion_tokens",
        )
    assert caught.value.param == param
    assert all(number in caught.value.message for number in numbers)
