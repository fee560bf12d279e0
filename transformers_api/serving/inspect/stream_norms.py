"""The usual length of the residual stream after each layer: what an edit's size is measured by."""

from __future__ import annotations

from collections.abc import Callable

import numpy

from transformers_api.inspection import questions
from transformers_api.inspection.base import Array
from transformers_api.inspection.questions import Inspected, Question
from transformers_api.serving.inspect.calibration import Calibration
from transformers_api.serving.swap.loaded_model import LoadedModel


def stream_norms(
    model: LoadedModel,
    inspector: Inspected,
    calibration: Calibration,
    ask: Callable[[Question[Array]], Array],
) -> tuple[float, ...]:
    """The median L2 norm over the tokens of some texts, of the embedding and after each layer.

    () where the texts have no tokens. ``ask`` gives the answer to a question.
    """
    layers = list(range(-1, inspector.anatomy.layers))
    texts = calibration.ids(model)
    if not texts:
        return ()
    read = [ask(questions.HiddenStates(ids, layers, list(range(len(ids))))) for ids in texts]
    states = numpy.concatenate(read, axis=1)
    norms = numpy.median(numpy.linalg.norm(states, axis=-1), axis=-1)
    return tuple(float(norm) for norm in norms)
