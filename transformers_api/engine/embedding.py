"""Vectors of texts: the pooled hidden states of an encoder, or of a causal model.

Every forward pass is a visit of the engine thread, between two decode steps of whoever is being
answered, and reads at most ``slice_tokens`` tokens where the model allows it.
"""

from __future__ import annotations

import copy
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, DynamicCache

from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.base import (
    NOTHING,
    ContextOverflow,
    Engine,
    EngineFacts,
    EngineListener,
    EngineStats,
    SequenceRequest,
    TokenStream,
)
from transformers_api.engine.load_options import LoadOptions
from transformers_api.engine.platform.cpu import usable_cores
from transformers_api.engine.platform.memory import release_memory
from transformers_api.engine.platform.meta_shapes import ShapesOnly
from transformers_api.engine.pretrained import context_window, pick_device, read_config
from transformers_api.engine.rope import follow_lengths, sequence_length, switching_lengths
from transformers_api.engine.thread import EngineThread
from transformers_api.errors import ApiError, ModelLoadFailed, ModelNotCapable, ModelUnloaded

T = TypeVar("T")
Mode = Literal["cls", "mean", "last"]
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reduction:
    """The reduction of a text's hidden states to one vector."""

    mode: Mode
    normalize: bool

    def finish(
        self, pooled: Tensor, dimensions: int | None, normalize: bool | None = None
    ) -> list[bytes]:
        """(B, H) as little-endian float32, cut to the first ``dimensions``."""
        vectors = pooled[:, :dimensions]
        if self.normalize if normalize is None else normalize:
            vectors = torch.nn.functional.normalize(vectors, dim=1)
        return [row.tobytes() for row in vectors.cpu().numpy().astype("<f4")]


