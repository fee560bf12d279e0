"""Numbers of a text's parts, as the path that serves makes them: to the bit.

The text is one more sequence of the engine, among those that are answered, with edits that change
nothing and copy what they see.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Sequence
from typing import Any

import numpy

from transformers_api.engine.base import Engine, SamplingParams, SequenceRequest
from transformers_api.inspection.base import Array
from transformers_api.inspection.edit_plan import Edit, EditPlan
from transformers_api.inspection.editable import Part
from transformers_api.inspection.parts import Parts
from transformers_api.inspection.places import module_of


def served_parts(
    engine: Engine,
    model: Any,
    parts: Parts,
    ids: Sequence[int],
    places: Sequence[tuple[int, Part]],
) -> Generator[None, None, list[Array]]:
    """See ``base.Inspector.part_numbers``. Raises what the sequence ends with."""
    edits = [
        Edit(do="copy", part=part, layer=layer, positions=((0, None),), copies=[])
        for layer, part in places
    ]
    # An identity of its own: nothing is taken from the cache, so that all is read.
    plan = EditPlan(edits=tuple(edits), identity=secrets.token_hex(16))
    params = SamplingParams(max_tokens=1, temperature=0)
    stream = engine.submit([SequenceRequest(list(ids), params, edits=plan)])
    try:
        while (output := stream.get(0)) is None:
            yield
    finally:
        stream.abort()
    if output.error is not None:
        raise output.error
    modules = [module_of(parts.places.of(model), layer, part) for layer, part in places]
    factors = [1.0 if module is None else module.factor for module in modules]
    pairs = zip(edits, factors, strict=True)
    # Where there is a factor, float64 alone gives the same bits when an edit divides by it.
    return [
        numpy.concatenate(edit.copies or []) * (factor if factor != 1 else numpy.float32(1))
        for edit, factor in pairs
    ]
