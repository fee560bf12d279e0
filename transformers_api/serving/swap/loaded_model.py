"""The resident model (LoadedModel), and what loads one (Loader)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Protocol

from transformers_api.engine.adapter_source import AdapterSource
from transformers_api.engine.base import Engine, PairIds
from transformers_api.inspection.questions import Inspected
from transformers_api.serving.constraints.compiler import Compiler
from transformers_api.serving.constraints.listener import ConstraintListener
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.models.spec import ModelFiles, ModelSpec, Prompts, Similarity
from transformers_api.serving.text.infilling import InfillTokens, infill_tokens
from transformers_api.serving.text.model_template import ModelTemplate
from transformers_api.serving.text.model_text import ModelText
from transformers_api.serving.text.vocabulary import Vocabulary


class Embedder(Protocol):
    """Makes vectors of texts. From any thread; the engine thread does the work."""

    @property
    def dimensions(self) -> int:
        """Numbers in a vector."""
        ...

    def on(self, engine: Engine) -> Embedder:
        """The same over another view of the same model."""
        ...

    @property
    def slice_tokens(self) -> int:
        """Tokens, padding included, to read between two decode steps of the resident model."""
        ...

    def embed(
        self,
        rows: Sequence[Sequence[int]],
        dimensions: int | None = None,
        normalize: bool | None = None,
        prompt_tokens: Sequence[int] = (),
    ) -> list[bytes]:
        """A vector per row of token ids, as little-endian float32: the first ``dimensions`` of it.

        ``normalize``: to length one, or not; None: as the model has it. ``prompt_tokens``: of each
        row, for models that leave a prompt out of the pooling.
        The rows are one slice. Raises ModelUnloaded, EngineDead.
        """
        ...


class PairScorer(Protocol):
    """Scores pairs of texts. From any thread; the engine thread does the work."""

    @property
    def slice_tokens(self) -> int:
        """See Embedder."""
        ...

    def score(self, pairs: Sequence[PairIds]) -> list[float]:
        """A score per pair, which are one slice. Raises ModelUnloaded, EngineDead."""
        ...


# Ask an upstream: (a GenerationRequest, the Cancellation) -> a Generation, once it has accepted.
Relay = Callable[[Any, Cancellation], Any]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A resident model. Meets ModelText."""

    spec: ModelSpec
    engine: Engine
    tokenizer: Any  # a transformers PreTrainedTokenizer; used read-only, from many threads
    device: str
    dtype: str
    file_types: Mapping[str, int] = field(default_factory=dict)  # of a GGUF file: see ModelFiles
    quantization: str = "none"  # "int8" or "int4"; dtype is then that of what is not quantised
    kernels: str = "torch"  # or "native"
    isa: str = ""  # the instruction set of native kernels
    bytes: int  # memory of the weights
    load_s: float
    fingerprint: str  # OpenAI's system_fingerprint: changes with weights, width, device, version
    created: int = 0
    count_tokens: Callable[[str], int] | None = None  # for usage; None: the model's own tokens
    embedder: Embedder | None = None  # where the registry entry says that it embeds
    prompts: Prompts = Prompts()  # noqa: RUF009 - it is frozen
    pools_prompts: bool = True  # the tokens of a prompt are pooled, too
    similarity: Similarity = "cosine"  # of two vectors, as the model was trained
    scorer: PairScorer | None = None  # of a cross encoder
    inspector: Inspected | None = None  # None: INSPECT_ENABLED is off
    is_outdated: Callable[[], bool] = bool  # whether loading it anew would make it faster
    constraint_listener: ConstraintListener | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    relay: Relay | None = None  # of a model that another server answers for; it has no tokenizer

    @property
    def vocab_size(self) -> int:
        """Its ids are below."""
        return self.engine.vocab_size

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer."""
        return self.engine.max_model_len

    @cached_property
    def template(self) -> ModelTemplate:
        """The tokenizer's chat template."""
        return ModelTemplate(self.tokenizer, self.engine.vocab_size)

    @property
    def end_of_turn(self) -> frozenset[int]:
        """See ModelTemplate."""
        return self.template.end_of_turn

    @cached_property
    def infill(self) -> InfillTokens | None:
        """The tokens for a text in the middle; None where the model has none."""
        return infill_tokens(self.tokenizer, self.engine.vocab_size)

    @cached_property
    def compiler(self) -> Compiler:
        """Of constraints, for the tokens of this model."""
        ends = self.engine.eos_token_ids | self.end_of_turn
        return Compiler(
            *(self.tokenizer, self.vocabulary, self.engine.vocab_size, ends),
            listener=self.constraint_listener,
        )

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Of the tokenizer: what a token stands for is looked up once, for all answers."""
        return Vocabulary(self.tokenizer)


@dataclass(frozen=True, kw_only=True)
class AdaptedModel(LoadedModel):
    """A resident model under the entry of an adapter; all that is by its tokenizer is shared."""

    base: LoadedModel

    @classmethod
    def of(
        cls,
        base: LoadedModel,
        spec: ModelSpec,
        engine: Engine | None = None,
        stamp: Hashable = None,
    ) -> AdaptedModel:
        """``spec``: of the adapter. ``engine``: with it; None: only texts are made with this.

        ``stamp``: another one when its files are.
        """
        own = {each.name: getattr(base, each.name) for each in fields(LoadedModel)}
        own |= {"spec": spec, "engine": engine or base.engine}
        if engine is not None and base.embedder is not None:
            own["embedder"] = base.embedder.on(engine)
        own["fingerprint"] = (
            f"{base.fingerprint}-{zlib.crc32(repr((spec.name, stamp)).encode()):08x}"
        )
        return cls(**own, base=base)

    @property
    def template(self) -> ModelTemplate:
        """The base's."""
        return self.base.template

    @property
    def infill(self) -> InfillTokens | None:
        """The base's."""
        return self.base.infill

    @property
    def compiler(self) -> Compiler:
        """The base's."""
        return self.base.compiler

    @property
    def vocabulary(self) -> Vocabulary:
        """The base's."""
        return self.base.vocabulary


