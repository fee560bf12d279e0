"""A folder in the transformers format to a running engine, on the engine thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from transformers_api.engine.backend import Backend, BackendRefused, PlanOutdated
from transformers_api.engine.backends import ALWAYS_NATIVE, choose_backends, not_quantized
from transformers_api.engine.cached_rows import FinishedRow
from transformers_api.engine.conversations import conversations_of, restore_conversations
from transformers_api.engine.llm_engine import BatchingEngine, EngineLimits
from transformers_api.engine.load_options import AS_NUMBERS, DTYPE_BYTES, LoadOptions
from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.engine.platform.imports import without_collection
from transformers_api.engine.platform.memory import available_bytes, release_memory
from transformers_api.engine.positions import follow_positions
from transformers_api.engine.pretrained import (
    context_window,
    differentiable,
    eos_token_ids,
    load_model,
    pick_device,
)
from transformers_api.engine.rope import follow_lengths
from transformers_api.engine.runners.model_runner import ModelRunner, Runner, VerifiedRunner
from transformers_api.engine.runners.prompt_logprobs import PromptScoringRunner
from transformers_api.engine.runners.suppressed_tokens import SuppressingRunner
from transformers_api.engine.runners.thread_sharing import SharingRunner
from transformers_api.engine.sampling.sampler import TokenSampler
from transformers_api.engine.standby import StandbyModel, StandbyModels
from transformers_api.engine.stored_model import load_stored, stored_weights
from transformers_api.engine.stored_weights import StoredWeights
from transformers_api.engine.thread import EngineThread
from transformers_api.engine.watched_pass import holding_passes
from transformers_api.engine.weight_names import NotStreamed
from transformers_api.errors import ModelLoadFailed, ModelNotServable
from transformers_api.heap import trim_memory

log = logging.getLogger(__name__)
COSTLY_CONTEXT = 6  # times the model's width: attention takes as long as all else there
FORCED_TOKENS = 8  # a step that reads these takes little longer than one token's
OWN_THREADS = min(torch.get_num_threads(), usable_cores())  # torch knows of no quota


class Wrap(Protocol):
    """Puts observers around a runner and a sampler."""

    def __call__(
        self,
        model: Any,
        limits: EngineLimits,
        backend: Backend,
        runner: Runner,
        sampler: TokenSampler,
    ) -> tuple[Runner, TokenSampler]:
        """Return the runner and the sampler that the engine is to use."""
        ...


def load_engine(
    folder: Path, options: LoadOptions, thread: EngineThread, wrap: Wrap | None = None
) -> BatchingEngine:
    """Load a model and start serving it on ``thread``, which must be the calling thread.

    ``wrap`` puts observers around the runner and the sampler. A model on standby is woken up. One
    that the kernels refuse is loaded again without them, if it fits so, unless it was to be
    quantised. Raises ModelLoadFailed, InsufficientMemory.
    """
    device, stored = pick_device(options.device), _stored(folder, options)
    options = replace(options, quantization=_quantization(options, stored))
    backends = choose_backends(options, device, thread.num_threads)
    backend, key = backends[0], (folder, options, backends[0].title)
    share_cores(backend, thread)
    if standby := options.standby.wake(key):
        runner = standby.runner
        engine = build_engine(runner.model, backend, options, thread, wrap, runner)
        conversations = options.standby.conversations(key)
        restore_conversations(conversations, engine.scheduler, runner.cache)
    else:
        # Nearly all that is made now stays.
        with without_collection(), holding_passes():
            make = partial(make_model, folder, stored, device, options)
            engine, backend = start(make, folder.name, backends, options, thread, wrap)
        if stored is not None:
            stored.close()
        standby = backend.standby(engine.runner)
    if standby:
        engine.on_closed = partial(_put_to_sleep, options.standby, key, standby)
    thread.engines.append(engine)
    trim_memory()  # of what loading and packing needed in between
    return engine


def _put_to_sleep(
    pool: StandbyModels, key: Hashable, model: StandbyModel, finished: Mapping[int, FinishedRow]
) -> None:
    cache = model.runner.cache
    pool.keep(key, model, conversations_of(finished, cache, pool.conversation_bytes))


def _stored(folder: Path, options: LoadOptions) -> StoredWeights | None:
    """The weights of a folder where they lie; None where transformers has to load them."""
    try:
        return stored_weights(folder, options.trust_remote_code)
    except (OSError, KeyError, ValueError) as error:
        raise ModelLoadFailed(f"The weights of {folder.name} cannot be read: {error}") from error


def _quantization(options: LoadOptions, stored: StoredWeights | None) -> str:
    """The quantisation of a load: that of the files for "auto", "gguf" and "stored"."""
    if options.quantization not in ("auto", "gguf", "stored"):
        return options.quantization
    if stored is None or not stored.is_quantized:
        return "none"
    is_small = sum(stored.types.values()) < AS_NUMBERS
    return "none" if options.quantization == "auto" and is_small else stored.method


def make_model(
    folder: Path, stored: StoredWeights | None, device: str, options: LoadOptions, backend: Backend
) -> Any:
    """The model of a folder, as a backend wants it. Raises ModelLoadFailed."""
    dtype = backend.load_dtype(options.dtype)
    if stored is not None:
        try:
            served = stored.serving_dtype(dtype, device)
            model = load_stored(folder, stored, served, backend.fill)
            with differentiable():
                return model.to(device)
        except NotStreamed as reason:
            log.info("%s is loaded by transformers, whole: %s", folder.name, reason)
    return load_model(folder, device, dtype, options.trust_remote_code)


def start(
    make: Callable[[Backend], Any],
    name: str,
    backends: Sequence[Backend],
    options: LoadOptions,
    thread: EngineThread,
    wrap: Wrap | None,
) -> tuple[BatchingEngine, Backend]:
    """Return an engine on the first backend that can run a model, and that backend.

    ``make(backend)`` gives the model, again for each backend that changes it; its ``name`` is for
    the log. Raises ModelLoadFailed, InsufficientMemory.
    """
    candidates, reason, weights, model = list(backends), "", 0, None
    while candidates:
        backend = candidates.pop(0)
        share_cores(backend, thread)
        if model is None:
            model = make(backend)
            follow_lengths(model)
            follow_positions(model)
            stored: StoredWeights | None = getattr(model, "stored_weights", None)
            counts = stored.types.values() if stored else (p.numel() for p in model.parameters())
            weights = sum(counts)
        try:  # errors as text: a record that is kept somewhere must not hold the model
            return build_engine(model, backend, options, thread, wrap), backend
        except PlanOutdated as error:
            log.warning("%s is not what was known of it: %s", name, str(error))
            candidates[:0] = [error.instead] if error.instead else []
            needs_room = False
        except BackendRefused as error:
            reason, needs_room = str(error), not backend.leaves_model
            if candidates:
                log.info("%s runs without %s: %s", name, backend.title, reason)
        if not backend.leaves_model:
            model = None  # here, where the error's frames do not hold it any more
            release_memory()
        if candidates and needs_room and options.check_room is not None:
            options.check_room(weights * DTYPE_BYTES.get(options.dtype, 4))
    if options.quantization in ALWAYS_NATIVE:
        raise not_quantized(options, reason)
    raise ModelNotServable(reason, param="model")


def share_cores(backend: Backend, thread: EngineThread) -> None:
    """Set the number of torch's threads: one beside a backend that has its own."""
    own = thread.num_threads or OWN_THREADS
    torch.set_num_threads(1 if backend.has_own_threads else own)


