"""POST /v1/rerank, as Cohere and Jina have it, and /v1/score, as vLLM has it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from transformers_api.api.http import request_log
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import RequestContext, check_prompt_bytes
from transformers_api.api.http.services import services
from transformers_api.api.openai.embeddings import only_when_enabled
from transformers_api.api.openai.format import new_id
from transformers_api.api.openai.schemas.rerank import (
    RerankAnswer,
    RerankRequest,
    ScoreAnswer,
    ScoreRequest,
)
from transformers_api.serving import embeddings

Json = dict[str, Any]
blueprint = Blueprint("rerank", __name__, dialect=OPENAI, description="How near texts are")
RERANK_EXAMPLE = {
    "model": "all-minilm-l6-v2",
    "query": "Where do cats sleep?",
    "documents": ["A cat naps on the sofa.", "The stock market fell."],
}
SCORE_EXAMPLE = {"model": "all-minilm-l6-v2", "text_1": "A cat", "text_2": ["A kitten", "A bond"]}
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
    texts = {"query": [body["query"]], "documents": body["documents"]}
    vectors, tokens = _vectors(body, texts)
    (query,) = vectors["query"]
    scores = [embeddings.cosine(query, document) for document in vectors["documents"]]
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
        "scoring": "cosine",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
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
    vectors, tokens = _vectors(body, {name: body[name] for name in ("text_1", "text_2")})
    first, second = vectors["text_1"], vectors["text_2"]
    pairs = zip(first * len(second) if len(first) == 1 else first, second, strict=True)
    return {
        "id": new_id("score"),
        "object": "list",
        "created": int(time.time()),
        "model": body["model"],
        "data": [
            {"index": index, "object": "score", "score": embeddings.cosine(one, other)}
            for index, (one, other) in enumerate(pairs)
        ],
        "scoring": "cosine",
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _vectors(
    body: Mapping[str, Any], texts: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[bytes]], int]:
    """The vectors of texts by the fields they came in, and the tokens of all."""
    models = services().embeddings
    assert models is not None
    for name, items in texts.items():
        check_prompt_bytes(items, services().settings, name)
    with RequestContext(services()) as context:
        context.take_place()
        model = context.hold(models.lease(body["model"], context.cancellation, context.client))
        record = request_log.current()
        record.model = model.spec.name
        limit = body.get("truncate_prompt_tokens")
        if limit is None and "max_tokens_per_doc" in body:
            limit = min(body["max_tokens_per_doc"], model.engine.max_model_len)
        rows = {
            name: embeddings.encode(model, items, limit, field=name)
            for name, items in texts.items()
        }
        every = [row for group in rows.values() for row in group]
        tokens = sum(map(len, every))
        services().limits.reserve(tokens)  # all of it is used
        vectors = iter(embeddings.embed(model, every, None, context.cancellation))
        record.prompt_tokens = tokens
    return {name: [next(vectors) for _ in group] for name, group in rows.items()}, tokens