def under_entry(resident: LoadedModel | None, spec: ModelSpec) -> LoadedModel | None:
    """The resident model as the entry ``spec`` has it, for texts; None where it is another one."""
    if resident is None or not spec.resident.is_same_model(resident.spec):
        return None
    return resident if spec.base is None else AdaptedModel.of(resident, spec)


PreparedAdapter = tuple[AdapterSource, ModelFiles]  # the files of its base


class Loader(Protocol):
    """The loader as the swapper sees it; ``app.py`` injects the real one."""

    def devices(self) -> Collection[str]:
        """The devices of this machine, such as "cpu", "cuda" and "cuda:0"."""
        ...

    def text(self, spec: ModelSpec) -> ModelText:
        """The tokenizer of a model, whose files are made complete; no weight is loaded.

        Raises ModelLoadFailed, InsufficientStorage.
        """
        ...

    def prepare(self, spec: ModelSpec, progress: Callable[[float, str], None]) -> ModelFiles:
        """Make the files complete on the disk (download, convert) and check them, without memory.

        Nothing of a resident model is touched. ``progress`` takes (share done 0..1, what is being
        done). Raises ModelLoadFailed, InsufficientStorage.
        """
        ...

    def prepare_adapter(
        self, spec: ModelSpec, progress: Callable[[float, str], None]
    ) -> PreparedAdapter:
        """The same for an adapter and its base, and check that they fit."""
        ...

    def find_adapter(self, spec: ModelSpec) -> PreparedAdapter | None:
        """The result of ``prepare_adapter``, unless a file of the adapter has changed; at once."""
        ...

    def adapt(
        self,
        model: LoadedModel,
        spec: ModelSpec,
        source: AdapterSource,
        *,
        timeout: float | None = None,
        is_cancelled: Callable[[], bool] = bool,
    ) -> LoadedModel:
        """The resident base with an adapter, until its engine is closed: see Engine.adapted."""
        ...

    def check_memory(self, spec: ModelSpec, files: ModelFiles, freed_bytes: int) -> bool:
        """Raise InsufficientMemory when the model cannot fit even after ``freed_bytes`` are freed.

        True when it fits beside what is resident now, with a fifth to spare.
        """
        ...

    def load(
        self, spec: ModelSpec, files: ModelFiles, progress: Callable[[float, str], None]
    ) -> LoadedModel:
        """Load into memory. ``progress`` as for ``prepare``. Raises ModelLoadFailed."""
        ...
