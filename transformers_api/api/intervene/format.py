"""The interventions of an answer: the plan that was carried out, and the cost of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers_api.serving.inspect.interventions import PlannedEdits

Json = dict[str, Any]


def header(edits: Sequence[PlannedEdits], prompt: int) -> Json:
    """The field ``intervene`` of the answers to a prompt; {} where nobody asked for edits."""
    return {"intervene": {"edits": list(edits[prompt].described)}} if edits else {}


def usage(edits: Sequence[PlannedEdits], per_prompt: int) -> Json:
    """The field ``intervene`` of ``usage``, so far.

    ``edits`` that are in effect, in so many ``rows`` (sequences) and ``places`` (parts of layers);
    ``tokens``: times that one of them changed a token in one layer.
    """
    if not edits:
        return {}
    plans = [each.plan for each in edits if each.plan is not None]
    in_effect = [sum(not own["elided"] for own in each.described) for each in edits]
    return {
        "intervene": {
            "edits": max(in_effect),
            "rows": len(plans) * per_prompt,
            "places": max((plan.places for plan in plans), default=0),
            "tokens": sum(plan.tally.tokens for plan in plans),
            "ms": round(1000 * sum(plan.tally.seconds for plan in plans), 3),
        }
    }
