"""A direction for each layer from texts that differ in one respect, and what it tells apart.

The mean of the differences: Rimsky and others 2024, arXiv:2312.06681, section 3. The first
principal component of the centred differences: Zou and others 2023, arXiv:2310.01405, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy
from numpy.typing import NDArray

from transformers_api.inspection.base import Array, Inspector, Job

Method = Literal["mean", "pca"]
Place = Literal["last", "mean"]

MOST_FOLDS = 16  # directions that a separation is measured with
WINDOW = 3  # layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Derived:
    """The directions (L, C), and what is known of each layer's."""

    rows: Array
    separation: NDArray[numpy.float64]  # (L,): see ``_separation``
    gap: NDArray[numpy.float64]  # (L,): between the means of both sides, along the direction
    window: tuple[int, int]  # the first and the last layer of the run that tells them apart best


@dataclass(frozen=True, slots=True)
class Streams:
    """The streams at the last token of each text, or their mean over its tokens: (texts, L, C)."""

    texts: Sequence[Sequence[int]]
    layers: Sequence[int]
    at: Place

    def job(self, inspector: Inspector) -> Job[Array]:
        """See ``questions.Question``."""

        def job(model: Any) -> Generator[None, None, Array]:
            streams = []
            for ids in self.texts:
                positions = [len(ids) - 1] if self.at == "last" else range(len(ids))
                states = yield from inspector.hidden_states(ids, self.layers, positions)(model)
                streams.append(states.mean(axis=1))
            return numpy.stack(streams)

        return job


def derive(
    positive: Array,
    negative: Array,
    layers: Sequence[int],
    method: Method,
    check: Callable[[], None] = lambda: None,
) -> Derived:
    """The directions from streams (pairs, L, C) of both sides of each pair.

    ``check`` is called between layers: it may raise, which ends this.
    """
    differences = (positive - negative).astype(numpy.float64)
    rows = _directions(differences, method, check)
    separation = _separation(positive, negative, differences, method, check)
    unit = rows / numpy.maximum(numpy.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    gap = numpy.einsum("lc,lc->l", differences.mean(axis=0), unit)
    return Derived(
        rows=rows.astype(numpy.float32),
        separation=separation,
        gap=gap,
        window=_window(separation, layers),
    )


def _directions(
    differences: NDArray[numpy.float64], method: Method, check: Callable[[], None]
) -> NDArray[numpy.float64]:
    """(L, C) of differences (pairs, L, C)."""
    mean: NDArray[numpy.float64] = differences.mean(axis=0)
    if method == "mean":
        return mean
    rows = []
    for layer in range(differences.shape[1]):
        check()
        own = differences[:, layer]
        component = _principal(own - own.mean(axis=0))
        if not component.any():
            component = mean[layer]
        rows.append(component if component @ mean[layer] >= 0 else -component)
    return numpy.stack(rows)


def _principal(rows: NDArray[numpy.float64]) -> NDArray[numpy.float64]:
    """The first principal component (C,) of centred rows (pairs, C), of length 1; 0 of zeros.

    By the products of the rows with each other: far fewer numbers than a wide model's C x C.
    """
    size = numpy.abs(rows).max()
    if not size:
        return numpy.zeros(rows.shape[1])
    scaled = rows / size
    component: NDArray[numpy.float64] = numpy.linalg.eigh(scaled @ scaled.T)[1][:, -1] @ scaled
    return component / numpy.linalg.norm(component)


def _separation(
    positive: Array,
    negative: Array,
    differences: NDArray[numpy.float64],
    method: Method,
    check: Callable[[], None],
) -> NDArray[numpy.float64]:
    """The chance that a positive text lies further along the direction than a negative one.

    Each text along a direction that was made without its own pair: 0.5 tells nothing apart, 1 all
    of them.
    """
    pairs = len(differences)
    along = numpy.zeros((2, pairs, differences.shape[1]))
    for fold in numpy.array_split(numpy.arange(pairs), min(pairs, MOST_FOLDS)):
        check()
        rest = numpy.delete(differences, fold, axis=0)
        rows = _directions(rest, method, check)
        for side, streams in enumerate((positive, negative)):
            along[side, fold] = numpy.einsum("plc,lc->pl", streams[fold], rows)
    above = (along[0][:, None] > along[1][None]).mean(axis=(0, 1))
    level = (along[0][:, None] == along[1][None]).mean(axis=(0, 1))
    separation: NDArray[numpy.float64] = above + level / 2
    return separation


def _window(separation: NDArray[numpy.float64], layers: Sequence[int]) -> tuple[int, int]:
    size = min(WINDOW, len(layers))
    means = numpy.convolve(separation, numpy.ones(size) / size, "valid")
    # Few pairs are often told apart by every layer: the first ones only know the words.
    best = numpy.flatnonzero(means >= means.max() - 1e-9)
    start = int(best[numpy.abs(best - (len(means) - 1) / 2).argmin()])
    return layers[start], layers[start + size - 1]
