"""POST /inspect/logit_parts: a logit as the sum of what the parts of the model add to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import NIELS
from transformers_api.api.http.error_schemas import Failed
from transformers_api.api.inspect import subjects
from transformers_api.api.inspect.schemas.logit_parts import LogitPartsRequest, SplitLogit
from transformers_api.api.inspect.subjects import Subject, opened
from transformers_api.errors import ModelNotCapable
from transformers_api.inspection import questions
from transformers_api.inspection.logit_share import LogitParts, LogitPartsQuestion, LogitShare
from transformers_api.serving.inspect import arrays
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint("logit_parts", __name__, dialect=NIELS, description="A logit's parts")

MOST_LISTED = 20  # where nobody says how many
CAPPED = "the model bends its logits after the head; the parts are of what the head gives"
_HELLO = {"prompt": "The capital of France is", "by": "layer"}


@blueprint.at("/inspect/logit_parts", methods=["POST"])
@blueprint.takes(LogitPartsRequest, example=_HELLO)
@blueprint.gives(SplitLogit)
@blueprint.gives(Failed, 413, description="Too much text, too many tokens or too many parts")
def logit_parts(body: dict[str, Any]) -> Any:
    """Say what each part of the model adds to the logit of a token: direct logit attribution.

    With the statistics of the final norm as they are, all that comes after the residual stream is
    linear, so that the shares add up to the logit. A share is direct: what a part does by way of
    later ones is theirs. With `intervene` what an edit adds to a part of this token is one, too.
    """
    with opened(body) as subject:
        anatomy, ids = subject.anatomy, subject.ids
        place = subjects.position(body["position"], len(ids), "position")
        for name in ("token", "against"):
            if isinstance(body.get(name), int):
                subjects.token(body[name], subject, name)
        if not anatomy.layers:
            raise ModelNotCapable("the layers of this model were not found", param="model")
        if body["by"] == "source":
            heads = sum(layer.heads for layer in anatomy.attention)
            subjects.check_read_cells(heads * (place + 1), subject.settings)
        question = LogitPartsQuestion(
            position=place,
            token_id=body.get("token"),
            against=body.get("against"),
            by=body["by"],
        )
        result = subject.ask(questions.LogitParts(ids, question))
        answer = _answer(subject, question, result, body.get("topk"))
        return {**answer, **subject.edit_header}


def _answer(
    subject: Subject, question: LogitPartsQuestion, result: LogitParts, topk: int | None
) -> dict[str, Any]:
    vocabulary = Vocabulary(subject.model.tokenizer)
    if topk is None:
        topk = len(result.shares) if question.by == "layer" else MOST_LISTED
    listed = result.largest(topk)
    if question.by == "layer":
        listed.sort()
    values = [share.value for share in result.shares]
    size = sum(map(abs, values)) + abs(result.constant)
    answer: dict[str, Any] = {
        "target": {**_token(vocabulary, result.token_id), "position": question.position},
        "against": _against(vocabulary, question),
        "by": question.by,
        "logit": arrays.digits(result.logit),
        "model_logit": arrays.digits(result.model_logit),
        "parts": [_share(vocabulary, subject.ids, result.shares[at]) for at in listed],
        "rest": arrays.digits(sum(values) - sum(values[at] for at in listed)),
        "constant": arrays.digits(result.constant),
        "rounding": arrays.digits(result.rounding),
        "verified_rel": arrays.digits(abs(result.rounding) / size if size else 0),
        "count": len(values),
        "note": CAPPED if result.is_capped else None,
    }
    if question.by == "source":
        answer["by_token"] = _by_token(result.shares, question.position + 1)
    return answer


def _token(vocabulary: Vocabulary, token_id: int) -> dict[str, Any]:
    return {"token_id": token_id, "token": vocabulary.decoded(token_id)}


def _against(vocabulary: Vocabulary, question: LogitPartsQuestion) -> Any:
    if isinstance(question.against, int):
        return _token(vocabulary, question.against)
    return question.against


def _share(vocabulary: Vocabulary, ids: Sequence[int], share: LogitShare) -> Mapping[str, Any]:
    answer: dict[str, Any] = {"part": share.part, "layer": share.layer}
    if share.part in ("head", "source"):
        answer["head"] = share.index
    if share.part == "edit":
        answer["of"] = share.of
    if share.part == "neuron":
        answer["neuron"] = share.index
    if share.part == "source":
        answer |= {"position": share.position, "token": vocabulary.decoded(ids[share.position])}
    return {**answer, "value": arrays.digits(share.value)}


def _by_token(shares: Sequence[LogitShare], count: int) -> list[float]:
    sums = [0.0] * count
    for share in shares:
        if share.part == "source":
            sums[share.position] += share.value
    return [arrays.digits(value) for value in sums]
