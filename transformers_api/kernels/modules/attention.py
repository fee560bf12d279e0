"""Attention over the KV cache by the kernel, for transformers' attention interface."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_api.kernels.abi import KV_TYPES, TYPES, Attention, CacheWrite, Library
from transformers_api.kernels.capture import Recorder, current

NAME = "native"
MAX_SIZE = 512  # src/attention_block.h
GROUP, GROUP_BYTES = 32, 34  # codes and bytes of keys and values in int8: src/kv_codes.h
OPTIONS = ("softcap", "s_aux", "slopes", "is_causal", "sliding_window")  # of the probabilities
_replayed: contextvars.ContextVar[Tensor | None] = contextvars.ContextVar("replayed", default=None)


@dataclass(frozen=True, slots=True)
class CausalRows:
    """A causal mask in short: query t of row b attends to the keys up to ``starts[b] + t``.

    To the last ``window`` of them only, if it is above 0; below 0 to those of its own chunk of so
    many tokens. ``starts`` (B,) int64, contiguous.
    ``cache_rows``, of the same kind: the row of the cache that each row belongs to, where the keys
    are those of all rows. Tokens of one sequence may be rows of their own, one after the other.
    """

    library: Library
    starts: Tensor
    window: int
    cache_rows: Tensor | None = None


_described: contextvars.ContextVar[Sequence[tuple[Tensor, CausalRows]]] = contextvars.ContextVar(
    "described", default=()
)


@contextmanager
def describing(masks: Sequence[tuple[Tensor, CausalRows]]) -> Iterator[None]:
    """While it lasts, attention with one of these very masks is computed from its description.

    A mask that a model makes of one of them is another one, and has none.
    """
    token = _described.set(masks)
    try:
        yield
    finally:
        _described.reset(token)


def _description(mask: Tensor | None) -> CausalRows | None:
    if mask is None:
        return None
    return next((rows for other, rows in _described.get() if other is mask), None)


def register() -> None:
    """Make ``native`` an attention implementation of transformers; masks are those of sdpa."""
    if NAME not in ALL_ATTENTION_FUNCTIONS:  # else it may be wrapped
        AttentionInterface.register(NAME, native_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def native_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of queries (B, H, T, D) over keys and values (B, G, S, D): (B, T, H, D).

    Those of int8 are groups of codes: see ``numbers_of``. By the kernel where the mask is described
    and the tensors are supported, else by sdpa.
    """
    if (output := _replayed.get()) is not None:
        return output, None
    rows = _description(attention_mask)
    if rows is None or dropout or not is_supported(query, key, value):
        key, value = numbers_of(key).to(query.dtype), numbers_of(value).to(query.dtype)
        if kwargs.get("softcap") or kwargs.get("s_aux") is not None:
            return _eager_attention(query, key, value, attention_mask, scaling, **kwargs), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if recorder := current():
        details = {"side": "inputs", "value_size": value.shape[3]}
        recorder.add_module_call(module, [query], key=key, value=value, options=details)
    result = attend(query, key, value, rows, scaling, kwargs)
    if recorder := current():
        options = {"scaling": scaling, **{k: v for k, v in kwargs.items() if k in OPTIONS}}
        details = {"window": rows.window, "options": options}
        recorder.add_module_call(module, [query, result], key=key, value=value, options=details)
    return result, None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: CausalRows,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor:
    """Attention by the kernel: (B, T, H, D).

    Besides those of transformers ``options`` may have ``slopes`` (H,): each times a key's distance
    behind the query is added to its score (ALiBi).
    """
    batch, heads, width, own_size = query.shape
    size = max(own_size, value.shape[3])
    wide = _widened(query, size)
    recorder, shape = current(), (batch, width, heads, size)
    out = query.new_empty(shape) if recorder is None else torch.zeros(shape, dtype=query.dtype)
    sinks, slopes = (per_head(options.get(name)) for name in ("s_aux", "slopes"))
    call = Attention(
        wide.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        out.data_ptr(),
        rows.starts.data_ptr(),
        None if rows.cache_rows is None else rows.cache_rows.data_ptr(),
        sinks.data_ptr() if sinks is not None else None,
        slopes.data_ptr() if slopes is not None else None,
        batch,
        width,
        heads,
        key.shape[1],
        size,
        wide.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        rows.window,
        own_size**-0.5 if scaling is None else scaling,
        options.get("softcap") or 0.0,
        TYPES[query.dtype],
        KV_TYPES[key.dtype],
    )
    if recorder is not None:  # a recording needs no numbers
        operands = {"q": wide, "k": key, "v": value, "sinks": sinks, "slopes": slopes}
        _record_attention(recorder, call, rows, operands, out)
    else:
        library = rows.library
        (library.with_gil if batch * width < 64 else library.without_gil).attention(call)
    return out[..., : value.shape[3]]


def per_head(numbers: Tensor | None) -> Tensor | None:
    """A number for each head as the kernels read them."""
    return None if numbers is None else numbers.detach().float().contiguous()


