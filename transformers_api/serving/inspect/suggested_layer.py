"""The layer whose attention is worth a first look, found by a question with a known answer.

When a model is about to say "Paris", some layer reads "France" where it was asked for its capital.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import numpy

from transformers_api.errors import ApiError
from transformers_api.inspection import questions
from transformers_api.inspection.base import Anatomy, HeadGrid
from transformers_api.inspection.questions import Inspected, Question
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
BEGINNING = "The capital of France is"  # for models that do not chat by a template
WORD = b"France"
MOST_TOKENS = 256  # a template may write much around the question


def suggested_layer(
    model: LoadedModel, inspector: Inspected, ask: Callable[[Question[HeadGrid]], HeadGrid]
) -> int | None:
    """The layer; None for a model without attention. ``ask`` gives the answer to a question.

    Where the question cannot be asked it is the one at three quarters of them.
    """
    anatomy = inspector.anatomy
    layers = anatomy.layers_with_attention
    if not layers:
        return None
    ids = _probe(model)
    places = _places(model, ids)
    engine = model.engine
    is_readable = len(ids) <= min(MOST_TOKENS, engine.max_model_len)
    if not places or not is_readable or max(ids) >= engine.vocab_size:
        return layers[len(layers) * 3 // 4]
    # As wide as the text is long, a picture is the matrix itself.
    return _best(ask(questions.HeadGrid(ids, len(ids))), places, anatomy)


def _probe(model: LoadedModel) -> list[int]:
    if model.template.source and model.spec.chat in (None, "template"):
        try:
            return chat_template.encode(model, QUESTION).ids
        except ApiError:  # a template that refuses it
            pass
    return chat_template.encode_text(model, BEGINNING)


def _places(model: LoadedModel, ids: list[int]) -> list[int]:
    """The positions of the tokens of the word; the last time that it stands there."""
    pieces = [model.vocabulary.token_bytes(token_id) for token_id in ids]
    start = b"".join(pieces).rfind(WORD)
    if start < 0:
        return []
    ends = list(accumulate(map(len, pieces)))
    return [
        at
        for at, end in enumerate(ends)
        if end > start and end - len(pieces[at]) < start + len(WORD)
    ]


def _best(grid: HeadGrid, places: list[int], anatomy: Anatomy) -> int:
    """The layer that reads most from ``places``, of all and of what does not rest on the first."""
    assert grid.thumbs is not None
    row: Any = numpy.nanmean(grid.thumbs[anatomy.layers_with_attention, :, -1, :], axis=1)  # (L, S)
    read = row[:, places].sum(-1)
    score = numpy.nan_to_num(read * read / numpy.maximum(1 - row[:, 0], 1e-6), nan=-1.0)
    return anatomy.layers_with_attention[int(score.argmax())]
