"""POST /v1/responses and its kin."""

from __future__ import annotations

from transformers_api.api.http.fields import (
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    Text,
    Unsupported,
)
from transformers_api.api.http.sampling_schema import MAX_LOGPROBS, MAX_TOKENS, about
from transformers_api.api.intervene.schema import WritingInterveneOptions
from transformers_api.api.openai.schemas.structured import Whatever

MAX_ITEMS = 4096


class InputFields(Schema):
    """The input that a response is an answer to."""

    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    input = Whatever(
        **about(
            "A text, or a list of items: messages, calls and their results, reasoning.",
            oneOf=[{"type": "string"}, {"type": "array", "items": {"type": "object"}}],
        )
    )
    instructions = Text(**about("A system turn in front; not inherited by a later response."))
    previous_response_id = Text(
        shortest=1, longest=128, **about("A stored response that this one goes on from.")
    )
    tools = Many(
        Whatever(),
        longest=128,
        **about("`function` and `custom` are called; tools of other kinds are not shown."),
    )
    tool_choice = Whatever(**about("`auto`, `none`, `required`, a tool, or allowed tools."))
    parallel_tool_calls = Boolean(load_default=True, **about("Several calls in one answer."))
    text = AnyObject(**about("`format`: `text`, `json_object` or `json_schema`; `verbosity`."))
    reasoning = AnyObject(**about("`effort`, and `max_tokens` for a budget."))
    truncation = Text(
        choices=("disabled", "auto"), **about("`auto` drops the oldest turns that do not fit.")
    )


class ResponseRequest(InputFields):
    """An answer that is asked for."""

    stream = Boolean(load_default=False, **about("Send server-sent events as tokens come."))
    max_output_tokens = Integer(
        1, MAX_TOKENS, **about("A ceiling. Default, and most: what the context leaves.")
    )
    temperature = Number(0, 2, **about("0 takes the most likely token."))
    top_p = Number(0, 1, **about("Nucleus sampling: the share of probability that is kept."))
    top_k = Integer(-1, (1 << 31) - 1, **about("Keep the k most likely tokens."))
    presence_penalty = Number(-2, 2, **about("As chat completions have it."))
    frequency_penalty = Number(-2, 2, **about("As chat completions have it."))
    intervene = Object(
        WritingInterveneOptions, **about("What to change; see [interventions](#interventions).")
    )
    seed = Integer(-(2**63), 2**63 - 1, **about("The same seed gives the same tokens."))
    top_logprobs = Integer(0, MAX_LOGPROBS, **about("Likely others, where scores are included."))
    include = Many(
        Text(longest=128),
        longest=32,
        **about("`message.output_text.logprobs`, `reasoning.encrypted_content`; no others."),
    )
    store = Boolean(load_default=True, **about("Keep the answer, see RESPONSES_STORE_TTL_S."))
    metadata = AnyObject(**about("Up to 16 pairs of texts, given back."))
    user = Text(longest=512, **about("Given back."))
    safety_identifier = Text(longest=512, **about("Given back."))
    prompt_cache_key = Text(longest=512, **about("Given back."))
    service_tier = Text(longest=64, **about("Not used."))
    max_tool_calls = Integer(1, 1 << 31, **about("Of tools that this server does not run."))
    stream_options = AnyObject(**about("Not used."))
    background = Unsupported()
    conversation = Unsupported()
    prompt = Unsupported()
    trace = Unsupported()
    branch = Unsupported()


class InputTokensRequest(InputFields):
    """Tokens that are to be counted."""


class ResponseBody(Schema):
    """An answer."""

    id = Text()
    object = Text(choices=("response",))
    created_at = Integer(0, 1 << 40)
    status = Text(choices=("completed", "incomplete", "failed", "in_progress"))
    model = Text()
    output = Many(AnyObject(), longest=1 << 20, **about("`reasoning`, `message` and calls."))
    usage = AnyObject(allow_none=True)


class ResponseDeleted(Schema):
    """A response that is gone."""

    id = Text()
    object = Text(choices=("response",))
    deleted = Boolean()


class ResponseItems(Schema):
    """The items of an input."""

    object = Text(choices=("list",))
    data = Many(AnyObject(), longest=1 << 20)
    first_id = Text(allow_none=True)
    last_id = Text(allow_none=True)
    has_more = Boolean()


class InputTokens(Schema):
    """The size of a prompt."""

    object = Text(choices=("response.input_tokens",))
    input_tokens = Integer(0, MAX_TOKENS)
