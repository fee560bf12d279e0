"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, validates_schema

from transformers_api.api.http.fields import (
    MAX_TOKEN_ID,
    MOST_IDS,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Schema,
    Text,
    TokenIds,
)
from transformers_api.api.http.sampling_schema import about
from transformers_api.api.openai.schemas.chat import TemplateFields, conversation

TEXT_NAMES = ("prompt", "text", "content")


class TokenizeRequest(TemplateFields):
    """A text under one of three names, or a conversation."""

    model = Text(shortest=1, longest=256)
    prompt = Text(**about("The text."))
    text = Text(**about("The same."))
    content = Text(**about("The same."))
    messages = conversation()
    add_special_tokens = Boolean(load_default=True, **about("As before a completion."))
    return_token_strs = Boolean(load_default=False, **about("Add the text of each token."))

    @validates_schema(skip_on_field_errors=True)
    def check(self, data: dict[str, Any], **_: Any) -> None:
        """One text or one conversation."""
        inputs = [name for name in (*TEXT_NAMES, "messages") if name in data]
        if not inputs:
            raise ValidationError("is required, or 'messages'", "prompt")
        if len(inputs) > 1:
            raise ValidationError(f"must not be given together with '{inputs[0]}'", inputs[1])


class TokenizeAnswer(Schema):
    """The tokens of a text."""

    tokens = Many(Integer(0, MAX_TOKEN_ID), longest=1 << 20)
    count = Integer(0, 1 << 20)
    max_model_len = Integer(1, 1 << 24)
    token_strs = Many(Text(), longest=1 << 20)


class DetokenizeRequest(Schema):
    """Token ids."""

    most_items = MOST_IDS
    model = Text(shortest=1, longest=256)
    tokens = TokenIds(required=True)


class DetokenizeAnswer(Schema):
    """The text of token ids, under both names."""

    prompt = Text()
    text = Text()


class TokenizerInfo(Schema):
    """The tokenizer of a model; special tokens stand beside, such as `eos_token`."""

    tokenizer_class = Text(required=True)
    model = Text()
    chat_template = Text(allow_none=True)
    vocab_size = Integer(0, MAX_TOKEN_ID)
    model_max_length = Integer(1, 1 << 24)
    added_tokens_decoder = AnyObject(**about("`content` and `special` of added tokens, by id."))
