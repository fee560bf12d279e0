"""A pass that runs natively, shown to whoever has hooks in the model or wraps its attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_api.kernels.abi import Library
from transformers_api.kernels.graph.executor import Seen
from transformers_api.kernels.graph.planner import View
from transformers_api.kernels.modules.attention import (
    NAME,
    CausalRows,
    native_attention,
    show_attention,
)


class Showing:
    """A pass whose sequences begin at the positions ``starts`` (B,) and end at ``seen`` or before.

    ``first``: the row of the ``cache`` that is the first one's. Meets ``program.Watch``. Who wraps
    the attention function may say which ``layers`` are wanted: of those alone it is told.

    Between two parts of a pass the weights have driven everything else from the caches, and a call
    of torch takes fifty microseconds: few are made.
    """

    def __init__(
        self, library: Library, starts: Tensor, seen: int, cache: list[Tensor], first: int
    ) -> None:
        self.library = library
        self.starts = starts
        self.cache = cache
        self.rows = slice(first, first + len(starts))
        self.seen = slice(seen)

    def wanted(self, views: Sequence[View]) -> list[View]:
        """See Watch."""
        function = ALL_ATTENTION_FUNCTIONS[NAME]
        nobody = () if function is native_attention else None
        layers = getattr(function, "layers", nobody)
        return [
            view
            for view in views
            if (
                layers is None or getattr(view.module, "layer_idx", None) in layers
                if view.cached
                else view.module._forward_hooks or view.module._forward_pre_hooks
            )
        ]

    def show(self, seen: Seen) -> None:
        """See Watch."""
        if seen.cached is None:
            stream, made = seen.tensors
            pass_through(seen.module, stream, (made,) if seen.options["is_tuple"] else made)
            return
        key, value = (self.cache[index][self.rows, :, self.seen] for index in seen.cached)
        query, output = seen.tensors
        mask = CausalRows(self.library, self.starts, seen.options["window"])
        show_attention(seen.module, (query, key, value, output), mask, seen.options["options"])


def pass_through(module: nn.Module, stream: Tensor, made: Any) -> None:
    """Call a module, and with it its hooks, for what has been computed."""
    with returning(module, made):
        module(stream)


@contextmanager
def returning(module: nn.Module, made: Any) -> Iterator[None]:
    """While it lasts, the module returns this whatever it is given."""
    own = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: made
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
