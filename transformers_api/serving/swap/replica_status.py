"""One replica of several, as a front sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers_api.serving.swap.residency import SwapperStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """A snapshot of one replica."""

    replica: str
    node: str
    pid: int
    swapper: SwapperStatus
    age_s: float  # of its resident model
    requests: int
    ready: bool
    reason: str
    process_bytes: int | None
    slots: int  # sequences that it decodes together
    queue: int  # and those that may wait for it
    encoder: str | None = None  # beside its model
