"""A batch in, logits out: the only place that turns sequences into tensors and calls the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from transformers_api.engine.batch import Batch
from transformers_api.engine.kv_cache import SlotCache
from transformers_api.engine.positions import at_positions
from transformers_api.engine.rope import sequence_length
from transformers_api.engine.runners.adapted_modules import AdaptsModules, adapted
from transformers_api.engine.scheduler import SlotStore
from transformers_api.engine.sequence import Sequence


class Runner(Protocol):
    """The runner that ``BatchingEngine`` drives; wrappers that observe are the same outside."""

    @property
    def cache(self) -> SlotStore:
        """The rows behind the slots."""
        ...

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """Read the batch's new tokens; logits (E, keep, V) float32 of the last ``keep``.

        Of the E sequences that end with them, or of all where none does, and only a sequence alone
        may ask for more than its last one's. They last until the next forward.
        """
        ...

    def clear(self) -> None:
        """After a failed forward: nothing in the cache may be used again."""
        ...


class ModelRunner(AdaptsModules):
    """Runs an unmodified transformers model over the slot cache, with explicit positions and masks.

    ``vocab_size``: logits of ids that the tokenizer lacks are cut off. ``original_window``: tokens
    of a sequence beyond which the model's rope takes other factors; see ``rope.py``.
    """

    mode = "batching"
    mixes = False  # reads prompts and the tokens of running answers in one pass
    original_window: int | None = None
    cache_name = "past_key_values"
    takes_positions = True

    def __init__(self, model: Any, cache: SlotCache, vocab_size: int) -> None:
        self.model = model
        self.cache = cache
        self.vocab_size = vocab_size
        self.device = model.device
        self.masks = MaskBuilder(model)
        self._takes_keep = bool(model._supports_logits_to_keep())

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        starts = [seq.num_cached for seq in batch.sequences]
        context = max(starts) + batch.width
        positions = torch.tensor(starts)[:, None] + torch.arange(batch.width)  # (B, T)
        positions = positions.to(self.device)
        self.bind(batch, positions, context)
        with (
            sequence_length(self._length(batch)),
            at_positions(positions),
            adapted(self.model, batch.adapters),
        ):
            output = self.model(
                input_ids=torch.tensor(batch.ids, device=self.device),
                attention_mask=self.masks.build(positions, context),
                use_cache=True,
                **{self.cache_name: self.cache},
                **({"position_ids": positions} if self.takes_positions else {}),
                return_dict=True,
                **({"logits_to_keep": keep} if self._takes_keep else {}),
            )
        return _last(output.logits, keep, self.vocab_size)

    def bind(self, batch: Batch, positions: Tensor, context: int) -> None:
        """Aim the next forward of the model at the rows of a batch."""
        self.cache.bind(batch.first_slot, positions, context)

    def clear(self) -> None:
        """See Runner."""
        self.cache.clear()

    def _length(self, batch: Batch) -> int | None:
        """A length whose factors the sequences of a batch take, which are of one kind."""
        if self.original_window is None:
            return None
        return self.original_window + batch.sequences[0].is_long


# Kinds of layers: those whose attention takes the mask of another kind, and those without any.
MASKS = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
WITHOUT_MASK = {"linear_attention", "conv", "moe", "mlp"}


class MaskBuilder:
    """Causal masks (B, 1, T, S) for rows at different positions, windows included.

    transformers takes a 4-D mask as it is, so a sliding window has to be in it; a model that mixes
    kinds of layers takes one mask per kind. ``windows``: tokens of each, see ``CausalRows``.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        window = getattr(config, "sliding_window", None) or 0
        chunk = getattr(config, "attention_chunk_size", None) or 0
        windows = {"sliding_attention": window, "chunked_attention": -chunk}
        kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
        attention = {kind: MASKS.get(kind, kind) for kind in kinds if kind not in WITHOUT_MASK}
        names = list(dict.fromkeys(attention.values()))
        if len(names) > 1:
            self.windows = {name: windows.get(name, 0) for name in names}
        elif kinds and not names:
            self.windows = {}
        else:
            self.windows = {"": windows.get(names[0], 0) if names else window}
        additive = config._attn_implementation == "eager"  # eager adds masks, sdpa selects by them
        self.additive_dtype = model.dtype if additive else None

    def build(self, positions: Tensor, context: int) -> Tensor | dict[str, Tensor] | None:
        """The mask for ``positions`` (B, T) over the first ``context`` cached tokens.

        None for a model without attention.
        """
        keys = torch.arange(context, device=positions.device)
        distance = positions[:, None, :, None] - keys  # (B, 1, T, S)
        starts = positions[:, None, :, None]
        masks = {
            kind: self._mask(distance, starts, window) for kind, window in self.windows.items()
        }
        return masks.get("", masks) if masks else None

    def _mask(self, distance: Tensor, positions: Tensor, window: int) -> Tensor:
        visible = distance >= 0
        if window > 0:
            visible &= distance < window
        elif window < 0:
            visible &= distance <= positions % -window
        if self.additive_dtype is None:
            return visible
        hidden = torch.finfo(self.additive_dtype).min
        mask = torch.zeros(visible.shape, dtype=self.additive_dtype, device=visible.device)
        return mask.masked_fill(~visible, hidden)


