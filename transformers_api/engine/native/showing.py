"""A pass that runs natively, shown to whoever has hooks in the model or wraps its attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from transformers_api.engine.model_runner import MaskBuilder
from transformers_api.engine.native.attention import NAME, native_attention, show_attention
from transformers_api.engine.native.layout import View
from transformers_api.engine.native.program import Seen


class Showing:
    """One pass over ``positions`` (B, T), whose rows of the ``cache`` begin with ``first``.

    Meets ``program.Watch``. Who wraps the attention function may say which layers it ``wants``.
    """

    def __init__(
        self, masks: MaskBuilder, positions: Tensor, cache: list[Tensor], first: int
    ) -> None:
        self.masks = masks
        self.positions = positions
        self.cache = cache
        self.rows = slice(first, first + len(positions))
        self._by_window: dict[int, Tensor] = {}

    def wants(self, view: View) -> bool:
        """See Watch."""
        if view.cached is None:
            return bool(view.module._forward_hooks or view.module._forward_pre_hooks)
        function = ALL_ATTENTION_FUNCTIONS[NAME]
        wants = getattr(function, "wants", None)
        return wants(view.module) if wants else function is not native_attention

    def show(self, seen: Seen) -> None:
        """See Watch."""
        if seen.cached is None:
            stream, made = seen.tensors
            pass_through(seen.module, stream, (made,) if seen.options["is_tuple"] else made)
            return
        count = int(self.positions.max()) + 1
        key, value = (self.cache[index][self.rows, :, :count] for index in seen.cached)
        query, output = seen.tensors
        mask = self._mask(seen.options["window"], count)
        show_attention(seen.module, (query, key, value, output), mask, seen.options["options"])

    def _mask(self, window: int, count: int) -> Tensor:
        if not self._by_window:
            built = self.masks.build(self.positions, count)
            masks = built if isinstance(built, dict) else {"": built}
            self._by_window = {self.masks.windows[kind]: mask for kind, mask in masks.items()}
        return self._by_window[window]


def pass_through(module: nn.Module, stream: Tensor, made: Any) -> None:
    """Call a module, and with it its hooks, for what has been computed."""
    own = vars(module).get("forward")
    module.forward = lambda *_args, **_kwargs: made
    try:
        module(stream)
    finally:
        del module.forward
        if own is not None:
            module.forward = own
