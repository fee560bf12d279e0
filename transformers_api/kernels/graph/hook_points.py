"""The hook points of a plan, indexed once: every step that is observed or edited looks them up."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from transformers_api.kernels.graph.planner import HookPoint

INPUTS = "inputs"  # the side of attention where its queries, keys and values are about to be read


class HookPoints:
    """Hook points in the order of the pass, by who may stop there."""

    def __init__(self, points: Sequence[HookPoint]) -> None:
        self._points = points
        self._edited: dict[tuple[nn.Module, str], list[int]] = {}  # by module and side
        self._attention: dict[Any, list[int]] = {}  # by layer, or the module that makes weights
        self._layers: set[Any] = set()  # whose attention is shown by its function
        self._hooked: list[tuple[int, Any, Any]] = []  # and the hooks of the module, if any
        for place, point in enumerate(points):
            if not point.cached:
                side = point.options.get("side", "out")
                self._edited.setdefault((point.module, side), []).append(place)
            if point.cached:
                self._attention.setdefault(attention_key(point), []).append(place)
                if not (point.options.get("is_own") or "side" in point.options):
                    self._layers.add(attention_key(point))
            if "side" not in point.options and (not point.cached or point.options.get("is_own")):
                module = point.module
                hooks = module._forward_hooks, module._forward_pre_hooks
                self._hooked.append((place, *hooks))

    def chosen(
        self,
        edited: Iterable[tuple[nn.Module, str]],
        attention: Iterable[Any],
        observes: bool,
        layers: Collection[int] | None,
    ) -> list[HookPoint]:
        """The points of ``edited`` modules and sides, and where it ``observes`` those observed.

        ``attention``: where it is edited, see ``attention_key``. It is observed in these ``layers``
        (None: in all), other modules where they have hooks.
        """
        places = {place for key in edited for place in self._edited.get(key, ())}
        for key in attention:
            places.update(self._attention.get(key, ()))
        if observes:
            for layer in self._layers if layers is None else layers:
                places.update(self._attention.get(layer, ()))
            places.update([place for place, after, before in self._hooked if after or before])
        return [self._points[place] for place in sorted(places)]


def attention_key(point: Any) -> Any:
    """The index of the layer that attends; the module, where it computes weights itself.

    Before it does so, (INPUTS, the index).
    """
    if point.options.get("is_own"):
        return point.module
    layer = getattr(point.module, "layer_idx", None)
    return (INPUTS, layer) if "side" in point.options else layer
