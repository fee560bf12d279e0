"""Numbers of eight and four bits: FP8, MXFP4, bitsandbytes' nf4 and fp4."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from transformers_api.engine.quantized.rows import GROUP, QuantizedRows

FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Float8Rows(QuantizedRows):
    """Numbers of eight bits with a scale for each block."""

    def few_rows(self, first: int, count: int) -> Tensor:
        """See QuantizedRows."""
        height, width = self.spec.facts["block"]
        scale = self._view("weight_scale").float()
        scale = scale.reshape(-(-self.shape[0] // height), -1)
        own = scale[torch.arange(first, first + count) // height]
        own = own.repeat_interleave(width, dim=1)[:, : self.shape[1]]
        return _numbers(self._view("weight")[first : first + count]) * own


def _numbers(codes: Tensor) -> Tensor:
    """float32 of numbers of eight bits, by a table: torch converts them one by one."""
    places = codes.contiguous().view(torch.uint8).view(-1).int()
    return torch.index_select(_table(codes.dtype), 0, places).view(codes.shape)


@functools.cache
def _table(dtype: torch.dtype) -> Tensor:
    return torch.arange(256).to(torch.uint8).view(dtype).float()


class Mxfp4Rows(QuantizedRows):
    """Four bits with an exponent for 32 of them, which ggml's block of that name has in halves."""

    @property
    def shape(self) -> tuple[int, int]:
        """See StoredRows. An expert's outputs are the rows."""
        width, out = self.spec.shape[-2:]
        return out, width

    @property
    def kind(self) -> str | None:
        """See StoredRows."""
        return "MXFP4"

    def _codes(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Codes (count, groups, 32) and exponents (count, groups, 1)."""
        pairs = self._view("blocks")[first : first + count]
        codes = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)
        return codes, self._view("scales")[first : first + count][..., None]

    def few_rows(self, first: int, count: int) -> Tensor:
        """See QuantizedRows."""
        codes, exponents = self._codes(first, count)
        levels = torch.tensor([*FP4, *(-level for level in FP4)])
        numbers: Tensor = torch.ldexp(levels[codes.long()], exponents.to(torch.int32) - 127)
        return numbers.view(count, -1)

    def few_blocks(self, first: int, count: int) -> Tensor:
        """See QuantizedRows."""
        codes, exponents = self._codes(first, count)
        halves = codes[..., : GROUP // 2] | codes[..., GROUP // 2 :] << 4
        return torch.cat([exponents, halves], dim=-1).reshape(-1)


class FourBitRows(QuantizedRows):
    """bitsandbytes': levels of a table, scaled in blocks of the whole matrix, row by row."""

    def few_rows(self, first: int, count: int) -> Tensor:
        """See QuantizedRows."""
        facts, width = self.spec.facts, self.shape[1]
        begin, end = first * width, (first + count) * width
        pairs = self._view("weight").reshape(-1).view(torch.uint8)[begin // 2 : -(-end // 2)]
        codes = torch.stack([pairs >> 4, pairs & 15], dim=-1).flatten()
        codes = codes[begin % 2 : begin % 2 + end - begin].long()
        place = torch.arange(begin, end) // facts["blocksize"]
        table = self._view("quant_map").float()
        return (table[codes] * self._scales()[place]).view(count, width)

    def _scales(self) -> Tensor:
        absmax = self._view("absmax")
        if "nested_absmax" not in self.parts:
            return absmax.float()
        facts = self.spec.facts
        outer = torch.arange(len(absmax)) // facts["nested_blocksize"]
        inner = self._view("nested_quant_map").float()[absmax.long()]
        scales: Tensor = inner * self._view("nested_absmax").float()[outer]
        return scales + float(facts["nested_offset"])
