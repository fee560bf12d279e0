"""A folder in the transformers format to a running engine, on the engine thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.utils.logging import disable_progress_bar

from transformers_api.engine.base import EngineListener
from transformers_api.engine.kv_cache import SlotCache
from transformers_api.engine.llm_engine import BatchingEngine, EngineLimits
from transformers_api.engine.native.convert_model import (
    SMALL_BYTES,
    NativeRefused,
    PlanOutdated,
    kind_of,
)
from transformers_api.engine.native.plan_cache import PlanFile
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.native.sampler import NativeRace
from transformers_api.engine.native.standby import Sleeper, SleepingModels
from transformers_api.engine.native.verified import checked_runner
from transformers_api.engine.platform.lazy_torch import without_collection
from transformers_api.engine.platform.memory import available_bytes, release_memory, trim_memory
from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.engine.runners.cuda_graphs import GraphRunner, PaddedCache
from transformers_api.engine.runners.model_runner import (
    ModelRunner,
    Runner,
    SequentialRunner,
    innermost,
)
from transformers_api.engine.runners.packed_linear import pack_linears
from transformers_api.engine.runners.prompt_logprobs import PromptScoringRunner
from transformers_api.engine.runners.suppressed_tokens import SuppressingRunner
from transformers_api.engine.runners.thread_sharing import SharingRunner
from transformers_api.engine.runners.verify import agrees
from transformers_api.engine.sampling.sampler import Sampler, TokenSampler
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ModelLoadFailed
from transformers_api.kernels.abi import Library
from transformers_api.kernels.cpu import usable_cores
from transformers_api.kernels.provider import kernel_provider

log = logging.getLogger(__name__)
disable_progress_bar()  # type: ignore[no-untyped-call]  # a server's log is no terminal
WINDOW_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
BUSY_CHUNK = 32  # on a CPU, where more tokens in one pass take as long apiece
OWN_THREADS = min(torch.get_num_threads(), usable_cores())  # torch knows of no quota
DTYPE_BYTES = {"float16": 2, "bfloat16": 2}
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
# (model, limits, runner, sampler) to the runner and the sampler that the engine is to use.
Wrap = Callable[[Any, EngineLimits, Runner, TokenSampler], tuple[Runner, TokenSampler]]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the settings and the registry say about loading."""

    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    max_context_tokens: int | None = None  # the registry's: clamps
    default_context_tokens: int = 2048  # where the config says nothing
    eos_token_ids: frozenset[int] = frozenset()  # the tokenizer's, besides the model's own
    tokenizer_size: int | None = None  # largest id + 1; larger ids are never sampled
    stamp: Hashable = None  # another one when the files are
    num_slots: int = 32
    max_waiting: int = 128
    prefill_chunk: int = 256
    prompt_lookup_tokens: int = 0  # used where bits do not depend on how many tokens are read
    kv_cache_bytes: int | None = None  # None: a quarter of what is free after loading
    native: Path | None = None  # where the compiled kernels are kept; None: without them
    plans: Path | None = None  # where is kept what a load found out; None: nowhere
    quantization: str = "none"  # or int8, int4: only with the kernels, else the load fails
    # What a loaded model does not depend on: who hears of every step, what raises where bytes of
    # weights do not fit, where unloaded models go.
    listener: EngineListener | None = field(default=None, compare=False)
    check_room: Callable[[int], None] | None = field(default=None, compare=False)
    sleeping: SleepingModels = field(default_factory=SleepingModels, compare=False)


def load_engine(
    folder: Path, options: LoadOptions, thread: EngineThread, wrap: Wrap | None = None
) -> BatchingEngine:
    """Load a model and start serving it on ``thread``, which must be the calling thread.

    ``wrap`` puts observers around the runner and the sampler. A model that sleeps is woken up. One
    that the kernels refuse is loaded again without them, if it fits so, unless it was to be
    quantised. Raises ModelLoadFailed, InsufficientMemory.
    """
    device = pick_device(options.device)
    if _library(options, thread) is None:
        options = replace(options, native=None)
    key = folder, options
    if sleeper := options.sleeping.wake(key):
        engine = build_engine(sleeper.runner.model, options, thread, wrap, sleeper.runner)
    else:
        with without_collection():  # nearly all that is made now stays
            engine = _load(folder, device, options, thread, wrap)
        sleeper = Sleeper.of(innermost(engine.runner), folder)
    if sleeper:
        engine.on_closed = partial(options.sleeping.keep, key, sleeper)
    thread.engines.append(engine)
    trim_memory()  # of what loading and packing needed in between
    return engine


