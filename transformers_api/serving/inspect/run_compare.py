"""Two runs side by side: their tokens, what was noted of them, and their activations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import numpy
from numpy.typing import NDArray

from transformers_api.inspection.uncertainty import settled_layer
from transformers_api.serving.inspect import arrays
from transformers_api.serving.inspect.run_file import Json, Run

NOTHING: Mapping[str, Any] = {}


def compare(a: Run, b: Run, most_numbers: int) -> Json:
    """The comparison of two runs, aligned where their answers begin.

    ``kl_at_least`` is the divergence of b from a over the tokens that were noted of both, and the
    rest as one: the whole one cannot be less. Cosines are of each token that both read, by its
    offset from the first one that was written; more than ``most_numbers`` are left out.
    """
    steps = list(zip_longest(a.token_ids, b.token_ids))
    differs = [place for place, (one, other) in enumerate(steps) if one != other]
    return {
        "a": a.id,
        "b": b.id,
        "same_model": (a.model, a.fingerprint) == (b.model, b.fingerprint),
        "same_prompt": list(a.prompt_ids) == list(b.prompt_ids),
        "identical": not differs,
        "first_difference": differs[0] if differs else None,
        "tokens": [
            {
                "step": step,
                "same": one == other,
                "a": _step(a, step),
                "b": _step(b, step),
                "kl_at_least": _divergence(_notes(a, step), _notes(b, step)),
            }
            for step, (one, other) in enumerate(steps)
        ],
        "activations": _activations(a, b, most_numbers),
    }


def _settled(readings: Sequence[Json]) -> int | None:
    return settled_layer([(each["layer"], each["token_id"]) for each in readings])


def _notes(run: Run, step: int) -> Mapping[str, Any]:
    return run.steps[step] if step < len(run.steps) else NOTHING


def _step(run: Run, step: int) -> Json | None:
    if step >= len(run.token_ids):
        return None
    notes = _notes(run, step)
    return {
        "token_id": run.token_ids[step],
        "token": run.tokens[step],
        "logprob": notes.get("logprob"),
        "entropy": notes.get("entropy"),
        "settled_layer": _settled(notes.get("lens", ())),
    }


def _divergence(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """KL(b || a) in nats over shared tokens and the rest; None where nothing was noted."""
    a, b = (_shares(notes) for notes in (one, other))
    shared = a.keys() & b.keys()
    if not shared:
        return None
    pairs = [(b[token], a[token]) for token in shared]
    rest = [max(1 - sum(side), 1e-12) for side in zip(*pairs, strict=True)]
    pairs.append((rest[0], rest[1]))
    return arrays.digits(max(sum(p * math.log(p / q) for p, q in pairs if p > 0 and q > 0), 0.0))


def _shares(notes: Mapping[str, Any]) -> dict[int, float]:
    return {each["token_id"]: math.exp(each["logprob"]) for each in notes.get("topk", ())}


def _activations(a: Run, b: Run, most_numbers: int) -> list[Json]:
    compared = []
    for layer, part in sorted(a.parts.keys() & b.parts.keys()):
        one, other = a.parts[layer, part].values, b.parts[layer, part].values
        if one.shape[1] != other.shape[1]:
            continue
        first = -min(len(a.prompt_ids), len(b.prompt_ids))
        starts = len(a.prompt_ids) + first, len(b.prompt_ids) + first
        count = min(len(one) - starts[0], len(other) - starts[1])
        rows = one[starts[0] : starts[0] + count], other[starts[1] : starts[1] + count]
        cosines = _cosines(*rows)
        lowest = int(cosines.argmin()) if count else None
        compared.append(
            {
                "layer": layer,
                "part": part,
                "first": first,
                "mean": arrays.digits(float(cosines.mean())) if count else None,
                "lowest": None if lowest is None else first + lowest,
                "cosine": arrays.significant(cosines) if count <= most_numbers else None,
            }
        )
        most_numbers -= count
    return compared


def _cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[numpy.float64]:
    """Of rows (n, width) each; 1 where they are equal to the bit, 0 where one is all zeros."""
    one, other = one.astype(numpy.float64), other.astype(numpy.float64)
    sizes = numpy.linalg.norm(one, axis=1) * numpy.linalg.norm(other, axis=1)
    cosines: NDArray[numpy.float64] = (one * other).sum(1) / numpy.where(sizes > 0, sizes, 1)
    return numpy.where((one == other).all(1), 1.0, cosines.clip(-1, 1))
