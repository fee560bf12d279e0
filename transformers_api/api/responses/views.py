"""/v1/responses: answers that agents ask for, and those that are kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import flask

from transformers_api.api.http.body import Blueprint
from transformers_api.api.http.error_schemas import Error
from transformers_api.api.http.request_context import Formatter, RequestContext, answer
from transformers_api.api.http.sampling_schema import MAX_TOKENS
from transformers_api.api.http.services import services
from transformers_api.api.openai.conversation import Conversation, Thinking
from transformers_api.api.openai.conversation_task import DEFAULTS, ConversationTask
from transformers_api.api.responses import input as response_input
from transformers_api.api.responses.format import RESPONSES, Head, ResponseFormatter, new_id
from transformers_api.api.responses.schema import (
    MAX_ITEMS,
    InputTokens,
    InputTokensRequest,
    ResponseBody,
    ResponseDeleted,
    ResponseItems,
    ResponseRequest,
)
from transformers_api.errors import InvalidRequest, NotFound, PreviousResponseNotFound
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.response_store import StoredResponse
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.tools.answer_plan import AnswerPlan

Json = dict[str, Any]
blueprint = Blueprint(
    "responses", __name__, dialect=RESPONSES, description="OpenAI's responses, for agents"
)
EXAMPLE = {"input": "Name three colours of the sea.", "max_output_tokens": 40}
LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
MAX_METADATA = 16
_SAMPLING = (
    *("temperature", "top_p", "top_k", "seed"),
    *("presence_penalty", "frequency_penalty"),
)


@blueprint.at("/v1/responses", methods=["POST"])
@blueprint.takes(ResponseRequest, example=EXAMPLE)
@blueprint.gives(ResponseBody)
@blueprint.gives(ResponseBody, content_type="text/event-stream")
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
@blueprint.gives(Error, 404, description="No such model")
@blueprint.gives(Error, 429, description="Too much is waiting; `Retry-After` says how long")
def create_response(body: dict[str, Any]) -> Any:
    """Answer, with tools, reasoning and forms.

    With `stream` the answer comes as events with names, each with a `sequence_number`; the last is
    `response.completed`, `response.incomplete` or `response.failed`.
    """
    turn = _Turn(body)
    return answer(turn.task())


@blueprint.at("/v1/responses/input_tokens", methods=["POST"])
@blueprint.takes(InputTokensRequest, example={"input": "Hello"})
@blueprint.gives(InputTokens)
@blueprint.gives(Error, 400, description="A field is wrong; `param` names it")
def count_input_tokens(body: dict[str, Any]) -> Any:
    """Count the tokens of an input, without an answer."""
    turn = _Turn(body)
    with RequestContext(services()) as context:
        model = context.text(body.get("model"), is_chat=True)
        count = len(turn.conversation.encode(model).ids)
    return {"object": "response.input_tokens", "input_tokens": count}


@blueprint.at("/v1/responses/<response_id>")
@blueprint.gives(ResponseBody)
@blueprint.gives(Error, 404, description="Not stored, or not any more")
def retrieve_response(response_id: str) -> Any:
    """Give a stored response again."""
    return _stored(response_id).body


@blueprint.at("/v1/responses/<response_id>", methods=["DELETE"])
@blueprint.gives(ResponseDeleted)
@blueprint.gives(Error, 404, description="Not stored, or not any more")
def delete_response(response_id: str) -> Any:
    """Forget a stored response."""
    if not services().responses.delete(response_id, flask.g.client):
        raise NotFound(f"Response '{response_id}' not found")
    return {"id": response_id, "object": "response", "deleted": True}


@blueprint.at("/v1/responses/<response_id>/input_items")
@blueprint.gives(ResponseItems)
@blueprint.gives(Error, 404, description="Not stored, or not any more")
def list_input_items(response_id: str) -> Any:
    """List the items of a stored response's input, the newest first unless `order` is `asc`."""
    items = list(_stored(response_id).items)
    arguments = flask.request.args
    if arguments.get("order", "desc") == "desc":
        items.reverse()
    ids = [item["id"] for item in items]
    after = arguments.get("after")
    start = ids.index(after) + 1 if after in ids else 0
    limit = arguments.get("limit", 20, type=int)
    if not 1 <= limit <= 100:
        raise InvalidRequest("'limit' must be from 1 to 100", param="limit")
    page = items[start : start + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": start + limit < len(items),
    }


@blueprint.at("/v1/responses/<response_id>/cancel", methods=["POST"])
@blueprint.gives(Error, 400, description="Nothing runs in the background here")
def cancel_response(response_id: str) -> Any:
    """Refuse: a response ends with its connection."""
    _stored(response_id)
    raise InvalidRequest("Only responses in the background can be cancelled; there are none here")


def _stored(response_id: str) -> StoredResponse:
    stored = services().responses.get(response_id, flask.g.client)
    if stored is None:
        raise NotFound(f"Response '{response_id}' not found")
    return stored


