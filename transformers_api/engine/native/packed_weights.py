"""The packed weights of one model in the store: read for a load, or written after one."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.native.packed_store import (
    AT_ONCE,
    SMALLEST,
    PackedContent,
    PackedStore,
    StoredWeight,
    lay_out,
)
from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.kernels.abi import Library, Weight
from transformers_api.kernels.modules.experts import PackedExperts
from transformers_api.kernels.modules.linear import PackedWeight
from transformers_api.kernels.modules.weight_memory import OtherWeights, WeightMemory

log = logging.getLogger(__name__)
NICE = 10  # of the thread that writes: it comes after those who answer
_writing = threading.Lock()


class StoredMemory(WeightMemory):
    """Weights that were packed before, in the order in which they were."""

    is_stored = True

    def __init__(self, content: PackedContent) -> None:
        super().__init__()
        self._bytes = torch.frombuffer(content.memory, dtype=torch.uint8)[content.start :]
        self._weights = content.weights

    def stored(self, number: int, weight: Weight, size: int) -> tuple[Tensor, float] | None:
        """See WeightMemory."""
        own = self._weights[number] if number < len(self._weights) else None
        if own is None or own[:3] != (weight.type, weight.n, weight.k) or own.bytes < size:
            raise OtherWeights("the stored weights are another model's")
        return self._bytes[own.offset : own.offset + own.bytes], own.error


@dataclass(frozen=True)
class PackedFile:
    """The place of a model's packed weights, there or not. ``model``: its name, for people.

    ``after_s``: how long a model serves before they are written.
    """

    store: PackedStore
    key: str
    model: str
    after_s: float = 0.0

    def memory(self, library: Library) -> WeightMemory:
        """Memory for the weights of a load: with them in it, or empty."""
        content = self.store.read(self.key, usable_cores())
        if content is None:
            return WeightMemory()
        if not _is_whole(content, library):
            log.warning("Damaged packed weights are not used: %s", self.store.path(self.key))
            self.remove()
            return WeightMemory()
        return StoredMemory(content)

    def remove(self) -> None:
        """Forget them."""
        self.store.remove(self.key)

    def write_later(
        self, library: Library, weights: Sequence[PackedWeight | PackedExperts]
    ) -> threading.Thread | None:
        """Store the weights of a model that serves, on a thread of its own, which is returned.

        Those that are released meanwhile are not stored. None where they are too small, or too
        large for the store.
        """
        parts = (each.weights if isinstance(each, PackedExperts) else [each] for each in weights)
        plain = sorted((own for part in parts for own in part), key=lambda own: own.number)
        size = sum(weight.nbytes for weight in plain)
        if not SMALLEST <= size <= self.store.most_bytes:
            return None
        work = self._write, (library, [weakref.ref(weight) for weight in plain])
        thread = threading.Thread(target=work[0], args=work[1], name="packed writer", daemon=True)
        thread.start()
        return thread

    def _write(self, library: Library, weights: Sequence[weakref.ref[PackedWeight]]) -> None:
        if sys.platform == "linux":  # where a thread has one of its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        time.sleep(self.after_s)
        try:
            with _writing:  # one model after the other
                if self.store.size(self.key):  # by another process, which loaded it meanwhile
                    return
                stored = _described(library, weights)
                if self.store.make_room(self.store.file_bytes(self.key, self.model, stored)):
                    parts = _parts(weights, stored)
                    self.store.write(self.key, self.model, stored, parts)
        except (OSError, _Released) as reason:
            log.info("The packed weights of %s are not stored: %r", self.model, reason)


class _Released(Exception):
    """A model was unloaded."""


def _memory(weight: weakref.ref[PackedWeight]) -> tuple[PackedWeight, Tensor]:
    """A weight and its bytes, which last while they are held."""
    own = weight()
    if own is None or not (memory := own.memory).numel():
        raise _Released
    return own, memory


def _described(
    library: Library, weights: Sequence[weakref.ref[PackedWeight]]
) -> list[StoredWeight]:
    """Raises _Released."""
    stored = []
    offsets = iter(lay_out([_memory(weight)[1].nbytes for weight in weights]))
    for weight in weights:
        own, memory = _memory(weight)
        stored.append(
            StoredWeight(
                own.kind_number,
                own.out_features,
                own.in_features,
                own.error,
                next(offsets),
                memory.nbytes,
                library.without_gil.checksum(memory.data_ptr(), memory.nbytes),
            )
        )
    return stored


def _parts(
    weights: Sequence[weakref.ref[PackedWeight]], stored: Sequence[StoredWeight]
) -> Iterator[Any]:
    """The bytes of each in pieces, so that a model is soon gone from memory. Raises _Released."""
    for weight, own in zip(weights, stored, strict=True):
        for at in range(0, own.bytes, AT_ONCE):
            yield _piece(weight, own.bytes, at)


def _piece(weight: weakref.ref[PackedWeight], size: int, at: int) -> Any:
    memory = _memory(weight)[1]
    if memory.nbytes != size:
        raise _Released
    return memory.numpy()[at : at + AT_ONCE]


def _is_whole(content: PackedContent, library: Library) -> bool:
    """True where all weights have their checksums."""
    start = torch.frombuffer(content.memory, dtype=torch.uint8).data_ptr() + content.start

    def has_its_own(weight: StoredWeight) -> bool:
        checksum = library.without_gil.checksum(start + weight.offset, weight.bytes)
        return bool(checksum == weight.checksum)

    with ThreadPoolExecutor(usable_cores()) as threads:
        return all(threads.map(has_its_own, content.weights))