def _load(
    folder: Path, device: str, options: LoadOptions, thread: EngineThread, wrap: Wrap | None
) -> BatchingEngine:
    numbers, engine = 0, None

    def start(options: LoadOptions) -> BatchingEngine:
        nonlocal numbers
        dtype = "stored" if options.native and options.dtype == "auto" else options.dtype
        model = load_model(folder, device, dtype, options.trust_remote_code)
        numbers = sum(parameter.numel() for parameter in model.parameters())
        return build_engine(model, options, thread, wrap)

    while engine is None:
        # as text: a record that is kept somewhere must not keep the error, and with it the model
        try:
            engine = start(options)
        except PlanOutdated as error:
            log.warning("%s is not what was known of it: %s", folder.name, str(error))
            options = replace(options, plans=None)
        except NativeRefused as error:
            if options.quantization != "none":
                raise _not_quantized(options, str(error)) from error
            log.info("%s runs without native kernels: %s", folder.name, str(error))
            options = replace(options, native=None)
        if engine is None:  # out of the handler: the error's frames held the refused model
            release_memory()
        if engine is None and options.native is None and options.check_room is not None:
            options.check_room(numbers * DTYPE_BYTES.get(options.dtype, 4))
    return engine


def pick_device(wanted: str) -> str:
    """``auto`` is the first accelerator, else the CPU. Raises ModelLoadFailed if absent."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return "cuda" if has["cuda"] else "mps" if has["mps"] else "cpu"
    kind, _, index = wanted.partition(":")
    if not has.get(kind, kind == "cpu"):
        raise ModelLoadFailed(f"Device '{wanted}' is not available on this machine", param="device")
    if index and int(index) >= torch.cuda.device_count():
        raise ModelLoadFailed(
            f"Device '{wanted}': there are {torch.cuda.device_count()} GPUs", param="device"
        )
    return wanted


def load_model(folder: Path, device: str, dtype: str, trust_remote_code: bool) -> Any:
    """A causal language model in evaluation mode, every weight from the file.

    Raises ModelLoadFailed for a missing, unexpected or mismatched weight: transformers itself
    would fill the gap with random numbers and go on.
    """
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
        if config.is_encoder_decoder:
            raise ModelLoadFailed("Encoder-decoder models cannot be served")
        with differentiable(), ShapesOnly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=_dtype(dtype, device, config, folder),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except ModelLoadFailed:
        raise
    except Exception as error:
        log.exception("Loading %s failed", folder.name)
        raise ModelLoadFailed(f"The model cannot be loaded: {_first_line(error)}") from error
    model, info = loaded
    _check_loading_info(info)
    with differentiable():
        return model.to(device).eval().requires_grad_(False)


@contextmanager
def differentiable() -> Iterator[None]:
    """Weights made while it lasts can take part in a gradient.

    Those of the engine thread's inference mode never can.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def build_engine(
    model: Any,
    options: LoadOptions,
    thread: EngineThread,
    wrap: Wrap | None = None,
    woken: NativeRunner | None = None,
) -> BatchingEngine:
    """An engine for a loaded model: batching where the model allows, else one at a time.

    ``woken``: the runner that the model has already. Raises NativeRefused if ``options`` want the
    kernels and the model cannot have them; it may be of no use then.
    """
    head = model.get_output_embeddings()
    size = head.weight.shape[0] if head is not None else model.config.vocab_size
    vocab_size = min(size, options.tokenizer_size or size)
    window = context_window(model.config, options)
    library = _library(options, thread)
    runner, window, mode = _runner(model, options, vocab_size, window, library, woken)
    limits = EngineLimits(
        max_model_len=window,
        vocab_size=vocab_size,
        num_slots=options.num_slots if mode == "batching" else 1,
        max_waiting=options.max_waiting + (0 if mode == "batching" else options.num_slots - 1),
        prefill_chunk=options.prefill_chunk if mode == "batching" else window,
        eos_token_ids=options.eos_token_ids | _eos_of(model),
        context_overflow=getattr(model.config, "context_overflow", None),
        prompt_window=getattr(model.config, "prompt_window", None),
        torch_noise=getattr(model.config, "sampling_noise", None) == "torch",
        busy_chunk=BUSY_CHUNK if model.device.type == "cpu" else None,
        prompt_lookup_tokens=options.prompt_lookup_tokens if library is not None else 0,
    )
    suppressed = getattr(model.generation_config, "suppress_tokens", None) or ()
    if ids := [token for token in suppressed if 0 <= token < vocab_size]:
        runner = SuppressingRunner(runner, ids)
    if library is None and model.device.type == "cpu":
        runner = SharingRunner(runner)
    runner = PromptScoringRunner(runner)
    sampler: TokenSampler = Sampler(NativeRace(library) if library else None)
    if wrap is not None:
        runner, sampler = wrap(model, limits, runner, sampler)
    return BatchingEngine(model, runner, limits, thread, mode, sampler, options.listener)


def context_window(config: Any, options: LoadOptions) -> int:
    """Tokens that the model can see: what its config allows, or less where the registry says so."""
    text = config.get_text_config(decoder=True)
    sizes = [getattr(text, name, None) for name in WINDOW_FIELDS]
    own = next((size for size in sizes if isinstance(size, int) and size > 0), None)
    if own is None:
        return options.max_context_tokens or options.default_context_tokens
    return min(own, options.max_context_tokens or own)


