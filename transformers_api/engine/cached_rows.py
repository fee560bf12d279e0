"""Rows of the KV cache that outlive their sequences. Pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers_api.engine.row_kind import RowKind


@dataclass(slots=True)
class FinishedRow:
    """A row whose sequence has finished."""

    tokens: list[int]
    used: int = 0  # when, in admissions
    kind: RowKind = field(default_factory=RowKind)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Return the number of tokens that two lists share from their start. By slices, so in C."""
    low, high = 0, min(len(a), len(b))
    if not high or a[0] != b[0]:
        return 0
    if a[:high] == b[:high]:
        return high
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
