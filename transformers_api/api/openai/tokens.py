"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from typing import Any

from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import OPENAI
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import RequestContext
from transformers_api.api.http.request_size import check_prompt_bytes
from transformers_api.api.http.services import services
from transformers_api.api.openai import requests
from transformers_api.api.openai.schemas.tokens import (
    TEXT_NAMES,
    DetokenizeAnswer,
    DetokenizeRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)
from transformers_api.api.openai.views import message_texts, template_options
from transformers_api.errors import ModelNotLoaded
from transformers_api.serving.text import chat_template
from transformers_api.serving.text.model_template import special_tokens
from transformers_api.serving.text.vocabulary import Vocabulary

blueprint = Blueprint("tokens", __name__, dialect=OPENAI, description="Text to token ids, and back")


@blueprint.at("/tokenize", methods=["POST"])
@blueprint.takes(TokenizeRequest, example={"prompt": "Hello, world"})
@blueprint.gives(TokenizeAnswer)
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
def tokenize(body: dict[str, Any]) -> Any:
    """Turn a text, or a conversation, into the ids that the model reads."""
    name = next((name for name in TEXT_NAMES if name in body), "messages")
    texts = message_texts(body[name]) if name == "messages" else [body[name]]
    check_prompt_bytes(texts, services().settings, name)
    with RequestContext(services()) as context:
        model = context.text(body.get("model"))
        if name == "messages":
            ids = chat_template.encode(model, body["messages"], **template_options(body)).ids
        else:
            ids = chat_template.encode_text(model, body[name], body["add_special_tokens"], name)
        answer = {"tokens": ids, "count": len(ids), "max_model_len": model.max_model_len}
        if body["return_token_strs"]:
            vocabulary = Vocabulary(model.tokenizer)
            answer["token_strs"] = [vocabulary.token_text(token_id) for token_id in ids]
        return answer


@blueprint.at("/detokenize", methods=["POST"])
@blueprint.takes(DetokenizeRequest, example={"tokens": [19556, 28]})
@blueprint.gives(DetokenizeAnswer)
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
def detokenize(body: dict[str, Any]) -> Any:
    """Turn token ids into text."""
    with RequestContext(services()) as context:
        model = context.text(body.get("model"))
        requests.check_ids(model, body["tokens"], "tokens")
        text = chat_template.decode_ids(model, body["tokens"])
        return {"prompt": text, "text": text}


@blueprint.at("/tokenizer_info")
@blueprint.gives(TokenizerInfo)
@blueprint.gives(Error, 503, description="No model is in memory")
def tokenizer_info() -> Any:
    """Describe the tokenizer of the resident model. Loads nothing."""
    model = services().swapper.resident()
    if model is None:
        raise ModelNotLoaded(services().settings.default_model)
    vocabulary = model.vocabulary
    return {
        "tokenizer_class": type(model.tokenizer).__name__,
        "model": model.spec.name,
        "chat_template": model.template.source or None,
        "vocab_size": len(model.tokenizer),
        "model_max_length": model.engine.max_model_len,
        **special_tokens(model.tokenizer),
        "added_tokens_decoder": {
            str(token_id): {"content": text, "special": token_id in vocabulary.special_ids}
            for token_id, text in sorted(vocabulary.added.items())
        },
    }