def _runner(
    model: Any,
    options: LoadOptions,
    vocab_size: int,
    window: int,
    library: Library | None,
    woken: NativeRunner | None,
) -> tuple[Runner, int, str]:
    """(runner, context window, mode): the fastest way that gives this model's own logits."""
    if library is not None:
        native = woken or _native_runner(model, options, vocab_size, window, library)
        return native, _bounded(native, options), "batching"
    if layers := _attention_layers(model):
        with differentiable():
            pack_linears(model)
        for batched in _batched_runners(model, layers, options.num_slots, window, vocab_size):
            if agrees(batched, model, vocab_size, window):
                return batched, _bounded(batched, options), "batching"
    for recompute in (False, True):
        runner = SequentialRunner(model, vocab_size, recompute)
        if agrees(runner, model, vocab_size, window):
            runner.clear()
            log.warning("%s is served one sequence at a time", type(model).__name__)
            return runner, window, "sequential"
    raise ModelLoadFailed(f"{type(model).__name__} cannot be run as a causal language model")


def _batched_runners(
    model: Any, layers: int, num_slots: int, window: int, vocab_size: int
) -> Iterator[ModelRunner]:
    """The fastest first; a model that reads its own results on the way cannot be captured."""
    if model.device.type == "cuda":
        yield GraphRunner(model, PaddedCache(layers, num_slots, window), vocab_size)
    yield ModelRunner(model, SlotCache(layers, num_slots, window), vocab_size)


def _native_runner(
    model: Any, options: LoadOptions, vocab_size: int, window: int, library: Library
) -> NativeRunner:
    layers = _attention_layers(model)
    if not layers:
        raise NativeRefused("it cannot share a batch")
    kind = kind_of(model, options.dtype, options.quantization)
    size, file = (layers, options.num_slots, window), None
    # Code of a model's own may change where nobody looks.
    if options.plans and options.stamp and not options.trust_remote_code:
        file = PlanFile.of(options.plans, options.stamp, options.dtype, kind, size)
    with differentiable():
        return checked_runner(model, library, kind, size, vocab_size, file)


def _bounded(runner: ModelRunner, options: LoadOptions) -> int:
    """Give the cache its budget, now that it has seen a forward; the longest sequence."""
    free = available_bytes(str(runner.model.device))
    window = runner.cache.set_budget(options.kv_cache_bytes or free // 4)
    runner.cache.clear()
    return window


def _library(options: LoadOptions, thread: EngineThread) -> Library | None:
    """The kernels if they are wanted and there; torch then leaves the cores to them."""
    quantizes, library = options.quantization != "none", None
    if pick_device(options.device) != "cpu":
        why = "it is for CPUs"
    elif options.native is None:
        why = "it needs NATIVE_KERNELS=true"
    else:
        kernels = kernel_provider(options.native, thread.num_threads)
        library = kernels.library(wait=quantizes)  # torch cannot do it meanwhile
        why = kernels.why_not
    torch.set_num_threads(1 if library else thread.num_threads or OWN_THREADS)
    if library is None and quantizes:
        raise _not_quantized(options, why)
    return library


def _not_quantized(options: LoadOptions, why: str) -> ModelLoadFailed:
    return ModelLoadFailed(
        f"The model cannot be loaded with quantization {options.quantization}: {why}",
        param="quantization",
    )


def _attention_layers(model: Any) -> int:
    """Layers of the slot cache; 0 for a model whose state is more than K and V per token."""
    if model._is_stateful or not model._supports_attention_backend:
        return 0
    config = model.config.get_text_config(decoder=True)
    if not set(getattr(config, "layer_types", None) or ()) <= ATTENTION_KINDS:
        return 0
    layers = DynamicCache(config=config).layers
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return len(layers) if plain else 0


def gpu_dtype(stored: str, stored_bytes: int) -> str:
    """What ``auto`` is on CUDA: the file's own, but 16 bits for a float32 file of any size."""
    if stored != "float32" or stored_bytes <= SMALL_BYTES:
        return stored
    return "bfloat16" if torch.cuda.is_bf16_supported() else "float16"


def _dtype(wanted: str, device: str, config: Any, folder: Path) -> Any:
    """Auto: float32 on a CPU, where tokens then do not depend on the batch; else see ``gpu_dtype``.

    The kernels keep that promise for weights of any dtype: with them it is ``stored``.
    """
    if wanted == "stored":
        return "auto"
    if wanted == "auto":
        if device == "cpu":
            return torch.float32
        stored = str(config.dtype).removeprefix("torch.")
        if not device.startswith("cuda") or stored == "None":
            return "auto"
        wanted = gpu_dtype(stored, sum(f.stat().st_size for f in folder.glob("*.safetensors")))
    return getattr(torch, wanted)


def _check_loading_info(info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info.get(kind) or ()):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelLoadFailed(
                f"The weights do not fit the configuration: {kind.replace('_', ' ')}: "
                f"{', '.join(keys[:3])}{more}"
            )


def _eos_of(model: Any) -> frozenset[int]:
    ids: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(decoder=True)):
        eos = getattr(source, "eos_token_id", None)
        ids.update([eos] if isinstance(eos, int) else eos or ())
    return frozenset(ids)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
