"""The places of a model's layers where numbers can be changed, found in one watched pass.

A layer adds the outputs of a few modules to the residual stream: its writers. Least squares over
the outputs of all its modules find them, with the factors that a model may give them. From a
writer one walks back, through norms and dropouts, to the linear module whose input are the heads'
outputs, or the neurons. A module is known for linear by what it does, never by its weight.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from transformers_api.engine.watched_pass import Call, layer_names, watched_pass

log = logging.getLogger(__name__)
MOST_WRITERS = 3
MOST_STEPS = 4  # modules between a linear one and the stream
FLOAT32, ROUNDED = 2e-5, 2e-2  # what a layer may leave unexplained, relative
MOST_ROUNDED = 0.2  # where it adds little to a large stream
NOT_LINEAR = 0.1  # relative; what is quantised is off by less, and a norm by half


@dataclass(frozen=True, slots=True)
class Writer:
    """A module whose output, times ``factor``, is added to the residual stream."""

    name: str
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlaces:
    """Names of the modules of one layer; None where there is none such.

    The first writer mixes tokens (attention), the second is the MLP.
    """

    layer: str
    writers: tuple[Writer, ...] = ()
    error: float = 0.0  # of out - in = sum of the writers, relative
    reader: str | None = None  # a linear module: its input are the outputs of the heads
    reader_width: int = 0
    reader_after: tuple[str, ...] = ()  # norms between it and the stream, in this order
    down: str | None = None  # a linear module: its input are the neurons
    down_width: int = 0
    down_after: tuple[str, ...] = ()

    @property
    def attn(self) -> Writer | None:
        """The writer of attention, or of what mixes tokens in its place."""
        return self.writers[0] if len(self.writers) in (1, 2) else None

    @property
    def mlp(self) -> Writer | None:
        """The writer of the MLP."""
        return self.writers[1] if len(self.writers) == 2 else None


def model_places(model: Any) -> tuple[LayerPlaces, ...]:
    """The places of every layer; () where the model's code fails."""
    try:
        with torch.no_grad():
            calls, _ = watched_pass(model, with_copies=True)
            return find_places(calls, layer_names(model, calls))
    except Exception:  # of that code, which may be anybody's
        log.info("%s: its places were not found", type(model).__name__, exc_info=True)
        return ()


class PlaceFinder:
    """The places of one model, found when somebody first wants them. Names only."""

    def __init__(self) -> None:
        self._places: tuple[LayerPlaces, ...] | None = None

    def of(self, model: Any) -> tuple[LayerPlaces, ...]:
        """See ``model_places``. On the engine thread; always of the same model."""
        if self._places is None:
            self._places = model_places(model)
        return self._places


def find_places(calls: Sequence[Call], layers: Sequence[str]) -> tuple[LayerPlaces, ...]:
    """The places of ``layers``, from the calls of a watched pass."""
    own, inner = _by_layer(calls, layers)
    places: list[LayerPlaces] = []
    for layer in layers:
        writers, error = _writers(own[layer], inner[layer], places)
        place = LayerPlaces(layer=layer, writers=writers, error=error)
        (reader, reader_after), (down, down_after) = (
            _linear_behind(inner[layer], each) for each in (place.attn, place.mlp)
        )
        places.append(
            replace(
                place,
                reader=None if reader is None else reader.name,
                reader_width=_width(reader),
                reader_after=reader_after,
                down=None if down is None else down.name,
                down_width=_width(down),
                down_after=down_after,
            )
        )
    return tuple(places)


def _by_layer(
    calls: Sequence[Call], layers: Sequence[str]
) -> tuple[dict[str, Call], dict[str, list[Call]]]:
    """The call of each layer, and the calls of the modules in it."""
    depth = len(layers[0].split(".")) if layers else 0
    own: dict[str, Call] = {}
    inner: dict[str, list[Call]] = {layer: [] for layer in layers}
    for call in calls:
        layer = ".".join(call.name.split(".")[:depth])
        if call.name in inner:
            own[call.name] = call
        elif layer in inner:
            inner[layer].append(call)
    return own, inner


def _width(call: Call | None) -> int:
    return 0 if call is None or call.x is None else call.x.shape[-1]


# -- writers


