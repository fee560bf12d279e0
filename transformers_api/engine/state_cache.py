"""A slot cache for models with recurrent layers, each row of which has a state of fixed size.

transformers' recurrent layers (Mamba, gated delta rules, short convolutions) keep the end of a
convolution's input and the state of a recurrence. Here the states of all slots lie in one tensor,
and a pass sees those of its rows as a view, which it changes in place. A state says all about the
tokens before it and cannot be cut: prompts are read in one pass, and prefixes are not shared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin

from transformers_api.engine.kv_cache import SlotCache, SlotLayer

States = dict[int, Tensor]


class StateLayer(LinearAttentionCacheLayerMixin):
    """The states of one layer for all slots: (rows, …) each. ``count``: of each kind."""

    def __init__(self, cache: StateCache, count: int = 1) -> None:
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=count)
        self.cache = cache
        self.conv_rows: States = {}
        self.recurrent_rows: States = {}

    @property
    def all_rows(self) -> list[Tensor]:
        """The tensors with the states of all rows."""
        return [*self.conv_rows.values(), *self.recurrent_rows.values()]

    def aim_states(self, window: slice, *, is_fresh: bool) -> None:
        """Show the next forward these rows; nothing where it begins sequences."""
        for index in range(self.number_of_states):
            for rows, current in self._kinds:
                current[index] = rows[index][window] if index in rows and not is_fresh else None
            self.has_previous_state[index] = not is_fresh

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **_: Any
    ) -> Tensor:
        """Take new columns (B, C, T) in; the columns so far, with these at the end."""
        rows = self.conv_rows.get(state_idx)
        size = rows.shape[-1] if rows is not None else conv_kernel_size or conv_states.shape[-1]
        if self.has_previous_state[state_idx]:
            assert rows is not None
            whole = torch.cat([rows[self.cache.window], conv_states], dim=-1)
        else:
            missing = max(size - conv_states.shape[-1], 0)
            whole = functional.pad(conv_states, (missing, 0))
        self.has_previous_state[state_idx] = True
        self._write(self.conv_rows, self.conv_states, state_idx, whole[..., -size:])
        return whole

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **_: Any
    ) -> Tensor:
        """Take new states (B, …) in."""
        self._write(self.recurrent_rows, self.recurrent_states, state_idx, recurrent_states)
        return self.recurrent_states[state_idx]  # type: ignore[return-value]

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the first states bring their shape."""

    def grow(self) -> None:
        """Make room for all rows that there are now."""
        for rows, _ in self._kinds:
            for index, old in rows.items():
                if (room := self.cache.state_room(old)) > len(old):
                    rows[index] = torch.cat([old, old.new_zeros(room - len(old), *old.shape[1:])])

    @property
    def _kinds(self) -> list[tuple[States, dict[int, Tensor | None]]]:
        return [
            (self.conv_rows, self.conv_states),
            (self.recurrent_rows, self.recurrent_states),
        ]

    def _write(
        self, rows: States, current: dict[int, Tensor | None], index: int, states: Tensor
    ) -> None:
        if index not in rows:
            rows[index] = states.new_zeros((self.cache.state_room(states), *states.shape[1:]))
        own = rows[index][self.cache.window]
        own.copy_(states)
        current[index] = own


class MixedLayer(StateLayer, SlotLayer):  # type: ignore[override, misc]
    """A layer with both: attention beside a recurrence."""

    def __init__(self, cache: StateCache, count: int = 1) -> None:
        SlotLayer.__init__(self, cache)  # type: ignore[no-untyped-call]
        StateLayer.__init__(self, cache, count)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """See SlotLayer."""
        SlotLayer.lazy_initialization(self, *args, **kwargs)


class StateCache(SlotCache):
    """A SlotCache some of whose layers have states. ``kinds``: see ``layer_kinds``."""

    reuses_prefixes = False
    in_pieces = False
    attention_layer: type[SlotLayer] = SlotLayer
    state_layer: type[StateLayer] = StateLayer
    mixed_layer: type[MixedLayer] = MixedLayer

    def __init__(self, kinds: Sequence[tuple[str, int]], max_rows: int, max_length: int) -> None:
        SlotCache.__init__(self, 0, max_rows, max_length)
        self.kinds = kinds
        self.states: list[StateLayer] = []
        self.slots = []
        layers: list[Any] = []
        for kind, count in kinds:
            layer: Any = DummyLayer()  # type: ignore[no-untyped-call]
            if kind == "attention":
                layer = self.attention_layer(self)
            elif kind != "none":
                layer = (self.state_layer if kind == "state" else self.mixed_layer)(self, count)
                self.states.append(layer)
            if isinstance(layer, SlotLayer):
                self.slots.append(layer)
            layers.append(layer)
        self.layers = layers

    @property
    def bytes(self) -> int:
        """See SlotCache."""
        return super().bytes + self.rows * self.state_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of a row; 0 before the first forward."""
        return sum(each[0].nbytes for layer in self.states for each in layer.all_rows)

    def set_budget(self, budget_bytes: int) -> int:
        """See SlotCache. States take half of it at most, and there is always one row."""
        rows = budget_bytes // 2 // max(self.state_bytes, 1)
        self.max_rows = max(1, min(self.max_rows, rows))
        return super().set_budget(budget_bytes - self.max_rows * self.state_bytes)

    def aim_states(self, *, is_fresh: bool) -> None:
        """Aim the next forward's states at the rows that it is bound to; see StateLayer."""
        for layer in self.states:
            layer.aim_states(self.window, is_fresh=is_fresh)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0, as that of SlotLayer."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """See SlotLayer."""
        return self.context, 0

    def swap(self, a: int, b: int, length: int) -> None:
        """Exchange two rows."""
        super().swap(a, b, length)
        for rows in self.state_rows:
            spare_row = rows[a].clone()
            rows[a] = rows[b]
            rows[b] = spare_row

    def wipe(self, row: int) -> None:
        """Zero a row."""
        super().wipe(row)
        for rows in self.state_rows:
            rows[row].zero_()

    def clear(self) -> None:
        """Let the memory go."""
        super().clear()
        for layer in self.states:
            layer.aim_states(slice(0, 0), is_fresh=True)
            layer.conv_rows, layer.recurrent_rows = {}, {}

    @property
    def state_rows(self) -> list[Tensor]:
        """The states of all rows, layer by layer."""
        return [rows for layer in self.states for rows in layer.all_rows]

    def state_room(self, like: Tensor) -> int:
        """Rows of states to have memory for: on a CPU all, as the system gives what is written."""
        return self.max_rows if like.device.type == "cpu" else self.rows

    def room_for(self, rows: int) -> int:
        """See SlotCache."""
        return super().room_for(rows) if self._shaped else rows

    def _resize(self, rows: int, length: int, prefixes: Mapping[int, int] | None) -> None:
        super()._resize(rows, length, prefixes)
        for layer in self.states:
            layer.grow()
