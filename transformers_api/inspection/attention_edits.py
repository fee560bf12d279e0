"""Edits of attention weights: edges that are blocked, softmaxes that are hotter or colder.

All edits of a layer are applied to the scores of its queries, in their order; then the weights of
the rows that one of them concerns are computed again, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from transformers_api.engine.runners.edited_attention import Attending, ComputedAttention
from transformers_api.inspection.attention import Weights
from transformers_api.inspection.edit_plan import Edit, EditPlan, Range


def change_attention(edits: SequenceOf[Edit], call: Attending, first: int, key_start: int) -> int:
    """Change the queries of a sequence, of positions from ``first`` on.

    ``key_start``: the position of the first key; a window may have dropped some before it. Gives
    how many queries were changed, those of each edit.
    """
    _, count, keys = call.shape
    rows = {id(edit): _rows(edit, first, count) for edit in edits}
    queries = sorted(set().union(*rows.values()))
    if not queries:
        return 0
    heads = sorted({head for edit in edits for head in edit.units})
    scores, sinks = call.scores(heads, queries), call.sinks(heads, queries)
    if sinks is not None:
        sinks = sinks.expand(-1, len(queries), 1).clone()
    where = torch.zeros(scores.shape[:2], dtype=torch.bool, device=scores.device)
    for edit in edits:
        if not (own := rows[id(edit)]):
            continue
        at = _mask(len(queries), (queries.index(row) for row in own), scores)
        head = _mask(len(heads), (heads.index(unit) for unit in edit.units), scores)
        here = head[:, None] & at  # (H', R')
        where |= here
        if edit.do == "block":
            blocked = _mask(keys, _keys(edit.keys, key_start, keys), scores)
            scores = scores.masked_fill(here[..., None] & blocked, -torch.inf)
        else:
            scores = torch.where(here[..., None], scores / edit.by, scores)
            if sinks is not None:
                sinks = torch.where(here[..., None], sinks / edit.by, sinks)
    call.write(heads, queries, _softmax(scores, sinks), where)
    return sum(map(len, rows.values()))


def edited_rows(
    plan: EditPlan | None,
    layer: int,
    weights: Weights,
    rows: tuple[Tensor, Tensor | None],
    heads: SequenceOf[int] | None,
    first: int,
    key_start: int,
) -> tuple[Tensor, Tensor | None]:
    """The ``rows`` of ``weights``, (H', R, S) and what the sinks took, as a plan's edits make them.

    Of these ``heads``, or of all. ``first``, ``key_start``: see ``change_attention``.
    """
    edits = () if plan is None or weights.is_edited else plan.attention.get(layer, ())
    if not edits:
        return rows
    own, sinks = rows
    chosen = list(range(weights.heads) if heads is None else heads)
    whole = own.new_zeros(weights.heads, *own.shape[1:])
    whole[chosen] = own
    change_attention(edits, ComputedAttention(whole, sinks is not None), first, key_start)
    own = whole[chosen]
    return own, None if sinks is None else 1 - own.sum(-1)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """(H', R', S). A query that nothing is left to read for reads nothing."""
    if sinks is None:
        return scores.softmax(-1).nan_to_num(0.0)
    return torch.cat([scores, sinks], -1).softmax(-1).nan_to_num(0.0)[..., :-1]


def _rows(edit: Edit, first: int, count: int) -> list[int]:
    """Of ``count`` queries from position ``first`` on, those that the edit concerns."""
    # A query reads from no token behind it.
    lowest = min((start for start, _ in edit.keys), default=0)
    rows: set[int] = set()
    for start, stop in edit.positions:
        end = first + count if stop is None else min(stop, first + count)
        rows.update(range(max(start, lowest, first) - first, max(end - first, 0)))
    return sorted(rows)


def _keys(ranges: SequenceOf[Range], key_start: int, count: int) -> Iterable[int]:
    for start, stop in ranges:
        end = count if stop is None else min(max(stop - key_start, 0), count)
        yield from range(max(start - key_start, 0), end)


def _mask(count: int, places: Iterable[int], like: Tensor) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(places)] = True
    return mask.to(like.device)