def _writers(
    own: Call, inner: list[Call], before: Sequence[LayerPlaces]
) -> tuple[tuple[Writer, ...], float]:
    """The writers of a layer and what they leave unexplained; those like ``before`` first."""
    assert own.x is not None
    assert own.y is not None
    # A stream rounds by its size: where it is large, as at a first token, it says the least.
    weight = 1 / own.y.double().norm(dim=-1, keepdim=True).clamp_min(1e-30)
    target = ((own.y.double() - own.x.double()) * weight).flatten()
    most = FLOAT32
    if own.y.dtype != torch.float32:  # so many roundings of a stream are of what a layer adds
        rounded = torch.finfo(own.y.dtype).eps * len(weight.flatten()) ** 0.5 / target.norm()
        most = max(ROUNDED, min(float(rounded), MOST_ROUNDED))
    candidates = _candidates(own, inner)
    if not candidates or not target.any():
        return (), 0.0
    columns = torch.stack([(made.double() * weight).flatten() for _, made in candidates])
    gram = (columns @ columns.T).cpu().numpy()
    products = (columns @ target).cpu().numpy()
    length = float(target @ target)
    names = [name.removeprefix(f"{own.name}.") for name, _ in candidates]
    best: tuple[float, tuple[int, ...], Any] | None = None
    for chosen in _combinations(names, before):
        factors, error = _solved(gram, products, length, chosen)
        if error < most and (numpy.abs(factors) > 1e-3).all():
            is_better = best is None or error < best[0] / (10 if len(chosen) == len(best[1]) else 3)
            best = (error, chosen, factors) if is_better else best
        if best is not None and (best[0] < FLOAT32 / 10 or len(chosen) > len(best[1]) + 1):
            break
    if best is None:
        return (), 0.0
    error, chosen, factors = best
    exact = torch.as_tensor(factors, device=columns.device) @ columns[list(chosen)]
    error = float((target - exact).norm() / target.norm())
    pairs = zip(chosen, factors, strict=True)
    return tuple(Writer(candidates[i][0], _plain(float(f))) for i, f in pairs), error


def _candidates(own: Call, inner: list[Call]) -> list[tuple[str, Tensor]]:
    """(name, output) of modules that may be writers, in the order of their calls.

    Of those with the same numbers the outermost, which is called last. A module that is called
    twice is none: a hook could not tell which call it is.
    """
    assert own.x is not None
    times = Counter(call.name for call in inner)
    chosen: list[tuple[str, Tensor]] = []
    for call in reversed(inner):
        made = call.y
        if times[call.name] > 1 or made is None or made.numel() != own.x.numel():
            continue
        made = made.reshape(own.x.shape)
        if torch.equal(made, own.x) or any(torch.equal(made, other) for _, other in chosen):
            continue
        chosen.append((call.name, made))
    return chosen[::-1]


def _combinations(names: list[str], before: Sequence[LayerPlaces]) -> Iterator[tuple[int, ...]]:
    """Sets of candidates: those that other layers have, then all, the smallest first."""
    for place in dict.fromkeys(before[-2:]):
        own = [writer.name.removeprefix(f"{place.layer}.") for writer in place.writers]
        if own and all(name in names for name in own):
            yield tuple(names.index(name) for name in own)
    for count in range(1, MOST_WRITERS + 1):
        yield from itertools.combinations(range(len(names)), count)


def _solved(gram: Any, products: Any, length: float, chosen: tuple[int, ...]) -> tuple[Any, float]:
    """(factors, error) of the least squares over these columns, by their inner products."""
    at = list(chosen)
    own, right = gram[numpy.ix_(at, at)], products[at]
    try:
        factors = numpy.linalg.solve(own, right)
    except numpy.linalg.LinAlgError:
        return numpy.zeros(len(at)), numpy.inf
    left = length - 2 * factors @ right + factors @ own @ factors
    error = float(max(left, 0.0) / length) ** 0.5
    return factors, error if numpy.isfinite(error) else numpy.inf


def _plain(factor: float) -> float:
    """1 where it is 1 but for rounding."""
    return 1.0 if abs(factor - 1) < 1e-4 else factor


# -- linear modules


def _linear_behind(inner: list[Call], writer: Writer | None) -> tuple[Call | None, tuple[str, ...]]:
    """The call of the linear module that a writer's output comes from; None where it is no one.

    And the names of the modules that come after it.
    """
    if writer is None:
        return None, ()
    after: list[str] = []
    current = [call for call in inner if call.name == writer.name][-1].y
    for _ in range(MOST_STEPS):
        assert current is not None
        same = [call for call in inner if _equal(call.y, current)]
        for call in same:
            if call.is_leaf and call.x is not None and is_linear(call.module, call.x):
                return call, tuple(reversed(after))
        leaf = next((c for c in same if c.is_leaf and not _equal(c.x, current)), None)
        if leaf is None or leaf.x is None:
            return None, ()
        after.append(leaf.name)
        current = leaf.x
    return None, ()


def _equal(made: Tensor | None, other: Tensor) -> bool:
    return (
        made is not None
        and made.numel() == other.numel()
        and torch.equal(made.reshape(other.shape), other)
    )


def is_linear(module: nn.Module, x: Tensor) -> bool:
    """True for a module that multiplies ``x`` (…, in) with a matrix, and may add a bias.

    Not for one that only scales, drops or normalises its channels. Our own say it themselves.
    """
    if getattr(module, "only_multiplies", False):
        return True
    only_first = torch.zeros_like(x)
    only_first[..., 0] = x.abs().amax() + 1
    inputs = torch.zeros_like(x), x, 2 * x, only_first
    try:
        made = module(torch.cat(inputs)).double()
    except Exception:  # of that code, which may be anybody's
        return False
    if made.shape[:-1] != (len(inputs) * len(x), *x.shape[1:-1]):
        return False
    zero, once, twice, first = made.chunk(len(inputs))
    grown, expected = twice - zero, 2 * (once - zero)
    off = (grown - expected).norm() / expected.norm().clamp_min(1e-30)
    mixed = ((first - zero).flatten(0, -2)[0] != 0).sum()
    return bool(off < NOT_LINEAR) and bool(mixed > 1)
