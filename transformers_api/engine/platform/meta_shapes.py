"""Models are made on ``meta``, as shapes without numbers, before their weights are there."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode

from transformers_api.engine.platform.lazy_torch import import_shapes


class ShapesOnly(TorchFunctionMode):
    """While it lasts, tensors on ``meta`` can do what they could if torch were imported whole.

    Most of it they can without (``engine.lean``); whoever wants more gets all.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            if not import_shapes():
                raise
            return func(*args, **kwargs)
