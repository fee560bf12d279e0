"""Direct logit attribution: what each part of a model adds to the logit of one token.

The residual stream is the embedding and the sum of what the layers' writers add. With the
statistics of the final norm frozen as they are at this position, what comes after it is linear: so
every part has a share in the logit, and the shares add up to it. Elhage and others 2021, "A
Mathematical Framework for Transformer Circuits"; Wang and others 2023, arXiv:2211.00593.

Nothing is known by name: a norm is read off its answers to three vectors, a matrix by gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from transformers_api.engine.places import LayerPlaces, Writer
from transformers_api.engine.watched_pass import first_of, stream_of
from transformers_api.errors import AttentionUnavailable, ModelNotCapable
from transformers_api.inspection.adjoints import NOT_AFFINE, MeanDirections, frozen, pulled
from transformers_api.inspection.attention import Attended, AttentionSource, Weights
from transformers_api.inspection.base import Anatomy, AttentionMode
from transformers_api.inspection.logit_share import LogitParts, LogitPartsQuestion, LogitShare
from transformers_api.inspection.parts import Parts, lens_logits
from transformers_api.inspection.reading import Way, read, unarmed

NOT_SUMMED = 0.05  # of the sizes of a head's shares: they are not what the head adds
FLOAT32, ROUNDED = 1e-5, 5e-3  # relative: logits that are the head's but for a factor


@dataclass(slots=True)
class TokenRows:
    """Rows of one token, as they passed through modules."""

    inputs: dict[str, Tensor] = field(default_factory=dict)  # (C,) by module
    outputs: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def watched(self, model: Any, names: Sequence[str]) -> Generator[None, None, None]:
        """Note the last token's rows of these modules, while it lasts."""

        def hook(name: str) -> Any:
            def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                stream = stream_of(args, kwargs)
                own = first_of(args) if stream is None else stream
                made = first_of(output)
                if own is not None:
                    self.inputs[name] = own.reshape(-1, own.shape[-1])[-1].clone()
                if made is not None:
                    self.outputs[name] = made.reshape(-1, made.shape[-1])[-1].clone()

            return note

        with ExitStack() as stack:
            for name in dict.fromkeys(names):
                module = model.get_submodule(name)
                handle = module.register_forward_hook(hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield


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
    logits = yield from _last_logits(
        model, way, tokens_read, lambda _first, _last: rows.watched(model, names)
    )
    reading = _end(model, way, rows, logits, question, MeanDirections())
    yield
    shares, bias, readers = yield from _shares(model, way.parts, anatomy, rows, reading, question)
    _check_split(shares, question)
    if question.by == "source":
        shares = yield from _by_source(model, way, source, tokens_read, readers, shares)
    return _result(reading, shares, bias)


def _shares(
    model: Any,
    parts: Parts,
    anatomy: Anatomy,
    rows: TokenRows,
    reading: _Reading,
    question: LogitPartsQuestion,
) -> Generator[None, None, tuple[list[LogitShare], float, dict[int, Tensor]]]:
    """(the shares, what biases add besides, the directions (H, D) of each layer's heads)."""
    shares = [LogitShare("embed", -1, _along(rows.inputs[parts.layers[0]], reading.direction))]
    bias = 0.0
    readers: dict[int, Tensor] = {}
    for layer, place in enumerate(parts.places.of(model)):
        heads = _heads(anatomy, layer, place)
        for writer in place.writers:
            part = _part(place, writer)
            whole = writer.factor * _along(rows.outputs[writer.name], reading.direction)
            along = writer.factor * reading.direction
            if part == "attn" and question.by in ("head", "source") and heads:
                along_input, added = _before(model, rows, place.reader, place.reader_after, along)
                x = rows.inputs[place.reader or ""].double()
                values = (x * along_input).reshape(heads, -1).sum(-1)
                readers[layer] = along_input.reshape(heads, -1)
                shares += _split("head", layer, values, whole, added)
                bias += added
            elif part == "mlp" and question.by == "neuron" and place.down:
                along_input, added = _before(model, rows, place.down, place.down_after, along)
                values = rows.inputs[place.down].double() * along_input
                shares += _split("neuron", layer, values, whole, added)
                bias += added
            else:
                shares.append(LogitShare(part, layer, whole))
        yield
    return shares, bias, readers


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
        if place.reader is None or place.reader not in rows.inputs:
            continue
        before, row = place.reader, rows.inputs[place.reader]
        for name in place.reader_after:  # what the heads' module makes, and norms make of it
            row = model.get_submodule(before)(row[None, None])[0, 0]
            before, rows.inputs[name] = name, row
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


def _last_logits(
    model: Any, way: Way, ids: list[int], arm: Callable[[int, int], AbstractContextManager[None]]
) -> Generator[None, None, Tensor]:
    """The logits (V',) of the last token; ``arm`` watches the chunk that it is in."""
    tokens = torch.tensor([ids], device=model.device)
    logits = torch.empty(0)

    def armed(first: int, last: int) -> AbstractContextManager[Any]:
        return arm(first, last) if last == len(ids) else unarmed(first, last)

    for chunk in read(model, tokens, way.width(), armed):
        logits = chunk.logits[0, -1]
        yield
    return logits


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


def _before(
    model: Any, rows: TokenRows, name: str | None, after: Sequence[str], direction: Tensor
) -> tuple[Tensor, float]:
    """The direction of a linear module's input, and what biases add along ``direction``.

    ``after``: the norms between the module and the stream, the nearest to the module first.
    """
    assert name is not None
    added = 0.0
    for norm_name in reversed(after):
        norm = frozen(model.get_submodule(norm_name), rows.inputs[norm_name])
        added += float(norm.constant @ direction)
        direction = norm.adjoint(direction)
    before, own = pulled(model.get_submodule(name), rows.inputs[name], direction)
    return before, added + own


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


def _by_source(
    model: Any,
    way: Way,
    source: AttentionSource,
    ids: list[int],
    readers: dict[int, Tensor],
    shares: Sequence[LogitShare],
) -> Generator[None, None, list[LogitShare]]:
    """Shares of heads, each by the token that was read: weight * value @ direction.

    ``readers``: the directions (H, D) of each layer's heads.
    """
    if source.mode is not AttentionMode.TAP:
        raise AttentionUnavailable(
            "the values that heads read cannot be shown for this model", param="by"
        )
    split_shares: dict[int, Tensor] = {}  # (H, S) by layer
    starts: dict[int, int] = {}

    def take(layer: int, weights: Weights) -> None:
        if layer not in readers or not isinstance(weights, Attended):
            return
        last = weights.query.shape[2] - 1
        probs = weights.rows(0, slice(last, last + 1))[0][:, 0].double()
        values = weights.numbers(weights.value[0]).double()
        values = values.repeat_interleave(weights.heads // len(values), dim=0)
        along = torch.einsum("hsd,hd->hs", values, readers[layer])
        split_shares[layer] = probs * along[:, -probs.shape[1] :]
        starts[layer] = len(ids) - probs.shape[1]

    yield from _last_logits(model, way, ids, lambda *_: source.watched(model, take, set(readers)))
    result: list[LogitShare] = [share for share in shares if share.part != "head"]
    for share in (share for share in shares if share.part == "head"):
        own = split_shares.get(share.layer)
        if own is None:
            result.append(share)
            continue
        values = own[share.index]
        size = max(float(values.abs().sum()), abs(share.value))
        if abs(float(values.sum()) - share.value) > NOT_SUMMED * max(size, 1e-6):
            raise ModelNotCapable(
                f"what head {share.index} of layer {share.layer} reads does not add up to what it "
                "gives: it is changed on the way",
                param="by",
            )
        result += [
            LogitShare("source", share.layer, value, share.index, starts[share.layer] + place)
            for place, value in enumerate(values.tolist())
        ]
    return result


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
