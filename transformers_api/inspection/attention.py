"""The tap: what a model's attention reads, noted beside the model's own computation.

Modern models look their attention function up by name, and q and k reach it as they are used:
rotated, normalised, with all that is cached. The function of that name is wrapped once; while
somebody watches, softmax(scale * q k^T) is computed again in float32 for the rows that are wanted.
The wrapped function's own output is passed on untouched, so watching cannot change an answer.

Models that attend with code of their own compute the weights anyway: hooks read them as they pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_api.engine.backend import Backend
from transformers_api.engine.runners.edited_attention import (
    AttentionCall,
    AttentionEdit,
    AttentionInputs,
    current_attention_edits,
    part_of,
)
from transformers_api.inspection.base import AttentionMode


class Weights(Protocol):
    """The attention of one layer in one forward pass: B sequences, T queries, S keys."""

    @property
    def is_edited(self) -> bool:
        """True where ``rows`` are what edits of them have made."""
        ...

    @property
    def heads(self) -> int:
        """H, of the queries."""
        ...

    def rows(
        self, sequence: int, queries: slice, heads: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Weights (H', R, S) and what the sinks took (H', R), float32; ``heads`` None: all."""
        ...


Watcher = Callable[[int, Weights], None]  # told of each layer that attends, in turn


@dataclass(frozen=True, slots=True)
class AttentionSource:
    """The source of a model's attention weights. Names only: it keeps no model alive."""

    mode: AttentionMode
    implementation: str
    outputs: tuple[tuple[int, str, int], ...] = ()  # hook: (layer, module, index in its output)
    has_sinks: bool = False  # hook: rows need not sum to 1
    backend: Backend | None = None  # tap: that of the model; None: torch

    def place_of(self, layer: int) -> tuple[str, int, bool] | None:
        """The module whose output has a layer's weights, and where; see ``AttentionEdit``."""
        if self.mode is not AttentionMode.HOOK:
            return None
        own = (each for each in self.outputs if each[0] == layer)
        return next(((name, index, self.has_sinks) for _, name, index in own), None)

    @contextmanager
    def watched(
        self, model: Any, watcher: Watcher, layers: Collection[int] | None = None
    ) -> Iterator[None]:
        """Tell ``watcher`` of every layer that attends on this thread, until the end of the block.

        ``layers``: those that it may be told of; None: all. Nothing is told of models whose mode is
        ``legacy`` or ``none``.
        """
        handles = [
            model.get_submodule(name).register_forward_hook(
                partial(_pass_on, watcher, layer, index, self.has_sinks)
            )
            for layer, name, index in self.outputs
            if layers is None or layer in layers
        ]
        is_tapped = self.mode is AttentionMode.TAP
        token = _current.set(_Watch(watcher, layers, self.backend) if is_tapped else None)
        observing = self.backend.observing_attention(layers) if self.backend else nullcontext()
        try:
            with observing if is_tapped else nullcontext():
                yield
        finally:
            _current.reset(token)
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, slots=True)
class _Watch:
    watcher: Watcher
    layers: Collection[int] | None  # None: all
    backend: Backend | None


# transformers finds attention functions by name, so that a tap gets its watcher by this way only.
_current: ContextVar[_Watch | None] = ContextVar("watch", default=None)


def install_tap(name: str) -> bool:
    """Wrap the attention function of that name; False when transformers has none such.

    Under its own name: masks are made by name, and a new name would get none, without a word.
    """
    if name not in ALL_ATTENTION_FUNCTIONS:
        return False
    function = ALL_ATTENTION_FUNCTIONS[name]
    if not isinstance(function, Tap):
        AttentionInterface.register(name, Tap(function, name))
    return True