class _Turn:
    """One body: the conversation that it goes on with, and what becomes of its answer."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.body = body
        source = body.get("input", [])
        if not isinstance(source, str | list) or (
            isinstance(source, list) and len(source) > MAX_ITEMS
        ):
            raise InvalidRequest("'input' must be a string or a list of items", param="input")
        before = self._before()
        if not source and not before:
            raise InvalidRequest("'input' must not be empty", param="input")
        self.turns = [*before, *response_input.messages_of(source, before)]
        if len(self.turns) > MAX_ITEMS:
            raise InvalidRequest(
                f"The conversation has more than {MAX_ITEMS} turns", param="previous_response_id"
            )
        self.items = _with_ids(source)
        instructions = body.get("instructions")
        system = [{"role": "system", "content": instructions}] if instructions else []
        messages = [*system, *self.turns]
        use, self.free_tools = response_input.tools_of(body)
        reasoning = body.get("reasoning") or {}
        effort = reasoning.get("effort")
        variables = {} if effort is None else {"reasoning_effort": effort}
        self.conversation = Conversation(
            messages=messages,
            use=use,
            form=response_input.form_of(body),
            thinking=Thinking(
                enabled=False if effort == "none" else None, budget=_budget(reasoning)
            ),
            variables=variables,
            drops_oldest=body.get("truncation") == "auto",
        )
        _check_metadata(body.get("metadata") or {})

    def task(self) -> ConversationTask:
        """The task of the engine."""
        body = self.body
        scored = LOGPROBS in body.get("include", ())
        return ConversationTask(
            self.conversation,
            self._formatter,
            model_id=body.get("model"),
            is_streamed=body["stream"],
            texts=response_input.texts_of(self.conversation.messages),
            sampling={name: body[name] for name in _SAMPLING if name in body},
            most_tokens=body.get("max_output_tokens", MAX_TOKENS),  # agents name none
            logprobs=body.get("top_logprobs", 0) if scored else None,
            field="input",
            intervene=body.get("intervene"),
        )

    def _before(self) -> Sequence[Mapping[str, Any]]:
        previous = self.body.get("previous_response_id")
        if previous is None:
            return ()
        stored = services().responses.get(previous, flask.g.client)
        if stored is None:
            raise PreviousResponseNotFound(
                f"Response '{previous}' not found", param="previous_response_id"
            )
        return stored.messages

    def _formatter(
        self, model: LoadedModel, request: GenerationRequest, plan: AnswerPlan
    ) -> Formatter:
        body = self.body
        include = body.get("include", ())
        owner, store = flask.g.client, services().responses
        is_kept = body["store"] and store.keeps_any
        head = Head(
            id=new_id("resp"),
            created_at=int(time.time()),
            model=body.get("model") or model.spec.name,
            prompt=request.prompts[0],
            echoed=_echoed(body, request, is_kept=is_kept),
            free_tools=self.free_tools,
            with_sealed=SEALED in include,
            with_logprobs=LOGPROBS in include,
            edits=request.edits,
            run=request.run,
        )

        def keep(answered: Json, turn: Sequence[Json]) -> None:
            if is_kept:
                messages = [*self.turns, *turn]
                response = StoredResponse(
                    body=answered, items=self.items, messages=messages, owner=owner
                )
                store.put(head.id, response)

        return ResponseFormatter(head, plan, keep)


def _with_ids(source: str | list[Any]) -> list[Json]:
    """The items of an input, each with an id."""
    if isinstance(source, str):
        content = [{"type": "input_text", "text": source}]
        source = [{"type": "message", "role": "user", "content": content}]
    if response_input.are_parts(source):
        source = [{"type": "message", "role": "user", "content": source}]
    return [
        {"id": new_id("msg"), "type": "message", **item}
        for item in source
        if isinstance(item, dict)
    ]


def _budget(reasoning: Mapping[str, Any]) -> int | None:
    budget = reasoning.get("max_tokens")
    if budget is not None and (not isinstance(budget, int) or budget < 0):
        raise InvalidRequest(
            "'reasoning.max_tokens' must be a number of tokens", param="reasoning.max_tokens"
        )
    return budget


def _check_metadata(metadata: Mapping[str, Any]) -> None:
    is_text = all(isinstance(value, str) and len(value) <= 512 for value in metadata.values())
    if len(metadata) > MAX_METADATA or not is_text or any(len(key) > 64 for key in metadata):
        raise InvalidRequest(
            f"'metadata' must have at most {MAX_METADATA} texts of 512 characters", param="metadata"
        )


def _echoed(body: Mapping[str, Any], request: GenerationRequest, *, is_kept: bool) -> Json:
    """The fields of a request that stand in its answer."""
    text = body.get("text") or {}
    return {
        "frequency_penalty": body.get("frequency_penalty", 0.0),
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": body.get("metadata") or {},
        "parallel_tool_calls": body["parallel_tool_calls"],
        "presence_penalty": body.get("presence_penalty", 0.0),
        "previous_response_id": body.get("previous_response_id"),
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": None, "summary": None, **(body.get("reasoning") or {})},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
        "store": is_kept,
        "temperature": body.get("temperature", DEFAULTS["temperature"]),
        "text": {"format": {"type": "text"}, **text},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools") or [],
        "top_logprobs": body.get("top_logprobs", 0),
        "top_p": body.get("top_p", DEFAULTS["top_p"]),
        "truncation": body.get("truncation", "disabled"),
        "user": body.get("user"),
    }
