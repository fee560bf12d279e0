"""The bodies of llama-server's routes."""

from __future__ import annotations

from typing import Any

from marshmallow import ValidationError, validates_schema

from transformers_api.api.http.field_table import COMPLETIONS, Entry, Treatment, of_route
from transformers_api.api.http.fields import (
    MAX_TOKEN_ID,
    AnyObject,
    Boolean,
    Integer,
    Many,
    Object,
    OutsideOnly,
    Schema,
    Text,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, Sampling, TokenLimit, about
from transformers_api.api.openai.schemas.chat import EFFORTS, TemplateFields, conversation
from transformers_api.api.openai.schemas.structured import Structured, Whatever

MAX_FILES = 256
# Fields of completions that an answer of llama-server's form has no place for.
_OTHER_ANSWERS = (
    *("truncate_prompt_tokens", "truncation_side", "prompt_logprobs"),
    *("return_token_ids", "return_tokens_as_token_ids"),
)
_ENTRIES = {
    name: entry
    for name, entry in of_route(COMPLETIONS).items()
    if entry.treatment is Treatment.ALIAS
} | {name: Entry(name, Treatment.REFUSED) for name in _OTHER_ANSWERS}


class ApplyTemplateRequest(TemplateFields):
    """A conversation whose prompt is wanted."""

    model = Text(shortest=1, longest=256, **about("Id of a model. Default: the server's own."))
    messages = conversation(required=True)
    tools = Many(Whatever(), longest=128, **about("Functions that the prompt shows."))
    tool_choice = Whatever(**about("As of a chat completion."))
    reasoning_effort = Text(choices=EFFORTS, **about("For templates that read it."))


class ApplyTemplateAnswer(Schema):
    """The prompt as the model reads it."""

    prompt = Text(required=True)


class ExtraFile(Schema):
    """Another file."""

    filename = Text(longest=1024, load_default="tmp")
    text = Text(required=True)


class InfillRequest(Sampling, Structured, OutsideOnly):
    """A gap to be filled. Of other fields those that stand for one of these are read."""

    entries = _ENTRIES
    input_prefix = Text(load_default="", **about("The text before the gap."))
    input_suffix = Text(load_default="", **about("The text after it."))
    prompt = Text(load_default="", **about("More text before the gap: of its own line."))
    input_extra = Many(
        Object(ExtraFile),
        longest=MAX_FILES,
        load_default=list,
        **about("`filename` and `text` of other files to look at."),
    )
    max_tokens = TokenLimit(
        0, load_default=-1, **about("`n_predict` is the same; 0 only reads the prompt.")
    )

    class Meta(Sampling.Meta):
        """Options of marshmallow."""

        exclude = _OTHER_ANSWERS

    @validates_schema(skip_on_field_errors=True)
    def check(self, data: dict[str, Any], **_: Any) -> None:
        """One answer."""
        if data["n"] != 1:
            raise ValidationError("must be 1", "n")


class InfillAnswer(Schema):
    """The text in the gap, or a piece of it; the last has `stop: true` and counts."""

    index = Integer(0, 0)
    content = Text(required=True)
    tokens = Many(Integer(0, MAX_TOKEN_ID), longest=MAX_TOKENS)
    stop = Boolean(required=True)
    model = Text()
    stop_type = Text(choices=("none", "eos", "limit", "word"))
    stopping_word = Text()
    tokens_predicted = Integer(0, MAX_TOKENS)
    tokens_evaluated = Integer(0, MAX_TOKENS)
    tokens_cached = Integer(0, MAX_TOKENS)
    truncated = Boolean()
    timings = AnyObject(**about("`prompt_n`, `prompt_ms`, `predicted_n`, `predicted_ms`, …"))


class GenerationSettings(Schema):
    """The context of a request, and what fields are where it does not say."""

    n_ctx = Integer(1, MAX_TOKENS)
    params = AnyObject()


class Modalities(Schema):
    """The inputs of a model besides text."""

    vision = Boolean()
    audio = Boolean()


class Props(Schema):
    """The resident model, and how it is served."""

    default_generation_settings = Object(GenerationSettings)
    total_slots = Integer(1, 1 << 16)
    model_path = Text(**about("Its id: the server's folders are nobody's business."))
    model_alias = Text()
    chat_template = Text()
    bos_token = Text()
    eos_token = Text()
    modalities = Object(Modalities)
    build_info = Text()
