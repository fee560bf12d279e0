"""Direct logit attribution: what each part of a model adds to the logit of one token.

The residual stream is the embedding and the sum of what the layers' writers add. With the
statistics of the final norm frozen as they are at this position, what comes after it is linear: so
every part has a share in the logit, and the shares add up to it. Elhage and others 2021, "A
Mathematical Framework for Transformer Circuits"; Wang and others 2023, arXiv:2211.00593.

Nothing is known by name: a norm is read off its answers to three vectors, a matrix by gradients.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor

from transformers_api.engine.places import LayerPlaces, Writer
from transformers_api.errors import ModelNotCapable
from transformers_api.inspection.adjoints import NOT_AFFINE, MeanDirections, frozen, pulled
from transformers_api.inspection.attention import AttentionSource
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.logit_share import LogitParts, LogitPartsQuestion, LogitShare
from transformers_api.inspection.logit_sources import NOT_SUMMED, by_source
from transformers_api.inspection.logit_units import head_shares, input_direction
from transformers_api.inspection.parts import Parts, lens_logits
from transformers_api.inspection.reading import Way, last_logits
from transformers_api.inspection.token_rows import TokenRows

# Questions by which the input of a module is split.
SPLIT_BY = {"head": ("head", "source"), "neuron": ("neuron",)}
FLOAT32, ROUNDED = 1e-5, 5e-3  # relative: logits that are the head's but for a factor


@dataclass(frozen=True, slots=True)
class _Reading:
    """The end of a model, as it is at one token: logit = parts @ direction + constant."""

    direction: Tensor  # (C,) float64, of the residual stream
    constant: float
    logit: float  # less the one it is compared with
    model_logit: float
    is_capped: bool
    token_id: int


def split(
    model: Any,
    way: Way,
    source: AttentionSource,
    anatomy: Anatomy,
    ids: list[int],
    question: LogitPartsQuestion,
) -> Generator[None, None, LogitParts]:
    """See ``base.Inspector.logit_parts``."""
    layers, parts = way.parts.places.of(model), way.parts
    _check(layers, parts.head)
    tokens_read = ids[: question.position + 1]
    rows = TokenRows()
    names = [*parts.layers, *([parts.final_norm] if parts.final_norm else []), parts.head or ""]
    for place in layers:
        names += [writer.name for writer in place.writers]
        names += [name for name in (place.reader, place.down) if name]
        names += [*place.reader_after, *place.down_after]
    logits = yield from last_logits(model, way, tokens_read, lambda *_: rows.watched(model, names))
    if way.edits is not None:
        rows.moved = dict(way.edits.moved)
    reading = _end(model, way, rows, logits, question, MeanDirections())
    yield
    shares, bias, readers = yield from _shares(model, way.parts, anatomy, rows, reading, question)
    _check_split(shares, question)
    if question.by == "source":
        shares = yield from by_source(model, way, source, tokens_read, readers, shares)
    return _result(reading, shares, bias)


def _shares(
    model: Any,
    parts: Parts,
    anatomy: Anatomy,
    rows: TokenRows,
    reading: _Reading,
    question: LogitPartsQuestion,
) -> Generator[None, None, tuple[list[LogitShare], float, dict[int, Tensor]]]:
    """(the shares, what biases add besides, the directions (H, D) of each layer's heads).

    What an edit adds to a row of the token is a share of its own; the others are without it.
    """
    first = parts.layers[0]
    shares = _edited(rows, (first, "in"), reading.direction, -1, "resid")
    embedding = _along(rows.inputs[first], reading.direction) - _sum(shares)
    shares.insert(0, LogitShare("embed", -1, embedding))
    bias = 0.0
    readers: dict[int, Tensor] = {}
    for layer, place in enumerate(parts.places.of(model)):
        heads = _heads(anatomy, layer, place)
        for writer in place.writers:
            own = _of_writer(model, rows, reading, (layer, place, writer), heads, question.by)
            shares += own.shares
            bias += own.bias
            if own.unit == "head" and own.along is not None:
                readers[layer] = own.along.reshape(heads, -1)
        shares += _edited(rows, (place.layer, "out"), reading.direction, layer, "resid")
        yield
    return shares, bias, readers


@dataclass(frozen=True, slots=True)
class _Written:
    """The shares of what one module writes; ``along``: the direction of its heads or neurons."""

    shares: list[LogitShare]
    unit: str = ""  # they are split by: "head" or "neuron"
    bias: float = 0.0
    along: Tensor | None = None


def _of_writer(
    model: Any,
    rows: TokenRows,
    reading: _Reading,
    place_of: tuple[int, LayerPlaces, Writer],
    heads: int,
    by: str,
) -> _Written:
    """See ``_shares``."""
    layer, place, writer = place_of
    part, direction = _part(place, writer), writer.factor * reading.direction
    edits = _edited(rows, (writer.name, "out"), direction, layer, part)
    name, after, unit = {
        "attn": (place.reader, place.reader_after, "head"),
        "mlp": (place.down, place.down_after, "neuron"),
    }.get(part, (None, (), ""))
    is_split = bool(name) and by in SPLIT_BY.get(unit, ()) and (unit == "neuron" or heads > 0)
    if name and is_split and by == "head":
        heads_own = head_shares(model, rows, (name, after), direction, heads, layer)
        edits += heads_own.edits
        whole = _along(rows.outputs[writer.name], direction) - _sum(edits)
        own = _split(unit, layer, heads_own.values, whole, heads_own.bias)
        return _Written([*own, *edits], unit, heads_own.bias)
    along, added = torch.empty(0), 0.0
    if name and (is_split or (name, "in") in rows.moved):
        along, added = input_direction(model, rows, name, after, direction)
        edits += _edited(rows, (name, "in"), along, layer, unit)
    whole = _along(rows.outputs[writer.name], direction) - _sum(edits)
    if not (is_split and name):
        return _Written([LogitShare(part, layer, whole), *edits])
    values = (rows.inputs[name].double() - rows.moved.get((name, "in"), 0)) * along
    if unit == "head":
        values = values.reshape(heads, -1).sum(-1)
    return _Written([*_split(unit, layer, values, whole, added), *edits], unit, added, along)


def _edited(
    rows: TokenRows, key: tuple[str, str], direction: Tensor, layer: int, part: str
) -> list[LogitShare]:
    """The share of what edits added there; none where nothing was."""
    moved = rows.moved.get(key)
    return [] if moved is None else [LogitShare("edit", layer, _along(moved, direction), of=part)]


def _sum(shares: Sequence[LogitShare]) -> float:
    return sum(share.value for share in shares)


def split_token(
    model: Any,
    way: Way,
    anatomy: Anatomy,
    rows: TokenRows,
    logits: Tensor,
    question: LogitPartsQuestion,
    means: MeanDirections,
) -> LogitParts:
    """The parts of a logit by layer or head, of ``rows`` that a pass on one token made.

    ``rows`` have what each writer made, the heads' outputs, and the stream before the first layer
    and after the last. ``logits`` (V,) are those of the pass, ``means`` of its head. Raises
    ModelNotCapable.
    """
    parts = way.parts
    for place in parts.places.of(model):
        _follow(model, rows, place.reader, place.reader_after)
        _follow(model, rows, place.down, place.down_after)
    names = [name for name in (parts.final_norm, parts.head) if name]
    with rows.watched(model, names):
        read_logits = lens_logits(model, parts, rows.outputs[parts.layers[-1]][None])[0]
    reading = _end(model, way, rows, read_logits, question, means)
    own = float(logits[reading.token_id])
    if question.against == "mean":
        own -= float(logits.double().mean())
    elif question.against is not None:
        own -= float(logits[question.against])
    slices = _shares(model, parts, anatomy, rows, reading, question)
    while True:
        try:
            next(slices)
        except StopIteration as end:
            shares, bias, _ = end.value
            break
    _check_split(shares, question)
    return _result(replace(reading, model_logit=own), shares, bias)


def _follow(model: Any, rows: TokenRows, before: str | None, after: Sequence[str]) -> None:
    """Note what a module makes of its row, where there is one, and norms ``after`` it of that."""
    if before is None or before not in rows.inputs:
        return
    row = rows.inputs[before]
    for name in after:
        row = model.get_submodule(before)(row[None, None])[0, 0]
        before, rows.inputs[name] = name, row


def _check(layers: Sequence[LayerPlaces], head: str | None) -> None:
    missing = [number for number, place in enumerate(layers) if not place.writers]
    if missing or not layers or head is None:
        what = f"layer {missing[0]} adds" if missing else "its layers add"
        raise ModelNotCapable(
            f"what {what} to the residual stream was not found: a logit has no parts here",
            param="model",
        )


def _heads(anatomy: Anatomy, layer: int, place: LayerPlaces) -> int:
    """The heads whose outputs lie one behind the other before a linear module; 0: not so."""
    heads = anatomy.attention[layer].heads if layer < len(anatomy.attention) else 0
    fits = place.reader is not None and heads and place.reader_width % heads == 0
    return heads if fits else 0


def _part(place: LayerPlaces, writer: Writer) -> str:
    if writer is place.attn:
        return "attn"
    return "mlp" if writer is place.mlp else writer.name.removeprefix(f"{place.layer}.")


def _along(row: Tensor, direction: Tensor) -> float:
    return float(row.double() @ direction)


def _end(
    model: Any,
    way: Way,
    rows: TokenRows,
    logits: Tensor,
    question: LogitPartsQuestion,
    means: MeanDirections,
) -> _Reading:
    """The logit as a direction of the residual stream after the last layer."""
    parts = way.parts
    head = model.get_submodule(parts.head)
    before_head, after_head = rows.inputs[parts.head or ""], rows.outputs[parts.head or ""]
    cut = logits[: way.vocab_size]
    token_id = int(cut.argmax()) if question.token_id is None else question.token_id
    selector = torch.zeros(len(after_head), dtype=torch.float64, device=after_head.device)
    selector[token_id] = 1
    factor, is_capped = _after_head(after_head, logits)
    if isinstance(question.against, int):
        selector[question.against] -= 1
    direction, constant = pulled(head, before_head, factor * selector)
    if question.against == "mean":
        selector[: way.vocab_size] -= 1 / way.vocab_size
        mean, added = means.of(head, before_head, len(after_head), way.vocab_size)
        direction, constant = direction - factor * mean, constant - factor * added
    normed = rows.outputs[parts.layers[-1]]
    if parts.final_norm:
        norm = frozen(model.get_submodule(parts.final_norm), rows.inputs[parts.final_norm])
        normed = rows.outputs[parts.final_norm]
    scale = _scale(normed, before_head)
    if parts.final_norm:
        constant += scale * float(norm.constant @ direction)
        direction = norm.adjoint(direction)
    return _Reading(
        direction=scale * direction,
        constant=constant,
        logit=float(after_head.double() @ selector) * factor,
        model_logit=float(logits.double() @ selector),
        is_capped=is_capped,
        token_id=token_id,
    )


def _after_head(after_head: Tensor, logits: Tensor) -> tuple[float, bool]:
    """(the factor of the head's logits, True where the model does more with them)."""
    own, last = after_head.double(), logits.double()
    most = FLOAT32 if after_head.dtype == torch.float32 else ROUNDED
    factor = float((own @ last) / (own @ own).clamp_min(1e-60))
    off = (factor * own - last).norm() / last.norm().clamp_min(1e-30)
    return (_plain(factor, most), False) if off < most else (1.0, True)


def _plain(factor: float, most: float) -> float:
    """1 where it is 1 but for rounding."""
    return 1.0 if abs(factor - 1) < most else factor


def _scale(normed: Tensor, before_head: Tensor) -> float:
    """The factor between the final norm and the head. Raises ModelNotCapable for anything else."""
    own, last = normed.double(), before_head.double()
    scale = float((own @ last) / (own @ own).clamp_min(1e-60))
    if not (scale * own - last).norm() <= NOT_AFFINE * last.norm():
        raise ModelNotCapable(
            "between the final norm and the head is more than a factor: a logit has no parts here",
            param="model",
        )
    return _plain(scale, FLOAT32 if normed.dtype == torch.float32 else ROUNDED)


def _split(part: str, layer: int, values: Tensor, whole: float, bias: float) -> list[LogitShare]:
    """The shares of a writer's parts. Raises ModelNotCapable unless they sum to the writer's."""
    off = abs(float(values.sum()) + bias - whole)
    if off > NOT_SUMMED * float(values.abs().sum() + abs(bias)):
        raise ModelNotCapable(
            f"the {part}s of layer {layer} do not add up to what it writes (off by {off:.2g})",
            param="by",
        )
    return [LogitShare(part, layer, value, index) for index, value in enumerate(values.tolist())]


def _check_split(shares: Sequence[LogitShare], question: LogitPartsQuestion) -> None:
    part = {"head": "head", "source": "head", "neuron": "neuron"}.get(question.by)
    if part is not None and not any(share.part == part for share in shares):
        raise ModelNotCapable(
            f"no layer of this model has {part}s that can be told apart", param="by"
        )


def _result(reading: _Reading, shares: list[LogitShare], bias: float) -> LogitParts:
    values = numpy.array([share.value for share in shares])
    constant = reading.constant + bias
    total = float(values.sum()) + constant
    return LogitParts(
        token_id=reading.token_id,
        logit=reading.logit,
        model_logit=reading.model_logit,
        is_capped=reading.is_capped,
        shares=tuple(shares),
        constant=constant,
        rounding=reading.logit - total,
        sum=total,
    )
