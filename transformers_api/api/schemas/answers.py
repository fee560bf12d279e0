"""What generation answers look like. Documentation only: answers are not built through these."""

from __future__ import annotations

from transformers_api.api.fields import (
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    Schema,
    Text,
)
from transformers_api.api.schemas.sampling import MAX_TOKEN_ID, MAX_TOKENS, about

_TIME = 1 << 40
_MANY = 1 << 20
_REASONS = ("stop", "length")


class ErrorBody(Schema):
    """What went wrong."""

    message = Text()
    type = Text()
    param = Text(**about("The field that is wrong, such as `messages[0].role`, or null."))
    code = Text()


class Error(Schema):
    """Every error of this server."""

    error = Object(ErrorBody)


class PromptDetails(Schema):
    """Where the prompt's tokens came from."""

    cached_tokens = Integer(0, MAX_TOKENS)


class UsageBody(Schema):
    """Tokens of the model itself."""

    prompt_tokens = Integer(0, MAX_TOKENS)
    completion_tokens = Integer(0, MAX_TOKENS)
    total_tokens = Integer(0, MAX_TOKENS)
    prompt_tokens_details = Object(PromptDetails)


class Answer(Schema):
    """What completions and chat completions have in common."""

    id = Text()
    created = Integer(0, _TIME)
    model = Text()
    system_fingerprint = Text()
    usage = Object(UsageBody)


class LegacyLogprobs(Schema):
    """Scores, one item per token."""

    tokens = Many(Text(), longest=_MANY)
    token_logprobs = Many(Number(-1e9, 0), longest=_MANY)
    top_logprobs = Many(AnyObject(), longest=_MANY)
    text_offset = Many(Integer(0, _MANY), longest=_MANY)


class TextChoice(Schema):
    """One continuation."""

    index = Integer(0, _MANY)
    text = Text()
    logprobs = Object(LegacyLogprobs)
    finish_reason = Text(choices=_REASONS)
    prompt_token_ids = Many(Integer(0, MAX_TOKEN_ID), longest=_MANY)
    token_ids = Many(Integer(0, MAX_TOKEN_ID), longest=_MANY)


class Completion(Answer):
    """Continuations of the prompts; in a stream, pieces of them."""

    object = Text(choices=("text_completion",))
    choices = Many(Object(TextChoice), longest=_MANY)


class ChatMessage(Schema):
    """What the assistant says."""

    role = Text(choices=("assistant",))
    content = Text()


class ChatLogprobs(Schema):
    """Scores, one item per token."""

    content = Many(AnyObject(), longest=_MANY)


class ChatChoice(Schema):
    """One answer."""

    index = Integer(0, _MANY)
    message = Object(ChatMessage)
    logprobs = Object(ChatLogprobs)
    finish_reason = Text(choices=_REASONS)
    token_ids = Many(Integer(0, MAX_TOKEN_ID), longest=_MANY)


class ChatCompletion(Answer):
    """Answers to a conversation."""

    object = Text(choices=("chat.completion",))
    choices = Many(Object(ChatChoice), longest=_MANY)


class ChunkChoice(Schema):
    """A piece of one answer."""

    index = Integer(0, _MANY)
    delta = Object(ChatMessage)
    logprobs = Object(ChatLogprobs)
    finish_reason = Text(choices=_REASONS)


class ChatCompletionChunk(Answer):
    """One event of a stream; the last is followed by `data: [DONE]`."""

    object = Text(choices=("chat.completion.chunk",))
    choices = Many(Object(ChunkChoice), longest=_MANY)


class Health(Schema):
    """How the server is, in the words of all its predecessors."""

    status = Text(choices=("healthy", "degraded"))
    ok = Boolean()
    model_ready = Boolean()
    model_loaded = Boolean()
    current_model = Text()
    models_loaded = Many(Text(), longest=_MANY)
    loaded_models = Integer(0, _MANY)
    active_requests = Integer(0, _MANY)
    total_models = Integer(0, _MANY)
    cuda_available = Boolean()
    device = Text(**about("Of the model in memory, or null."))
    cache_dir = Text()
    memory = AnyObject(**about("`process_bytes` (null where unknown) and `model_bytes`."))
    system = AnyObject(**about("`platform`, `python` and `cpu_count`."))
    uptime = Text()
