"""Models with recurrent layers on the kernels: prompts by the model's modules, steps recorded.

A prompt is a scan over its tokens, which each family writes in its own way; it runs as the model
has it, with products and attention by the kernels. A decode step is the same for every token, so
that it is recorded as that of any other model, with the states of its rows. Where it cannot be, it
runs by the modules too.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.batch import Batch
from transformers_api.engine.kv_cache import MIN_LENGTH
from transformers_api.engine.native.latent import expanding_into
from transformers_api.engine.native.runner import SIZES, Kind, NativeRunner, inputs_of
from transformers_api.engine.native.state_cache import NativeStateCache
from transformers_api.engine.rope import fixed_factors
from transformers_api.engine.runners.adapted_modules import adapted
from transformers_api.engine.runners.edited_attention import (
    current_attention_edits,
    edited_model,
    unedited_attention,
)
from transformers_api.engine.runners.edited_modules import current_edits
from transformers_api.kernels.modules.attention import CausalRows, describing

log = logging.getLogger(__name__)
SHORT = [1, 2, 3]  # tokens of a prompt after which steps are recorded


class NativeStateRunner(NativeRunner):
    """Runs a packed model with recurrent layers."""

    cache: NativeStateCache
    mixes = False

    def __init__(self, model: Any, cache: Any, vocab_size: int, kind: Kind, *_: Any) -> None:
        super().__init__(model, cache, vocab_size, kind)
        names = inspect.signature(model.forward).parameters
        if "past_key_values" not in names:
            self.cache_name = "cache_params"  # Mamba's name for it
        self.takes_positions = "position_ids" in names

    @property
    def failure(self) -> str:
        """None: what cannot be recorded runs by the modules."""
        return ""

    def learn(self, until_packed: Callable[[], object] = lambda: None) -> None:
        """See NativeRunner. Prompts are read by the model's modules, which need the weights."""
        until_packed()
        cache = self.cache.scratch(max(SIZES), MIN_LENGTH)
        for row in range(max(SIZES)):
            self._read_prompt(SHORT, row, 1, cache)
        self.cache.shaped_like(cache)
        inputs = [inputs_of([1] * size, [3] * size, list(range(size))) for size in SIZES]
        with fixed_factors(self.model, False):
            self._compute(inputs[0], cache)
        self._learn_steps(inputs, cache)
        if not self.layers.is_ready:
            log.info("%s: its steps are not recorded", type(self.model).__name__)

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        first = batch.sequences[0]
        if not first.num_cached:
            (ids,) = batch.ids
            with adapted(self.model, batch.adapters):
                logits = self._read_prompt(ids, first.slot, keep, self.cache)
            return logits[..., : self.vocab_size]
        if self.layers.is_ready:
            return super().forward(batch, keep)
        starts = [seq.num_cached for seq in batch.sequences]
        inputs = inputs_of(
            [token for (token,) in batch.ids], starts, [seq.slot for seq in batch.sequences]
        )
        with adapted(self.model, batch.adapters):
            return self._compute(inputs, self.cache, max(starts) + 1)[..., : self.vocab_size]

    def read(
        self, ids: Sequence[int], start: int = 0, keep: int = 1, is_long: bool = False
    ) -> Tensor:
        """See NativeRunner."""
        if not start:
            return self._read_prompt(list(ids), 0, keep, self.cache)[
                0, :, : self.vocab_size
            ].clone()
        return super().read(ids, start, keep)

    def _read_prompt(self, ids: list[int], row: int, keep: int, cache: NativeStateCache) -> Tensor:
        """Logits (1, keep, V) of a whole prompt, by the model's modules."""
        length = len(ids)
        cache.begin_prompt(row, length)
        positions = torch.arange(length)[None]
        return self._run(torch.tensor([ids]), positions, cache, keep)[:, -keep:].float()

    def _compute(self, inputs: list[Tensor], cache: Any, context: int | None = None) -> Tensor:
        """Logits (N, 1, V) of a token of each row."""
        ids, positions, cache_rows = inputs
        cache.begin_step(positions[:, 0], cache_rows, cache.length if context is None else context)
        # before the recording of the layers ends
        handle = self.model.base_model.register_forward_hook(
            lambda *_: cache.end_step(), prepend=True
        )
        try:
            return self._run(ids, positions, cache, 1)
        finally:
            handle.remove()

    def _run(self, ids: Tensor, positions: Tensor, cache: NativeStateCache, keep: int) -> Tensor:
        built = self.masks.build(positions, cache.context)
        masks = built if isinstance(built, dict) else {} if built is None else {"": built}
        described = [
            (
                mask,
                CausalRows(cache.library, cache.starts, self.masks.windows[kind], cache.cache_rows),
            )
            for kind, mask in masks.items()
        ]
        hooks = edited_model(self.model, current_edits(), current_attention_edits())
        # what is current already is not applied twice
        with describing(described), expanding_into(cache), unedited_attention(), hooks:
            logits: Tensor = self.model(
                input_ids=ids,
                attention_mask=built,
                use_cache=True,
                return_dict=True,
                **{self.cache_name: cache},
                **({"position_ids": positions} if self.takes_positions else {}),
                **({"logits_to_keep": keep} if self._takes_keep else {}),
            ).logits
        return logits
