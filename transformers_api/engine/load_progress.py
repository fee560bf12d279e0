"""Progress of a load: weights read and packed, counted while a model is put together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

Report = Callable[[float, str], None]
READ, PACKED = (0.05, 0.45), (0.45, 0.9)  # shares of a load, from and to
NEARLY = 0.99  # weights that are tied or not used make counts uncertain


class LoadProgress:
    """Reports the share of a load, which never goes back. ``total``: weights in the files."""

    def __init__(self, total: int, report: Report) -> None:
        self._total = max(total, 1)
        self._report = report
        self._read = self._packed = 0
        self._share = 0.0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """In the block, and on this thread, each weight and each packed layer counts.

        Layers that are put into a model after its weights, with a matrix of which only the shape
        is left, stand for packed weights.
        """
        from torch.nn.modules import module

        own = threading.get_ident()

        def on_weight(_module: Any, _name: str, weight: Any) -> None:
            if weight is not None and not weight.is_meta and threading.get_ident() == own:
                self.read(weight.numel())

        def on_layer(_module: Any, _name: str, layer: Any) -> None:
            weight: Any = getattr(layer, "weight", None)
            if weight is None or not self._read or threading.get_ident() != own:
                return
            if weight.is_meta:
                self.packed(weight.numel())

        with ExitStack() as hooks:
            register = module.register_module_parameter_registration_hook
            hooks.callback(register(on_weight).remove)
            hooks.callback(module.register_module_module_registration_hook(on_layer).remove)
            yield

    def read(self, weights: int) -> None:
        """So many more weights are in memory."""
        self._read += weights
        self._show(READ, self._read / self._total, "reading the weights")

    def packed(self, weights: int) -> None:
        """So many more have the form that they are computed in."""
        self._packed += weights
        self._show(PACKED, self._packed / self._total, "packing the weights")

    def _show(self, part: tuple[float, float], share: float, text: str) -> None:
        first, last = part
        self._share = max(self._share, first + (last - first) * min(share, 1.0))
        self._report(self._share, "checking the weights" if share > NEARLY else text)
