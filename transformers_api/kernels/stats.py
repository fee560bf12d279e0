"""Figures for inspection, computed by the kernels: attention probabilities, token statistics."""

from __future__ import annotations

from ctypes import byref, c_float, c_int64
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from transformers_api.kernels import abi
from transformers_api.kernels.modules.attention import CausalRows, per_head


@dataclass(frozen=True, slots=True)
class TokenStats:
    """A token and the distribution it comes from."""

    logprob: float
    entropy: float  # in nats
    rank: int  # number of tokens that are likelier
    ids: list[int]  # of the likeliest tokens, the likeliest first
    probs: list[float]  # theirs


def token_stats(library: abi.Library, logits: Tensor, token: int, count: int) -> TokenStats:
    """Statistics of ``token`` and of the ``count`` likeliest.

    ``logits``: (V,) float32, contiguous, without NaN.
    """
    count = min(count, len(logits))
    row = abi.TokenStats(logits.data_ptr(), len(logits), token, count)
    ids, probs = (c_int64 * count)(), (c_float * count)()
    library.with_gil.token_stats(byref(row), ids, probs)
    return TokenStats(row.logprob, row.entropy, row.rank, ids[:], probs[:])


def attention_probs(
    rows: CausalRows,
    query: Tensor,
    key: Tensor,
    sequence: int,
    queries: range,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Attention of ``queries`` of one sequence (H, R, S), and of the sinks (H, R), float32.

    ``query`` (B, H, T, D) and ``key`` (B, G, S, D) as native_attention has them, with its options.
    """
    heads, count, keys, size = query.shape[1], len(queries), key.shape[2], query.shape[3]
    scaling = options.get("scaling")
    sinks, slopes = (per_head(options.get(name)) for name in ("s_aux", "slopes"))
    probs = torch.from_numpy(numpy.empty((heads, count, keys), numpy.float32))
    sink_probs = None if sinks is None else torch.empty(heads, count)
    call = abi.Attention(
        q=query.data_ptr(),
        k=key.data_ptr(),
        starts=rows.starts.data_ptr(),
        sinks=sinks.data_ptr() if sinks is not None else None,
        slopes=slopes.data_ptr() if slopes is not None else None,
        heads=heads,
        kv_heads=key.shape[1],
        size=size,
        q_strides=query.stride()[:3],
        k_strides=key.stride()[:3],
        window=rows.window,
        scale=size**-0.5 if scaling is None else scaling,
        softcap=options.get("softcap") or 0.0,
        q_type=abi.TYPES[query.dtype],
        kv_type=abi.KV_TYPES[key.dtype],
    )
    rows.library.with_gil.attention_probs(
        byref(call),
        *(sequence, queries.start, count, keys),
        probs.data_ptr(),
        None if sink_probs is None else sink_probs.data_ptr(),
    )
    return probs, sink_probs
