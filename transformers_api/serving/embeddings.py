"""The one way texts become vectors or scores: which model, which token ids, in which slices.

An encoder lives beside the resident model, under a swapper of its own: loaded at its first use
when the memory suffices, one at a time, and unloaded when it is idle or its memory is needed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import numpy

from transformers_api.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotCapable,
    Overloaded,
)
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelSpec, Pooling, Similarity
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.swap.model_pool import ModelPool
from transformers_api.serving.swap.residency import ModelResolver
from transformers_api.serving.text import chat_template

Side = Literal["left", "right"]
MAX_TOKENS = 300_000  # of all texts of a request, as OpenAI's


class EncoderRegistry:
    """Meets ``residency.ModelResolver``: the entries that are encoders, and ids of the Hub."""

    def __init__(self, registry: ModelResolver) -> None:
        self._registry = registry

    def resolve(self, model_id: str) -> ModelSpec:
        """Raises ModelNotFound, ModelNotCapable."""
        spec = self._registry.resolve(model_id)
        if not spec.registered:  # its files will tell
            spec = replace(spec, embedding="encoder")
        if spec.embedding is None:
            raise ModelNotCapable(
                f"Model '{model_id}' makes no embeddings; its registry entry has no 'embedding'",
                param="model",
            )
        return spec


class EmbeddingModels:
    """The models of /v1/embeddings: encoders, and the resident model where its entry says so."""

    def __init__(
        self, registry: ModelResolver, models: ModelPool, encoders: ModelPool, max_requests: int
    ) -> None:
        self._registry = EncoderRegistry(registry)
        self._models = models
        self._encoders = encoders
        self._places = threading.BoundedSemaphore(max_requests)

    @contextmanager
    def lease(
        self, model_id: str, cancellation: Cancellation, client: str = "", *, scores: bool = False
    ) -> Iterator[LoadedModel]:
        """The model, which stays in memory until the end of the block.

        ``scores``: it may be one that makes no vectors. Raises ModelNotCapable, as Swapper.lease.
        """
        spec = self._registry.resolve(model_id)
        if spec.encoder == "cross_encoder" and not scores:
            raise ModelNotCapable(
                f"Model '{model_id}' is a cross encoder: it scores pairs of texts, for /v1/rerank "
                "and /v1/score, and makes no embeddings",
                param="model",
            )
        if not self._places.acquire(blocking=False):
            raise Overloaded("Too many requests for embeddings are waiting", retry_after=1)
        try:
            swapper = self._models if isinstance(spec.embedding, Pooling) else self._encoders
            lease = swapper.lease(spec, model_id=model_id, client=client, cancellation=cancellation)
            with lease:
                yield lease.model
        finally:
            self._places.release()

    @property
    def encoder(self) -> str | None:
        """The encoder in memory. Advisory."""
        return self._encoders.status().model

    def give_back(self, lacking_bytes: int) -> bool:
        """Unload the encoder if that frees so many bytes, after its requests; whether it did."""
        return self._encoders.status().bytes >= lacking_bytes and self._encoders.evict()


def encode(
    model: LoadedModel,
    inputs: Sequence[str | list[int]],
    limit: int | None = None,
    side: Side = "right",
    field: str = "input",
    prompt: str = "",
) -> list[list[int]]:
    """The token ids of every input; ids pass as they are. Raises InvalidRequest with ``param``.

    ``limit``: tokens of an input that are read, special ones included; -1: as many as the model
    reads; None: all, or it is refused. ``side`` is where the others are left out. ``field`` is the
    one that the inputs came in, for messages. ``prompt`` stands before each text.
    """
    limit = model.engine.max_model_len if limit == -1 else limit
    rows = []
    for index, item in enumerate(inputs):
        param = f"{field}[{index}]" if len(inputs) > 1 else field
        item = f"{prompt}{item}" if isinstance(item, str) else item
        row = chat_template.encode_text(model, item, True, param) if isinstance(item, str) else item
        if limit is not None and len(row) > limit:
            plain = row
            if isinstance(item, str):
                plain = chat_template.encode_text(model, item, False, param)
            row = _cut(row, plain, limit, side)
        check_row(model, row, param)
        rows.append(row)
    check_total(sum(map(len, rows)), field)
    return rows


def check_total(tokens: int, field: str) -> None:
    """Raise InvalidRequest where texts have more tokens together than a request may have."""
    if tokens > MAX_TOKENS:
        raise InvalidRequest(
            f"'{field}' has {tokens} tokens; at most {MAX_TOKENS} are allowed", param=field
        )


def _cut(row: list[int], plain: list[int], limit: int, side: Side) -> list[int]:
    """``limit`` tokens of ``row``, which is ``plain`` and special tokens around it: these stay."""
    count = len(plain)
    starts = range(len(row) - count + 1)
    start = next((at for at in starts if row[at : at + count] == plain), None)
    if start is None:  # special tokens in the middle
        plain, start, count = row, 0, len(row)
    before, after = row[:start], row[start + count :]
    room = max(limit - len(before) - len(after), 0)
    middle = plain[:room] if side == "right" else plain[count - room :]
    return [*before, *middle, *after][:limit]


def check_row(model: LoadedModel, row: Sequence[int], param: str) -> None:
    """Raise InvalidRequest for ids that the model cannot read."""
    most = model.engine.max_model_len
    if len(row) > most:
        raise ContextLengthExceeded(
            f"'{param}' has {len(row)} tokens; this model reads at most {most}", param=param
        )
    if not row:
        raise InvalidRequest(f"'{param}' has no tokens", param=param)
    size = model.engine.vocab_size
    if (largest := max(row)) >= size:
        raise InvalidRequest(
            f"'{param}' has token id {largest}; the ids of this model are below {size}. Ids of "
            "another tokenizer, such as tiktoken's, mean nothing to it: send text (LangChain's "
            "OpenAIEmbeddings does with check_embedding_ctx_length=False)",
            param=param,
        )


def embed(
    model: LoadedModel,
    rows: Sequence[Sequence[int]],
    dimensions: int | None,
    cancellation: Cancellation,
    normalize: bool | None = None,
    prompt_tokens: Sequence[int] = (),
) -> list[bytes]:
    """A vector per row, in their order, as little-endian float32.

    ``normalize``: to length one, or not; None: as the model's files or its entry say.
    ``prompt_tokens``: of each row, that take no part; none: all do.

    Raises InvalidRequest for more ``dimensions`` than the model has, ClientGone.
    """
    embedder = model.embedder
    assert embedder is not None  # only models that embed are leased for it
    if dimensions is not None and dimensions > embedder.dimensions:
        raise InvalidRequest(
            f"'dimensions' must not be larger than the model's {embedder.dimensions}",
            param="dimensions",
        )
    vectors = [b""] * len(rows)
    for indices in slices([len(row) for row in rows], embedder.slice_tokens):
        cancellation.check()
        skipped = [prompt_tokens[index] for index in indices] if prompt_tokens else []
        group = [rows[index] for index in indices]
        options = {"prompt_tokens": skipped} if skipped else {}
        made = embedder.embed(group, dimensions, normalize, **options)
        for index, vector in zip(indices, made, strict=True):
            vectors[index] = vector
    return vectors


def similarity(kind: Similarity, one: bytes, other: bytes) -> float:
    """The nearness of two vectors, little-endian float32; distances are negative.

    The cosine of the angle is 0 beside a vector of zeros.
    """
    first, second = (numpy.frombuffer(vector, "<f4").astype(float) for vector in (one, other))
    match kind:
        case "dot":
            return float(first @ second)
        case "euclidean":
            return -float(numpy.linalg.norm(first - second))
        case "manhattan":
            return -float(numpy.abs(first - second).sum())
    length = math.sqrt(float(first @ first) * float(second @ second))
    return max(-1.0, min(1.0, float(first @ second) / length)) if length else 0.0


def slices(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indices of rows of similar length that have at most ``most`` tokens with their padding.

    A longer row is a slice of its own.
    """
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and lengths[index] * (len(group) + 1) > most:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
