"""Edits of a pass as changes that the kernels make in the middle of it, without a pause."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from transformers_api.engine.runners.edited_modules import ModuleEdit, RowsChange
from transformers_api.kernels.abi import OPS, TYPES, RowChange
from transformers_api.kernels.graph.hooks import RowEdit

_OPS = {"add": OPS.index("add"), "scale": OPS.index("mul"), "set": OPS.index("copy")}


def row_edit(edit: ModuleEdit) -> RowEdit:
    """The edit for a recorded pass."""
    if edit.changes is None:
        return RowEdit(edit.apply)
    return RowEdit(edit.apply, partial(_row_changes, edit.changes))


def _row_changes(changes: Sequence[RowsChange], rows: Tensor, at: int) -> list[RowChange]:
    """The changes of ``rows`` (N, width), after ``at`` steps of the pass."""
    base, stride, size = rows.data_ptr(), rows.stride(0), rows.element_size()
    number_type = TYPES[rows.dtype]
    return [
        RowChange(
            at=at,
            rows=base + (each.start * stride + each.column) * size,
            count=each.tokens,
            stride=stride,
            width=each.width or rows.shape[1],
            type=number_type,
            op=_OPS[each.do],
            vector=each.vector,
            vector_stride=each.vector_stride,
            factor=each.by,
            largest=each.largest,
            number=each.number,
            state=each.state,
        )
        for each in changes
    ]
