"""Progress of a load: weights read and packed, counted while a model is put together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

Report = Callable[[float, str], None]
READ, PACKED = (0.05, 0.45), (0.45, 0.9)  # shares of a load, from and to
NEARLY = 0.99  # weights that are tied or not used make counts uncertain


_thread = threading.local()


@contextmanager
def uncounted() -> Iterator[None]:
    """In the block, and on this thread, nothing counts: a model is made, without its weights."""
    _thread.is_uncounted = True
    try:
        yield
    finally:
        _thread.is_uncounted = False


def _counts() -> bool:
    return not getattr(_thread, "is_uncounted", False)


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

        Layers that read their weights from a file count when they are called first. Layers that are
        put into a model after its weights, with a matrix of which only the shape is left, stand for
        packed weights.
        """
        from torch.nn.modules import module

        own = threading.get_ident()
        called = WeakSet[Any]()

        def on_weight(_module: Any, _name: str, weight: Any) -> None:
            if weight is not None and not weight.is_meta and is_counted():
                self.read(weight.numel())

        def on_layer(_module: Any, _name: str, layer: Any) -> None:
            weight: Any = getattr(layer, "weight", None)
            if weight is not None and weight.is_meta and self._read and is_counted():
                self.packed(weight.numel())

        def on_call(layer: Any, _inputs: Any, _output: Any) -> None:
            if hasattr(layer, "source") and layer not in called and is_counted():
                called.add(layer)
                self.read(layer.weight.numel())

        def is_counted() -> bool:
            return _counts() and threading.get_ident() == own

        with ExitStack() as hooks:
            register = module.register_module_parameter_registration_hook
            hooks.callback(register(on_weight).remove)
            hooks.callback(module.register_module_module_registration_hook(on_layer).remove)
            hooks.callback(module.register_module_forward_hook(on_call).remove)
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