class Tap:
    """An attention function that lets others watch. Parameters are named as transformers' are."""

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function = function
        # where the last query stands among more keys than queries, when there is no mask
        self.aligns_ends = name.startswith("flash")

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        *args: Any,
        **options: Any,
    ) -> Any:
        """Return the result of the wrapped function; what it reads and makes may be edited."""
        layer, watch = getattr(module, "layer_idx", None), _current.get()
        edits = [edit for edit in current_attention_edits() if edit.layer == layer]
        if edits and torch.is_grad_enabled():  # gradients may need what the edits write over
            query, key, value = query.clone(), key.clone(), value.clone()
        for edit in edits:
            if edit.before is not None:
                edit.before(_inputs(edit, query, key, value))
        result = self.function(module, query, key, value, attention_mask, *args, **options)
        if layer is None or (watch is None and not edits):
            return result
        if edits and torch.is_grad_enabled():
            result = result[0].clone(), *result[1:]
        call = Attended(
            *(module, query, key, value, attention_mask, result[0], options),
            aligns_ends=self.aligns_ends,
            backend=None if watch is None else watch.backend,
        )
        for edit in edits:
            if edit.apply is not None:
                edit.apply(call.part(edit))
        if watch is not None and (watch.layers is None or layer in watch.layers):
            watch.watcher(layer, call)
        return result


