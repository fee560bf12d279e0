"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from transformers_api.api.http import request_log
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import RequestContext, upstream_refusal
from transformers_api.api.http.request_size import check_prompt_bytes
from transformers_api.api.http.services import services
from transformers_api.api.openai.schemas.embeddings import EmbeddingRequest, Embeddings
from transformers_api.api.openai.upstream import texts_only
from transformers_api.errors import EmbeddingsUnavailable
from transformers_api.serving import embeddings
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.prompts import choose_prompt, count_prompt_tokens
from transformers_api.serving.upstream.spec import UpstreamCall
from transformers_api.serving.upstream.vectors import read_vectors

blueprint = Blueprint("embeddings", __name__, dialect=OPENAI, description="OpenAI's embeddings")
EXAMPLE = {"model": "all-minilm-l6-v2", "input": "The colour of the sea"}
_PASSED = ("encoding_format", "dimensions", "input_type")
_NEED_TOKENS = ("truncate_prompt_tokens", "truncation_side", "normalize", "prompt_name")
View = TypeVar("View", bound=Callable[..., Any])


def only_when_enabled(view: View) -> View:
    """Refuse before the body is looked at: without a backend no body can be right."""

    @wraps(view)
    def guarded(*args: Any, **options: Any) -> Any:
        if services().embeddings is None:
            raise EmbeddingsUnavailable(
                "Embeddings backend is not configured. Set ENABLE_EMBEDDINGS_BACKEND=1 to enable."
            )
        return view(*args, **options)

    return cast(View, guarded)


@blueprint.at("/v1/embeddings", methods=["POST"])
@only_when_enabled
@blueprint.takes(EmbeddingRequest, example=EXAMPLE)
@blueprint.gives(Embeddings)
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 501, description="`ENABLE_EMBEDDINGS_BACKEND` is off")
def create_embeddings(body: dict[str, Any]) -> Any:
    """Make a vector of each text."""
    models = services().embeddings
    assert models is not None
    inputs = body["input"]
    texts = [item for item in inputs if isinstance(item, str)]
    check_prompt_bytes(texts, services().settings, "input")
    spec = services().registry.resolve(body["model"])
    with RequestContext(services()) as context:
        context.take_place()
        if spec.upstream is not None:
            return _relayed(context, spec, body)
        lease = models.lease(body["model"], context.cancellation, context.client)
        model = context.hold(lease)
        record = request_log.current()
        record.model = model.spec.name
        side = body.get("truncation_side", "right")
        prompt = choose_prompt(model.prompts, body.get("prompt_name"), body.get("input_type"))
        limit = body.get("truncate_prompt_tokens")
        rows = embeddings.encode(model, inputs, limit, side, prompt=prompt)
        services().limits.reserve(sum(map(len, rows)))  # all of it is used
        vectors = embeddings.embed(
            *(model, rows, body.get("dimensions"), context.cancellation, body.get("normalize")),
            prompt_tokens=count_prompt_tokens(model, inputs, prompt),
        )
    encoded = _base64 if body["encoding_format"] == "base64" else _numbers
    tokens = record.prompt_tokens = sum(map(len, rows))
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": index, "embedding": encoded(vector)}
            for index, vector in enumerate(vectors)
        ],
        "model": body["model"],
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _relayed(context: RequestContext, spec: ModelSpec, body: dict[str, Any]) -> Any:
    """The answer of the upstream, checked, under the name that the client used."""
    request_log.current().model = spec.name
    for name in _NEED_TOKENS:
        if name in body:
            raise upstream_refusal(spec, f"'{name}' needs its tokens", param=name)
    inputs = texts_only(spec, body["input"], "input")
    passed = {name: body[name] for name in _PASSED if name in body} | {"input": inputs}
    call = UpstreamCall(route="embeddings", body=passed)
    answer = read_vectors(
        services().upstreams.ask(spec, call, context.cancellation),
        count=len(body["input"]),
        is_text=body["encoding_format"] == "base64",
    )
    tokens = request_log.current().prompt_tokens = answer["usage"]["prompt_tokens"]
    services().limits.reserve(tokens)
    return {**answer, "model": body["model"]}


def _numbers(vector: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(vector) // 4}f", vector))


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()
