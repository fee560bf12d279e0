"""Generated answers. Documentation only: answers are not built through these."""

from __future__ import annotations

from marshmallow import fields

from transformers_api.api.http.fields import (
    MAX_TOKEN_ID,
    AnyObject,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    Text,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about

_TIME = 1 << 40
_MANY = 1 << 20
_REASONS = ("stop", "length", "tool_calls", "function_call")


class PromptDetails(Schema):
    """The sources of the prompt's tokens."""

    cached_tokens = Integer(0, MAX_TOKENS)


class CompletionDetails(Schema):
    """The uses of the answer's tokens."""

    reasoning_tokens = Integer(0, MAX_TOKENS)


class UsageBody(Schema):
    """Tokens of the model itself."""

    prompt_tokens = Integer(0, MAX_TOKENS)
    completion_tokens = Integer(0, MAX_TOKENS)
    total_tokens = Integer(0, MAX_TOKENS)
    prompt_tokens_details = Object(PromptDetails)
    completion_tokens_details = Object(CompletionDetails)


class Answer(Schema):
    """The fields of both completions and chat completions."""

    id = Text()
    created = Integer(0, _TIME)
    model = Text()
    system_fingerprint = Text()
    usage = Object(UsageBody)


class StopReason(fields.Raw):
    """The end of an answer that is not the model's own."""

    def __init__(self) -> None:
        kinds = [{"type": "string"}, {"type": "integer"}, {"type": "null"}]
        text = "The stop string, or the id of the stop token; null at the model's own end."
        super().__init__(metadata={"description": text, "anyOf": kinds})


class PromptLogprobs(Many):
    """Scores of a prompt's tokens."""

    def __init__(self) -> None:
        text = "By token id: `logprob`, `rank`, `decoded_token`; null for the first token."
        super().__init__(AnyObject(allow_none=True), longest=_MANY, **about(text))


class LegacyLogprobs(Schema):
    """Scores, one item per token."""

    tokens = Many(Text(), longest=_MANY)
    token_logprobs = Many(
        Number(-1e9, 0, allow_none=True), longest=_MANY, **about("null for the first of a prompt.")
    )
    top_logprobs = Many(AnyObject(allow_none=True), longest=_MANY)
    text_offset = Many(Integer(0, _MANY), longest=_MANY)


class WholeTrace(Schema):
    """The requested trace of every token."""

    header = AnyObject(**about("The prompt's tokens, the model, the units."))
    steps = Many(AnyObject(), longest=_MANY)


class TextChoice(Schema):
    """One continuation."""

    index = Integer(0, _MANY)
    text = Text()
    logprobs = Object(LegacyLogprobs, allow_none=True)
    prompt_logprobs = PromptLogprobs()
    finish_reason = Text(choices=_REASONS, allow_none=True)
    stop_reason = StopReason()
    prompt_token_ids = Many(Integer(0, MAX_TOKEN_ID), longest=_MANY)
    token_ids = Many(Integer(0, MAX_TOKEN_ID), longest=_MANY)
    trace = Object(WholeTrace)
    intervene = AnyObject(**about("The edits that were made: layers, positions."))
    compare = AnyObject(**about("Of each token, what the unedited model makes of it."))


class Completion(Answer):
    """Continuations of the prompts; in a stream, pieces of them."""

    object = Text(choices=("text_completion",))
    choices = Many(Object(TextChoice), longest=_MANY)
    compare = AnyObject(**about("Of a choice, in a stream: after the last piece."))


class ChatMessage(Schema):
    """The assistant's message."""

    role = Text(choices=("assistant",))
    content = Text(allow_none=True)
    reasoning_content = Text(**about("What was thought before."))
    reasoning = Text(**about("The same."))
    tool_calls = Many(AnyObject(), longest=_MANY, **about("`id`, `type`, `function`."))
    function_call = AnyObject(**about("Where the request had `functions`."))


class ChatLogprobs(Schema):
    """Scores, one item per token."""

    content = Many(AnyObject(), longest=_MANY)


class ChatChoice(Schema):
    """One answer."""

    index = Integer(0, _MANY)
    message = Object(ChatMessage)
    logprobs = Object(ChatLogprobs, allow_none=True)
    finish_reason = Text(choices=_REASONS, allow_none=True)
    stop_reason = StopReason()
    token_ids = Many(Integer(0, MAX_TOKEN_ID), longest=_MANY)
    trace = Object(WholeTrace)
    intervene = AnyObject(**about("The edits that were made: layers, positions."))
    compare = AnyObject(**about("Of each token, what the unedited model makes of it."))


class ChatCompletion(Answer):
    """Answers to a conversation."""

    object = Text(choices=("chat.completion",))
    choices = Many(Object(ChatChoice), longest=_MANY)
    prompt_logprobs = PromptLogprobs()


class ChunkChoice(Schema):
    """A piece of one answer."""

    index = Integer(0, _MANY)
    delta = Object(ChatMessage)
    logprobs = Object(ChatLogprobs, allow_none=True)
    finish_reason = Text(choices=_REASONS, allow_none=True)
    stop_reason = StopReason()


class ChatCompletionChunk(Answer):
    """One event of a stream; the last is followed by `data: [DONE]`."""

    object = Text(choices=("chat.completion.chunk",))
    choices = Many(Object(ChunkChoice), longest=_MANY)
    trace = AnyObject(**about("Of the token of this chunk; with the role, its header."))
    intervene = AnyObject(**about("With the role: the edits, their layers and positions."))
    compare = AnyObject(**about("Of a choice: after the last piece, without `choices`."))
