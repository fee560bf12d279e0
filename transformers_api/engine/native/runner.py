"""A batch in, logits out, with the native kernels: forward passes are recorded once, then run.

Bits depend on the way that a pass is computed. So an engine goes one way with every token: all
passes are recorded, those that are watched and those whose whole prompt is scored too, or none is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transformers_api.engine.batch import Batch
from transformers_api.engine.kv_cache import MIN_LENGTH
from transformers_api.engine.native.kv_cache import NativeCache
from transformers_api.engine.native.latent import expanding_into
from transformers_api.engine.positions import at_positions
from transformers_api.engine.rope import fixed_factors
from transformers_api.engine.runners.model_runner import ModelRunner
from transformers_api.kernels.capture import Recorder, current
from transformers_api.kernels.graph.executor import RecordedPass
from transformers_api.kernels.graph.hooks import HookReplay, forward_returning
from transformers_api.kernels.modules.attention import CausalRows, describing
from transformers_api.kernels.modules.experts import routing_modules

DECODE_ROWS = (2, 3)  # sizes that are recorded; see layout.py
PROMPT_TOKENS = (5, 7)
KINDS = ("decode", "prompt", "scored")
LONG = "long "  # before the kind of a pass of sequences beyond the model's original window


class Kind(NamedTuple):
    """A format: ``numbers`` is the dtype of the KV cache, and of weights unless quantised."""

    numbers: str
    quantization: str

    @property
    def weights(self) -> str:
        """See PackedWeight."""
        return self.numbers if self.quantization == "none" else self.quantization


class NativeRunner(ModelRunner):
    """Runs a packed model. ``learn`` before the first sequence."""

    cache: NativeCache

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
        names = [*KINDS, *(LONG + name for name in KINDS if original_window is not None)]
        self.passes = {name: RecordedPass(cache.library) for name in names}  # by the kind of pass
        self.is_recorded = False

    def learn(self) -> None:
        """Record passes on a cache of their own; the model goes on as it is where that fails."""
        cache = self.cache.scratch(max(DECODE_ROWS), MIN_LENGTH)
        with fixed_factors(self.model, False):
            self._compute(_inputs(torch.zeros(1, 2, dtype=torch.int64), [0]), cache, 1)
        self.cache.shaped_like(cache)
        for length in ("", LONG)[: len(self.passes) // len(KINDS)]:
            with _shown_layers(self.model), fixed_factors(self.model, bool(length)):
                for size in DECODE_ROWS:
                    inputs = _inputs(_some_ids(size, 1), [3] * size)
                    self._learn(f"{length}decode", size, cache, inputs, 1)
                for size in PROMPT_TOKENS:
                    self._learn_prompt(length, size, cache)
        self.is_recorded = all(each.is_ready for each in self.passes.values())

    def forward(self, batch: Batch, keep: int = 1) -> Tensor:
        """See Runner. The result lasts until the next one."""
        starts = [seq.num_cached for seq in batch.sequences]
        ids = torch.tensor(batch.ids)
        first, tensors, inputs = batch.first_slot, self.cache.tensors, _inputs(ids, starts)
        if keep > 1:
            kind, size = "scored", batch.width
        elif batch.width > 1:
            kind, size = "prompt", batch.width
        else:
            kind, size = "decode", len(starts)
        is_long = self.original_window is not None and batch.sequences[0].is_long
        recorded = self.passes[f"{LONG}{kind}" if is_long else kind]
        watch = None
        if batch.reaches_end and any(seq.observe for seq in batch.sequences):
            context = max(starts) + batch.width
            watch = HookReplay(self.cache.library, inputs[2], context, tensors, first)
        logits = recorded.run(size, inputs, tensors, first, watch)
        return logits[:, -keep:, : self.vocab_size]

    def compute(self, kind: str, ids: list[list[int]], starts: list[int]) -> Tensor:
        """Logits of a pass of this kind, which last until the next one."""
        size = len(ids) if kind.endswith("decode") else len(ids[0])
        inputs = _inputs(torch.tensor(ids), starts)
        return self.passes[kind].run(size, inputs, self.cache.tensors, 0)

    def logits_of(self, ids: Sequence[int]) -> Tensor:
        """Logits (1, V) of the last token of this prompt; nothing stays in the cache."""
        logits = self.compute("prompt", [list(ids)], [0])[:, -1].clone()
        self.cache.clear()
        return logits

    def release(self) -> None:
        """Let go of all memory but the model's own."""
        self.clear()
        for recorded in self.passes.values():
            recorded.release_memory()

    def _learn(
        self,
        kind: str,
        size: int,
        cache: NativeCache,
        inputs: list[Tensor],
        keep: int,
        prefix: Recorder | None = None,
    ) -> None:
        forward = partial(self._compute, inputs, cache, keep)
        self.passes[kind].record(size, inputs, cache.tensors, forward, prefix)

    def _learn_prompt(self, length: str, size: int, cache: NativeCache) -> None:
        """Record two passes; a scored one differs after the layers only, so these run once."""
        inputs, base, branches = _inputs(_some_ids(1, size), [0]), self.model.base_model, []

        def branch(module: nn.Module, args: Any, output: Any) -> None:
            if recorder := current():
                branches.append((recorder.copy(), output))

        handle = base.register_forward_hook(branch)
        try:
            self._learn(f"{length}prompt", size, cache, inputs, 1)
        finally:
            handle.remove()
        if base is self.model or len(branches) != 1:
            self._learn(f"{length}scored", size, cache, inputs, 0)
            return
        prefix, output = branches[0]
        with forward_returning(base, output):
            self._learn(f"{length}scored", size, cache, inputs, 0, prefix)

    def _compute(self, inputs: list[Tensor], cache: NativeCache, keep: int) -> Tensor:
        ids, positions, starts = inputs
        context = cache.length
        cache.bind(0, positions, context)
        cache.starts = starts
        built = self.masks.build(positions, context)
        masks = built if isinstance(built, dict) else {"": built}
        rows = {kind: CausalRows(cache.library, starts, self.masks.windows[kind]) for kind in masks}
        described = describing([(mask, rows[kind]) for kind, mask in masks.items()])
        with described, expanding_into(cache), at_positions(positions):
            logits: Tensor = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=built,
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
                **({"logits_to_keep": keep} if self._takes_keep else {}),
            ).logits
        return logits