class EncoderEngine:
    """Meets ``base.Engine`` for a model that makes vectors and no text."""

    eos_token_ids: frozenset[int] = frozenset()
    context_overflow: ContextOverflow = None

    def __init__(self, model: Any, max_model_len: int, thread: EngineThread) -> None:
        self.model = model
        self.facts = EngineFacts(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            bytes=sum(parameter.nbytes for parameter in model.parameters()),
            mode="encoder",
        )
        self.max_model_len = max_model_len
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.thread = thread
        self._threads = thread.num_threads or usable_cores()
        self._closed: ApiError | None = None

    def submit(
        self, requests: Sequence[SequenceRequest], *, observe: Mapping[str, Any] = NOTHING
    ) -> TokenStream:
        """Raises ModelNotCapable."""
        raise ModelNotCapable("This model makes embeddings, it does not generate text")

    def adapted(
        self,
        source: AdapterSource,
        *,
        listener: EngineListener | None = None,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> Engine:
        """Raises ModelNotCapable."""
        raise ModelNotCapable("A model that makes embeddings takes no adapters")

    def evict_adapter(self, name: str) -> bool:
        """See base.Engine."""
        return False

    def call(self, visit: Callable[[Any], T]) -> Future[T]:
        """See base.Engine."""

        def run() -> T:
            if self._closed:
                raise self._closed
            before = torch.get_num_threads()  # 1 beside a model that runs on native kernels
            torch.set_num_threads(self._threads)
            try:
                return visit(self.model)
            finally:
                torch.set_num_threads(before)

        return self.thread.call(run)

    def describe(self) -> EngineFacts:
        """See base.Engine."""
        return self.facts

    def stats(self) -> EngineStats:
        """See base.Engine."""
        return EngineStats(mode=self.facts.mode)

    def close(self, error: ApiError | None = None) -> None:
        """See base.Engine."""
        reason = error or ModelUnloaded("The model was unloaded")
        future = self.thread.call(lambda: self._close(reason))
        if self.thread.is_alive:
            future.result()

    def _close(self, error: ApiError) -> None:
        if self._closed is None:
            self._closed = error
            del self.model
            release_memory()


class Visitor:
    """Passes of a model between the steps of its engine: one at a time, by turns, from any thread.

    ``slice_tokens``: to be read in a pass, padding included.
    """

    def __init__(self, engine: Engine, slice_tokens: int) -> None:
        self.slice_tokens = slice_tokens
        self._engine = engine
        self._line = Line()  # several slices in the inbox would run without a step between
        lengths = self.visit(lambda model: switching_lengths(model, sys.maxsize))
        self._original = min(lengths, default=None)

    def of_one_kind(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """The numbers of rows that can share a pass: all, unless rope factors differ."""
        if self._original is None:
            return [[*range(len(rows))]]
        is_long = [len(row) > self._original for row in rows]
        kinds = [[i for i, own in enumerate(is_long) if own == kind] for kind in (False, True)]
        return [numbers for numbers in kinds if numbers]

    def visit(self, visit: Callable[[Any], T]) -> T:
        """The result of ``visit``, which gets the model, on the engine thread."""
        with self._line.turn():
            return self._engine.call(visit).result()


class PooledEmbedder(Visitor):
    """Meets ``serving.swap.Embedder``.

    ``reads_in_chunks``: a causal model can take a long text in pieces; its later tokens do not
    change the earlier ones.
    """

    def __init__(
        self, engine: Engine, reduction: Reduction, slice_tokens: int, *, reads_in_chunks: bool
    ) -> None:
        super().__init__(engine, slice_tokens)
        self._reduction = reduction
        self._reads_in_chunks = reads_in_chunks
        self.dimensions = int(self.visit(partial(_pooled, rows=[[0]], mode="last")).shape[1])

    def on(self, engine: Engine) -> PooledEmbedder:
        """See serving.swap.Embedder."""
        other = copy.copy(self)
        other._engine = engine
        return other

    def embed(
        self,
        rows: Sequence[Sequence[int]],
        dimensions: int | None = None,
        normalize: bool | None = None,
    ) -> list[bytes]:
        """See serving.swap.Embedder."""
        mode = self._reduction.mode
        finish = partial(self._reduction.finish, dimensions=dimensions, normalize=normalize)
        if self._reads_in_chunks and len(rows) == 1 and len(rows[0]) > self.slice_tokens:
            reading = _Reading(rows[0])
            while not reading.is_done:
                self.visit(partial(reading.read, width=self.slice_tokens))
            return self.visit(lambda _model: finish(reading.pooled(mode)))
        vectors: dict[int, bytes] = {}
        for numbers in self.of_one_kind(rows):
            pooled = partial(_pooled, rows=[rows[i] for i in numbers], mode=mode)
            made = self.visit(lambda model, pooled=pooled: finish(pooled(model)))  # type: ignore[misc]
            vectors |= zip(numbers, made, strict=True)
        return [vectors[i] for i in range(len(rows))]


class Line:
    """A lock whose holders come in the order in which they asked: who asks again is the last.

    One of ``threading`` goes to whoever is quick, which is the one that has just released it.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._line: deque[threading.Event] = deque()  # the first one holds it

    def __len__(self) -> int:
        """Those who hold it or wait for it."""
        return len(self._line)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn; it ends with the block."""
        turn = threading.Event()
        with self._guard:
            self._line.append(turn)
            self._line[0].set()
        turn.wait()
        try:
            yield
        finally:
            with self._guard:
                self._line.popleft()
                if self._line:
                    self._line[0].set()


class _Reading:
    """One long text, a chunk per visit."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = ids
        self.done = 0
        self.cache: Any = None
        self.first = self.last = self.sum = torch.empty(0)

    @property
    def is_done(self) -> bool:
        return self.done == len(self.ids)

    def read(self, model: Any, width: int) -> None:
        if self.cache is None:
            self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        ids = self.ids[self.done : self.done + width]
        stop = self.done + len(ids)
        with sequence_length(len(self.ids)):
            hidden = _hidden(
                model,
                input_ids=torch.tensor([ids], device=model.device),
                attention_mask=torch.ones(1, stop, dtype=torch.long, device=model.device),
                past_key_values=self.cache,
                use_cache=True,
            )
        total = hidden.sum(1)
        self.first = self.first if self.done else hidden[:, 0]
        self.sum = self.sum + total if self.done else total
        self.last = hidden[:, -1]
        self.done = stop

    def pooled(self, mode: Mode) -> Tensor:
        """(1, H)."""
        if mode == "mean":
            return self.sum / len(self.ids)
        return self.first if mode == "cls" else self.last


def load_encoder(
    folder: Path, options: LoadOptions, thread: EngineThread, *, with_head: bool = False
) -> EncoderEngine:
    """An encoder, ready for visits; on the engine thread. Raises ModelLoadFailed.

    Without its head a pooler that the file lacks is not used; ``with_head``: it scores pairs.
    """
    auto = AutoModelForSequenceClassification if with_head else AutoModel
    device = pick_device(options.device)
    dtype: Any = "auto" if options.dtype == "auto" else getattr(torch, options.dtype)
    if options.dtype == "auto" and device == "cpu":
        dtype = torch.float32
    try:
        with ShapesOnly():
            loaded: Any = auto.from_pretrained(
                folder,
                config=read_config(folder, options.trust_remote_code),
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        log.exception("Loading %s failed", folder.name)
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelLoadFailed(f"The model cannot be loaded: {reason}") from error
    model, info = loaded
    _check_weights(info, needs_pooler=with_head)
    follow_lengths(model)
    model = model.to(device).eval()
    return EncoderEngine(model, context_window(model, options), thread)


def _check_weights(info: dict[str, Any], *, needs_pooler: bool) -> None:
    lacking = {str(key) for key in info.get("missing_keys") or ()}
    lacking = {key for key in lacking if needs_pooler or "pooler" not in key.split(".")}
    lacking |= {str(key) for key in info.get("mismatched_keys") or ()}
    if lacking:
        raise ModelLoadFailed(
            "The weights do not fit the configuration: missing or of another shape: "
            f"{', '.join(sorted(lacking)[:3])}"
        )


def _hidden(model: Any, **inputs: Any) -> Tensor:
    """The last layer's states, float32 (B, T, H), without the language model's head."""
    output = model.base_model(**inputs, return_dict=True)
    hidden = getattr(output, "last_hidden_state", None)
    if hidden is None:
        raise ModelNotCapable(f"{type(model).__name__} does not show its hidden states")
    states: Tensor = hidden.float()
    return states


def padded(model: Any, rows: Sequence[Sequence[int]]) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of a pass (B, T), and the lengths of the rows (B)."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    pad = max(getattr(model.config, "pad_token_id", None) or 0, 0)
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    mask = (torch.arange(width) < lengths[:, None]).long().to(model.device)
    return {"input_ids": torch.tensor(ids, device=model.device), "attention_mask": mask}, lengths


def _pooled(model: Any, rows: Sequence[Sequence[int]], mode: Mode) -> Tensor:
    """(B, H) of texts of different lengths; what pads them takes no part."""
    inputs, lengths = padded(model, rows)
    hidden = _hidden(model, **inputs)
    if mode == "cls":
        return hidden[:, 0]
    if mode == "last":
        return hidden[torch.arange(len(rows)), lengths - 1]
    weights = inputs["attention_mask"][:, :, None].float()
    return (hidden * weights).sum(1) / weights.sum(1)