def _widened(query: Tensor, size: int) -> Tensor:
    """The queries (…, D) with zeros behind them where values are wider than keys."""
    if query.shape[3] == size:
        return query
    wide = query.new_zeros((*query.shape[:3], size))
    wide[..., : query.shape[3]] = query
    return wide


def _record_attention(
    recorder: Recorder,
    call: Attention,
    rows: CausalRows,
    operands: dict[str, Tensor | None],
    out: Tensor,
) -> None:
    operands |= {"starts": rows.starts, "cache_rows": rows.cache_rows}
    present = {name: each for name, each in operands.items() if each is not None}
    fields = (*present, "out")
    recorder.add("attention", out, [*present.values()], (1,), call=call, fields=fields)


def replay_attention(
    module: nn.Module,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: CausalRows,
    options: dict[str, Any],
) -> None:
    """Call the attention function, wrappers included, with an output that is computed already.

    ``tensors``: query, key, value and output.
    """
    *arguments, output = tensors
    token = _replayed.set(output)
    try:
        ALL_ATTENTION_FUNCTIONS[NAME](module, *arguments, mask, **options)
    finally:
        _replayed.reset(token)


def _eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Attention with softcap and sinks, which sdpa lacks."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril(
            scores.shape[3] - scores.shape[2]
        )
    # finite, as in sdpa: a row of padding attends to nothing, and its NaN would reach the others
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2).contiguous()


def is_supported(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """True for views of rows that are wide enough for keys and for values."""
    return (
        query.dtype in TYPES
        and key.dtype in KV_TYPES
        and key.dtype == value.dtype
        and query.shape[3] == key.shape[3]
        and max(key.shape[3], value.shape[3]) <= min(MAX_SIZE, key.stride(2), value.stride(2))
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and not (query.requires_grad and torch.is_grad_enabled())
    )


def code_bytes(size: int) -> int:
    """Bytes of ``size`` keys or values of a token and head in int8."""
    return -(-size // GROUP) * GROUP_BYTES


def numbers_of(states: Tensor) -> Tensor:
    """Keys or values (B, G, S, D) of the cache as numbers.

    Of int8 a view with this shape is the place of groups of codes, which reach beyond D: what
    attention multiplies is made of them. Others are numbers as they are.
    """
    if states.dtype != torch.int8:
        return states
    *shape, size = states.shape
    width = code_bytes(size)
    groups = states.as_strided((*shape, width), states.stride()).reshape(*shape, -1, GROUP_BYTES)
    scales = groups[..., :2].contiguous().view(torch.bfloat16).float()
    return (groups[..., 2:] * scales).bfloat16().flatten(-2)[..., :size]


def write_cache(
    library: Library,
    states: Tensor,
    rows: Tensor,
    starts: Tensor | None,
    cache_rows: Tensor | None = None,
) -> None:
    """Write ``states`` (B, G, T, D) into ``rows`` (R, G, length, D) from each row's start on.

    ``starts`` (B,); None: from 0. Row b of ``states`` goes to the row ``cache_rows[b]``, by default
    b. Rows of int8 have ``code_bytes(D)`` in the place of D and become groups of codes.
    """
    batch, heads, width, size = states.shape
    if states.stride(3) != 1:
        states = states.contiguous()
    call = CacheWrite(
        states.data_ptr(),
        rows.data_ptr(),
        None if starts is None else starts.data_ptr(),
        None if cache_rows is None else cache_rows.data_ptr(),
        batch,
        heads,
        width,
        size,
        states.stride()[:3],
        rows.stride()[:3],
        TYPES[states.dtype],
        KV_TYPES[rows.dtype],
    )
    if recorder := current():  # a recording needs no numbers
        every = {"source": states, "starts": starts, "cache_rows": cache_rows, "target": rows}
        operands = {name: each for name, each in every.items() if each is not None}
        recorder.add(
            "write_cache", None, [*operands.values()], (1,), call=call, fields=(*operands,)
        )
    else:
        library.with_gil.write_cache(call)


def read_cache(library: Library, rows: Tensor, cache_rows: Tensor) -> Tensor:
    """A copy (B, …) of these ``cache_rows`` (B,) of ``rows`` (R, …), both contiguous."""
    recorder, shape = current(), (len(cache_rows), *rows.shape[1:])
    made = rows.new_empty(shape) if recorder is None else torch.zeros(shape, dtype=rows.dtype)
    size = made[0].numel()
    strides = (size, size, size)
    call = CacheWrite(
        rows.data_ptr(),
        made.data_ptr(),
        None,
        cache_rows.data_ptr(),
        len(made),
        1,
        1,
        size,
        strides,
        strides,
        TYPES[rows.dtype],
        TYPES[made.dtype],
    )
    if recorder is not None:
        fields = ("source", "cache_rows", "target")
        recorder.add("read_cache", made, [rows, cache_rows], (1,), call=call, fields=fields)
    else:
        library.with_gil.read_cache(call)
    return made
