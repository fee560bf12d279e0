"""Models are made on ``meta``, as shapes without numbers, before their weights are there."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch._meta_registrations as registrations
from torch.overrides import TorchFunctionMode


class ShapesOnly(TorchFunctionMode):
    """While it lasts, tensors on ``meta`` can do what they could if torch were imported whole.

    Most of it they can without (``lazy_torch.py``); an operation that needs more gets all.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """See TorchFunctionMode."""
        kwargs = kwargs or {}
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            if type(registrations) is ModuleType:  # nothing was left out
                raise
            _ = registrations.activate_meta  # the first name that is used imports it
            return func(*args, **kwargs)
