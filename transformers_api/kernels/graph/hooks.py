"""Hooks of modules and wrapped attention functions, replayed for a pass that runs natively."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from transformers_api.kernels.abi import Library
from transformers_api.kernels.graph.executor import FinishedCall
from transformers_api.kernels.graph.planner import HookPoint
from transformers_api.kernels.modules.attention import CausalRows, replay_attention

_observed: ContextVar[Collection[int] | None] = ContextVar("observed", default=())


@contextmanager
def observing(layers: Collection[int] | None) -> Iterator[None]:
    """Let passes show the attention of these layers, within the block; None: of all."""
    token = _observed.set(layers)
    try:
        yield
    finally:
        _observed.reset(token)


class HookReplay:
    """A PassObserver of sequences at the positions ``starts`` (B,) that end before ``length``.

    ``first``: the row of the ``cache`` that belongs to the first sequence. Attention is shown of
    the layers that are observed (see ``observing``), other modules where they have hooks.

    Between two parts of a pass the weights have driven everything else from the caches, and a call
    of torch takes fifty microseconds: few are made.
    """

    def __init__(
        self, library: Library, starts: Tensor, length: int, cache: list[Tensor], first: int
    ) -> None:
        self.library = library
        self.starts = starts
        self.cache = cache
        self.rows = slice(first, first + len(starts))
        self.positions = slice(length)

    def choose(self, points: Sequence[HookPoint]) -> list[HookPoint]:
        """See PassObserver."""
        layers = _observed.get()
        return [
            point
            for point in points
            if (
                layers is None or getattr(point.module, "layer_idx", None) in layers
                if point.cached
                else point.module._forward_hooks or point.module._forward_pre_hooks
            )
        ]

    def show(self, call: FinishedCall) -> None:
        """See PassObserver."""
        if call.cached is None:
            stream, *results = call.tensors
            call_hooks(
                call.module, stream, tuple(results) if call.options["is_tuple"] else results[0]
            )
            return
        key, value = (self.cache[index][self.rows, :, self.positions] for index in call.cached)
        query, output = call.tensors
        key, value = key[..., : query.shape[3]], value[..., : output.shape[3]]
        mask = CausalRows(self.library, self.starts, call.options["window"])
        replay_attention(call.module, (query, key, value, output), mask, call.options["options"])


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
