"""Whole numbers in groups along the inputs: GPTQ, AWQ, compressed-tensors, bitsandbytes' int8."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from transformers_api.checkpoints.headers.quantized_parts import QuantizedTensor
from transformers_api.engine.file_tensor import FileTensor
from transformers_api.engine.quantized.rows import GROUP, Parts, QuantizedRows

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in an int32 the first, second, … output's code is
MOST_LOST = 2.0**-10  # of a scale in half precision


class IntegerRows(QuantizedRows):
    """Whole numbers in groups along the inputs: (code - zero) * scale."""

    def __init__(self, spec: QuantizedTensor, parts: Parts, index: int | None = None) -> None:
        super().__init__(spec, parts, index)
        self._levels: tuple[Tensor, Tensor | None] | None = None
        self._kind: str | None = None
        self._has_kind = False

    @abstractmethod
    def codes(self, first: int, count: int) -> Tensor:
        """The codes (count, in) of some rows, int16."""

    @abstractmethod
    def read_levels(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points (out, groups) float32; None: all zero."""

    def order(self) -> Tensor | None:
        """The group (in) of each input, where they are not one after the other."""
        return None

    @property
    def levels(self) -> tuple[Tensor, Tensor | None]:
        """See read_levels. In memory until ``release``."""
        if self._levels is None:
            self._levels = self.read_levels()
        return self._levels

    def release(self) -> None:
        """See StoredRows."""
        self._levels = None
        super().release()

    @property
    def kind(self) -> str | None:
        """See StoredRows."""
        if not self._has_kind:
            self._kind, self._has_kind = self._blocks_of(), True
        return self._kind

    @property
    def width(self) -> str | None:
        """See StoredRows."""
        return "int4" if self.kind == "Q4_1" else "int8"

    def _blocks_of(self) -> str | None:
        width, size = self.shape[1], self.spec.facts["group"]
        scale, zero = self.levels
        is_whole = width % GROUP == 0 and (size % GROUP == 0 or scale.shape[1] == 1)
        if not is_whole or self.order() is not None or not _fit_halves(scale):
            return None
        if self.spec.bits <= 4:
            return "Q4_1" if zero is None or _fit_halves(scale * zero) else None
        return "Q8_0" if zero is None or bool((zero == self._middle()).all()) else None

    def _middle(self) -> int:
        return 1 << (self.spec.bits - 1)

    def _of_groups(self, levels: Tensor, first: int, count: int) -> Tensor:
        """Levels (count, in) of each weight of some rows."""
        own = levels[first : first + count]
        if (order := self.order()) is not None:
            return own[:, order]
        return own.repeat_interleave(self.spec.facts["group"], dim=1)[:, : self.shape[1]]

    def few_rows(self, first: int, count: int) -> Tensor:
        """See QuantizedRows."""
        scale, zero = self.levels
        codes = self.codes(first, count).float()
        if zero is not None:
            codes -= self._of_groups(zero, first, count)
        return codes * self._of_groups(scale, first, count)

    def few_blocks(self, first: int, count: int) -> Tensor:
        """See QuantizedRows."""
        scale, zero = self.levels
        starts = torch.arange(0, self.shape[1], GROUP) // self.spec.facts["group"]
        own = scale[first : first + count][:, starts]
        codes = self.codes(first, count)
        if self.kind == "Q8_0":
            codes = codes if zero is None else codes - self._middle()
            return _joined(own, codes.to(torch.int8).view(count, -1, GROUP))
        minimum = torch.zeros_like(own)
        if zero is not None:
            minimum = -own * zero[first : first + count][:, starts]
        halves = codes.to(torch.uint8).view(count, -1, 2, GROUP // 2)
        return _joined(own, minimum, halves[:, :, 0] | halves[:, :, 1] << 4)


def _fit_halves(levels: Tensor) -> bool:
    """True where half precision changes these numbers by little enough."""
    return bool(((levels.half().float() - levels).abs() <= MOST_LOST * levels.abs()).all())


def _joined(*fields: Tensor) -> Tensor:
    """The bytes of blocks: of numbers (count, blocks), and of codes (count, blocks, …)."""
    halves = [each.half()[..., None] if each.ndim == 2 else each for each in fields]
    return torch.cat([each.view(torch.uint8) for each in halves], dim=-1).reshape(-1)


def _unpacked(words: Tensor, bits: int, dim: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Codes of int32 words, one after the other in ``dim``: the lowest bits first, or ``order``."""
    places = torch.tensor(order or range(32 // bits)) * bits
    shifts = places.view([-1 if axis == dim + 1 else 1 for axis in range(words.ndim + 1)])
    codes = (words.unsqueeze(dim + 1) >> shifts.to(torch.int32)) & ((1 << bits) - 1)
    return codes.flatten(dim, dim + 1).to(torch.int16)


class GptqRows(IntegerRows):
    """Words along the inputs, (in / 8, out); zero points along the outputs."""

    def codes(self, first: int, count: int) -> Tensor:
        """See IntegerRows."""
        words = self._view("qweight")[:, first : first + count]
        return _unpacked(words, self.spec.bits, 0).t()[:, : self.shape[1]].contiguous()

    def read_levels(self) -> tuple[Tensor, Tensor | None]:
        """See IntegerRows."""
        zeros = _unpacked(self._view("qzeros"), self.spec.bits, 1) + self.spec.facts["zero_offset"]
        zeros &= (1 << self.spec.bits) - 1
        return self._view("scales").float().t().contiguous(), zeros.float().t()[: self.shape[0]]

    def order(self) -> Tensor | None:
        """See IntegerRows."""
        return _order(self.parts.get("g_idx"), self.spec.facts["group"])


class AwqRows(IntegerRows):
    """Words along the outputs, (in, out / 8), and so are zero points."""

    def codes(self, first: int, count: int) -> Tensor:
        """See IntegerRows."""
        start = first // 8 * 8
        words = self._view("qweight")[:, start // 8 : -(-(first + count) // 8)]
        codes = _unpacked(words, 4, 1, AWQ_ORDER)
        return codes[:, first - start : first - start + count].t().contiguous()

    def read_levels(self) -> tuple[Tensor, Tensor | None]:
        """See IntegerRows."""
        zeros = _unpacked(self._view("qzeros"), 4, 1, AWQ_ORDER)
        return self._view("scales").float().t().contiguous(), zeros.float().t()


class PackedRows(IntegerRows):
    """compressed-tensors': words along the inputs, (out, in / 8), codes from the middle on."""

    def codes(self, first: int, count: int) -> Tensor:
        """See IntegerRows."""
        words = self._view("weight_packed")[first : first + count]
        return _unpacked(words, self.spec.bits, 1)[:, : self.shape[1]].contiguous()

    def read_levels(self) -> tuple[Tensor, Tensor | None]:
        """See IntegerRows."""
        scale = _of_rows(self._view("weight_scale"), self.shape[0])
        if "weight_zero_point" not in self.parts:
            return scale, torch.full_like(scale, self._middle())
        stored = self._view("weight_zero_point")
        if stored.dtype == torch.int32:
            zeros = _unpacked(stored, self.spec.bits, 0)[: self.shape[0]].float()
        else:  # as older versions wrote them
            zeros = _of_rows(stored, self.shape[0]) + self._middle()
        return scale, zeros.expand_as(scale)

    def order(self) -> Tensor | None:
        """See IntegerRows."""
        return _order(self.parts.get("weight_g_idx"), self.spec.facts["group"])


class Int8Rows(IntegerRows):
    """Bytes with scales of rows, of groups or of all."""

    def codes(self, first: int, count: int) -> Tensor:
        """See IntegerRows."""
        return self._view("weight")[first : first + count].to(torch.int16)

    def read_levels(self) -> tuple[Tensor, Tensor | None]:
        """See IntegerRows."""
        scale = _of_rows(self._view("weight_scale"), self.shape[0])
        if "weight_zero_point" not in self.parts:
            return scale, None
        zero = _of_rows(self._view("weight_zero_point"), self.shape[0]).expand_as(scale)
        return scale, zero if zero.any() else None

    def _middle(self) -> int:
        return 0


class ScbRows(Int8Rows):
    """bitsandbytes': bytes whose rows have a largest number."""

    def read_levels(self) -> tuple[Tensor, Tensor | None]:
        """See IntegerRows."""
        return _of_rows(self._view("SCB"), self.shape[0]) / 127, None


def _of_rows(levels: Tensor, out: int) -> Tensor:
    """(out, groups) float32 of one number, of one for each row, or of one for each group."""
    levels = levels.float()
    return levels.reshape(-1, 1).expand(out, 1) if levels.ndim < 2 else levels.expand(out, -1)


def _order(groups: FileTensor | None, size: int) -> Tensor | None:
    """The group of each input where it is not the place of the input that says it."""
    if groups is None:
        return None
    order = groups.view().long()
    if (order < 0).any():  # never set: compressed-tensors' without an order
        return None
    return None if torch.equal(order, torch.arange(len(order)) // size) else order
