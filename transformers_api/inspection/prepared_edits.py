"""Edits with the tensors and modules of the model that they change."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from transformers_api.engine.runners.edited_attention import SUMS
from transformers_api.engine.runners.edited_modules import RowsChange
from transformers_api.inspection.base import LayerAttention
from transformers_api.inspection.edit_plan import Edit, EditPlan
from transformers_api.inspection.editable import INPUTS
from transformers_api.inspection.parts import Parts
from transformers_api.inspection.places import Module, head_dims, module_of

ATTENTION = Module("", "in")  # what it reads comes from no module alone
LARGEST = 1e15  # of a change's length: its square is still a number in float32
MOST_PIECES = 64  # heads or neurons of one edit, beyond which tensors are faster than a list


@dataclass(frozen=True, slots=True)
class _Piece:
    """Neighbouring columns that are edited, and the address of their float32, if any."""

    column: int
    width: int  # 0: all columns
    vector: int = 0
    stride: int = 0  # from the numbers of a position to those of the next; 0: all have the same


@dataclass(frozen=True, slots=True)
class PreparedEdit:
    """An edit with its module and its tensors.

    ``pieces`` say all of it for a backend that can edit by itself; None: they cannot.
    """

    edit: Edit
    module: Module
    head_dim: int
    vector: Tensor | None  # as the module's own numbers: divided by the writer's factor
    pieces: SequenceOf[_Piece] | None = None

    def changes(
        self, start: int, tokens: int, offset: int, number: int, state: int
    ) -> list[RowsChange]:
        """The pieces for rows from ``start`` on, the first of which is the ``offset``-th edited."""
        assert self.pieces is not None
        do, by = self.edit.do, self.edit.by
        assert do == "add" or do == "scale" or do == "set"
        return [
            RowsChange(
                do=do,
                start=start,
                tokens=tokens,
                column=piece.column,
                width=piece.width,
                vector=piece.vector + 4 * offset * piece.stride,
                vector_stride=piece.stride,
                by=by,
                largest=LARGEST,
                number=number,
                state=state,
            )
            for piece in self.pieces
        ]

    def apply(self, rows: Tensor, offset: int) -> bool:
        """Change ``rows`` (n, width), of which the first is the ``offset``-th position edited.

        False where the result is no number or too large; the rows are as they were then.
        """
        if self.edit.do == "copy":
            assert self.edit.copies is not None
            self.edit.copies.append(rows.flatten(1).float().cpu().numpy().copy())
            return True
        # A step of a small model takes milliseconds, and a call of torch in it 50 microseconds.
        part = self._part(rows)
        if self.edit.do == "add" and not self.edit.keeps_norm:
            assert self.vector is not None
            changed = part + self.vector  # in float32, which the vector is
        else:
            part = part.float()
            if torch.is_grad_enabled():
                part = part.clone()  # as it was: gradients may need it
            changed = self._changed(part, offset)
        if self.edit.keeps_norm:
            length = vector_norm(changed, dim=-1, keepdim=True).clamp_min(1e-30)
            changed = changed * (vector_norm(part, dim=-1, keepdim=True) / length)
        if not float(vector_norm(changed.detach())) <= LARGEST:  # nor where it is no number
            return False
        self._write(rows, changed)
        return True

    def _part(self, rows: Tensor) -> Tensor:
        """(n, C), (n, heads, D) or (n, neurons). Rows of q, k and v are (n, heads, D)."""
        edit = self.edit
        if edit.part in INPUTS:
            return rows[:, list(edit.units)]
        if edit.part == "head":
            return rows.view(len(rows), -1, self.head_dim)[:, list(edit.units)]
        return rows[:, list(edit.units)] if edit.part == "neuron" else rows

    def _write(self, rows: Tensor, changed: Tensor) -> None:
        edit = self.edit
        if edit.part == "head":
            heads = rows.view(len(rows), -1, self.head_dim)
            heads[:, list(edit.units)] = changed.to(rows.dtype)
        elif edit.part == "neuron" or edit.part in INPUTS:
            rows[:, list(edit.units)] = changed.to(rows.dtype)
        else:
            rows.copy_(changed)

    def _changed(self, part: Tensor, offset: int) -> Tensor:
        edit = self.edit
        if edit.feature is not None:
            rows = (part * self.module.factor).cpu().numpy()
            changed = torch.from_numpy(edit.feature.applied(rows)).to(part.device)
            return changed / self.module.factor
        if edit.do == "scale":
            return part * edit.by if edit.by else torch.zeros_like(part)
        assert self.vector is not None
        vector = self.vector
        if edit.do == "add":
            return part + vector
        if edit.do == "erase":
            basis = vector.to(SUMS)  # in how many tokens it is read does not show in the bits
            return (part - (part.to(SUMS) @ basis.T) @ basis).float()
        if edit.is_aligned:
            vector = vector[offset : offset + len(part)]
        return vector.expand_as(part)


def prepared(
    plan: EditPlan, model: Any, parts: Parts, attention: SequenceOf[LayerAttention]
) -> list[PreparedEdit]:
    """The edits of a plan for a model."""
    places = parts.places.of(model)
    heads = head_dims(places, attention)
    edits = []
    for edit in plan.edits:
        if edit.part == "weights":
            continue
        module = module_of(places, edit.layer, edit.part) or ATTENTION
        vector = None
        if edit.vector is not None:
            vector = torch.from_numpy(edit.vector).to(model.device)
        if vector is not None and edit.do != "erase":
            vector = (vector / module.factor).float()
        head_dim = heads.get(edit.layer, 0)
        if vector is not None and edit.do != "erase":
            vector = _of_each_unit(edit, vector).contiguous()
        pieces = _pieces(edit, head_dim, vector)
        edits.append(PreparedEdit(edit, module, head_dim, vector, pieces))
    return edits


def _of_each_unit(edit: Edit, vector: Tensor) -> Tensor:
    """(…, heads, D) where there is one (D,) for all heads."""
    if edit.part == "head" and vector.ndim < 2 + edit.is_aligned:
        return vector.unsqueeze(-2).expand(*vector.shape[:-1], len(edit.units), -1)
    return vector


def _pieces(edit: Edit, head_dim: int, vector: Tensor | None) -> list[_Piece] | None:
    if edit.part in INPUTS or edit.keeps_norm:
        return None
    is_simple = edit.do in ("add", "scale", "set")
    is_here = vector is None or vector.device.type == "cpu"
    if not is_simple or not is_here or len(edit.units) > MOST_PIECES:
        return None
    size = {"head": head_dim, "neuron": 1}.get(edit.part, 0)
    columns = [unit * size for unit in edit.units] if size else [0]
    if vector is None:
        return [_Piece(column, size) for column in columns]
    base, stride = vector.data_ptr(), vector[0].numel() if edit.is_aligned else 0
    width = size or vector.shape[-1]
    return [
        _Piece(column, width, base + 4 * at * size, stride) for at, column in enumerate(columns)
    ]
