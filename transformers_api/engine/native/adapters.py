"""Adapters in recorded passes: each token has the number of its adapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.kernels.graph.adapted import adaptable_weights
from transformers_api.kernels.graph.executor import RecordedPass
from transformers_api.kernels.modules.low_rank import LowRankTables

if TYPE_CHECKING:
    from transformers_api.engine.adapters import LoadedAdapter


class PassAdapters:
    """The adapters that the passes of a model know. A pass without any is not changed."""

    def __init__(self, model: Any, passes: Iterable[RecordedPass]) -> None:
        self._tables = LowRankTables(model)
        self._numbered: list[LoadedAdapter] = []
        self._weights: set[int] = set()
        for recorded in passes:
            if recorded.is_ready:
                recorded.add_adapters(self._tables.addresses)
                self._weights |= adaptable_weights(recorded.plan)

    def check(self, path: str) -> None:
        """Raise ValueError for a layer that no recorded pass multiplies every token with."""
        if self._weights and self._tables.weight_of(path) not in self._weights:
            raise ValueError(f"{path} of the base is no layer that every token goes through")

    def numbers(self, batch: Batch) -> list[int]:
        """The number of each sequence's adapter; -1: it has none."""
        for seq in batch.sequences:
            if seq.adapter is not None and seq.adapter not in self._numbered:
                self._numbered.append(seq.adapter)
                self._fill()
        return [
            -1 if s.adapter is None else self._numbered.index(s.adapter) for s in batch.sequences
        ]

    def drop(self, adapter: LoadedAdapter) -> None:
        """Know it no longer."""
        if adapter in self._numbered:
            self._numbered.remove(adapter)
            self._fill()

    def _fill(self) -> None:
        self._tables.fill([adapter.products for adapter in self._numbered])  # type: ignore[misc]


def repeated(numbers: list[int], widths: list[int]) -> Tensor:
    """The number of each token (N,), of sequences with so many tokens."""
    return torch.tensor(numbers).repeat_interleave(torch.tensor(widths))
