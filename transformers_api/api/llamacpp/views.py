"""llama-server's routes: /apply-template, /infill, /props."""

from __future__ import annotations

from typing import Any

from transformers_api import __version__
from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.dialects import LLAMA_CPP
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import RequestContext, answer
from transformers_api.api.http.request_size import check_prompt_bytes
from transformers_api.api.http.services import services
from transformers_api.api.llamacpp.infill import InfillTask
from transformers_api.api.llamacpp.schema import (
    ApplyTemplateAnswer,
    ApplyTemplateRequest,
    InfillAnswer,
    InfillRequest,
    Props,
)
from transformers_api.api.openai import requests
from transformers_api.api.openai.views import CHAT_DEFAULTS, conversation_of, message_texts
from transformers_api.errors import ModelNotLoaded
from transformers_api.serving.text.model_template import special_tokens

blueprint = Blueprint(
    "llamacpp", __name__, dialect=LLAMA_CPP, description="llama-server's own routes"
)
TEMPLATE_EXAMPLE = {"messages": [{"role": "user", "content": "Hi"}]}
INFILL_EXAMPLE = {
    "input_prefix": "def add(a, b):\n    return ",
    "input_suffix": "\n\nprint(add(1, 2))\n",
    "n_predict": 16,
}


@blueprint.at("/apply-template", methods=["POST"])
@blueprint.takes(ApplyTemplateRequest, example=TEMPLATE_EXAMPLE)
@blueprint.gives(ApplyTemplateAnswer)
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
def apply_template(body: dict[str, Any]) -> Any:
    """Turn a conversation into the prompt that a chat completion would read."""
    check_prompt_bytes(message_texts(body["messages"]), services().settings, "messages")
    conversation = conversation_of(body)
    with RequestContext(services()) as context:
        model = context.text(body.get("model"), is_chat=True)
        return {"prompt": conversation.encode(model).text}


@blueprint.at("/infill", methods=["POST"])
@blueprint.takes(InfillRequest, example=INFILL_EXAMPLE)
@blueprint.gives(InfillAnswer)
@blueprint.gives(InfillAnswer, content_type="text/event-stream")
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
def infill(body: dict[str, Any]) -> Any:
    """Write what stands between two texts.

    With `stream` the answer comes as server-sent events, the last with `stop: true`.
    """
    return answer(InfillTask(body))


@blueprint.at("/props")
@blueprint.gives(Props)
@blueprint.gives(Error, 503, description="No model is in memory")
def props() -> Any:
    """Say what the resident model is and how it is served. Loads nothing."""
    model = services().swapper.resident()
    if model is None:
        raise ModelNotLoaded(services().settings.default_model)
    specials = special_tokens(model.tokenizer)
    return {
        "default_generation_settings": {
            "n_ctx": model.engine.max_model_len,
            "params": {**CHAT_DEFAULTS, **requests.registered_options(model)},
        },
        "total_slots": services().admission.slots,
        "model_path": model.spec.name,
        "model_alias": model.spec.name,
        "chat_template": model.template.source,
        "bos_token": specials.get("bos_token", ""),
        "eos_token": specials.get("eos_token", ""),
        "modalities": {"vision": False, "audio": False},
        "build_info": f"transformers_api {__version__}",
    }
