"""The interventions of an answer: the plan that was carried out, and the cost of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy

from transformers_api.inspection.base import Array
from transformers_api.inspection.divergence_question import Divergence
from transformers_api.serving.inspect.interventions import PlannedEdits
from transformers_api.serving.text.vocabulary import Vocabulary

Json = dict[str, Any]
NO_RUN: Mapping[str, str] = MappingProxyType({})


def header(edits: Sequence[PlannedEdits], prompt: int, run: Mapping[str, str] = NO_RUN) -> Json:
    """The field ``intervene`` of the answers to a prompt; {} where nobody asked for edits.

    ``run``: the field of the run that an answer is kept as.
    """
    return {"intervene": {"edits": list(edits[prompt].described), **run}} if edits else {}


def usage(edits: Sequence[PlannedEdits], per_prompt: int, twins: int = 0) -> Json:
    """The field ``intervene`` of ``usage``, so far.

    ``edits`` that are in effect, in so many ``rows`` (sequences) and ``places`` (parts of layers);
    ``tokens``: times that one of them changed a token in one layer. ``twins``: answers without.
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
            **({"twins": twins} if twins else {}),
        }
    }


def compared(own: Divergence, index: int, ids: Sequence[int], vocabulary: Vocabulary) -> Json:
    """The field ``compare`` of the choice ``index``, of its tokens ``ids``."""
    return {
        "index": index,
        "tokens": [
            {
                "token_id": token_id,
                "token": vocabulary.decoded(token_id),
                "kl": kl,
                "logprob_without": logprob,
                "top_without": [
                    {"token_id": i, "token": vocabulary.decoded(i), "logprob": score}
                    for i, score in zip(top, scores, strict=True)
                ],
            }
            for token_id, kl, logprob, top, scores in zip(
                ids,
                _finite(own.kl),
                _finite(own.logprob_without),
                own.top_ids.tolist(),
                map(_finite, own.top_logprobs),
                strict=True,
            )
        ],
    }


def _finite(numbers: Array) -> list[float]:
    """Six significant digits; what has no probability at all is told as the smallest number."""
    return [float(f"{number:.6g}") for number in numpy.nan_to_num(numbers).tolist()]