def innermost(runner: Any) -> Any:
    """The runner behind those that only add something."""
    while hasattr(runner, "inner"):
        runner = runner.inner
    return runner


class OneRow:
    """The slot of a runner that keeps its own state and serves one sequence at a time."""

    reuses_prefixes = False
    in_pieces = True

    bytes = 0
    token_bytes = 0
    budget_bytes = 0

    def reserve(
        self, rows: int, length: int, prefixes: Mapping[int, int] | None = None
    ) -> tuple[int, int] | None:
        """One row of any length."""
        return (1, length) if rows == 1 else None

    def copy(self, src: int, dst: int, length: int) -> None:
        """Never asked for: there is one row."""

    def swap(self, a: int, b: int, length: int) -> None:
        """Never asked for: there is one row."""

    def wipe(self, row: int) -> None:
        """The next sequence begins with a state of its own."""


class SequentialRunner(AdaptsModules):
    """One sequence at a time, as ``generate`` would run it: for models that cannot share a batch.

    Recurrent and linear-attention models keep a state of their own kind; others attend without
    transformers' attention interface. The model's own ``prepare_inputs_for_generation`` knows. With
    ``recompute`` every step reads the whole sequence again: for models without a cache.
    """

    mode = "sequential"
    mixes = False
    original_window: int | None = None  # generate()'s own rule holds

    def __init__(self, model: Any, vocab_size: int, recompute: bool = False) -> None:
        self.model = model
        self.cache = OneRow()
        self.vocab_size = vocab_size
        self.recompute = recompute
        self._takes_keep = bool(model._supports_logits_to_keep())
        self._sequence: Sequence | None = None
        self._state: dict[str, Any] = {}

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        (seq,) = batch.sequences
        read = seq.cached + seq.upcoming(batch.width)
        ids = torch.tensor([read], device=self.model.device)
        with adapted(self.model, [seq.adapter]):
            if self.recompute:
                logits = self.model(input_ids=ids, use_cache=False, return_dict=True).logits
            else:
                positions = torch.arange(seq.num_cached, len(read), device=ids.device)[None]
                with at_positions(positions):
                    logits = self._continue(seq, ids, batch.width, keep)
        return _last(logits, keep, self.vocab_size)

    def clear(self) -> None:
        """See Runner."""
        self._sequence, self._state = None, {}

    def _continue(self, seq: Sequence, ids: Tensor, width: int, keep: int) -> Tensor:
        starts = seq is not self._sequence or not seq.num_cached
        if starts:
            self._sequence, self._state = seq, self._fresh_state(ids)
        inputs = self.model.prepare_inputs_for_generation(
            ids,
            next_sequence_length=None if starts else width,
            is_first_iteration=starts,
            **self._state,
        )
        if self._takes_keep:  # some models' own preparation keeps the last token's alone
            inputs["logits_to_keep"] = keep
        output = self.model(**inputs, return_dict=True)
        self._state = self.model._update_model_kwargs_for_generation(output, self._state)
        logits: Tensor = output.logits
        return logits

    def _fresh_state(self, ids: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"use_cache": True, "attention_mask": torch.ones_like(ids)}
        if self.model._supports_default_dynamic_cache():
            name = "cache_params" if "mamba" in type(self.model).__name__.lower() else None
            config = self.model.config.get_text_config(decoder=True)
            state[name or "past_key_values"] = DynamicCache(config=config)
        return state


VerifiedRunner = ModelRunner | SequentialRunner


def _last(logits: Tensor, keep: int, vocab_size: int) -> Tensor:
    return logits[:, -keep:, :vocab_size].float()
