"""From a registry entry to a resident model: the store's files, the tokenizer, the engine.

Meets ``serving.models.Loader``. torch and transformers are imported when they are first needed, so
that a server answers its health checks before they are there.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from transformers_api import __version__
from transformers_api.config.settings import GIB, Settings, load_in_one_thread
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import InsufficientMemory, ModelLoadFailed, ModelNotCapable
from transformers_api.serving.models.encoder_files import read_encoder
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, Pooling
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.loaded_model import Embedder, LoadedModel
from transformers_api.serving.text.token_counts import token_counter

if TYPE_CHECKING:
    from transformers_api.engine.base import Engine, EngineListener
    from transformers_api.engine.loader import LoadOptions
    from transformers_api.engine.native.standby import SleepingModels
    from transformers_api.inspection.base import Inspector

RESERVE = 1.15  # of the weights: activations, the KV cache of a few short sequences
SPARE = 1.2  # of what is needed, to load beside a resident model
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTIZED_BYTES = {"int8": 1.07, "int4": 0.8}  # int4: 5/8, and the output layer's like int8


class _Tokenizer(NamedTuple):
    tokenizer: Any
    size: int  # largest id + 1


class ModelLoader:
    """Prepares in the caller's thread, loads on the engine's.

    ``make_room`` is asked for bytes that lack for a model, and says whether it freed them.
    ``listen`` gives what hears of the steps of the model with that name. ``wake`` is called when
    a loaded model has become outdated.
    """

    make_room: Callable[[int], bool] | None = None
    listen: Callable[[str], EngineListener] | None = None
    wake: Callable[[], None] | None = None

    def __init__(self, settings: Settings, store: ModelStore, thread: EngineThread) -> None:
        self.settings = settings
        self.store = store
        self.thread = thread
        self._sleeping: SleepingModels | None = None  # made with torch
        self._tokenizers: OrderedDict[Hashable, _Tokenizer] = OrderedDict()
        self._examinations: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # see Attachment
        load_in_one_thread()
        self._devices = thread.call(_devices)  # also the first import of torch

    def devices(self) -> Collection[str]:
        """See Loader. Never waits: only the CPU until torch has been imported."""
        known = self._devices.done() and not self._devices.exception()
        return self._devices.result() if known else ("cpu",)

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        """See Loader."""
        if spec.embedding == "encoder":
            raise ModelNotCapable(
                f"Model '{spec.name}' makes embeddings, it does not generate text", param="model"
            )
        if spec.token_encoding:  # what cannot be had is told before anything is loaded
            token_counter(spec.token_encoding)
        return self.store.prepare(spec, progress)

    def check_memory(self, spec: ModelSpec, files: ModelFiles, freed_bytes: int) -> bool:
        """See Loader."""
        device = self.thread.call(lambda: self._pick_device(spec)).result()
        free = self._free_bytes(device)
        need = int(self._weight_bytes(spec, files, device) * RESERVE)
        lacking = need - free - freed_bytes
        if lacking > 0 and self.make_room is not None and self.make_room(lacking):
            free = self._free_bytes(device)
        _require(spec, device, need, free + freed_bytes)
        return need * SPARE <= free

    def load(self, spec: ModelSpec, files: ModelFiles) -> LoadedModel:
        """See Loader."""
        started = time.monotonic()
        self.thread.call(_register_families).result()
        known = self._tokenizer(spec, files)
        is_outdated = self.thread.call(lambda: self._outdating(spec)).result()
        made = self.thread.call(lambda: self._load_engine(spec, files, known)).result()
        engine: Any = made[0]
        facts = self.thread.call(lambda: _facts(engine.model)).result()
        return LoadedModel(
            spec=spec,
            engine=engine,
            tokenizer=known.tokenizer,
            load_s=time.monotonic() - started,
            fingerprint=_fingerprint(files, facts),
            created=files.created,
            count_tokens=token_counter(spec.token_encoding) if spec.token_encoding else None,
            embedder=self._embedder(spec, files, engine),
            inspector=made[1],
            is_outdated=is_outdated,
            **facts,
        )

    def _tokenizer(self, spec: ModelSpec, files: ModelFiles) -> _Tokenizer:
        """That of these files; known ones are kept, of models that sleep and of the resident."""
        key, known = (files.folder, files.stamp, spec.trust_remote_code), self._tokenizers
        if (found := known.pop(key, None)) is None:
            tokenizer = _load_tokenizer(files.folder, spec.trust_remote_code)
            found = _Tokenizer(tokenizer, max(tokenizer.get_vocab().values(), default=0) + 1)
        known[key] = found
        sleeping = self.settings.sleeping_models
        while len(known) > (sleeping + 1 if sleeping else 0):
            known.popitem(last=False)
        return found

    def _outdating(self, spec: ModelSpec) -> Callable[[], bool]:
        """What says that the kernels, which a model loaded now does without, are compiled."""
        compiled = threading.Event()

        def tell() -> None:
            compiled.set()
            if self.wake is not None:
                self.wake()

        if self.settings.native_kernels and self._pick_device(spec) == "cpu":
            from transformers_api.kernels.provider import kernel_provider

            kernels = kernel_provider(self.settings.native_cache, self.settings.torch_threads)
            if kernels.library() is None:
                kernels.when_compiled(tell)
        return compiled.is_set

    def _load_engine(
        self, spec: ModelSpec, files: ModelFiles, known: _Tokenizer
    ) -> tuple[Engine, Inspector | None]:
        from transformers_api.engine.loader import load_engine

        options = self._options(spec, files, known)
        if not self.settings.inspect_enabled:
            return load_engine(files.folder, options, self.thread), None
        from transformers_api.inspection.attachment import Attachment

        attachment = Attachment(self.settings.prefill_chunk, self._examinations)
        engine = load_engine(files.folder, options, self.thread, attachment.wrap)
        return engine, attachment.inspector(engine)

    def _embedder(self, spec: ModelSpec, files: ModelFiles, engine: Engine) -> Embedder | None:
        if not isinstance(spec.embedding, Pooling):
            return None
        in_chunks = engine.stats().mode == "batching"
        return self._pooled(engine, spec.embedding, reads_in_chunks=in_chunks)

    def _pooled(self, engine: Engine, pooling: Pooling, *, reads_in_chunks: bool) -> Embedder:
        from transformers_api.engine.embedding import PooledEmbedder, Reduction

        reduction = Reduction(pooling.mode, pooling.normalize)
        size = self.settings.prefill_chunk
        return PooledEmbedder(engine, reduction, size, reads_in_chunks=reads_in_chunks)

    def _options(self, spec: ModelSpec, files: ModelFiles, known: _Tokenizer) -> LoadOptions:
        from transformers_api.engine.loader import LoadOptions
        from transformers_api.engine.native.standby import SleepingModels

        settings = self.settings
        if self._sleeping is None:
            self._sleeping = SleepingModels(settings.sleeping_models)
        eos = known.tokenizer.eos_token_id
        return LoadOptions(
            dtype=self._dtype(spec),
            device=self._device(spec),
            trust_remote_code=spec.trust_remote_code,
            max_context_tokens=spec.max_context_tokens,
            default_context_tokens=settings.max_context_tokens,
            eos_token_ids=frozenset() if eos is None else frozenset([eos]),
            tokenizer_size=known.size,
            stamp=files.stamp,
            num_slots=settings.max_inflight,
            max_waiting=settings.max_queue,
            prefill_chunk=settings.prefill_chunk,
            prompt_lookup_tokens=settings.prompt_lookup_tokens,
            kv_cache_bytes=int(settings.kv_cache_gib * GIB) if settings.kv_cache_gib else None,
            listener=self.listen(spec.name) if self.listen else None,
            native=settings.native_cache if settings.native_kernels else None,
            plans=settings.model_store.absolute() / "plans",
            check_room=lambda size: _require(
                spec, "cpu", int(size * RESERVE), _available_bytes("cpu")
            ),
            quantization=self._quantization(spec),
            sleeping=self._sleeping,
        )

    def _free_bytes(self, device: str) -> int:
        return self.thread.call(lambda: _available_bytes(device)).result()

    def _pick_device(self, spec: ModelSpec) -> str:
        from transformers_api.engine.loader import pick_device

        return pick_device(self._device(spec))

    def _device(self, spec: ModelSpec) -> str:
        return self.settings.default_device if spec.device == "auto" else spec.device

    def _dtype(self, spec: ModelSpec) -> str:
        return self.settings.dtype if spec.dtype == "auto" else spec.dtype

    def _quantization(self, spec: ModelSpec) -> str:
        return spec.quantization or self.settings.quantization

    def _weight_bytes(self, spec: ModelSpec, files: ModelFiles, device: str) -> int:
        if quantized := QUANTIZED_BYTES.get(self._quantization(spec)):
            return int(files.parameters * quantized)
        dtype = self._dtype(spec)
        if dtype == "auto":
            dtype = (
                self._automatic_dtype(files) if device == "cpu" else self._gpu_dtype(files, device)
            )
        return files.parameters * DTYPE_BYTES.get(dtype, 4)

    def _automatic_dtype(self, files: ModelFiles) -> str:
        """What a CPU serves; a model that refuses the kernels needs more and is told at load."""
        if not self.settings.native_kernels:
            return "float32"
        cache, threads = self.settings.native_cache, self.settings.torch_threads
        kernels = self.thread.call(lambda: _kernels(cache, threads)).result()
        stored = files.stored_dtype
        stored_bytes = files.parameters * DTYPE_BYTES.get(stored, 4)
        return (kernels and kernels("auto", stored, stored_bytes)) or "float32"

    def _gpu_dtype(self, files: ModelFiles, device: str) -> str:
        from transformers_api.engine.loader import gpu_dtype

        stored = files.stored_dtype
        stored_bytes = files.parameters * DTYPE_BYTES.get(stored, 4)
        return gpu_dtype(stored, stored_bytes) if device.startswith("cuda") else stored


class EncoderLoader(ModelLoader):
    """The same for the encoders of /v1/embeddings, which torch runs and nobody quantises."""

    def _outdating(self, spec: ModelSpec) -> Callable[[], bool]:
        return bool

    def _quantization(self, spec: ModelSpec) -> str:
        return "none"

    def _automatic_dtype(self, files: ModelFiles) -> str:
        return "float32"

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        """See Loader."""
        files = self.store.prepare(spec, progress)
        read_encoder(files.folder)  # what it wants and we cannot is told before anything is loaded
        return files

    def _load_engine(
        self, spec: ModelSpec, files: ModelFiles, known: _Tokenizer
    ) -> tuple[Engine, Inspector | None]:
        from transformers_api.engine.embedding import load_encoder

        limits = (
            spec.max_context_tokens,
            read_encoder(files.folder).max_tokens,
            known.tokenizer.model_max_length,  # enormous where it says nothing
        )
        options = replace(
            self._options(spec, files, known),
            max_context_tokens=min(limit for limit in limits if limit is not None),
        )
        return load_encoder(files.folder, options, self.thread), None

    def _embedder(self, spec: ModelSpec, files: ModelFiles, engine: Engine) -> Embedder:
        pooling = read_encoder(files.folder).pooling
        return self._pooled(engine, pooling, reads_in_chunks=False)


def _require(spec: ModelSpec, device: str, need: int, free: int) -> None:
    if need > free:
        raise InsufficientMemory(
            f"Model '{spec.name}' needs {need / GIB:.1f} GiB of memory on {device}, "
            f"{free / GIB:.1f} GiB can be had"
        )


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        raise ModelLoadFailed(f"The tokenizer cannot be loaded: {error}") from error
    _forget_words(tokenizer)
    return tokenizer


def _forget_words(tokenizer: Any) -> None:
    """Keep no words that were tokenized once.

    The BPE of tokenizers 0.23 remembers 10,000 words for each thread, of models that are gone too:
    with a thread per request gigabytes in the end. Without, a prompt takes twice as long, which is
    a millisecond for 2,000 characters.
    """
    from tokenizers.models import BPE

    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if isinstance(model, BPE) and hasattr(model, "_resize_cache"):  # no public name says it
        model._resize_cache(0)


def _register_families() -> None:
    from transformers_api import families

    families.register()


def _devices() -> list[str]:
    import torch

    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return ["cpu", *(["cuda"] if gpus else []), *gpus, *mps]


def _kernels(cache: Path, threads: int | None) -> Callable[[str, str, int], str | None] | None:
    """What says how weights are kept; None without kernels."""
    from transformers_api.engine.native.convert_model import weight_kind
    from transformers_api.kernels.provider import kernel_provider

    return weight_kind if kernel_provider(cache, threads).library() else None


def _available_bytes(device: str) -> int:
    from transformers_api.engine.platform.memory import available_bytes

    return available_bytes(device)


def _facts(model: Any) -> dict[str, Any]:
    """What LoadedModel tells of the model itself."""
    from transformers_api.engine.native.convert_model import native_kind, packed_bytes

    native = native_kind(model)
    own = sum(parameter.nbytes for parameter in model.parameters())  # on any device
    return {
        "device": str(model.device),
        "dtype": native.numbers if native else str(model.dtype).removeprefix("torch."),
        "quantization": native.quantization if native else "none",
        "kernels": "native" if native else "torch",
        "bytes": own + packed_bytes(model),
    }


def _fingerprint(files: ModelFiles, facts: dict[str, Any]) -> str:
    weights = [(p.name, p.stat().st_size) for p in sorted(files.folder.glob("*.safetensors"))]
    told = repr((__version__, weights, files.created, sorted(facts.items())))
    return "fp_" + hashlib.sha256(told.encode()).hexdigest()[:10]