def _inputs(ids: Tensor, starts: list[int]) -> list[Tensor]:
    """[ids (B, T), positions (B, T), starts (B,)] of what differs from pass to pass."""
    first = torch.tensor(starts)
    return [ids, first[:, None] + torch.arange(ids.shape[1]), first]


@contextmanager
def _shown_layers(model: Any) -> Iterator[None]:
    """While it lasts, recorders note what goes into the model's layers and what comes out."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    with ExitStack() as stack:
        for stacked in model.modules():
            for layer in stacked if isinstance(stacked, nn.ModuleList) else ():
                if len(stacked) == count:
                    handle = layer.register_forward_hook(_note_layer, with_kwargs=True)
                    stack.callback(handle.remove)
        for router in routing_modules(model):
            handle = router.register_forward_hook(_note_router)
            stack.callback(handle.remove)
        yield


def _note_router(module: nn.Module, args: Any, output: Any) -> None:
    """Note a router's logits, the weights of the experts it chose, and which these are."""
    if not (isinstance(output, tuple) and all(isinstance(each, Tensor) for each in output)):
        return
    tensors = [args[0], *output]
    if (recorder := current()) and len({t.untyped_storage().data_ptr() for t in tensors}) == 4:
        recorder.add_module_call(module, tensors, options={"is_tuple": True})


def _note_layer(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    stream = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
    made = output[0] if isinstance(output, tuple) else output
    if (recorder := current()) and stream is not None and isinstance(made, Tensor):
        recorder.add_module_call(
            module, [stream, made], options={"is_tuple": isinstance(output, tuple)}
        )


def _some_ids(rows: int, width: int) -> Tensor:
    return torch.arange(1, rows * width + 1).reshape(rows, width)
