"""The modules whose hooks see the attention weights that a model computes itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

_running: ContextVar[list[nn.Module]] = ContextVar("running")


@contextmanager
def following(model: nn.Module) -> Iterator[None]:
    """While it lasts, recorded attention knows the modules that compute it."""
    running: list[nn.Module] = []
    token = _running.set(running)
    handles = []
    for module in model.modules():
        if any(True for _ in module.children()):
            handles.append(module.register_forward_pre_hook(lambda m, _: running.append(m)))
            handles.append(module.register_forward_hook(lambda *_: _left(running)))
    try:
        yield
    finally:
        _running.reset(token)
        for handle in handles:
            handle.remove()


def _left(running: list[nn.Module]) -> None:
    running.pop()


def weight_modules() -> list[nn.Module]:
    """Modules that see or return the weights of the attention that is computed now.

    The running ones from the layer on, and such as a softmax or a dropout in the last of them.
    """
    running = _running.get([])
    if not running:
        return []
    layers = [i for i, each in enumerate(running[:-1]) if _is_layer(each, running[:i])]
    own = running[layers[-1] + 1 :] if layers else running[-1:]
    functions = [m for m in running[-1].children() if next(m.parameters(), None) is None]
    return own + functions


def _is_layer(module: nn.Module, outer: list[nn.Module]) -> bool:
    lists = (m for each in outer[-1:] for m in each.children() if isinstance(m, nn.ModuleList))
    return any(module is each for one in lists for each in one)