def build_engine(
    model: Any,
    backend: Backend,
    options: LoadOptions,
    thread: EngineThread,
    wrap: Wrap | None = None,
    runner: VerifiedRunner | None = None,
) -> BatchingEngine:
    """Return an engine for a loaded model: batching where the model allows, else one at a time.

    ``runner``: the one that the model has already. Raises BackendRefused; the model may be of no
    use then, unless the backend ``leaves_model``.
    """
    vocab_size, window = _vocab_size(model, options), context_window(model, options)
    if runner is None:
        if reason := backend.refusal(model):
            raise BackendRefused(reason)
        runner = backend.verified_runner(model, vocab_size, window)
    if isinstance(runner, ModelRunner):
        window = _bounded(runner, options)
    if options.kv_cache_dtype != "auto" and not getattr(runner.cache, "has_codes", False):
        log.warning(
            "KV_CACHE_DTYPE=%s is not used: %s keeps its own numbers with %s",
            *(options.kv_cache_dtype, type(model).__name__, backend.title),
        )
    facts = backend.describe(runner)
    facts = replace(facts, in_pieces=facts.mode == "batching" and runner.cache.in_pieces)
    limits = replace(
        _limits(model, backend, options, facts.mode, vocab_size, window),
        original_window=runner.original_window,
        mixes=runner.mixes,
        prefill_alone=options.prefill_alone if runner.mixes else 0,
    )
    if not runner.cache.in_pieces:  # nothing that was read ahead could be taken back
        limits = replace(limits, prompt_lookup_tokens=0, forced_tokens=0)
    outer: Runner = runner
    suppressed = getattr(model.generation_config, "suppress_tokens", None) or ()
    if ids := [token for token in suppressed if 0 <= token < vocab_size]:
        outer = SuppressingRunner(outer, ids)
    if model.device.type == "cpu" and not backend.has_own_threads:
        outer = SharingRunner(outer)
    outer, sampler = PromptScoringRunner(outer), backend.sampler()
    if wrap is not None:
        outer, sampler = wrap(model, limits, backend, outer, sampler)
    return BatchingEngine(model, outer, limits, thread, facts, sampler, options.listener)


def _limits(
    model: Any,
    backend: Backend,
    options: LoadOptions,
    mode: str,
    vocab_size: int,
    window: int,
) -> EngineLimits:
    batches, on_cpu = mode == "batching", model.device.type == "cpu"
    width = getattr(model.config.get_text_config(decoder=True), "hidden_size", 0)
    return EngineLimits(
        max_model_len=window,
        vocab_size=vocab_size,
        num_slots=options.num_slots if batches else 1,
        max_waiting=options.max_waiting + (0 if batches else options.num_slots - 1),
        prefill_chunk=options.prefill_chunk if batches else window,
        eos_token_ids=options.eos_token_ids | eos_token_ids(model),
        context_overflow=getattr(model.config, "context_overflow", None),
        prompt_window=getattr(model.config, "prompt_window", None),
        torch_noise=getattr(model.config, "sampling_noise", None) == "torch",
        costly_context=(COSTLY_CONTEXT * width or None) if on_cpu and batches else None,
        prompt_lookup_tokens=options.prompt_lookup_tokens if backend.is_batch_invariant else 0,
        forced_tokens=FORCED_TOKENS if backend.is_batch_invariant else 0,
        adapter_bytes=options.adapter_bytes,
    )


def _vocab_size(model: Any, options: LoadOptions) -> int:
    head = model.get_output_embeddings()
    size: int = head.weight.shape[0] if head is not None else model.config.vocab_size
    return min(size, options.tokenizer_size or size)


def _bounded(runner: ModelRunner, options: LoadOptions) -> int:
    """Give the cache its budget, now that it has seen a forward; the longest sequence."""
    free = available_bytes(str(runner.model.device))
    window = runner.cache.set_budget(options.kv_cache_bytes or free // 4)
    runner.cache.clear()
    return window