def _inputs(edit: AttentionEdit, query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
    """Those of the sequence's tokens, its last ones; views."""
    sequence, queries = part_of(edit, len(query), query.shape[2])
    own = query[sequence, :, queries]
    stop = min(key.shape[2], edit.context)
    keys = slice(stop - own.shape[1], stop)
    return AttentionInputs(
        *(each.transpose(0, 1) for each in (own, key[sequence, :, keys], value[sequence, :, keys]))
    )


@dataclass(frozen=True, slots=True, eq=False)
class Attended:
    """One call of an attention function; see Weights.

    Letters for shapes: B sequences, H heads of the queries, G of keys and values, T queries, S
    keys, D head size.
    """

    module: nn.Module
    query: Tensor  # (B, H, T, D)
    key: Tensor  # (B, G, S, D)
    value: Tensor  # (B, G, S, D')
    mask: Any  # (B | 1, H | 1, T, >= S): boolean, or added to the scores; or the backend's own
    output: Tensor  # (B, T, H, D')
    options: dict[str, Any]
    aligns_ends: bool
    backend: Backend | None = None

    @property
    def is_edited(self) -> bool:
        """See Weights: edits write into the output."""
        return False

    @property
    def heads(self) -> int:
        """See Weights."""
        return self.query.shape[1]

    @property
    def kv_heads(self) -> int:
        """G."""
        return self.key.shape[1]

    @property
    def has_sinks(self) -> bool:
        """True where a head may leave a part of its attention unused."""
        return self.options.get("s_aux") is not None

    def rows(
        self, sequence: int, queries: slice, heads: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See Weights."""
        if (own := self._own_rows(sequence, queries)) is not None:
            probs, taken = own
            chosen = slice(None) if heads is None else list(heads)
            return probs[chosen], None if taken is None else taken[chosen]
        scores = self._products(sequence, queries, heads) * self._scale()
        if (cap := self.options.get("softcap")) is not None:
            scores = torch.tanh(scores / cap) * cap
        for added in (self.options.get("position_bias"), self.mask):
            scores = _masked(scores, self._part(added, sequence, queries, heads))
        if self.mask is None:
            scores = _masked(scores, self._causal(queries))
        sinks = self.options.get("s_aux")
        if sinks is None:
            return scores.softmax(-1).nan_to_num_(0.0), None  # a row that sees nothing is padding
        sinks = sinks.float().reshape(-1, 1, 1)[slice(None) if heads is None else list(heads)]
        shares = torch.cat([scores, sinks.expand(-1, scores.shape[1], 1)], -1).softmax(-1)
        return shares[..., :-1], shares[..., -1]

    def part(self, edit: AttentionEdit) -> AttentionCall:
        """The part that an edit changes; its output is a view of this one's."""
        sequence, queries = part_of(edit, len(self.query), self.query.shape[2])
        added = (self.options.get("position_bias"), self.mask)
        masks = [self._part(each, sequence, queries, None) for each in added]
        masks.append(self._causal(queries) if self.mask is None else None)
        context = edit.context  # others may have more
        return AttentionCall(
            query=self.query[sequence, :, queries],
            key=self.key[sequence, :, :context],
            value=self.value[sequence, :, :context],
            masks=tuple(
                (each if each.dim() == 3 else each[None])[..., :context]
                for each in masks
                if each is not None
            ),
            output=self.output[sequence, queries],
            options=self.options,
        )

    def _own_rows(self, sequence: int, queries: slice) -> tuple[Tensor, Tensor | None] | None:
        """The backend's probabilities (H, R, S) and what the sinks took, where it has them."""
        if self.backend is None:
            return None
        rows = range(self.query.shape[2])[queries]
        return self.backend.attention_probs(
            self.mask, self.query, self.key, sequence, rows, self.options
        )

    def error(self) -> float:
        """The largest |P V - out| relative to |out|: rounding, when P made the output."""
        worst = 0.0
        for sequence in range(len(self.query)):
            weights, _ = self.rows(sequence, slice(None))
            values = self.numbers(self.value[sequence])
            values = values.repeat_interleave(self.heads // len(values), dim=0)
            out = self.output[sequence].float().transpose(0, 1)
            off = (weights @ values - out).abs().amax() / out.abs().amax().clamp_min(1e-30)
            worst = max(worst, float(off.nan_to_num(torch.inf)))
        return worst

    def _products(self, sequence: int, queries: slice, heads: Sequence[int] | None) -> Tensor:
        """The products (H', R, S), by groups of heads: no key is copied for the heads it serves."""
        query = self.query[sequence, :, queries].float()
        key = self.numbers(self.key[sequence])
        group = self.heads // self.kv_heads
        if heads is not None:
            return query[list(heads)] @ key[[head // group for head in heads]].transpose(-1, -2)
        grouped = query.reshape(self.kv_heads, -1, query.shape[-1])
        return (grouped @ key.transpose(-1, -2)).reshape(self.heads, query.shape[1], -1)

    def numbers(self, states: Tensor) -> Tensor:
        """Keys or values as float32, however the backend holds them."""
        return (states if self.backend is None else self.backend.numbers_of(states)).float()

    def _scale(self) -> float:
        scale = self.options.get("scaling")
        return float(self.query.shape[-1] ** -0.5 if scale is None else scale)

    def _part(
        self, added: Tensor | None, sequence: int, queries: slice, heads: Sequence[int] | None
    ) -> Tensor | None:
        """(H' | 1, R, S) of what is given for all sequences, heads and queries."""
        if added is None:
            return None
        part = added[min(sequence, len(added) - 1), :, queries, : self.key.shape[2]]
        return part if heads is None or len(part) == 1 else part[list(heads)]

    def _causal(self, queries: slice) -> Tensor | None:
        """The causal mask of a function that is given none."""
        count, keys = self.query.shape[2], self.key.shape[2]
        is_causal = self.options.get("is_causal")
        if is_causal is None:
            is_causal = getattr(self.module, "is_causal", True)
        window = self.options.get("sliding_window") if self.aligns_ends else None
        if not is_causal or (count == 1 and not window):
            return None
        first = keys - count if self.aligns_ends else 0
        places = torch.arange(first, first + count, device=self.query.device)[queries]
        distance = places[:, None] - torch.arange(keys, device=self.query.device)
        return (distance >= 0) & (distance < (window or keys + 1))


def _masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    return scores + mask.float()


@dataclass(frozen=True, slots=True, eq=False)
class ComputedWeights:
    """Weights (B, H, T, S) that the model computed itself; see Weights."""

    weights: Tensor
    has_sinks: bool
    is_edited: bool = False

    @property
    def heads(self) -> int:
        """See Weights."""
        return self.weights.shape[1]

    def rows(
        self, sequence: int, queries: slice, heads: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See Weights."""
        chosen = slice(None) if heads is None else list(heads)
        weights = self.weights[sequence, chosen, queries].float()
        return weights, 1 - weights.sum(-1) if self.has_sinks else None


def _pass_on(
    watcher: Watcher,
    layer: int,
    index: int,
    has_sinks: bool,
    _module: nn.Module,
    _args: Any,
    output: Any,
) -> None:
    weights = output[index] if isinstance(output, tuple) else output
    watcher(layer, ComputedWeights(weights, has_sinks, bool(current_attention_edits())))
