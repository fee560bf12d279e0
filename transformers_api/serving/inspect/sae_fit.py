"""The fit of an autoencoder to a model: what it explains, and what one feature stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from transformers_api.inspection.sae import Array, Sae

ROWS = 64  # that are encoded together
LEAST = 0.5  # of the variance
MISFIT = "does not fit this model: it explains {:.2f} of the variance over the calibration texts"
WINDOWS, AROUND = 5, 6  # texts that are shown of a feature, and tokens on each side
NEAREST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SaeFit:
    """The figures over some rows."""

    explained: float  # share of the variance
    l0: float  # features that are active, of a row
    dead: float  # share of features that never are
    tokens: int

    @property
    def note(self) -> str | None:
        """The reason to doubt that it is for this model."""
        return None if self.explained >= LEAST else MISFIT.format(self.explained)


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of a text around the token ``place`` of it, with the feature at each token."""

    text: int
    start: int
    place: int
    values: tuple[float, ...]


def counted(texts: Sequence[Array]) -> Array:
    """The rows that figures are of: all but the first of each text, which is like no other."""
    return numpy.concatenate([rows[1:] if len(rows) > 1 else rows for rows in texts])


def fit(sae: Sae, rows: Array, check: Callable[[], None] = lambda: None) -> SaeFit:
    """The fit to rows (n, C). ``check`` is called between some of them, and may raise."""
    missed, active = 0.0, 0
    alive = numpy.zeros(sae.features, bool)
    for some in _pieces(rows):
        check()
        features = sae.encode(some)
        error = some - sae.decode(features, some)
        missed += float((error.astype(numpy.float64) ** 2).sum())
        is_active = features > 0
        active += int(is_active.sum())
        alive |= is_active.any(0)
    spread = float(((rows - rows.mean(0)).astype(numpy.float64) ** 2).sum())
    return SaeFit(
        explained=1 - missed / spread if spread else 0.0,
        l0=active / len(rows),
        dead=1 - float(alive.mean()),
        tokens=len(rows),
    )


def _pieces(rows: Array) -> Iterator[Array]:
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


def values_of(sae: Sae, texts: Sequence[Array], number: int) -> list[Array]:
    """A feature of each token of each text."""
    return [
        numpy.concatenate([sae.feature(some, number) for some in _pieces(rows)]) for rows in texts
    ]


def windows(values: Sequence[Array]) -> list[Window]:
    """The places where a feature is strongest, none within another one's window."""
    places = [
        (float(value), text, place)
        for text, own in enumerate(values)
        for place, value in enumerate(own)
        if value > 0
    ]
    chosen: list[Window] = []
    for _, text, place in sorted(places, key=lambda each: -each[0]):
        if any(one.text == text and abs(one.place - place) <= AROUND for one in chosen):
            continue
        start = max(place - AROUND, 0)
        own = values[text][start : place + AROUND + 1]
        chosen.append(Window(text, start, place, tuple(map(float, own))))
        if len(chosen) == WINDOWS:
            break
    return chosen


def nearest(sae: Sae, number: int) -> list[tuple[int, float]]:
    """The features whose directions are most like this one's, with the cosine."""
    lengths = numpy.maximum(numpy.linalg.norm(sae.decoder, axis=1), 1e-30)
    cosines: NDArray[numpy.float32] = sae.decoder @ sae.decoder[number] / lengths
    cosines = cosines / lengths[number]
    order = [each for each in numpy.argsort(-cosines).tolist() if each != number]
    return [(each, float(cosines[each])) for each in order[:NEAREST]]
