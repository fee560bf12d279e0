"""The backend on the kernels of ``transformers_api.kernels``, for CPUs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from transformers_api.engine.backend import (
    BackendRefused,
    PlanOutdated,
    TokenStats,
)
from transformers_api.engine.base import EngineFacts
from transformers_api.engine.load_options import DTYPE_BYTES, LoadOptions
from transformers_api.engine.native.convert_model import (
    kind_of,
    packed_bytes,
    packed_weights,
    weight_kind,
)
from transformers_api.engine.native.plan_cache import PlanFile
from transformers_api.engine.native.runner import Kind, NativeRunner
from transformers_api.engine.native.sampler import NativeSampler
from transformers_api.engine.native.standby import NativeStandby
from transformers_api.engine.native.streaming import fill_streamed, packed_size
from transformers_api.engine.native.verified import verified_runner
from transformers_api.engine.pretrained import (
    attention_layers,
    differentiable,
    indexed_layers,
    layer_kinds,
)
from transformers_api.engine.rope import reads_again, switching_lengths
from transformers_api.engine.runners.edited_attention import AttentionEdit, editing_attention
from transformers_api.engine.runners.edited_modules import ModuleEdit, editing
from transformers_api.engine.runners.model_runner import Runner, VerifiedRunner, innermost
from transformers_api.engine.sampling.sampler import Sampler, TokenSampler
from transformers_api.engine.standby import StandbyModel
from transformers_api.engine.stored_weights import StoredWeights
from transformers_api.kernels import stats
from transformers_api.kernels.abi import Library
from transformers_api.kernels.graph.hooks import noting_attention, observing
from transformers_api.kernels.modules.attention import CausalRows, numbers_of


class NativeBackend:
    """Meets Backend: models on attention, whose layers become packed ones."""

    title = "native kernels"
    has_own_threads = True
    is_batch_invariant = True
    runs_modules = False
    leaves_model = False

    def __init__(self, library: Library, options: LoadOptions) -> None:
        self.library = library
        self.options = options

    def load_dtype(self, dtype: str) -> str:
        """See Backend. The kernels keep their promise for weights of any dtype."""
        return "stored" if dtype == "auto" else dtype

    def fill(self, model: Any, stored: StoredWeights, dtype: torch.dtype) -> None:
        """See Backend. Large weights stay in the file until they are packed."""
        fill_streamed(self.library, model, stored, dtype)

    def weight_dtype(self, dtype: str, stored: str, stored_bytes: int) -> str:
        """See Backend."""
        return weight_kind(dtype, stored, stored_bytes) or dtype

    def file_bytes(self, types: Mapping[str, int], dtype: str) -> int:
        """See Backend."""
        return packed_size(types, DTYPE_BYTES.get(dtype, 4))

    def refusal(self, model: Any) -> str | None:
        """See Backend."""
        if not (attention_layers(model) or layer_kinds(model)):
            return "it cannot share a batch"
        if indexed_layers(model):
            return "it has an index of what to attend to"
        try:
            self._kind(model)
        except BackendRefused as error:
            return str(error)
        return None

    def verified_runner(self, model: Any, vocab_size: int, window: int) -> VerifiedRunner:
        """See Backend. Raises PlanOutdated where a plan on the disk does not fit the model."""
        options = self.options
        kind = self._kind(model)
        lengths = switching_lengths(model, window)
        if len(lengths) > 1 or not all(reads_again(model, n) for n in lengths):
            raise BackendRefused("positions that depend on the length")
        layers = attention_layers(model) or layer_kinds(model)
        size, file = (layers, options.num_slots, window), None
        # Code of a model's own may change where nobody looks.
        if (
            isinstance(layers, int)
            and options.plans
            and options.stamp
            and not options.trust_remote_code
        ):
            file = PlanFile.of(options.plans, options.stamp, options.dtype, kind, size)
        packed = options.packed
        memory = packed.memory(self.library) if packed else None
        try:
            with differentiable():
                original = min(lengths, default=None)
                rest = kind, size, vocab_size, file, original, memory
                runner = verified_runner(model, self.library, *rest)
        except (BackendRefused, PlanOutdated) as error:
            if packed and memory and memory.is_stored:  # they may be the reason
                packed.remove()
            if isinstance(error, PlanOutdated):
                anew = replace(options, plans=None, packed=None)
                error.instead = NativeBackend(self.library, anew)
            raise
        runner.packed = packed
        if packed and memory and not memory.is_stored:
            packed.write_later(self.library, packed_weights(model))
        return runner

    def _kind(self, model: Any) -> Kind:
        options = self.options
        return kind_of(model, options.dtype, options.quantization, options.kv_cache_dtype)

    def sampler(self) -> TokenSampler:
        """See Backend."""
        return Sampler(NativeSampler(self.library))

    def describe(self, runner: VerifiedRunner) -> EngineFacts:
        """See Backend."""
        assert isinstance(runner, NativeRunner)
        model, kind = runner.model, runner.kind
        own = sum(parameter.nbytes for parameter in model.parameters())
        return EngineFacts(
            device=str(model.device),
            dtype=kind.numbers,
            quantization=kind.quantization,
            kernels="native",
            isa=self.library.isa,
            bytes=own + packed_bytes(model),
        )

    def token_stats(self, logits: Tensor, token: int, count: int) -> TokenStats | None:
        """See Backend."""
        if logits.stride(0) != 1:
            return None
        made = stats.token_stats(self.library, logits, token, count)
        return TokenStats(made.logprob, made.entropy, made.rank, made.ids, made.probs)

    def observing_attention(self, layers: Collection[int] | None) -> AbstractContextManager[None]:
        """See Backend."""
        return observing(layers)

    @contextmanager
    def noting_attention(
        self, places: Mapping[int, tuple[int, ...]]
    ) -> Iterator[Mapping[int, tuple[Tensor, Tensor | None]]]:
        """See Backend."""
        with noting_attention(places) as rows:
            yield rows.by_layer

    @contextmanager
    def editing(
        self, model: Any, edits: Sequence[ModuleEdit], attention: Sequence[AttentionEdit] = ()
    ) -> Iterator[None]:
        """See Backend."""
        with editing(edits), editing_attention(attention):
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
        """See Backend. None for a pass that ran the model's modules, as inspections do."""
        if not isinstance(mask, CausalRows):
            return None
        return stats.attention_probs(mask, query, key, sequence, queries, options)

    def numbers_of(self, states: Tensor) -> Tensor:
        """See Backend."""
        return numbers_of(states)

    def standby(self, runner: Runner) -> StandbyModel | None:
        """See Backend."""
        return NativeStandby.of(innermost(runner))
