"""Directions of residual streams by name, each owner's own: a model is steered by them."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

from transformers_api.errors import NotFound, PayloadTooLarge

Array = NDArray[numpy.float32]

MOST_VECTORS = 64  # of one owner
MOST_BYTES = 64 << 20  # of all
MOST_NAME = 64  # characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Vector:
    """Directions (L, C) for the stream after some layers, or one (1, C) for any of them."""

    rows: Array
    layers: tuple[int, ...] | None  # None: one direction, for any layer
    source: str  # "json", "npz", "gguf", "safetensors" or "pairs"
    model: str | None = None  # for which it was made, where that is known
    separation: tuple[float, ...] | None = None  # of each row, for one derived from pairs
    created: int = field(default_factory=lambda: int(time.time()))  # seconds since 1970

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return int(self.rows.shape[1])

    @property
    def norms(self) -> NDArray[numpy.float64]:
        """L2 of each row, in float64: squares of large numbers are none in float32."""
        norms: NDArray[numpy.float64] = numpy.linalg.norm(self.rows.astype(numpy.float64), axis=1)
        return norms

    def at(self, layer: int) -> Array | None:
        """The direction (C,) for the stream after a layer; None where there is none."""
        if self.layers is not None and layer not in self.layers:
            return None
        row: Array = self.rows[0 if self.layers is None else self.layers.index(layer)]
        return row

    def cosine(self, other: Vector) -> float | None:
        """The mean cosine over the layers of both; None where they have none in common."""
        if self.width != other.width:
            return None
        if self.layers is None:
            pairs = [(self.rows[0], row) for row in other.rows]
        else:
            pairs = [
                (self.rows[number], row)
                for number, layer in enumerate(self.layers)
                if (row := other.at(layer)) is not None
            ]
        cosines = [_cosine(*pair) for pair in pairs]
        return sum(cosines) / len(cosines) if cosines else None


def _cosine(one: Array, other: Array) -> float:
    one, other = one.astype(numpy.float64), other.astype(numpy.float64)
    size = float(numpy.linalg.norm(one)) * float(numpy.linalg.norm(other))
    return float(one @ other) / size if size else 0.0


class VectorStore:
    """In memory, bounded by number and bytes; thread-safe.

    An owner's own vectors are never dropped for another one of theirs. Where the vectors of all
    are too many bytes, the least recently used of the owner with the most of them goes.
    """

    def __init__(self, most: int = MOST_VECTORS, most_bytes: int = MOST_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._vectors: OrderedDict[tuple[str, str], Vector] = OrderedDict()  # by owner and name
        self._bytes = Counter[str]()  # by owner

    def put(self, owner: str, name: str, vector: Vector) -> bool:
        """Keep a vector under a name; False where it takes another one's place.

        Raises PayloadTooLarge where this owner has too many, or too many bytes.
        """
        key = owner, name
        with self._lock:
            old = self._vectors.get(key)
            count = sum(holder == owner for holder, _ in self._vectors)
            if old is None and count >= self._most:
                raise PayloadTooLarge(f"There are {count} vectors (max {self._most}); delete one")
            freed = 0 if old is None else old.rows.nbytes
            size = self._bytes[owner] - freed + vector.rows.nbytes
            if size > self._most_bytes:
                raise PayloadTooLarge(
                    f"The vectors would take {size} bytes (max {self._most_bytes}); delete one"
                )
            self._remove(key)
            self._vectors[key] = vector
            self._bytes[owner] += vector.rows.nbytes
            self._make_room(owner)
            return old is None

    def get(self, owner: str, name: str) -> Vector:
        """A vector of ``owner``. Raises NotFound, which names those that are there."""
        with self._lock:
            vector = self._vectors.get((owner, name))
            if vector is not None:
                self._vectors.move_to_end((owner, name))
                return vector
            names = sorted(own for holder, own in self._vectors if holder == owner)
        there = f"there are: {', '.join(names)}" if names else "it is empty"
        raise NotFound(f"No vector '{name}' in the store; {there}", param="vector")

    def delete(self, owner: str, name: str) -> None:
        """Forget a vector. Raises NotFound."""
        self.get(owner, name)
        with self._lock:
            self._remove((owner, name))

    def of(self, owner: str) -> dict[str, Vector]:
        """The vectors of ``owner`` by name."""
        with self._lock:
            return {
                name: vector
                for (holder, name), vector in sorted(self._vectors.items())
                if holder == owner
            }

    def _make_room(self, owner: str) -> None:
        """Drop vectors of those who have the most, as long as all take too much."""
        while self._bytes.total() > self._most_bytes:
            others = [holder for holder in self._bytes if holder != owner]
            largest = max(others, key=lambda holder: self._bytes[holder])
            self._remove(next(key for key in self._vectors if key[0] == largest))

    def _remove(self, key: tuple[str, str]) -> None:
        vector = self._vectors.pop(key, None)
        if vector is not None:
            self._bytes[key[0]] -= vector.rows.nbytes
            self._bytes += Counter()  # those without any
