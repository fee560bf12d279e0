"""Seeds of the answers to one prompt."""

from __future__ import annotations

from dataclasses import replace

from transformers_api.engine.base import SamplingParams

_SEEDS = 2**63


def with_seed(params: SamplingParams, place: int) -> SamplingParams:
    """The choices of a prompt differ, and each can be had again: seed + its place."""
    if params.seed is None:
        return params
    return replace(params, seed=(params.seed + place) % _SEEDS)
