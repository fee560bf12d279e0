"""Sampling parameters as JSON, and back: those that differ from the defaults."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers_api.engine.base import DryParams, SamplingParams

Json = dict[str, Any]
# Scores change no token, and forced tokens are in ``intervene``.
_LEFT_OUT = ("logprobs", "prompt_logprobs", "forced")
_SETS = ("allowed_token_ids", "stop_token_ids")


def to_json(params: SamplingParams) -> Json:
    """The fields that are not as by default."""
    default, document = SamplingParams(), Json()
    for each in fields(params):
        value = getattr(params, each.name)
        if each.name in _LEFT_OUT or value == getattr(default, each.name):
            continue
        if each.name in _SETS:
            value = sorted(value)
        elif each.name == "logit_bias":
            value = {str(token): bias for token, bias in value.items()}
        elif each.name == "dry":
            value = _dry_json(value)
        document[each.name] = value
    return document


def from_json(document: Json) -> SamplingParams:
    """Raises TypeError, ValueError, KeyError, AttributeError for what ``to_json`` did not write."""
    values = dict(document)
    for name in _SETS:
        if name in values:
            values[name] = frozenset(values[name])
    if "logit_bias" in values:
        values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
    if "dry" in values:
        values["dry"] = _dry(values["dry"])
    return SamplingParams(**values)


def _dry_json(dry: DryParams) -> Json:
    breakers = {str(first): sorted(map(list, others)) for first, others in dry.breakers.items()}
    numbers = {
        name: getattr(dry, name) for name in ("multiplier", "base", "allowed_length", "last_n")
    }
    return {**numbers, "breakers": breakers}


def _dry(document: Json) -> DryParams:
    breakers = {
        int(first): frozenset(map(tuple, others)) for first, others in document["breakers"].items()
    }
    return DryParams(**{**document, "breakers": breakers})
