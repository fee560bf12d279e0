"""Hooks of modules and wrapped attention functions, replayed for a pass that runs natively."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from transformers_api.kernels.abi import OPS, TYPES, Library, RowChange
from transformers_api.kernels.graph.executor import FinishedCall
from transformers_api.kernels.graph.hook_points import HookPoints, attention_key
from transformers_api.kernels.graph.planner import HookPoint
from transformers_api.kernels.modules.attention import CausalRows, replay_attention
from transformers_api.kernels.stats import attention_probs

TAKE, ATTENTION = OPS.index("take"), OPS.index("attention")


@dataclass(frozen=True, slots=True)
class RowEdit:
    """An edit of the rows (N, width) of a tensor in the middle of a pass.

    ``apply`` writes into them. ``changes`` says the same in words of the kernels, for the rows as
    they lie in memory after so many steps; None: that cannot be said.
    """

    apply: Callable[[Tensor], None]
    changes: Callable[[Tensor, int], list[RowChange]] | None = None


NO_EDITS: Mapping[Any, Any] = {}
_observed: ContextVar[Collection[int] | None] = ContextVar("observed", default=())


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Attention rows that passes note themselves, where they can.

    ``places``: by layer, the sequences whose last tokens' rows are noted, as HookReplay counts
    them. ``by_layer``: of these, probabilities (B, H, S) and those of the sinks (B, H).
    """

    places: Mapping[int, tuple[int, ...]]
    by_layer: dict[int, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


_attention_rows: ContextVar[AttentionRows | None] = ContextVar("attention rows", default=None)


@contextmanager
def observing(layers: Collection[int] | None) -> Iterator[None]:
    """Let passes show the attention of these layers, within the block; None: of all."""
    token = _observed.set(layers)
    try:
        yield
    finally:
        _observed.reset(token)


@contextmanager
def noting_attention(places: Mapping[int, tuple[int, ...]]) -> Iterator[AttentionRows]:
    """Let passes note attention rows, within the block, in place of showing these layers'."""
    rows = AttentionRows(places)
    token = _attention_rows.set(rows)
    try:
        yield rows
    finally:
        _attention_rows.reset(token)


class HookReplay:
    """A PassObserver that shows the last tokens of sequences, whose K and V are neighbours.

    ``tokens``: a token of the pass for each of the rows ``first``.. of the ``cache``; None: those
    of the pass, in order. ``positions`` (N, 1) int64, contiguous: of every token of the pass, all
    below ``length``. Attention is shown of the layers that are observed (see ``observing``), other
    modules where they have hooks. ``edits`` write into the rows (N, width) of all tokens, of what a
    module is given ("in") or makes ("out"), before anybody is shown it; unless it ``observes``
    nobody is. Those of ``attention``, by the layer's index or by the module that makes its weights,
    write into what attention made.

    Between two parts of a pass the kernels' threads wait, and soon go to sleep. The weights have
    driven everything else from the caches, and a call of torch takes fifty microseconds. So most
    edits, and copies of what is shown, are left to the kernels in the middle of the pass.
    """

    def __init__(
        self,
        library: Library,
        positions: Tensor,
        length: int,
        cache: list[Tensor],
        first: int,
        tokens: Tensor | None = None,
        edits: Mapping[tuple[nn.Module, str], RowEdit] = NO_EDITS,
        attention: Mapping[Any, Callable[[FinishedCall], None]] = NO_EDITS,
        observes: bool = True,
    ) -> None:
        self.library = library
        self.observes = observes
        self.edits = edits
        self.attention = attention
        self.cache = cache
        self.tokens = tokens
        self.positions = positions
        self.length = length
        self.first = first
        self._attended: list[tuple[FinishedCall, Tensor, Tensor]] = []
        self._last_tokens: dict[tuple[int, ...], Tensor] = {}  # by place
        self._taken: list[tuple[FinishedCall, list[Tensor]]] = []  # to be shown yet

    def choose(self, points: HookPoints) -> list[HookPoint]:
        """See PassObserver."""
        return points.chosen(self.edits, self.attention, self.observes, _observed.get())

    def changes(self, call: FinishedCall, at: int) -> list[RowChange] | None:
        """See PassObserver."""
        changes: list[RowChange] = []
        if self._attention_change(call) is not None:
            return None
        if (edit := self._edit_of(call)) is not None:
            if edit.changes is None:
                return None
            made = call.tensors[-1]
            changes = edit.changes(made.view(-1, made.shape[-1]), at)
        if "side" in call.options or not self.observes:
            return changes
        if (change := self._rows_change(call, at)) is not None:
            return [*changes, change]
        taken = [self._copy(tensor, at) for tensor in call.tensors]
        copies = [each for each in taken if each is not None]
        if len(copies) < len(taken):
            return None
        self._taken.append((call, [target for target, _ in copies]))
        return [*changes, *(change for _, change in copies)]

    def _rows_change(self, call: FinishedCall, at: int) -> RowChange | None:
        """The change that notes the attention of a call; None: it is to be shown."""
        rows = _attention_rows.get()
        layer = None if rows is None or call.cached is None else attention_key(call)
        if rows is None or layer is None or layer not in rows.places or call.options.get("is_own"):
            return None
        query, tokens = call.tensors[0], self._tokens_of(rows.places[layer])
        shape = len(tokens), query.shape[1], self.length + 1
        probs = torch.from_numpy(numpy.empty(shape, numpy.float32))
        has_sinks = call.options["options"].get("s_aux") is not None
        rows.by_layer[layer] = probs[..., :-1], probs[..., -1] if has_sinks else None
        return RowChange(
            at=at,
            count=len(tokens),
            width=self.length,
            op=ATTENTION,
            target=probs.data_ptr(),
            tokens=tokens.data_ptr(),
        )

    def _tokens_of(self, places: tuple[int, ...]) -> Tensor:
        """The last tokens of these sequences, in memory that lasts as long as the pass."""
        tokens = self._last_tokens.get(places)
        if tokens is None:
            tokens = torch.tensor(places)
            if self.tokens is not None:
                tokens = self.tokens[tokens]
            self._last_tokens[places] = tokens
        return tokens

    def _copy(self, tensor: Tensor, at: int) -> tuple[Tensor, RowChange] | None:
        """The rows that are shown, and the change that copies them; None: it cannot be said."""
        if tensor.dtype not in TYPES or not len(tensor) or not tensor[0].is_contiguous():
            return None
        tokens = self.tokens
        count = len(tensor) if tokens is None else len(tokens)
        target = tensor.new_empty((count, *tensor.shape[1:]))
        change = RowChange(
            at=at,
            rows=tensor.data_ptr(),
            count=count,
            stride=tensor.stride(0),
            width=tensor[0].numel(),
            type=TYPES[tensor.dtype],
            op=TAKE,
            target=target.data_ptr(),
            tokens=None if tokens is None else tokens.data_ptr(),
        )
        return target, change

    def show(self, call: FinishedCall) -> None:
        """See PassObserver. Attention is shown in the end: its keys are in the cache then."""
        self._show_taken()
        if (edit := self._edit_of(call)) is not None:
            made = call.tensors[-1]
            edit.apply(made.view(-1, made.shape[-1]))
        if (change := self._attention_change(call)) is not None:
            change(call)
        if "side" in call.options or not self.observes:
            return
        tensors = call.tensors
        if self.tokens is not None:
            tensors = [each[self.tokens] for each in tensors]
        elif call.cached is not None:
            tensors = [each.clone() for each in tensors]
        self._show(call, tensors)

    def _show_taken(self) -> None:
        for call, tensors in self._taken:
            self._show(call, tensors)
        self._taken = []

    def _show(self, call: FinishedCall, tensors: list[Tensor]) -> None:
        x, *others = tensors
        if call.cached is None:
            results = tuple(others) if call.options["is_tuple"] else others[0]
            call_hooks(call.module, x, results)
        else:
            self._attended.append((call, x, others[0]))

    def _attention_change(self, call: FinishedCall) -> Callable[[FinishedCall], None] | None:
        if not self.attention or call.cached is None:
            return None
        return self.attention.get(attention_key(call))

    def _edit_of(self, point: HookPoint | FinishedCall) -> RowEdit | None:
        if not self.edits or point.cached:
            return None
        return self.edits.get((point.module, point.options.get("side", "out")))

    def finish(self) -> None:
        """See PassObserver."""
        self._show_taken()
        if not self._attended:
            return
        starts = self.positions.view(-1)
        if self.tokens is not None:
            starts = starts[self.tokens]
        for call, query, output in self._attended:
            assert call.cached is not None
            key, value = (
                self._cached(index, len(query), sizes.shape[3])
                for index, sizes in zip(call.cached, (query, output), strict=True)
            )
            mask = CausalRows(self.library, starts, call.options["window"])
            if call.options.get("is_own"):
                _show_weights(call, query, key, mask)
                continue
            tensors = query, key, value, output
            replay_attention(call.module, tensors, mask, call.options["options"])

    def _cached(self, index: int, count: int, size: int) -> Tensor:
        """The keys or values (count, G, length, size) of the rows; one call of torch."""
        rows = self.cache[index]
        strides = rows.stride()
        shape = count, rows.shape[1], self.length, min(size, rows.shape[3])
        return rows.as_strided(shape, strides, rows.storage_offset() + self.first * strides[0])


def _show_weights(call: FinishedCall, query: Tensor, key: Tensor, mask: CausalRows) -> None:
    """Call the hooks of a module that computes weights itself, with the weights (B, H, T, S)."""
    slopes = [*call.options["slopes"].values()]
    options = {
        "scaling": call.options["scaling"],
        "slopes": torch.tensor(slopes) if slopes else None,
    }
    queries = range(query.shape[2])
    rows = [attention_probs(mask, query, key, i, queries, options)[0] for i in range(len(query))]
    call_hooks(call.module, query, torch.stack(rows))


def call_hooks(module: nn.Module, stream: Tensor, result: Any) -> None:
    """Call a module's hooks, as a call of it would, with a result that is computed already."""
    for number, before in list(module._forward_pre_hooks.items()):
        with_kwargs = number in module._forward_pre_hooks_with_kwargs
        before(module, (stream,), *([{}] if with_kwargs else []))
    for number, after in list(module._forward_hooks.items()):
        with_kwargs = number in module._forward_hooks_with_kwargs
        after(module, (stream,), *([{}] if with_kwargs else []), result)


@contextmanager
def forward_returning(module: nn.Module, result: Any) -> Iterator[None]:
    """Let the module return ``result`` for any arguments, within the block."""
    own = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: result
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
