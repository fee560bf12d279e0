"""Tokens sampled by the kernel (kernels/src/sample.cpp), as engine/sampling defines them."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from transformers_api.engine.base import Mask
from transformers_api.engine.sampling import rng
from transformers_api.engine.sampling.changed_rows import NO_CHANGES, ChangedRows
from transformers_api.engine.sampling.fast_sampler import UNSURE, is_fast
from transformers_api.engine.sequence import Sequence
from transformers_api.kernels.abi import Library, SampleRow

SAMPLE_ROWS = numpy.dtype(SampleRow)


class NativeSampler:
    """Meets ``fast_sampler.FastSampler``."""

    def __init__(self, library: Library) -> None:
        self.library = library

    applies_masks = True

    def __call__(
        self, logits: Tensor, sequences: list[Sequence], changed: ChangedRows = NO_CHANGES
    ) -> list[int]:
        """See FastSampler."""
        if logits.dtype != torch.float32 or logits.stride(1) != 1:
            return [UNSURE] * len(sequences)
        rows = [row for row, seq in enumerate(sequences) if is_fast(seq)]
        start, step, size = logits.data_ptr(), logits.stride(0) * 4, logits.shape[1]
        addresses = [start + row * step for row in rows]
        if changed.logits:
            for place, row in enumerate(rows):
                if row in changed.logits:
                    addresses[place] = changed.logits[row].data_ptr()
        masks = changed.masks
        draws = numpy.array(
            [
                _draw(address, size, sequences[row], masks.get(row))
                for row, address in zip(rows, addresses, strict=True)
            ],
            dtype=SAMPLE_ROWS,
        )
        drawn = numpy.empty(len(rows), numpy.int64)
        library = self.library.without_gil if len(rows) > 1 else self.library.with_gil
        library.sample(draws.ctypes.data, len(rows), drawn.ctypes.data)
        tokens = [UNSURE] * len(sequences)
        for row, token in zip(rows, drawn.tolist(), strict=True):
            tokens[row] = token
        return tokens


def _draw(address: int, size: int, seq: Sequence, mask: Mask | None) -> tuple[float, ...]:
    params = seq.params
    if mask is not None:  # what it has no bits for may not come
        size = min(size, len(mask) * 32)
    key = rng.step_key(seq.seed, seq.num_output) if params.temperature else 0
    top_k = min(params.top_k or size, size)
    allowed = 0 if mask is None else mask.ctypes.data
    return address, size, key, top_k, params.temperature, params.top_p, params.min_p, allowed
