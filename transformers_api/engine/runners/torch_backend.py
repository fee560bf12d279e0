"""The backends that compute with torch: with CUDA graphs where they can be had, else plainly."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from transformers_api.engine.backend import (
    BackendRefused,
    TokenStats,
)
from transformers_api.engine.base import EngineFacts
from transformers_api.engine.kv_cache import SlotCache
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.pretrained import attention_layers, differentiable, gpu_dtype
from transformers_api.engine.runners.cuda_graphs import GraphRunner, PaddedCache
from transformers_api.engine.runners.model_runner import (
    ModelRunner,
    Runner,
    SequentialRunner,
    VerifiedRunner,
)
from transformers_api.engine.runners.packed_linear import pack_linears
from transformers_api.engine.runners.verify import agrees
from transformers_api.engine.sampling.sampler import Sampler, TokenSampler
from transformers_api.engine.standby import StandbyModel

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

    def weight_dtype(self, dtype: str, stored: str, stored_bytes: int) -> str:
        """See Backend."""
        if dtype != "auto":
            return dtype
        if self.device.startswith("cuda"):
            return gpu_dtype(stored, stored_bytes)
        return "float32" if self.device == "cpu" else stored

    def refusal(self, model: Any) -> str | None:
        """See Backend."""
        return None

    def verified_runner(self, model: Any, vocab_size: int, window: int) -> VerifiedRunner:
        """See Backend."""
        if layers := attention_layers(model):
            with differentiable():
                pack_linears(model)
            cache = SlotCache(layers, self.options.num_slots, window)
            batched = ModelRunner(model, cache, vocab_size)
            if agrees(batched, model, vocab_size, window):
                return batched
        for recompute in (False, True):
            runner = SequentialRunner(model, vocab_size, recompute)
            if agrees(runner, model, vocab_size, window):
                runner.clear()
                log.warning("%s is served one sequence at a time", type(model).__name__)
                return runner
        raise BackendRefused(f"{type(model).__name__} cannot be run as a causal language model")

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

    def standby(self, runner: Runner, folder: Path) -> StandbyModel | None:
        """See Backend."""
        return None


class CudaGraphsBackend(TorchBackend):
    """The same with captured decode steps; a model that reads its results cannot be captured."""

    title = "CUDA graphs"

    def refusal(self, model: Any) -> str | None:
        """See Backend."""
        return None if attention_layers(model) else "it cannot share a batch"

    def verified_runner(self, model: Any, vocab_size: int, window: int) -> VerifiedRunner:
        """See Backend."""
        cache = PaddedCache(attention_layers(model), self.options.num_slots, window)
        runner = GraphRunner(model, cache, vocab_size)
        if not agrees(runner, model, vocab_size, window):
            raise BackendRefused("its decode steps cannot be captured")
        return runner
