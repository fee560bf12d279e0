"""Models whose weights were made of four bits, as those of a Q4_1 file are."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

GROUP = 32


def of_four_bits(model: Any) -> Any:
    """A copy whose linear layers, all but the last, have 16 evenly spaced numbers per group."""
    made = copy.deepcopy(model)
    head = made.get_output_embeddings()
    for module in made.modules():
        if isinstance(module, nn.Linear) and module is not head:
            module.weight.data = rounded(module.weight.data)
        if isinstance(module, Conv1D):
            module.weight.data = rounded(module.weight.data.t()).t().contiguous()
    return made


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """(out, in), ``in`` a multiple of 32; scales and minima in half precision."""
    groups = weight.reshape(-1, GROUP)
    low = groups.amin(1, keepdim=True).half().float()
    scale = ((groups.amax(1, keepdim=True) - low) / 15).half().float()
    return (((groups - low) / scale).round().clamp(0, 15) * scale + low).view_as(weight)
