"""Sparse autoencoders of a part of a layer: their numbers, and what they make of rows. Torch-free.

standard: Bricken and others 2023; gated: arXiv:2404.16014; topk: arXiv:2406.04093; jumprelu:
arXiv:2407.14435. F features, C numbers of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float32]
Architecture = Literal["standard", "jumprelu", "topk", "gated"]
SaePart = Literal["resid", "attn", "mlp"]
Normalization = Literal["none", "layer_norm", "constant_norm_rescale"]
ARCHITECTURES: tuple[Architecture, ...] = ("standard", "jumprelu", "topk", "gated")
TINY = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sae:
    """An autoencoder: x ~ decode(encode(x)). ``digest`` tells it from every other one.

    ``extra``: of jumprelu ``threshold`` (F,); of gated ``r_mag`` and ``b_mag`` (F,), with the
    gate's bias in ``encoder_bias``.
    """

    name: str
    digest: str
    architecture: Architecture
    part: SaePart
    layer: int  # -1, of ``resid``: the embedding
    encoder: Array  # (C, F)
    decoder: Array  # (F, C)
    encoder_bias: Array  # (F,)
    decoder_bias: Array  # (C,)
    extra: Mapping[str, Array] = field(default_factory=dict)
    k: int = 0  # of topk
    subtracts_bias: bool = False  # the decoder's bias, before it encodes
    normalization: Normalization = "none"

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return int(self.encoder.shape[0])

    @property
    def features(self) -> int:
        """The number of features."""
        return int(self.encoder.shape[1])

    def encode(self, rows: Array) -> Array:
        """The features (n, F) of rows (n, C); 0 or more."""
        before = self._before(rows, slice(None))
        if self.architecture != "topk":
            return before
        k = min(self.k, before.shape[1])
        lowest = numpy.partition(before, -k, axis=1)[:, -k, None]
        return numpy.where(before >= lowest, before, 0).astype(numpy.float32)

    def feature(self, rows: Array, number: int) -> Array:
        """One feature (n,) of rows (n, C)."""
        own = self._before(rows, slice(number, number + 1))[:, 0]
        if self.architecture == "topk":  # it depends on all the others
            return numpy.where(self.encode(rows)[:, number] > 0, own, 0).astype(numpy.float32)
        return own

    def decode(self, features: Array, rows: Array) -> Array:
        """Rows (n, C) again, from their features; ``rows`` say how long they were."""
        shift, scale = self._moments(rows)
        decoded: Array = (features @ self.decoder + self.decoder_bias) * scale + shift
        return decoded

    def direction(self, number: int, rows: Array) -> Array:
        """The change (n, C) of rows that one more of a feature is."""
        _, scale = self._moments(rows)
        change: Array = self.decoder[number] * scale
        return change

    def _before(self, rows: Array, some: slice) -> Array:
        """The features of ``some`` before any of them is dropped for another."""
        shift, scale = self._moments(rows)
        x = (rows - shift) / scale
        if self.subtracts_bias:
            x = x - self.decoder_bias
        encoder = self.encoder[:, some]
        if encoder.shape[1] == 1:  # in how many rows it is asked about must not show in the bits
            x, encoder = x.astype(numpy.float64), encoder.astype(numpy.float64)
        product = x @ encoder
        before = product + self.encoder_bias[some]
        if self.architecture == "jumprelu":
            is_active = before > self.extra["threshold"][some]
            return numpy.where(is_active, numpy.maximum(before, 0), 0).astype(numpy.float32)
        if self.architecture == "gated":
            size = product * numpy.exp(self.extra["r_mag"][some]) + self.extra["b_mag"][some]
            return numpy.where(before > 0, numpy.maximum(size, 0), 0).astype(numpy.float32)
        return numpy.maximum(before, 0).astype(numpy.float32)

    def _moments(self, rows: Array) -> tuple[Array | float, Array | float]:
        """(what is subtracted from rows, what they are divided by)."""
        if self.normalization == "layer_norm":
            shift = rows.mean(1, keepdims=True)
            return shift, rows.std(1, ddof=1, keepdims=True) + TINY
        if self.normalization == "constant_norm_rescale":
            length = numpy.linalg.norm(rows, axis=1, keepdims=True)
            return 0.0, numpy.maximum(length, TINY) / self.width**0.5
        return 0.0, 1.0


@dataclass(frozen=True, slots=True, eq=False)
class FeaturePlan:
    """The features to note of every step: the ``topk`` largest."""

    sae: Sae
    topk: int


@dataclass(frozen=True, slots=True, eq=False)
class FeatureEdit:
    """A feature that is made ``value``; what the autoencoder does not explain stays as it is."""

    sae: Sae
    number: int
    value: float

    def applied(self, rows: Array) -> Array:
        """Rows (n, C) with the feature as it is to be."""
        change = numpy.float32(self.value) - self.sae.feature(rows, self.number)
        return rows + change[:, None] * self.sae.direction(self.number, rows)


def largest(features: Array, count: int) -> list[tuple[int, float]]:
    """The ``count`` largest of features (F,) with their values; none that is 0."""
    order = numpy.argsort(-features, kind="stable")[:count].tolist()
    return [(number, float(features[number])) for number in order if features[number] > 0]
