"""What inspection says of a step, worked out by the kernels: shares of attention, figures."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformers_api.kernels.abi import TYPES, Attention, Library
from transformers_api.kernels.modules.attention import CausalRows


class _Figures(ctypes.Structure):
    """kernels.cpp: struct Figures."""

    _fields_ = (
        ("logits", c_void_p),
        ("size", c_int64),
        ("token", c_int64),
        ("count", c_int64),
        ("logprob", c_double),
        ("entropy", c_double),
        ("rank", c_int64),
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """Of a token and of the distribution that it is from."""

    logprob: float
    entropy: float  # in nats
    rank: int  # how many tokens are likelier
    ids: list[int]  # the likeliest tokens, the likeliest first
    probs: list[float]  # theirs


def figures(library: Library, logits: Tensor, token: int, count: int) -> Figures:
    """Of ``logits`` (V,) float32, contiguous, with ``count`` of the likeliest tokens."""
    count = min(count, len(logits))
    row = _Figures(logits.data_ptr(), len(logits), token, count)
    ids, probs = (c_int64 * count)(), (c_float * count)()
    library.quick.figures(byref(row), ids, probs)
    return Figures(row.logprob, row.entropy, row.rank, ids[:], probs[:])


def shares(
    rows: CausalRows,
    query: Tensor,
    key: Tensor,
    sequence: int,
    queries: range,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What ``queries`` of one sequence read (H, R, S), and what sinks took (H, R), float32.

    ``query`` (B, H, T, D) and ``key`` (B, G, S, D) as native_attention has them, with its options.
    """
    heads, count, keys, size = query.shape[1], len(queries), key.shape[2], query.shape[3]
    scaling, sinks = options.get("scaling"), options.get("s_aux")
    if sinks is not None:
        sinks = sinks.detach().float().contiguous()
    found = torch.empty(heads, count, keys)
    taken = None if sinks is None else torch.empty(heads, count)
    call = Attention(
        q=query.data_ptr(),
        k=key.data_ptr(),
        starts=rows.starts.data_ptr(),
        sinks=sinks.data_ptr() if sinks is not None else None,
        heads=heads,
        kv_heads=key.shape[1],
        size=size,
        q_strides=query.stride()[:3],
        k_strides=key.stride()[:3],
        window=rows.window,
        scale=size**-0.5 if scaling is None else scaling,
        softcap=options.get("softcap") or 0.0,
        q_type=TYPES[query.dtype],
        kv_type=TYPES[key.dtype],
    )
    where = sequence, queries.start, count, keys
    to_sinks = None if taken is None else taken.data_ptr()
    rows.library.quick.shares(byref(call), *where, found.data_ptr(), to_sinks)
    return found, taken
