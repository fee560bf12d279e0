"""The slot cache of models with recurrent layers, as the kernels write and read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.native.kv_cache import NativeCache, NativeLayer
from transformers_api.engine.state_cache import MixedLayer, StateCache, StateLayer
from transformers_api.kernels.abi import Library
from transformers_api.kernels.modules.attention import read_cache, write_cache


class NativeStateLayer(StateLayer):
    """A StateLayer whose decode steps copy states of any rows, and write them back."""

    cache: NativeStateCache

    def copy_in(self) -> None:
        """Show the next forward copies of the states of the bound rows."""
        cache = self.cache
        for rows, current in self._kinds:
            for index, each in rows.items():
                current[index] = read_cache(cache.library, each, cache.cache_rows)
        self.has_previous_state = dict.fromkeys(range(self.number_of_states), True)

    def write_back(self) -> None:
        """Write what the forward has made of the copies."""
        cache = self.cache
        for rows, current in self._kinds:
            for index, each in rows.items():
                made = current[index]
                assert made is not None
                flat = made.reshape(len(made), 1, 1, -1)
                write_cache(cache.library, flat, _flat(each), None, cache.cache_rows)
                current[index] = None

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """See StateLayer."""
        if not self.cache.is_step:
            return super().update_conv_state(conv_states, state_idx, conv_kernel_size)
        current = self.conv_states[state_idx]
        assert current is not None
        whole = torch.cat([current, conv_states], dim=-1)
        self.conv_states[state_idx] = whole[..., -current.shape[-1] :]
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """See StateLayer."""
        if not self.cache.is_step:
            return super().update_recurrent_state(recurrent_states, state_idx)
        self.recurrent_states[state_idx] = recurrent_states
        return recurrent_states


class NativeMixedLayer(  # type: ignore[no-untyped-call, override]
    NativeStateLayer, MixedLayer, NativeLayer
):
    """A layer with both, on the kernels."""

    cache: NativeStateCache

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See NativeLayer."""
        return NativeLayer.update(self, *args, **kwargs)


class NativeStateCache(StateCache, NativeCache):
    """A StateCache whose keys and values are those of a NativeCache; states are float32.

    A pass is either the whole prompt of one row or, where ``is_step``, a token of each of some
    rows. The states of a layer are copied when it asks for them, and written back when the next one
    does.
    """

    attention_layer = NativeLayer
    state_layer = NativeStateLayer
    mixed_layer = NativeMixedLayer

    def __init__(
        self,
        library: Library,
        kinds: Sequence[tuple[str, int]],
        max_rows: int,
        max_length: int,
        dtype: torch.dtype,
        latent: frozenset[int] = frozenset(),
        holds_codes: bool = False,
    ) -> None:
        self.library, self.dtype, self.holds_codes = library, dtype, holds_codes
        self.starts = self.cache_rows = torch.zeros(0, dtype=torch.int64)
        self._most = max_rows, max_length
        StateCache.__init__(self, kinds, max_rows, max_length)
        self.latent = latent
        for index in latent:
            layer: Any = self.layers[index]
            layer.is_latent = True
        self.is_step = False
        self._active: NativeStateLayer | None = None

    def begin_prompt(self, row: int, length: int) -> None:
        """Aim the next forward at a row, from its beginning on."""
        self.is_step, self.window, self.context = False, slice(row, row + 1), length
        self.starts = self.cache_rows = torch.zeros(1, dtype=torch.int64)
        self.aim_states(is_fresh=True)

    def begin_step(self, starts: Tensor, cache_rows: Tensor, context: int) -> None:
        """Aim the next forward at a token of each of these rows."""
        self.is_step, self._active = True, None
        self.bind_rows(starts, cache_rows, context)

    def end_step(self) -> None:
        """Write back the states of the last layer."""
        if self._active is not None:
            self._active.write_back()
        self._active = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """See transformers' Cache."""
        self._activate(layer_idx)
        return super().get_conv_state(layer_idx, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """See transformers' Cache."""
        self._activate(layer_idx)
        return super().get_recurrent_state(layer_idx, state_idx)

    @property
    def tensors(self) -> list[Tensor]:
        """See NativeCache; and the states of all rows as (rows, 1, 1, size)."""
        if self.slots and not self.slots[0].is_initialized:
            self.allocate()
        kv = [rows for layer in self.slots for rows in layer.rows]
        return [*kv, *map(_flat, self.state_rows)]

    def scratch(self, rows: int, length: int) -> NativeStateCache:
        """See NativeCache."""
        sizes = self.kinds, rows, length
        made = NativeStateCache(self.library, *sizes, self.dtype, self.latent, self.holds_codes)
        made.reserve(rows, length)
        return made

    def _activate(self, index: int) -> None:
        layer = self.layers[index]
        assert isinstance(layer, NativeStateLayer)
        if self.is_step and layer is not self._active:
            self.end_step()
            layer.copy_in()
            self._active = layer


def _flat(rows: Tensor) -> Tensor:
    return rows.view(len(rows), 1, 1, -1)
