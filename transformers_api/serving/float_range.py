"""Sampling parameters in float32, in which every way of sampling computes."""

from __future__ import annotations

from dataclasses import replace

from transformers_api.engine.base import SamplingParams

# What is smaller has no normal float32: a temperature is 0 then, the likeliest token; a share keeps
# that one too. A penalty that divides by less would make infinite logits of ordinary ones.
_SMALLEST = 2.0**-126
_LEAST_PENALTY = 1e-30


def within_float32(params: SamplingParams) -> SamplingParams:
    """``params`` with numbers that mean in float32 what they say, for every way of sampling."""
    return replace(
        params,
        temperature=0.0 if params.temperature < _SMALLEST else params.temperature,
        top_p=max(params.top_p, _SMALLEST),
        typical_p=max(params.typical_p, _SMALLEST),
        repetition_penalty=max(params.repetition_penalty, _LEAST_PENALTY),
        word_repetition_penalty=max(params.word_repetition_penalty, _LEAST_PENALTY),
    )
