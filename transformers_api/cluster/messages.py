"""All that passes between fronts and replicas. Plain data, none of it as a client has sent it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, cast

from transformers_api.engine.base import (
    ContextOverflow,
    EngineFacts,
    SequenceRequest,
    TokenOutput,
)
from transformers_api.errors import ApiError, EngineFailed
from transformers_api.inspection.base import Anatomy
from transformers_api.inspection.edit_plan import EditPlan, EditTally
from transformers_api.serving.constraints.plan import ConstraintPlan
from transformers_api.serving.models.spec import ModelSpec, Prompts, Similarity


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An ApiError on its way; those that are none have become EngineFailed."""

    kind: str
    message: str
    param: str | None = None
    retry_after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """Word of a replica that has a request, and not yet the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """The facts of a model in memory that a front needs to work with it."""

    stamp: str  # another one where its tokens are
    engine: EngineFacts
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    context_overflow: ContextOverflow
    tokenizer: Any
    fingerprint: str
    created: int
    load_s: float
    file_types: Mapping[str, int]
    anatomy: Anatomy | None
    prompts: Prompts
    pools_prompts: bool
    similarity: Similarity
    dimensions: int | None  # of its vectors; None: it makes none
    scores: bool
    slice_tokens: int  # of texts that are read at once
    age_s: float  # since it came into memory


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFacts:
    """The same of a model whose weights are not needed."""

    tokenizer: Any
    vocab_size: int
    max_model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever asks, and for which model. ``encoder``: it stands beside the resident one."""

    spec: ModelSpec
    client: str = ""
    request_id: str = "-"
    encoder: bool = False
    stamp: str | None = None  # of the facts that the request was made with; None: of none


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The sequences of one submit. Their constraints are plans, which start beside the model.

    ``name``: by which one of several is aborted, whichever replica has them.
    ``front``: whose answers may carry each other's tokens; empty: none does.
    """

    requests: Sequence[SequenceRequest]
    constraints: Sequence[ConstraintPlan | None]
    observe: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    front: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """The next outputs of a stream; a failure is of the output in the same place.

    A front and a replica of two versions understand each other: new fields come last.
    """

    outputs: Sequence[TokenOutput]
    failures: Mapping[int, Failure] = field(default_factory=dict)
    tallies: Sequence[EditTally] = ()  # of the edits of each sequence so far, where there are any
    position: int = 0  # of the first one among all of the stream
    again: Sequence[int] = ()  # tokens before ``outputs``, which other streams may have lost
    # Of other answers to the same front, by their names: position and tokens.
    carried: Mapping[str, tuple[int, Sequence[int]]] = field(default_factory=dict)


def place_of(spec: ModelSpec) -> str:
    """The text that requests for the model of ``spec`` are routed by: its name and its files.

    While fronts of two registries run, each model of them is on replicas of its own.
    """
    model = spec.resident
    return f"{model.name}@{sha256(repr(model.source).encode()).hexdigest()[:8]}"


def failure_of(error: BaseException) -> Failure:
    """``error`` in words that travel."""
    if not isinstance(error, ApiError):
        message = "A replica failed to handle the request; its log says more"
        return Failure(kind=EngineFailed.__name__, message=message)
    return Failure(
        kind=type(error).__name__,
        message=error.message,
        param=error.param,
        retry_after=error.retry_after,
    )


def error_of(failure: Failure) -> ApiError:
    """The error again."""
    kind = {each.__name__: each for each in _kinds()}.get(failure.kind, EngineFailed)
    error: ApiError = kind.__new__(kind)  # some make their message themselves
    ApiError.__init__(error, failure.message, param=failure.param, retry_after=failure.retry_after)
    return error


def _kinds() -> Iterator[type[ApiError]]:
    kinds: list[type[ApiError]] = [ApiError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        yield kind


def tallies(requests: Sequence[SequenceRequest]) -> list[EditTally]:
    """The work of each sequence's edits so far; empty where none is edited."""
    plans = [cast("EditPlan | None", request.edits) for request in requests]
    if not any(plans):
        return []
    return [EditTally() if plan is None else plan.tally for plan in plans]


def note_tallies(requests: Sequence[SequenceRequest], message: Outputs) -> None:
    """Give the plans of ``requests`` what was counted elsewhere."""
    for own, tally in zip(tallies(requests), message.tallies, strict=False):
        own.tokens, own.seconds = tally.tokens, tally.seconds


def packed(outputs: Sequence[TokenOutput], counted: Sequence[EditTally] = ()) -> Outputs:
    """``outputs`` on their way."""
    failures = {
        place: failure_of(output.error)
        for place, output in enumerate(outputs)
        if output.error is not None
    }
    plain = [replace(output, error=None, extras=dict(output.extras)) for output in outputs]
    return Outputs(outputs=plain, failures=failures, tallies=counted)


def unpacked(message: Outputs) -> list[TokenOutput]:
    """The outputs again."""
    outputs = list(message.outputs)
    for place, failure in message.failures.items():
        outputs[place] = replace(outputs[place], error=error_of(failure))
    return outputs
