"""Hooks of modules and wrapped attention functions, replayed for a pass that runs natively."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_api.kernels.abi import Library
from transformers_api.kernels.graph.executor import FinishedCall
from transformers_api.kernels.graph.planner import HookPoint
from transformers_api.kernels.modules.attention import (
    NAME,
    CausalRows,
    native_attention,
    replay_attention,
)


class HookReplay:
    """A PassObserver of sequences at the positions ``starts`` (B,) that end before ``length``.

    ``first``: the row of the ``cache`` that belongs to the first sequence. A function that wraps
    the attention may have ``layers``, and is then called for those alone.

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
        function = ALL_ATTENTION_FUNCTIONS[NAME]
        unwrapped = () if function is native_attention else None
        layers = getattr(function, "layers", unwrapped)
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
            stream, output = call.tensors
            call_with_result(call.module, stream, (output,) if call.options["is_tuple"] else output)
            return
        key, value = (self.cache[index][self.rows, :, self.positions] for index in call.cached)
        query, output = call.tensors
        mask = CausalRows(self.library, self.starts, call.options["window"])
        replay_attention(call.module, (query, key, value, output), mask, call.options["options"])


def call_with_result(module: nn.Module, stream: Tensor, result: Any) -> None:
    """Call a module, and so its hooks, with a result that is computed already."""
    with forward_returning(module, result):
        module(stream)


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
