"""Rows of logits that are changed before sampling: by processors, then by the mask of a constraint.

Only those rows are copied: a neighbour's parameters cost a plain row nothing.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from transformers_api.engine.base import Mask
from transformers_api.engine.sequence import Sequence
from transformers_api.errors import ApiError, ConstraintFailed

log = logging.getLogger(__name__)
# Each byte of a mask as what is added to 8 logits: 0 where a bit is set, else -inf.
_BITS = numpy.unpackbits(numpy.arange(256, dtype=numpy.uint8)[:, None], axis=1, bitorder="little")
_PENALTIES = torch.from_numpy(numpy.where(_BITS, 0, -numpy.inf).astype(numpy.float32))  # (256, 8)


@dataclass(frozen=True, slots=True)
class ChangedRows:
    """The rows of one step that differ from the model's logits, by their place in the batch."""

    logits: dict[int, Tensor] = field(default_factory=dict)  # (V,) each, of processed rows
    masks: dict[int, Mask] = field(default_factory=dict)  # of constrained rows
    errors: dict[int, ApiError] = field(default_factory=dict)  # of constraints that failed


NO_CHANGES = ChangedRows()


class RowChanges:
    """Works out the changed rows of a step, in memory of its own that it reuses."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def find(self, logits: Tensor, sequences: list[Sequence]) -> ChangedRows:
        """Run the processors on copies of their rows of ``logits`` (B, V), and ask for masks."""
        changing = [
            row for row, seq in enumerate(sequences) if seq.processors or seq.constraint is not None
        ]
        if not changing:
            return NO_CHANGES
        rows: dict[int, Tensor] = {}
        masks: dict[int, Mask] = {}
        errors: dict[int, ApiError] = {}
        for row in changing:
            seq = sequences[row]
            if seq.processors:
                own = rows[row] = self._copy(logits, row)
                for processor in seq.processors:
                    processor(seq, own)
            if seq.constraint is not None:
                try:
                    mask = seq.constraint.allowed()
                except ApiError as error:
                    errors[row] = error
                except Exception:
                    log.exception("A constraint failed", extra={"request_id": seq.request_id})
                    errors[row] = ConstraintFailed("The requested format failed")
                else:
                    if mask is not None:
                        masks[row] = mask
        return ChangedRows(rows, masks, errors)

    def apply_masks(self, logits: Tensor, changed: ChangedRows) -> None:
        """Forbid in ``changed.logits`` what its masks do not allow. Idempotent."""
        rows = changed.logits
        for row, mask in changed.masks.items():
            if row not in rows:
                rows[row] = self._copy(logits, row)
            forbid(rows[row], mask)

    def _copy(self, logits: Tensor, row: int) -> Tensor:
        room = self._room
        if (
            room.shape[1:] != logits.shape[1:]
            or len(room) < len(logits)
            or room.device != logits.device
            or room.dtype != logits.dtype
        ):
            # the copies of this step that exist keep the old memory
            self._room = torch.empty_like(logits, memory_format=torch.contiguous_format)
        return self._room[row].copy_(logits[row])


def changed_row(logits: Tensor, seq: Sequence) -> Tensor:
    """The row (V,) that a token of ``seq`` is drawn from, for ``logits`` (V,) of the model."""
    if not seq.processors and seq.constraint is None:
        return logits
    row = logits.clone()
    for processor in seq.processors:
        processor(seq, row)
    if seq.constraint is not None:
        mask = seq.constraint.allowed()
        if mask is not None:
            forbid(row, mask)
    return row


def forbid(row: Tensor, mask: Mask) -> None:
    """Set the logits (V,) of all tokens but those of ``mask`` to -inf, NaN stays."""
    size = min(len(row), len(mask) * 32)
    row[size:] = -torch.inf
    used = torch.from_numpy(mask.view(numpy.uint8)[: (size + 7) // 8]).to(row.device)
    row[:size] += _PENALTIES.to(row.device)[used.int()].flatten()[:size]
