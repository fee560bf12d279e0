"""A batch in, logits out, with the native kernels: forward passes are recorded once, then run.

A pass reads tokens, each a row of its own with its position and its row of the cache: those of
prompts and those of running answers alike. What a token is multiplied by does not depend on the
others, and attention finds the tokens of one sequence together. So one plan runs any mixture, and
a token's bits are the same in all of them. A second plan makes logits of the tokens that need them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from transformers_api.engine.batch import Batch
from transformers_api.engine.kv_cache import MIN_LENGTH
from transformers_api.engine.native.adapters import PassAdapters, repeated
from transformers_api.engine.native.edited_attention import attention_changes
from transformers_api.engine.native.kv_cache import NativeCache
from transformers_api.engine.native.latent import expanding_into
from transformers_api.engine.native.row_changes import row_edit
from transformers_api.engine.native.shown_modules import leave_places, shown_layers, shown_sides
from transformers_api.engine.places import model_places
from transformers_api.engine.positions import at_positions
from transformers_api.engine.rope import fixed_factors
from transformers_api.engine.runners.edited_attention import (
    AttentionEdit,
    current_attention_edits,
    unedited_attention,
)
from transformers_api.engine.runners.edited_modules import ModuleEdit, current_edits
from transformers_api.engine.runners.model_runner import ModelRunner
from transformers_api.kernels.capture import Recorder, current, record
from transformers_api.kernels.graph.executor import RecordedPass
from transformers_api.kernels.graph.hooks import HookReplay, RowEdit, forward_returning
from transformers_api.kernels.modules.attention import CausalRows, describing
from transformers_api.kernels.modules.low_rank import LowRankPair
from transformers_api.kernels.modules.own_attention import (
    computes_own_attention,
    masked,
)
from transformers_api.kernels.modules.weight_memory import WeightMemory
from transformers_api.kernels.modules.weight_modules import following

if TYPE_CHECKING:
    from transformers_api.engine.adapters import LoadedAdapter, MakeProduct
    from transformers_api.engine.native.packed_weights import PackedFile

SIZES = (2, 3)  # tokens of the passes that are recorded; see planner.py
PROBE = (1, 2, 3)  # tokens that exist everywhere


class Kind(NamedTuple):
    """A format: ``numbers`` is the dtype of the KV cache, and of weights unless quantised.

    ``has_int8_cache``: keys and values are int8, where that is possible.
    """

    numbers: str
    quantization: str
    has_int8_cache: bool = False

    @property
    def weights(self) -> str:
        """See PackedWeight."""
        return self.numbers if self.quantization == "none" else self.quantization


class NativeRunner(ModelRunner):
    """Runs a packed model. ``learn`` before the first sequence.

    ``layers`` makes hidden states of tokens, ``head`` logits of hidden states. Where a model cannot
    be divided so, ``layers`` makes the logits, and ``head`` is not ready. ``long_layers`` are those
    of sequences beyond the model's original window, where there is one.
    """

    cache: NativeCache
    mixes = True

    def __init__(
        self,
        model: Any,
        cache: NativeCache,
        vocab_size: int,
        kind: Kind,
        original_window: int | None = None,
    ) -> None:
        super().__init__(model, cache, vocab_size)
        self.kind = kind
        self.original_window = original_window
        has_lengths = original_window is not None
        self.long_layers = RecordedPass(cache.library) if has_lengths else None
        self.layers, self.head = RecordedPass(cache.library), RecordedPass(cache.library)
        self._pass_adapters: PassAdapters | None = None
        self._modules: dict[str, nn.Module] = {}  # that were edited, by name
        self.packed: PackedFile | None = None  # where its weights are stored
        self.logits_digest: str | None = None  # of PROBE, where its plans are stored
        self.probe_logits: Tensor | None = None  # the last one's (1, V), where they are known

    def learn(self, until_packed: Callable[[], object] = lambda: None) -> None:
        """Record passes on a cache of their own; ``failure`` says why that failed.

        ``until_packed`` waits for the weights: most recordings need none of them.
        """
        is_own = computes_own_attention(self.model)
        # A window of the model's own is recognised where there are more keys than it has.
        cache = self.cache.scratch(max(SIZES), self.cache.max_length if is_own else MIN_LENGTH)
        cache.shows_symbols = is_own
        inputs = [inputs_of([1] * size, [3] * size, list(range(size))) for size in SIZES]
        if is_own:  # a recording has to know the rows' memory
            until_packed()
            with fixed_factors(self.model, False):
                self._compute(inputs[0], cache)
        self._learn_steps(inputs, cache, until_packed)
        self.cache.shaped_like(cache)

    def _module(self, name: str) -> nn.Module:
        """As ``get_submodule``, which takes thirty microseconds in the middle of a step."""
        module = self._modules.get(name)
        if module is None:
            module = self._modules[name] = self.model.get_submodule(name)
        return module

    def _learn_steps(
        self,
        inputs: list[list[Tensor]],
        cache: NativeCache,
        until_packed: Callable[[], object] = lambda: None,
    ) -> None:
        passes = self._watched_passes(inputs, cache, False)
        long = [] if self.long_layers is None else self._watched_passes(inputs, cache, True)
        until_packed()
        places = model_places(self.model)
        for each in (*passes, *long):
            for recorder in filter(None, (each.before, each.whole)):
                leave_places(self.model, places, recorder)
        if all(each.hidden is not None for each in [*passes, *long]):
            for each in passes:
                self._learn_divided(each, cache)
            for each in long:
                self._learn_layers(self.long_layers, each, cache)
            if all(recorded.is_ready for recorded in self.passes.values()):
                return
        library = self.cache.library
        self.layers, self.head = RecordedPass(library), RecordedPass(library)
        self.long_layers = self.long_layers and RecordedPass(library)
        for recorded, watched in ((self.layers, passes), (self.long_layers, long)):
            for each in watched:
                assert recorded is not None
                recorded.add(len(each.logits), each.whole, each.inputs, each.logits, cache.tensors)

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner."""
        starts: list[int] = []
        rows: list[int] = []
        for seq, width in zip(batch.sequences, batch.widths, strict=True):
            starts += range(seq.num_cached, seq.num_cached + width)
            rows += [seq.slot] * width
        inputs = inputs_of([token for ids in batch.ids for token in ids], starts, rows)
        last = [end - 1 for end in accumulate(batch.widths)]
        edits, attention = current_edits(), current_attention_edits()
        watch = None
        if batch.is_observed or edits or attention:
            watch = self._replay(batch, inputs[1], max(starts) + 1, last, edits, attention)
        is_long = self.original_window is not None and batch.sequences[0].is_long
        adapters = self._adapters_of(batch) if batch.is_adapted else None
        layers = self._layers(is_long)
        with unedited_attention():  # the pass does it: whoever is shown attention need not
            hidden = layers.run(len(starts), inputs, self.cache.tensors, watch, adapters)
        if len(last) == 1:
            own = None if adapters is None else adapters[-keep:]
            return self._logits(hidden[-keep:], own).transpose(0, 1)
        ends = [at for at, is_last in zip(last, batch.ends, strict=True) if is_last]
        if len(ends) == len(hidden):
            return self._logits(hidden, adapters)
        return self._logits(hidden[ends], None if adapters is None else adapters[ends])

    def adapter_maker(self) -> MakeProduct:
        """See AdapterRunner."""
        memory, adapters = WeightMemory(), self.pass_adapters

        def make(path: str, down: Tensor, up: Tensor, rescaling: Any = None) -> LowRankPair:
            adapters.check(path)
            kind = self.kind.numbers
            return LowRankPair(self.cache.library, down, up, kind, memory, rescaling)

        return make

    def drop_adapter(self, adapter: LoadedAdapter) -> None:
        """See AdapterRunner."""
        self.pass_adapters.drop(adapter)

    @property
    def pass_adapters(self) -> PassAdapters:
        """The adapters of passes; made with the first one."""
        if self._pass_adapters is None:
            self._pass_adapters = PassAdapters(self.model, self.passes.values())
        return self._pass_adapters

    def _adapters_of(self, batch: Batch) -> Tensor:
        """The number of each token's adapter."""
        return repeated(self.pass_adapters.numbers(batch), batch.widths)

    @property
    def passes(self) -> dict[str, RecordedPass]:
        """By name."""
        long = {"long layers": self.long_layers} if self.long_layers else {}
        return {"layers": self.layers, "head": self.head, **long}

    @property
    def failure(self) -> str:
        """The reason why the layers' passes cannot be run; "" where they can."""
        layers = [self.layers, *([self.long_layers] if self.long_layers else [])]
        return next((each.failure for each in layers if each.failure), "")

    def read(
        self, ids: Sequence[int], start: int = 0, keep: int = 1, is_long: bool = False
    ) -> Tensor:
        """Logits (keep, V) of the last of these tokens, in the cache's first row from ``start``."""
        positions = list(range(start, start + len(ids)))
        inputs = inputs_of(list(ids), positions, [0] * len(ids))
        hidden = self._layers(is_long).run(len(ids), inputs, self.cache.tensors)
        return self._logits(hidden[-keep:])[:, 0].clone()

    def logits_of(self, ids: Sequence[int]) -> Tensor:
        """Logits (1, V) of the last token of this prompt; nothing stays in the cache."""
        logits = self.read(ids)
        self.cache.clear()
        return logits

    def release(self) -> None:
        """Let go of all memory but the model's own."""
        self.clear()
        self._pass_adapters = None
        for recorded in self.passes.values():
            recorded.release_memory()

    def _layers(self, is_long: bool) -> RecordedPass:
        return self.long_layers if is_long and self.long_layers else self.layers

    def _logits(self, hidden: Tensor, adapters: Tensor | None = None) -> Tensor:
        """(R, 1, V) of hidden states (R, 1, C), which last until the next ones."""
        if self.head.is_ready and len(hidden):
            hidden = self.head.run(len(hidden), [hidden.contiguous()], [], adapters=adapters)
        return hidden[..., : self.vocab_size]

    def _replay(
        self,
        batch: Batch,
        positions: Tensor,
        length: int,
        last: list[int],
        edits: Sequence[ModuleEdit],
        attention: Sequence[AttentionEdit],
    ) -> HookReplay:
        """Show the last token of each sequence, by its slot; let ``edits`` write into all."""
        first = batch.first_slot
        places = [seq.slot - first for seq in batch.sequences]
        tokens = None
        if last != list(range(len(last))) or places != last:
            tokens = torch.zeros(max(places) + 1, dtype=torch.int64)
            tokens[places] = torch.tensor(last)
        cache = self.cache
        by_module: dict[tuple[nn.Module, str], RowEdit] = {
            (self._module(edit.module), edit.side): row_edit(edit) for edit in edits
        }
        return HookReplay(
            *(cache.library, positions, length, cache.tensors, first, tokens),
            edits=by_module,
            attention=attention_changes(self.model, attention, positions, cache),
            observes=batch.is_observed,
        )

    def _watched_passes(
        self, inputs: list[list[Tensor]], cache: NativeCache, is_long: bool
    ) -> list[_WatchedPass]:
        showing = ExitStack()
        showing.enter_context(shown_layers(self.model))
        showing.enter_context(shown_sides(self.model))
        if cache.shows_symbols:
            showing.enter_context(following(self.model))
        with showing, fixed_factors(self.model, is_long):
            return [self._watched_pass(each, cache) for each in inputs]

    def _watched_pass(self, inputs: list[Tensor], cache: NativeCache) -> _WatchedPass:
        """Record a pass, and what of it lies before its logits."""
        base, divisions = self.model.base_model, []

        def divide(module: nn.Module, args: Any, output: Any) -> None:
            if recorder := current():
                divisions.append((recorder.copy(), output))

        handle = base.register_forward_hook(divide)
        try:
            with record(inputs) as recorder:
                logits = self._compute(inputs, cache)
        finally:
            handle.remove()
        if base is self.model or len(divisions) != 1 or not isinstance(divisions[0][1][0], Tensor):
            return _WatchedPass(inputs, recorder, logits)
        before, output = divisions[0]
        return _WatchedPass(inputs, recorder, logits, before, output, output[0])

    @staticmethod
    def _learn_layers(
        recorded: RecordedPass | None, watched: _WatchedPass, cache: NativeCache
    ) -> None:
        assert recorded is not None
        assert watched.before is not None
        assert watched.hidden is not None
        size, hidden = len(watched.hidden), watched.hidden
        recorded.add(size, watched.before, watched.inputs, hidden, cache.tensors)

    def _learn_divided(self, watched: _WatchedPass, cache: NativeCache) -> None:
        inputs, output, hidden = watched.inputs, watched.output, watched.hidden
        self._learn_layers(self.layers, watched, cache)
        assert hidden is not None
        fresh = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        if isinstance(output, tuple):
            output = (fresh, *output[1:])
        else:
            output[next(iter(output))] = fresh
        with forward_returning(self.model.base_model, output):
            self.head.record(len(fresh), [fresh], [], partial(self._compute, inputs, cache))

    def _compute(self, inputs: list[Tensor], cache: NativeCache) -> Tensor:
        ids, positions, cache_rows = inputs
        starts, context = positions[:, 0], cache.length
        cache.bind_rows(starts, cache_rows, context)
        rows = {
            kind: CausalRows(cache.library, starts, window, cache_rows)
            for kind, window in self.masks.windows.items()
        }
        if cache.shows_symbols:
            masks: dict[str, Any] = {kind: masked(own, context) for kind, own in rows.items()}
            described = []
        else:
            built = self.masks.build(positions, context)
            masks = built if isinstance(built, dict) else {"": built}
            described = [(mask, rows[kind]) for kind, mask in masks.items()]
        with describing(described), expanding_into(cache), at_positions(positions):
            logits: Tensor = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=masks.get("", masks),
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **({"logits_to_keep": 1} if self._takes_keep else {}),
            ).logits
        return logits


class _WatchedPass(NamedTuple):
    """A recorded pass, and its part up to the ``output`` of the model without its head."""

    inputs: list[Tensor]
    whole: Recorder
    logits: Tensor
    before: Recorder | None = None
    output: Any = None
    hidden: Tensor | None = None


def inputs_of(ids: list[int], positions: list[int], cache_rows: list[int]) -> list[Tensor]:
    """[ids (N, 1), positions (N, 1), rows of the cache (N,)] of the tokens of a pass."""
    return [
        torch.tensor(ids)[:, None],
        torch.tensor(positions)[:, None],
        torch.tensor(cache_rows),
    ]
