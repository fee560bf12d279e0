"""The random numbers of sampling: a function of (seed, step, token id) and of nothing else.

So a token does not depend on who shares the batch, on how many candidates were looked at, on the
device or on the process, and nothing has to be remembered between two steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15
_MIX1, _MIX2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def step_key(seed: int, step: int) -> int:
    """The key of one step of one sequence, a signed 64-bit integer."""
    state = _mix((seed * GAMMA + 1) & _MASK)
    return signed(_mix((state + step * GAMMA) & _MASK))


def chance(key: int) -> float:
    """A number above 0 and below 1 of the step with this key, apart from its tokens' noise."""
    return ((_mix((key - GAMMA) & _MASK) >> 11) + 0.5) * 2.0**-53  # that of a token -1


def exponential(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Exponential(1) noise for each (row, token): ``keys`` (B,), ``token_ids`` (B, K) or (K,).

    float64 (B, K). The token with the largest p / noise is a sample of p (the exponential race,
    which is the Gumbel-max trick). SplitMix64: Steele, Lea, Flood 2014,
    doi:10.1145/2714064.2660195.
    """
    x = keys[:, None] + token_ids * signed(GAMMA)
    mix(x, torch.empty_like(x))
    uniform = (_shifted(x, 11).double() + 0.5) * 2.0**-53  # in (0, 1)
    return -torch.log(uniform)


def mix(x: Tensor, room: Tensor) -> None:
    """SplitMix64's mixing of ``x``, in place; ``room`` is of its kind and overwritten."""
    for bits, factor in ((30, _MIX1), (27, _MIX2), (31, 0)):
        torch.bitwise_right_shift(x, bits, out=room)
        x.bitwise_xor_(room.bitwise_and_((1 << (64 - bits)) - 1))  # torch's own shift has signs
        if factor:
            x.mul_(signed(factor))


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * _MIX1) & _MASK
    x = ((x ^ (x >> 27)) * _MIX2) & _MASK
    return x ^ (x >> 31)


def signed(x: int) -> int:
    """The same 64 bits as a number with a sign."""
    return x - (1 << 64) if x >= 1 << 63 else x


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
