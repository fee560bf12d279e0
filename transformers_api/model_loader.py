"""From a registry entry to a resident model: the store's files, the tokenizer, the engine.

Meets ``serving.models.Loader``. torch and transformers are imported when they are first needed, so
that a server answers its health checks before they are there.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from transformers_api.adapter_loader import AdapterLoader
from transformers_api.config.environment import load_in_one_thread
from transformers_api.config.settings import GIB, Settings
from transformers_api.engine.load_deadline import LoadDeadline
from transformers_api.engine.load_options import AS_NUMBERS, DTYPE_BYTES, LoadOptions
from transformers_api.engine.load_progress import LoadProgress
from transformers_api.engine.native.packed_store import PackedStore, packed_key
from transformers_api.engine.native.program import program, sources
from transformers_api.engine.standby import StandbyModels
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import InsufficientMemory, ModelNotCapable
from transformers_api.model_facts import (
    available_bytes,
    engine_facts,
    fingerprint_of,
    register_families,
    torch_devices,
)
from transformers_api.serving.models.hub import Progress
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, Pooling, VectorStep
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.loaded_model import Embedder, LoadedModel, PairScorer
from transformers_api.serving.text.model_text import ModelText
from transformers_api.serving.text.token_counts import token_counter
from transformers_api.sidecar_writer import sidecar_writer
from transformers_api.tokenizer_loader import LoadedTokenizer, read_text, read_tokenizer

if TYPE_CHECKING:
    from transformers_api.engine.backend import Backend
    from transformers_api.engine.base import Engine, EngineListener
    from transformers_api.engine.native.packed_weights import PackedFile
    from transformers_api.inspection.base import Inspector
    from transformers_api.serving.constraints.listener import ConstraintListener

RESERVE = 1.15  # of the weights: activations, the KV cache of a few short sequences
TEXTS = 2  # tokenizers of models that are not in memory
SPARE = 1.2  # of what is needed, to load beside a resident model
WRITE_AFTER_S = 1.0  # who waits for a model comes before the disk
QUANTIZED_BYTES = {"int8": 1.07, "int4": 0.8}  # int4: 5/8, and the output layer's like int8

log = logging.getLogger(__name__)


def _unheard(_share: float, _text: str) -> None:
    """Nobody asks how far it is."""


class ModelLoader(AdapterLoader):
    """Prepares in the caller's thread, loads on the engine's.

    ``make_room`` is asked for bytes that lack for a model, and returns True if it freed them.
    ``listen`` gives the listener to the steps of the model with that name, ``constraint_listener``
    hears of constraints on answers of all. ``wake`` is called when a loaded model has become
    outdated.
    """

    def __init__(
        self,
        settings: Settings,
        store: ModelStore,
        thread: EngineThread,
        *,
        make_room: Callable[[int], bool] = lambda _lacking_bytes: False,
        listen: Callable[[str], EngineListener | None] = lambda _model: None,
        wake: Callable[[], object] = lambda: None,
        constraint_listener: ConstraintListener | None = None,
    ) -> None:
        self.settings = settings
        super().__init__(store, listen)
        self.thread = thread
        self._make_room, self._wake = make_room, wake
        self._constraint_listener = constraint_listener
        self.deadline = LoadDeadline(settings.model_wait_s)
        self._standby = StandbyModels(settings.sleeping_models, settings.sleeping_kv_mb << 20)
        self._packed = PackedStore.of(settings.model_store, settings.packed_store_mb)
        self._packed.keep_within_bound()
        self._tokenizers: OrderedDict[Hashable, LoadedTokenizer] = OrderedDict()
        self._texts: OrderedDict[Hashable, ModelText] = OrderedDict()  # of models not in memory
        self._text_lock, self._fetch_lock = threading.Lock(), threading.Lock()
        self._examinations: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # see Attachment
        store.write_sidecar = sidecar_writer(thread)
        load_in_one_thread()
        self._devices = thread.call(torch_devices)  # also the first import of torch

    def devices(self) -> Collection[str]:
        """See Loader. Never waits: only the CPU until torch has been imported."""
        is_there = self._devices.done() and not self._devices.exception()
        return self._devices.result() if is_there else ("cpu",)

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        """See Loader."""
        if spec.encoder:
            made = "embeddings" if spec.encoder == "encoder" else "scores"
            raise ModelNotCapable(
                f"Model '{spec.name}' makes {made}, it does not generate text", param="model"
            )
        if spec.token_encoding:  # an encoding that cannot be had: before anything is loaded
            token_counter(spec.token_encoding)
        files = self.store.prepare(spec, progress)
        if not self._devices.done():  # the process starts: cores wait for the imports of torch
            self._packed.read_ahead(self._packed_key(spec, files))
        return files

    def text(self, spec: ModelSpec) -> ModelText:
        """See Loader. Those that were asked for last stay here."""
        if self.store.is_cached(spec):
            files = self.prepare(spec, _unheard)
        else:  # of several who ask for one at once, one fetches it
            with self._fetch_lock:
                files = self.prepare(spec, _unheard)
        key = (spec.name, files.folder, files.stamp)
        with self._text_lock:
            if (text := self._texts.pop(key, None)) is None:
                self.thread.call(register_families).result()
                text = read_text(spec, files, self.settings.max_context_tokens)
            self._texts[key] = text
            if len(self._texts) > TEXTS:
                self._texts.popitem(last=False)
        return text

    def check_memory(self, spec: ModelSpec, files: ModelFiles, freed_bytes: int) -> bool:
        """See Loader."""
        device = self.thread.call(lambda: self._pick_device(spec)).result()
        ahead = self._packed.ahead_bytes(self._packed_key(spec, files))  # which is its own
        free = self._free_bytes(device) + ahead
        need = int(self._weight_bytes(spec, files) * RESERVE)
        if need > free + freed_bytes:
            self.thread.call(self._standby.forget_conversations).result()
            free = self._free_bytes(device) + ahead
        lacking = need - free - freed_bytes
        if lacking > 0 and self._make_room(lacking):
            free = self._free_bytes(device) + ahead
        if need > free + freed_bytes:
            self._packed.forget_ahead()
        _require(spec, device, need, free + freed_bytes)
        return need * SPARE <= free

    def load(
        self, spec: ModelSpec, files: ModelFiles, progress: Progress = _unheard
    ) -> LoadedModel:
        """See Loader."""
        try:
            with self.deadline.running():
                return self._load(spec, files, progress)
        finally:
            self._packed.forget_ahead()  # of a model that has not taken it

    def _load(self, spec: ModelSpec, files: ModelFiles, progress: Progress) -> LoadedModel:
        started = time.monotonic()
        self.thread.call(register_families).result()
        tokenizer = self._tokenizer(spec, files)
        options = self._options(spec, files, tokenizer)
        is_outdated = self.thread.call(lambda: self._outdating(options)).result()
        counted = LoadProgress(files.parameters, progress)
        work = partial(self._in_time, spec, files, options, counted)
        engine, inspector = self.thread.call(work).result()
        facts = engine_facts(engine.describe())
        loaded = LoadedModel(
            spec=spec,
            engine=engine,
            tokenizer=tokenizer.tokenizer,
            load_s=time.monotonic() - started,
            fingerprint=fingerprint_of(files, facts),
            file_types=files.file_types if files.stored_dtype == "gguf" else {},
            created=files.created,
            count_tokens=token_counter(spec.token_encoding) if spec.token_encoding else None,
            embedder=self._embedder(spec, files, engine),
            **self._text_use(files),
            scorer=self._scorer(spec, files, engine),
            inspector=inspector,
            is_outdated=is_outdated if facts["kernels"] == "torch" else lambda: False,
            constraint_listener=self._constraint_listener,
            **facts,
        )
        if spec.chat != "off" and (fault := loaded.template.fault) is not None:
            log.warning("The chat template of %s cannot be used: %s", spec.name, fault)
        return loaded

    def _tokenizer(self, spec: ModelSpec, files: ModelFiles) -> LoadedTokenizer:
        """The tokenizer of these files; those of standby models and of the resident stay here."""
        key, tokenizers = (files.folder, files.stamp, spec.trust_remote_code), self._tokenizers
        if (tokenizer := tokenizers.pop(key, None)) is None:
            tokenizer = read_tokenizer(spec, files)
        tokenizers[key] = tokenizer
        standby = self.settings.sleeping_models
        while len(tokenizers) > (standby + 1 if standby else 0):
            tokenizers.popitem(last=False)
        return tokenizer

    def _outdating(self, options: LoadOptions) -> Callable[[], bool]:
        """Return the question whether kernels, which were lacking at this load, are compiled."""
        from transformers_api.engine.backends import when_compiled

        compiled = threading.Event()

        def on_compiled() -> None:
            compiled.set()
            self._wake()

        when_compiled(options, self.thread.num_threads, on_compiled)
        return compiled.is_set

    def _in_time(
        self, spec: ModelSpec, files: ModelFiles, options: LoadOptions, progress: LoadProgress
    ) -> tuple[Engine, Inspector | None]:
        self.deadline.check()
        with self.deadline.between_tensors(), progress.counting():
            return self._load_engine(spec, files, options)

    def _load_engine(
        self, spec: ModelSpec, files: ModelFiles, options: LoadOptions
    ) -> tuple[Engine, Inspector | None]:
        from transformers_api.engine.loader import load_engine

        if not self.settings.inspect_enabled:
            return load_engine(files.folder, options, self.thread), None
        from transformers_api.inspection.attachment import Attachment
        from transformers_api.inspection.examination_file import ExaminationStore

        folder = self.settings.model_store.absolute() / "plans"
        store = ExaminationStore(folder, lambda: program() + sources("inspection"))
        attachment = Attachment(self.settings.prefill_chunk, self._examinations, store)
        engine = load_engine(files.folder, options, self.thread, attachment.wrap)
        return engine, attachment.inspector(engine)

    def _embedder(self, spec: ModelSpec, files: ModelFiles, engine: Engine) -> Embedder | None:
        if not isinstance(spec.embedding, Pooling):
            return None
        in_chunks = engine.describe().in_pieces
        return self._pooled(engine, spec.embedding, reads_in_chunks=in_chunks)

    def _scorer(self, spec: ModelSpec, files: ModelFiles, engine: Engine) -> PairScorer | None:
        return None

    def _text_use(self, files: ModelFiles) -> dict[str, Any]:
        """The fields of LoadedModel that say how its texts become vectors."""
        return {}

    def _pooled(
        self,
        engine: Engine,
        pooling: Pooling,
        steps: Sequence[VectorStep] = (),
        *,
        reads_in_chunks: bool,
    ) -> Embedder:
        from transformers_api.engine.embedding import PooledEmbedder
        from transformers_api.engine.pooling import Reduction, load_layers

        def layers() -> Any:
            device = engine.describe().device
            return load_layers([(step.kind, step.folder, step.config) for step in steps], device)

        reduction = Reduction(
            pooling.mode,
            pooling.normalize,
            self.thread.call(layers).result() if steps else None,
            pooling.include_prompt,
        )
        size = self.settings.prefill_chunk
        return PooledEmbedder(engine, reduction, size, reads_in_chunks=reads_in_chunks)

    def _options(
        self, spec: ModelSpec, files: ModelFiles, tokenizer: LoadedTokenizer
    ) -> LoadOptions:
        settings = self.settings
        eos = tokenizer.tokenizer.eos_token_id
        return replace(
            self._placement(spec),
            trust_remote_code=spec.trust_remote_code,
            max_context_tokens=spec.max_context_tokens,
            default_context_tokens=settings.max_context_tokens,
            eos_token_ids=frozenset() if eos is None else frozenset([eos]),
            tokenizer_size=tokenizer.size,
            stamp=files.stamp,
            num_slots=settings.max_inflight,
            max_waiting=settings.max_queue,
            prefill_chunk=settings.prefill_chunk,
            prefill_alone=settings.prefill_alone,
            prompt_lookup_tokens=settings.prompt_lookup_tokens,
            adapter_bytes=settings.max_adapters_mb << 20,
            kv_cache_bytes=int(settings.kv_cache_gib * GIB) if settings.kv_cache_gib else None,
            listener=self._listen(spec.name),
            plans=settings.model_store.absolute() / "plans",
            packed=self._packed_file(spec, files),
            check_room=lambda size: _require(
                spec, "cpu", int(size * RESERVE), available_bytes("cpu")
            ),
            standby=self._standby,
        )

    def _placement(self, spec: ModelSpec) -> LoadOptions:
        """The options that decide which backend runs a model, and in which format."""
        settings = self.settings
        return LoadOptions(
            dtype=settings.dtype if spec.dtype == "auto" else spec.dtype,
            device=settings.default_device if spec.device == "auto" else spec.device,
            native=settings.native_cache if settings.native_kernels else None,
            native_isa=settings.native_isa,
            quantization=spec.quantization or settings.quantization,
            kv_cache_dtype=settings.kv_cache_dtype,
        )

    def _packed_key(self, spec: ModelSpec, files: ModelFiles) -> str | None:
        """The name of the model's packed weights in the store; None where they are not kept."""
        if spec.encoder or not self.settings.packed_store_mb:
            return None
        trusts = spec.trust_remote_code
        options = replace(self._placement(spec), stamp=files.stamp, trust_remote_code=trusts)
        return packed_key(options, files.folder)

    def _packed_file(self, spec: ModelSpec, files: ModelFiles) -> PackedFile | None:
        from transformers_api.engine.native.packed_weights import PackedFile

        key = self._packed_key(spec, files)
        return PackedFile(self._packed, key, spec.name, WRITE_AFTER_S) if key else None

    def _free_bytes(self, device: str) -> int:
        return self.thread.call(lambda: available_bytes(device)).result()

    def _pick_device(self, spec: ModelSpec) -> str:
        from transformers_api.engine.pretrained import pick_device

        return pick_device(self._placement(spec).device)

    def _weight_bytes(self, spec: ModelSpec, files: ModelFiles) -> int:
        """Bytes of the weights, which a load takes little more than: they come tensor by tensor.

        Code of a model's own has them all in memory first. A model that the kernels refuse needs
        more, as its load finds.
        """
        whole = files.parameters * DTYPE_BYTES.get(files.stored_dtype, 4)
        return max(self._served_bytes(spec, files), whole if files.has_own_code else 0)

    def _served_bytes(self, spec: ModelSpec, files: ModelFiles) -> int:
        options, stored = self._placement(spec), files.stored_dtype
        if packed := self._packed.size(self._packed_key(spec, files)):
            return packed
        if quantized := QUANTIZED_BYTES.get(options.quantization):
            return int(files.parameters * quantized)
        backend = self.thread.call(lambda: self._backend(options)).result()
        as_numbers = options.quantization == "auto" and files.parameters < AS_NUMBERS
        if files.file_types and options.quantization != "none" and not as_numbers:
            return backend.file_bytes(files.file_types, options.dtype)
        stored_bytes = files.parameters * DTYPE_BYTES.get(stored, 4)
        dtype = backend.weight_dtype(options.dtype, stored, stored_bytes)
        return files.parameters * DTYPE_BYTES.get(dtype, 4)

    def _backend(self, options: LoadOptions) -> Backend:
        from transformers_api.engine.backends import choose_backends
        from transformers_api.engine.pretrained import pick_device

        return choose_backends(options, pick_device(options.device), self.thread.num_threads)[0]


def _require(spec: ModelSpec, device: str, need: int, free: int) -> None:
    if need > free:
        raise InsufficientMemory(
            f"Model '{spec.name}' needs {need / GIB:.1f} GiB of memory on {device}, "
            f"{free / GIB:.1f} GiB can be had"
        )
