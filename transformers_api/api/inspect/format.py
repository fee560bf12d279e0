"""The results of inspections, as dictionaries and files. No Flask, no clock."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

import numpy

from transformers_api.api.inspect import attention_page
from transformers_api.inspection.attribution_question import Attribution, AttributionQuestion
from transformers_api.inspection.base import (
    Anatomy,
    Array,
    HeadGrid,
    LayerAttention,
    PromptReading,
    StepTrace,
)
from transformers_api.inspection.editable import INPUTS, Editable, Places
from transformers_api.inspection.lens_maps import LensTable
from transformers_api.serving.inspect import arrays, picture
from transformers_api.serving.inspect.arrays import Reduction
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text.spans import Span
from transformers_api.serving.text.vocabulary import Vocabulary

Json = dict[str, Any]
Range = tuple[int, int]

FORMATS = ("json", "f16", "u8", "topk", "npz", "png", "html")
LOWEST_LOGPROB = -9999.0  # JSON has no infinity
STATES_NOTE = "before the final norm"
ROLLOUT_NOTE = "in a causal model rollout over many layers ends at the leftmost token"


def tokens(vocabulary: Vocabulary, ids: Sequence[int]) -> Json:
    """Ids, and what they are on their own."""
    return {
        "tokens": [vocabulary.decoded(token_id) for token_id in ids],
        "tokens_display": [vocabulary.display(token_id) for token_id in ids],
        "token_ids": list(ids),
    }


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """(H', R, C) weights of queries ``rows`` on keys ``cols``, and the fields beside them."""

    weights: Array
    rows: Range
    cols: Range
    fields: Json  # the fields before "attn": tokens, layer, head, …
    rest: Json = field(default_factory=dict)  # and those behind
    sink: Array | None = None  # (H', R)
    has_heads: bool = False  # several heads were asked for, as such

    def pooled(self, size: Sequence[int] | None, how: Reduction) -> Matrix:
        """Made smaller to ``size``: rows and columns."""
        if size is None:
            return self
        sink = self.sink
        if sink is not None:
            sink = arrays.pool(sink[..., None], size[0], 1, how)[..., 0]
        weights = arrays.pool(self.weights, size[0], size[1], how)
        return replace(self, weights=weights, sink=sink)

    @property
    def visible(self) -> Array:
        """(R, C), or (H, R, C) of several heads."""
        return self.weights if self.has_heads else self.weights[0]

    def json(self, how: str) -> Json:
        """The answer; ``how`` the weights are written: json, f16 or u8."""
        write = {"json": arrays.rounded, "f16": arrays.float16, "u8": arrays.uint8}[how]
        return {**self.fields, "attn": write(self.visible), **self._rest()}

    def npz(self) -> bytes:
        """A file for numpy."""
        ids = numpy.array(self.fields["token_ids"], numpy.int32)
        meta = {**self.fields, **self._rest()}
        return arrays.npz({"attn": self.visible.astype(numpy.float16), "token_ids": ids}, meta)

    def png(self, cell: int | None, has_words: bool) -> bytes:
        """A picture of the only head; without words where cells stand for several tokens."""
        weights, names = self.weights[0], self.fields["tokens_display"]
        height, width = weights.shape
        size = picture.cell_size(height, width, cell)
        rows, cols = names[slice(*self.rows)], names[slice(*self.cols)]
        if not has_words or (height, width) != (len(rows), len(cols)):
            return picture.draw(weights, size)
        return picture.draw(weights, size, rows, cols)

    def html(self, model: str) -> str:
        """A page that shows it, without a server."""
        return attention_page.render({"model": model, **self.json("u8")})

    def _rest(self) -> Json:
        sink = None
        if self.sink is not None:
            sink = arrays.rounded(self.sink if self.has_heads else self.sink[0])
        place = {"rows": list(self.rows), "cols": list(self.cols)}
        return {**place, "n": len(self.fields["token_ids"]), **self.rest, "sink": sink}


def full_attention(
    vocabulary: Vocabulary, ids: Sequence[int], layer: LayerAttention, head: int | str
) -> Json:
    """The fields of one layer's matrix before its numbers."""
    return {"layer": layer.layer, "head": head, **tokens(vocabulary, ids)}


def about_layer(
    anatomy: Anatomy, layer: LayerAttention, head: int | str, is_truncated: bool
) -> Json:
    """And those behind them. A group of query heads shares the keys and values of one head."""
    group = max(layer.heads // max(layer.kv_heads, 1), 1)
    return {
        "kv_head": head // group if isinstance(head, int) else None,
        "layer_type": layer.type,
        "window": layer.window,
        **about_all(anatomy, is_truncated),
    }


def about_all(anatomy: Anatomy, is_truncated: bool) -> Json:
    """``exact`` where the model saw all of it and used these weights."""
    return {
        "state": "truncated" if is_truncated else "exact",
        "verified": anatomy.verified,
    }


def token_table(vocabulary: Vocabulary, ids: Sequence[int], spans: Sequence[Span]) -> Json:
    """The tokens, and where they stand in the text."""
    raw = [vocabulary.token_bytes(token_id) for token_id in ids]
    # A character that is spread over several tokens counts with the one that begins it.
    ends = list(accumulate(sum(byte & 0xC0 != 0x80 for byte in piece) for piece in raw))
    return {
        **tokens(vocabulary, ids),
        "bytes": [list(piece) for piece in raw],
        "offsets": [list(pair) for pair in zip([0, *ends], ends, strict=False)],
        "spans": [asdict(span) for span in spans],
    }


def reading(vocabulary: Vocabulary, result: PromptReading) -> Json:
    """The model's expectation of each token; nothing foresees the first one."""
    return {
        "surprisal": [None, *arrays.significant(result.surprisal)],
        "entropy": [None, *arrays.significant(result.entropy)],
        "rank": [None, *result.rank.tolist()],
        "topk": [
            None,
            *(
                [
                    {**_named(vocabulary, token_id), "logprob": arrays.digits(logprob)}
                    for token_id, logprob in zip(ids, logprobs, strict=True)
                ]
                for ids, logprobs in zip(
                    result.top_ids.tolist(), result.top_logprobs.tolist(), strict=True
                )
            ),
        ],
    }


def written(vocabulary: Vocabulary, prompt: int, steps: Sequence[StepTrace]) -> Json:
    """The expectation of each token that was written, after so many of the prompt."""
    unread = [None] * prompt
    logprobs = [max(step.logprob, LOWEST_LOGPROB) for step in steps]
    return {
        "surprisal": [*unread, *(arrays.digits(0.0 - logprob) for logprob in logprobs)],
        "entropy": [*unread, *(arrays.digits(step.entropy) for step in steps)],
        "rank": [*unread, *(step.rank for step in steps)],
        "topk": [
            *unread,
            *(
                [
                    {**_named(vocabulary, token_id), "logprob": _log(prob)}
                    for token_id, prob in zip(step.top.token_ids, step.top.probs, strict=True)
                ]
                for step in steps
            ),
        ],
    }


def _log(prob: float) -> float:
    return arrays.digits(math.log(prob)) if prob > 0 else LOWEST_LOGPROB


def _named(vocabulary: Vocabulary, token_id: int) -> Json:
    return {"token_id": token_id, "token": vocabulary.decoded(token_id)}


_GRID = ("entropy", "distance", "first", "previous", "itself")
_WIRE = {"itself": "self"}


def head_table(anatomy: Anatomy, n: int, grid: HeadGrid) -> Json:
    """Every head at a glance; the thumbnails of layers without attention are empty."""
    numbers = {_WIRE.get(name, name): arrays.significant(getattr(grid, name)) for name in _GRID}
    sinks = None if grid.sink is None else arrays.rounded(grid.sink)
    answer: Json = {"n": n, "layers": []}
    for layer in anatomy.attention:
        entry: Json = {"layer": layer.layer, "type": layer.type, "heads": None}
        if layer.available:
            entry["heads"] = [
                {
                    "head": head,
                    **{name: rows[layer.layer][head] for name, rows in numbers.items()},
                    "sink": sinks[layer.layer][head] if sinks and layer.sinks else None,
                }
                for head in range(min(layer.heads, grid.entropy.shape[1]))
            ]
        else:
            entry["reason"] = layer.reason or layer.type
        answer["layers"].append(entry)
    if grid.thumbs is not None:
        answer["thumb"] = arrays.uint8(grid.thumbs)
    return answer


def lens_table(
    vocabulary: Vocabulary,
    anatomy: Anatomy,
    layers: Sequence[int],
    positions: Sequence[int],
    table: LensTable,
) -> Json:
    """A row of cells for each position, a cell for each layer."""
    probs, entropy = arrays.significant(table.top_probs), arrays.significant(table.entropy)
    target_probs = arrays.significant(table.target_prob)
    ids, ranks = table.top_ids.tolist(), table.target_rank.tolist()

    def cell(row: int, column: int) -> Json:
        likely = zip(ids[row][column], probs[row][column], strict=True)
        return {
            "topk": [{**_named(vocabulary, token_id), "prob": prob} for token_id, prob in likely],
            "entropy": entropy[row][column],
            "target_rank": ranks[row][column],
            "target_prob": target_probs[row][column],
        }

    return {
        "layers": list(layers),
        "positions": list(positions),
        "targets": [_named(vocabulary, token_id) for token_id in table.target_ids.tolist()],
        "final_norm": anatomy.final_norm,
        "exact_final": anatomy.lens_is_exact,
        "cells": [[cell(i, j) for j in range(len(layers))] for i in range(len(positions))],
    }


def attribution(vocabulary: Vocabulary, question: AttributionQuestion, result: Attribution) -> Json:
    """One score for each token up to the query."""
    unit = "nats" if question.of == "logprob" else "logits"
    delta = result.convergence_delta
    return {
        "method": question.method,
        "unit": f"{unit} per unit of embedding" if question.method == "gradient_norm" else unit,
        "target": {
            **_named(vocabulary, result.token_id),
            "logprob": arrays.digits(result.logprob),
            "position": question.position,
        },
        "value": arrays.digits(result.value),
        "scores": arrays.significant(result.scores),
        "convergence_delta": None if delta is None else arrays.digits(delta),
        "steps": result.steps,
        "largest_change": None
        if result.largest_change is None
        else arrays.digits(result.largest_change),
        "note": result.note,
    }


def states_meta(layers: Sequence[int], positions: Sequence[int], ids: Sequence[int]) -> Json:
    """The layers and tokens of residual streams, which are raw, as the last layer leaves them."""
    return {
        "layers": list(layers),
        "positions": list(positions),
        "stream": "residual",
        "note": STATES_NOTE,
        "token_ids": list(ids),
    }


def not_loaded(model_id: str, limits: Mapping[str, Any]) -> Json:
    """The answer about a model that is not in memory: what holds for all."""
    return {"id": model_id, "loaded": False, "limits": dict(limits), "formats": list(FORMATS)}


def capabilities(
    model: LoadedModel,
    anatomy: Anatomy,
    gradients: bool,
    suggested_layer: int | None,
    editable: Editable,
    norms: Sequence[float],
    limits: Mapping[str, Any],
) -> Json:
    """The capabilities of a model."""
    routing = anatomy.routing
    return {
        "id": model.spec.name,
        "loaded": True,
        "model_type": anatomy.model_type,
        "layers": anatomy.layers,
        "heads": anatomy.heads,
        "kv_heads": anatomy.kv_heads,
        "head_dim": anatomy.head_dim,
        "hidden_size": anatomy.hidden_size,
        "vocab": anatomy.vocab_size,
        "context": anatomy.context,
        "dtype": anatomy.dtype,
        "attention": {
            "mode": str(anatomy.mode),
            "impl": anatomy.implementation,
            "verified": anatomy.verified,
            "max_rel_err": anatomy.max_rel_err,
            "while_writing": anatomy.traces_attention,
            "per_layer": [_layer(layer) for layer in anatomy.attention],
        },
        "lens": {
            "available": anatomy.lens,
            "final_norm": anatomy.final_norm,
            "exact": anatomy.lens_is_exact,
        },
        "places": [_places(layer) for layer in editable.places],
        "neighbours": "bit-equal" if editable.neighbours_are_equal else "as in any company",
        "resid_norm": [arrays.digits(norm) for norm in norms[1:]],
        "suggested_layer": suggested_layer,
        "gradients": gradients,
        "router": routing
        and {
            "layers": list(routing.layers),
            "experts": routing.experts,
            "experts_per_token": routing.experts_per_token,
        },
        "limits": dict(limits),
        "formats": list(FORMATS),
    }


def _places(places: Places) -> Json:
    """The parts of a layer that can be changed; numbers say how many, 0 or false none."""
    return {
        "layer": places.layer,
        "resid": places.can("resid"),
        "attn": places.can("attn"),
        "mlp": places.can("mlp"),
        "head": places.heads if places.can("head") else 0,
        "neuron": places.neurons if places.can("neuron") else 0,
        **{part: places.inputs[part][0] if places.can(part) else 0 for part in INPUTS},
        "weights": places.can("weights"),
        "verified": places.verified,
    }


def _layer(layer: LayerAttention) -> Json:
    return {
        "layer": layer.layer,
        "type": layer.type,
        "heads": layer.heads,
        "kv_heads": layer.kv_heads,
        "window": layer.window,
        "sinks": layer.sinks,
        "available": layer.available,
        "reason": layer.reason,
        "max_rel_err": layer.max_rel_err,
    }
