"""POST /inspect/stability: how far small random pushes move each prediction."""

from __future__ import annotations

from typing import Any

import numpy

from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.inspect.schemas.stability import StabilityRequest, StableTokens
from transformers_api.api.inspect.subjects import Subject, opened
from transformers_api.errors import InvalidRequest, ModelNotCapable
from transformers_api.inspection import questions
from transformers_api.inspection.divergence_question import DivergenceQuestion
from transformers_api.inspection.edit_plan import Edit, EditPlan
from transformers_api.serving.inspect import arrays
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint("stability", __name__, dialect=NIELS, description="Small pushes")


@blueprint.at("/inspect/stability", methods=["POST"])
@blueprint.takes(StabilityRequest, example={"prompt": "The capital of France is"})
@blueprint.gives(StableTokens)
@blueprint.gives(Failed, 413, description="Too much text, or too many tokens")
def stability(body: dict[str, Any]) -> Any:
    """Push the stream a little into random directions, and say how far each prediction moves.

    Of a recent answer its tokens, of another text all but the first. A token that a breath moves is
    one that the model does not know.
    """
    with opened(body) as subject:
        layer = _layer(subject, body.get("layer", subject.anatomy.layers // 2))
        first = 1 if subject.completion is None else len(subject.completion.prompt_ids)
        answer = subject.ids[first:]
        if subject.is_truncated or not answer:
            raise InvalidRequest("needs a text of two tokens that the model sees whole")
        compared = [
            DivergenceQuestion(answer=answer, plan=plan, topk=1)
            for plan in _plans(subject, body, layer)
        ]
        moved = subject.ask(questions.Pushes(subject.ids[:first], compared))
        kl = numpy.stack([each.kl for each in moved])
        vocabulary = Vocabulary(subject.model.tokenizer)
        return {
            "layer": layer,
            "scale": body["scale"],
            "samples": len(moved),
            "tokens": [
                {
                    "position": first + place,
                    "token_id": token_id,
                    "token": vocabulary.decoded(token_id),
                    "kl_mean": arrays.digits(float(kl[:, place].mean())),
                    "kl_max": arrays.digits(float(kl[:, place].max())),
                }
                for place, token_id in enumerate(answer)
            ],
            **subject.edit_header,
        }


def _layer(subject: Subject, layer: int) -> int:
    inspections, cancellation = subject.context.services.inspections, subject.context.cancellation
    editable = inspections.editable(subject.model, subject.inspector, cancellation)
    last = subject.anatomy.layers - 1
    if not -1 <= layer <= last:
        raise InvalidRequest(f"layer must be in [-1, {last}]", param="layer")
    if not editable.places or not editable.of(layer).can("resid"):
        raise ModelNotCapable(f"the stream after layer {layer} cannot be pushed", param="layer")
    return layer


def _plans(subject: Subject, body: dict[str, Any], layer: int) -> list[EditPlan]:
    """One for each direction, after the edits that were asked for."""
    inspections, cancellation = subject.context.services.inspections, subject.context.cancellation
    norms = inspections.stream_norms(subject.model, subject.inspector, cancellation)
    own = () if subject.edits is None or subject.edits.plan is None else subject.edits.plan.edits
    chance = numpy.random.default_rng(body["seed"])
    plans = []
    for number in range(body["samples"]):
        direction = chance.standard_normal(subject.anatomy.hidden_size)
        direction *= body["scale"] * norms[layer + 1] / numpy.linalg.norm(direction)
        push = Edit(
            do="add",
            part="resid",
            layer=layer,
            positions=((0, None),),
            vector=direction.astype(numpy.float32),
        )
        plans.append(EditPlan(edits=(*own, push), identity=f"push {number}"))
    return plans
