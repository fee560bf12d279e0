"""The backends that compute with torch: with CUDA graphs where they can be had, else plainly."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.backend import (
    BackendRefused,
    TokenStats,
)
from transformers_api.engine.base import EngineFacts
from transformers_api.engine.kv_cache import SlotCache
from transformers_api.engine.load_options import DTYPE_BYTES, LoadOptions
from transformers_api.engine.pretrained import (
    attention_layers,
    differentiable,
    gpu_dtype,
    indexed_layers,
    layer_kinds,
)
from transformers_api.engine.rope import reads_again, switching_lengths
from transformers_api.engine.runners.cuda_graphs import GraphRunner, PaddedCache
from transformers_api.engine.runners.edited_attention import AttentionEdit, edited_model
from transformers_api.engine.runners.edited_modules import ModuleEdit, editing
from transformers_api.engine.runners.model_runner import (
    ModelRunner,
    Runner,
    SequentialRunner,
    VerifiedRunner,
)
from transformers_api.engine.runners.packed_linear import called_linears, pack_linears
from transformers_api.engine.runners.state_runner import StateRunner
from transformers_api.engine.runners.verify import (
    agrees,
    expected_logits,
    looks_ahead,
    windows_agree,
)
from transformers_api.engine.sampling.sampler import Sampler, TokenSampler
from transformers_api.engine.standby import StandbyModel
from transformers_api.engine.state_cache import StateCache
from transformers_api.engine.stored_weights import StoredWeights

log = logging.getLogger(__name__)


class TorchBackend:
    """Meets Backend: any model, on any device; in a batch where the model allows, else alone."""

    title = "torch"
    has_own_threads = False
    is_batch_invariant = False
    runs_modules = True
    leaves_model = True

    def __init__(self, device: str, options: LoadOptions) -> None:
        self.device = device
        self.options = options

    def load_dtype(self, dtype: str) -> str:
        """See Backend."""
        return dtype

    def fill(self, model: Any, stored: StoredWeights, dtype: torch.dtype) -> None:
        """See Backend."""
        stored.fill(model, dtype)

    def weight_dtype(self, dtype: str, stored: str, stored_bytes: int) -> str:
        """See Backend."""
        if dtype != "auto":
            return dtype
        if self.device.startswith("cuda"):
            return gpu_dtype(stored, stored_bytes)
        return "float32" if self.device == "cpu" else stored

    def file_bytes(self, types: Mapping[str, int], dtype: str) -> int:
        """See Backend."""
        return sum(types.values()) * DTYPE_BYTES.get(dtype, 4)

    def refusal(self, model: Any) -> str | None:
        """See Backend."""
        return None

    def verified_runner(self, model: Any, vocab_size: int, window: int) -> VerifiedRunner:
        """See Backend."""
        if batched := self._batched(model, vocab_size, window):
            return batched
        for recompute in (False, True):
            runner = SequentialRunner(model, vocab_size, recompute)
            if agrees(runner, model, vocab_size, window):
                runner.clear()
                log.warning("%s is served one sequence at a time", type(model).__name__)
                return runner
        raise BackendRefused(
            f"{type(model).__name__} cannot be run as a causal language model"
            f"{looks_ahead(model, vocab_size, window)}"
        )

    def _batched(self, model: Any, vocab_size: int, window: int) -> ModelRunner | None:
        """None for a model whose sequences cannot be read together. Its layers are packed."""
        layers, lengths = attention_layers(model), switching_lengths(model, window)
        kinds = [] if layers else layer_kinds(model)
        if not (layers or kinds):
            return None
        if len(lengths) > 1 or not all(reads_again(model, n) for n in lengths):
            return None
        rows = self.options.num_slots
        runner = (
            StateRunner(model, StateCache(kinds, rows, window), vocab_size)
            if kinds
            else ModelRunner(
                model, SlotCache(layers, rows, window, indexed=indexed_layers(model)), vocab_size
            )
        )
        runner.original_window = min(lengths, default=None)
        expected: list[Tensor] = []
        try:
            called = called_linears(
                model, lambda: expected.extend(expected_logits(runner, vocab_size, window))
            )
        except Exception:
            log.info("%s cannot read the probe", type(model).__name__, exc_info=True)
            return None
        with differentiable():
            pack_linears(model, called)
        right = windows_agree(model) and agrees(runner, model, vocab_size, window, expected)
        return runner if right else None

    def sampler(self) -> TokenSampler:
        """See Backend."""
        return Sampler()

    def describe(self, runner: VerifiedRunner) -> EngineFacts:
        """See Backend."""
        model = runner.model
        return EngineFacts(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            bytes=sum(parameter.nbytes for parameter in model.parameters()),
            mode=runner.mode,
        )

    def token_stats(self, logits: Tensor, token: int, count: int) -> TokenStats | None:
        """See Backend."""
        return None

    def observing_attention(self, layers: Collection[int] | None) -> AbstractContextManager[None]:
        """See Backend."""
        return nullcontext()

    def noting_attention(
        self, places: Mapping[int, tuple[int, ...]]
    ) -> AbstractContextManager[Mapping[int, tuple[Tensor, Tensor | None]]]:
        """See Backend."""
        return nullcontext({})

    @contextmanager
    def editing(
        self, model: Any, edits: Sequence[ModuleEdit], attention: Sequence[AttentionEdit] = ()
    ) -> Iterator[None]:
        """See Backend."""
        with editing(edits), edited_model(model, edits, attention):
            yield

    def attention_probs(
        self,
        mask: Any,
        query: Tensor,
        key: Tensor,
        sequence: int,
        queries: range,
        options: dict[str, Any],
    ) -> tuple[Tensor, Tensor | None] | None:
        """See Backend."""
        return None

    def numbers_of(self, states: Tensor) -> Tensor:
        """See Backend."""
        return states

    def standby(self, runner: Runner) -> StandbyModel | None:
        """See Backend."""
        return None


class CudaGraphsBackend(TorchBackend):
    """The same with captured decode steps; a model that reads its results cannot be captured."""

    title = "CUDA graphs"

    def refusal(self, model: Any) -> str | None:
        """See Backend."""
        if switching_lengths(model, sys.maxsize):
            return "positions that depend on the length"
        if not attention_layers(model):
            return "it cannot share a batch"
        return "it has an index of what to attend to" if indexed_layers(model) else None

    def verified_runner(self, model: Any, vocab_size: int, window: int) -> VerifiedRunner:
        """See Backend."""
        cache = PaddedCache(attention_layers(model), self.options.num_slots, window)
        runner = GraphRunner(model, cache, vocab_size)
        if not (windows_agree(model) and agrees(runner, model, vocab_size, window)):
            raise BackendRefused("its decode steps cannot be captured")
        return runner
