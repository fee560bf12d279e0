"""The fields of ``intervene``, as plain data, and how large they may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy

from transformers_api.errors import InvalidRequest
from transformers_api.inspection.base import Array
from transformers_api.inspection.editable import Part
from transformers_api.serving.inspect.edit_positions import At

MOST_EDITS = 32
MOST_INLINE = 4_000_000  # bytes of vectors
Do = Literal["add", "erase", "ablate", "scale", "set", "patch", "block", "temper", "feature"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EditRequest:
    """The fields of one edit."""

    do: Do
    part: Part = "resid"
    layers: tuple[int, ...] | Literal["all"] = "all"
    at: At = "all"
    heads: tuple[int, ...] | Literal["all"] | None = None
    neurons: tuple[int, ...] | Literal["all"] | None = None
    vector: Array | str | None = None  # (C,) or (L, C), or a name
    scale: float = 1.0
    by: float | None = None
    value: float | None = None
    any_model: bool = False  # a stored vector may be of another one
    units: Literal["raw", "norm"] = "raw"
    keep_norm: bool = False
    # Of ablate: numbers that are put there; of it and of patch: the prompt that they are from.
    instead: Literal["zero", "mean"] = "zero"
    source: str | None = None
    run: str | None = None  # or the run, by its id
    source_at: At | list[int] | None = None  # of patch: the positions there; None: as here
    # Of block and temper, whose part is "weights".
    queries: At = "all"
    keys: At = ()
    temperature: float = 1.0
    # Of feature: the autoencoder's name, which says part and layer, and the feature's number.
    sae: str | None = None
    feature: int = 0

    @property
    def has_source(self) -> bool:
        """True where the numbers are those of another text."""
        return self.source is not None or self.run is not None


@dataclass(frozen=True, slots=True)
class ForceRequest:
    """Output tokens that come whatever the model says, from a step on."""

    step: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class InterveneRequest:
    """The fields of ``intervene``; ``name`` is the field's own.

    ``compares``: the unedited model reads the answer too; see ``comparing.py``. ``has_twins``: it
    writes one of its own.
    """

    edits: tuple[EditRequest | ForceRequest, ...]
    compares: bool = False
    has_twins: bool = False
    store: bool = False  # keep the answer as a run
    source: Any = None  # the field as it came
    name: str = "intervene"


def check_size(request: InterveneRequest) -> None:
    """Raise InvalidRequest for more than one request may edit."""
    count = len(request.edits)
    if count > MOST_EDITS:
        raise InvalidRequest(
            f"{request.name} has {count} edits (max {MOST_EDITS})", param=request.name
        )
    edits = [each for each in request.edits if isinstance(each, EditRequest)]
    vectors = [each.vector for each in edits if isinstance(each.vector, numpy.ndarray)]
    if (size := sum(vector.nbytes for vector in vectors)) > MOST_INLINE:
        raise InvalidRequest(
            f"vectors sent inline have {size / 1e6:.1f} MB (max {MOST_INLINE // 10**6} MB); "
            "put them into /inspect/vectors",
            param=request.name,
        )
