"""POST /v1/rerank, as Cohere and Jina have it, and /v1/score, as vLLM has it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers_api.api.http import request_log
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.request_size import check_prompt_bytes
from transformers_api.api.http.services import services
from transformers_api.api.openai.embeddings import only_when_enabled
from transformers_api.api.openai.format import new_id
from transformers_api.api.openai.schemas.rerank import (
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
)
from transformers_api.serving import embeddings, pairs
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.prompts import choose_prompt, count_prompt_tokens
from transformers_api.serving.swap.loaded_model import LoadedModel

Json = dict[str, Any]
Texts = Mapping[str, Sequence[str]]  # by the two fields they came in
blueprint = Blueprint("rerank", __name__, dialect=OPENAI, description="How near texts are")
RERANK_EXAMPLE = {
    "model": "all-minilm-l6-v2",
    "query": "Where do cats sleep?",
    "documents": ["A cat naps on the sofa.", "The stock market fell."],
}
SCORE_EXAMPLE = {"model": "all-minilm-l6-v2", "text_1": "A cat", "text_2": ["A kitten", "A bond"]}
_SIDES = {"query": "query", "documents": "document"}  # of a search; those of a score are alike
OFF = "`ENABLE_EMBEDDINGS_BACKEND` is off"


@blueprint.at("/v1/rerank", also={"/rerank": "rerank"}, methods=["POST"])
@only_when_enabled
@blueprint.takes(RerankRequest, example=RERANK_EXAMPLE)
@blueprint.gives(RerankAnswer)
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 501, description=OFF)
def create_rerank(body: Json) -> Any:
    """Sort documents by how near they are to a query."""
    scores, facts = _scores(body, {"query": [body["query"]], "documents": body["documents"]})
    nearest = sorted(range(len(scores)), key=lambda index: -scores[index])
    results: list[Json] = [
        {"index": index, "relevance_score": scores[index]} for index in nearest[: body.get("top_n")]
    ]
    if body["return_documents"]:
        for result in results:
            result["document"] = {"text": body["documents"][result["index"]]}
    return {
        "id": new_id("rerank"),
        "model": body["model"],
        "results": results,
        **facts,
    }


@blueprint.at("/v1/score", also={"/score": "score"}, methods=["POST"])
@only_when_enabled
@blueprint.takes(ScoreRequest, example=SCORE_EXAMPLE)
@blueprint.gives(ScoreAnswer)
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 501, description=OFF)
def create_score(body: Json) -> Any:
    """Say of pairs of texts how near they are."""
    scores, facts = _scores(body, {name: body[name] for name in ("text_1", "text_2")})
    return {
        "id": new_id("score"),
        "object": "list",
        "created": int(time.time()),
        "model": body["model"],
        "data": [
            {"index": index, "object": "score", "score": score}
            for index, score in enumerate(scores)
        ],
        **facts,
    }


def _scores(body: Json, texts: Texts) -> tuple[list[float], Json]:
    """The scores of the pairs of two fields' texts, and the answer's fields about them."""
    models = services().embeddings
    assert models is not None
    for name, items in texts.items():
        check_prompt_bytes(items, services().settings, name)
    with RequestContext(services()) as context:
        context.take_place()
        model = context.hold(
            models.lease(body["model"], context.cancellation, context.client, scores=True)
        )
        record = request_log.current()
        record.model = model.spec.name
        ways = _of_pairs if model.scorer else _of_vectors
        scores, tokens = ways(model, body, texts, context.cancellation)
        record.prompt_tokens = tokens
    return scores, {
        "scoring": "cross_encoder" if model.scorer else model.similarity,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _of_pairs(
    model: LoadedModel, body: Json, texts: Texts, cancellation: Cancellation
) -> tuple[list[float], int]:
    (first, firsts), (second, seconds) = texts.items()
    rows = pairs.encode(
        model,
        firsts,
        seconds,
        limit=body.get("truncate_prompt_tokens"),
        second_limit=body.get("max_tokens_per_doc"),
        fields=(first, second),
    )
    tokens = sum(len(ids) for ids, _ in rows)
    services().limits.reserve(tokens)  # all of it is used
    return pairs.score(model, rows, cancellation), tokens


def _of_vectors(
    model: LoadedModel, body: Json, texts: Texts, cancellation: Cancellation
) -> tuple[list[float], int]:
    limit = body.get("truncate_prompt_tokens")
    if limit is None and "max_tokens_per_doc" in body:
        limit = min(body["max_tokens_per_doc"], model.engine.max_model_len)
    prompts = {name: choose_prompt(model.prompts, input_type=_SIDES.get(name)) for name in texts}
    first, second = (
        embeddings.encode(model, items, limit, field=name, prompt=prompts[name])
        for name, items in texts.items()
    )
    tokens = sum(map(len, [*first, *second]))
    services().limits.reserve(tokens)
    skipped = [
        count
        for name, items in texts.items()
        for count in count_prompt_tokens(model, items, prompts[name]) or [0] * len(items)
    ]
    vectors = embeddings.embed(
        *(model, [*first, *second], None, cancellation),
        prompt_tokens=skipped if any(skipped) else (),
    )
    left, right = vectors[: len(first)], vectors[len(first) :]
    compared = zip(left * len(right) if len(left) == 1 else left, right, strict=True)
    kind = model.similarity
    return [embeddings.similarity(kind, one, other) for one, other in compared], tokens
