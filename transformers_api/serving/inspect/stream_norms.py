"""The usual length of the residual stream after each layer: what an edit's size is measured by."""

from __future__ import annotations

from collections.abc import Callable

import numpy

from transformers_api.inspection import questions
from transformers_api.inspection.base import Array
from transformers_api.inspection.questions import Inspected, Question
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

TEXT = (
    "The library opens at nine and closes at six. Last year Anna wrote 3 letters to her brother in "
    "Lisbon; he answered none of them. Water boils at 100 degrees. def add(a, b): return a + b. "
    "Wer viel fragt, bekommt viele Antworten. La lune se lève au-dessus de la mer."
)
MOST_TOKENS = 96


def stream_norms(
    model: LoadedModel, inspector: Inspected, ask: Callable[[Question[Array]], Array]
) -> tuple[float, ...]:
    """The median L2 norm over the tokens of a text, of the embedding and after each layer.

    () where the text has no tokens. ``ask`` gives the answer to a question.
    """
    anatomy = inspector.anatomy
    most = min(MOST_TOKENS, model.engine.max_model_len)
    ids = chat_template.encode_text(model, TEXT)[:most]
    ids = [token for token in ids if token < model.engine.vocab_size]
    if not ids:
        return ()
    layers = range(-1, anatomy.layers)
    states = ask(questions.HiddenStates(ids, list(layers), list(range(len(ids)))))
    norms = numpy.median(numpy.linalg.norm(states, axis=-1), axis=-1)
    return tuple(float(norm) for norm in norms)
