"""Low-rank products beside packed weights, and their tables for recorded passes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from transformers_api.kernels.abi import Library, LowRank, LowRankPart
from transformers_api.kernels.modules.linear import NativeLinear, PackedWeight, multiply
from transformers_api.kernels.modules.weight_memory import WeightMemory


class LowRankPair:
    """The addition to one layer: ``up`` (out, rank) times ``down`` (rank, in), packed.

    ``kind``: float32 or bfloat16, as of a PackedWeight. ``rescaling``: gain and offset (out) that
    the layer's own outputs are multiplied with and added to before.
    """

    def __init__(
        self,
        library: Library,
        down: Tensor,
        up: Tensor,
        kind: str,
        memory: WeightMemory,
        rescaling: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        self.down = PackedWeight(library, [down], kind, memory)
        self.up = PackedWeight(library, [up], kind, memory)
        self.rescaling = rescaling and tuple(each.float().contiguous() for each in rescaling)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the product with ``x`` (…, in): (…, out)."""
        return multiply(self.up, multiply(self.down, x))

    @property
    def nbytes(self) -> int:
        """Bytes of the packed form."""
        own = sum(each.nbytes for each in self.rescaling or ())
        return self.down.nbytes + self.up.nbytes + own


class LowRankTables:
    """A table for each packed weight of a model: what adapters add to its products.

    Their addresses are those of a recorded pass, constant during the tables' life.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: dict[str, tuple[int, int]] = {}  # weight, first output; by the layer's path
        self._tables: dict[int, LowRank] = {}
        self._parts: list[Any] = []  # what the tables point to
        for path, module in model.named_modules(remove_duplicate=False):
            if isinstance(module, NativeLinear):
                weight, sizes = module.joined.weight, module.joined.sizes
                self._places[path] = weight.address, sum(sizes[: module.index])
                self._tables.setdefault(weight.address, LowRank(n=weight.out_features))

    @property
    def addresses(self) -> dict[int, int]:
        """The address of each weight's table, by the weight's."""
        return {weight: ctypes.addressof(table) for weight, table in self._tables.items()}

    def weight_of(self, path: str) -> int | None:
        """The address of a layer's weight; None where it has none that is packed."""
        place = self._places.get(path)
        return None if place is None else place[0]

    def fill(self, adapters: Sequence[Mapping[str, LowRankPair]]) -> None:
        """Let each adapter, by the paths of its layers, have its place in this list as a number."""
        parts: dict[int, list[LowRankPart]] = {}
        for number, adapter in enumerate(adapters):
            for path, pair in adapter.items():
                weight, column = self._places[path]
                part = LowRankPart(pair.down.address, pair.up.address, number, column)
                if pair.rescaling is not None:
                    part.gain, part.offset = (each.data_ptr() for each in pair.rescaling)
                parts.setdefault(weight, []).append(part)
        self._parts = [adapters]
        for weight, table in self._tables.items():
            own = parts.get(weight, [])
            array = (LowRankPart * len(own))(*own)
            self._parts.append(array)
            table.count, table.adapters = len(own), len(adapters)
            table.parts = ctypes.addressof(array)
