"""The bodies of Ollama's routes."""

from __future__ import annotations

from transformers_api.api.http.fields import (
    AnyObject,
    Boolean,
    Integer,
    Many,
    Number,
    Object,
    OneOrMany,
    OutsideOnly,
    Schema,
    Text,
    Unsupported,
)
from transformers_api.api.http.sampling_schema import MAX_TOKENS, about
from transformers_api.api.openai.schemas.structured import Whatever

_MANY = 1 << 16


class OllamaOptions(Schema):
    """The choice of tokens; options that are not here change nothing here."""

    temperature = Number(0, 2, **about("0 takes the most likely token."))
    top_p = Number(0, 1, **about("Nucleus sampling."))
    top_k = Integer(-1, (1 << 31) - 1, **about("Keep the k most likely tokens; 0 keeps all."))
    min_p = Number(0, 1, **about("Drop tokens less likely than this share of the likeliest."))
    typical_p = Number(0, 1, above=True, **about("Locally typical sampling."))
    repeat_penalty = Number(0, 10, above=True, **about("Over prompt and answer; 1 does nothing."))
    presence_penalty = Number(-2, 2, **about("Subtracted once from tokens of the answer."))
    frequency_penalty = Number(-2, 2, **about("Subtracted per occurrence in the answer."))
    seed = Integer(-(2**63), 2**63 - 1, **about("The same seed gives the same tokens."))
    num_predict = Integer(-2, MAX_TOKENS, **about("A ceiling; below 0 what the context leaves."))
    stop = OneOrMany(Text(shortest=1, longest=256), longest=16, **about("Texts that end it."))
    mirostat = Unsupported(lambda value: value == 0)


class Shared(OutsideOnly):
    """The fields of chat and generate."""

    model = Text(shortest=1, longest=256, **about("Id of a model; `:latest` is left out."))
    stream = Boolean(load_default=True, **about("Send lines of JSON as tokens come."))
    format = Whatever(**about("`json`, or a JSON schema."))
    options = Object(OllamaOptions)
    think = Whatever(**about("`false` answers at once; `true` or an effort lets it think."))
    keep_alive = Whatever(**about("Not used: models stay until another one is asked for."))
    truncate = Boolean()
    shift = Boolean()


class OllamaChatRequest(Shared):
    """A conversation to be answered; an empty one loads the model."""

    messages = Many(Whatever(), longest=4096, load_default=list, **about("`role` and `content`."))
    tools = Many(Whatever(), longest=128, **about("Functions that the answer may call."))
    tool_choice = Unsupported(lambda value: value in ("auto", "none"))


class OllamaGenerateRequest(Shared):
    """A prompt to be answered; an empty one loads the model."""

    prompt = Text(load_default="", **about("What the user says; with `raw` the prompt itself."))
    system = Text(**about("A system turn in front."))
    raw = Boolean(load_default=False, **about("Leave the model's template out."))
    suffix = Text(**about("What stands behind the answer, for models that fill in a middle."))
    images = Unsupported()
    template = Unsupported()
    context = Unsupported()


class OllamaEmbedRequest(OutsideOnly):
    """Texts whose vectors are wanted."""

    model = Text(shortest=1, longest=256, required=True)
    input = OneOrMany(Text(), longest=2048, required=True, **about("A text, or several."))
    dimensions = Integer(1, 1 << 16, **about("Only the first so many numbers."))
    truncate = Boolean()
    keep_alive = Whatever()
    options = AnyObject()


class OllamaNameRequest(Schema):
    """Which model."""

    model = Text(shortest=1, longest=256)
    name = Text(shortest=1, longest=256, **about("The older name of `model`."))
    verbose = Boolean()


class OllamaChatLine(Schema):
    """A line of a stream, or the whole answer; the last has `done: true` and counts."""

    model = Text()
    created_at = Text()
    message = AnyObject(**about("Of a chat."))
    response = Text(**about("Of a prompt."))
    done = Boolean()
    done_reason = Text()
    prompt_eval_count = Integer(0, MAX_TOKENS)
    eval_count = Integer(0, MAX_TOKENS)


class OllamaTags(Schema):
    """The models."""

    models = Many(AnyObject(), longest=_MANY)


class OllamaVersion(Schema):
    """The version of this server."""

    version = Text()


class OllamaVectors(Schema):
    """A vector for each text."""

    model = Text()
    embeddings = Many(Many(Number(-1e9, 1e9), longest=_MANY), longest=_MANY)


class OllamaPromptRequest(OutsideOnly):
    """One text for a vector."""

    model = Text(shortest=1, longest=256, required=True)
    prompt = Text(required=True, shortest=1)


class OllamaVector(Schema):
    """The vector of the text."""

    embedding = Many(Number(-1e9, 1e9), longest=_MANY)
