"""The routes under /v1/models."""

from __future__ import annotations

from transformers_api.api.http.fields import AnyObject, Boolean, Integer, Many, Object, Schema, Text
from transformers_api.api.http.sampling_schema import about

_TIME = 1 << 40
CHECKPOINTS = ("awq", "bitsandbytes", "compressed-tensors", "fp8", "gptq", "mxfp4")


class LoadRequest(Schema):
    """Which model to load, and where."""

    model = Text(shortest=1, longest=256, required=True)
    device = Text(
        pattern="auto|cpu|cuda|cuda:[0-9]|mps",
        **about("Default: as the registry or the settings say."),
    )


class LoadAnswer(Schema):
    """The resident model."""

    id = Text()
    object = Text(choices=("model",))
    created = Integer(0, _TIME)
    owned_by = Text()
    status = Text(choices=("loaded", "already_loaded"))
    device = Text()


class Deleted(Schema):
    """A model that was taken out of memory."""

    id = Text()
    object = Text(choices=("model",))
    deleted = Boolean()


class Model(Schema):
    """A model that may be asked for."""

    id = Text()
    object = Text(choices=("model",))
    type = Text(choices=("model",))
    display_name = Text()
    created = Integer(0, _TIME)
    created_at = Text(**about("The same in words: RFC 3339."))
    owned_by = Text()
    loaded = Boolean()
    permission = Many(AnyObject(), longest=0)
    root = Text()
    parent = Text(allow_none=True)
    max_model_len = Integer(1, 1 << 24, **about("Tokens of prompt and answer; once loaded."))
    quantization = Text(
        choices=("none", "int8", "int4", "gguf", *CHECKPOINTS),
        **about("Width of the weights, or the format that their files have; once loaded."),
    )
    capabilities = Many(
        Text(
            choices=(
                *("chat", "completion", "embedding", "rerank", "tools", "reasoning", "trace"),
                "fill-in-the-middle",
            )
        ),
        longest=8,
        **about("What can be asked of it here, by its files."),
    )
    local = Boolean(**about("false: it has to be fetched first."))
    size_bytes = Integer(
        0, 1 << 50, allow_none=True, **about("Of its weights as they are stored; null: unknown.")
    )
    context_length = Integer(
        1, 1 << 40, allow_none=True, **about("Tokens of prompt and answer, by its files.")
    )
    servable = Boolean(**about("false: it is listed, and can never be served; else absent."))
    reason = Text(**about("Why it can never be served."))


class ModelDetail(Model):
    """A model with what its registry entry says about it."""

    metadata = AnyObject()
    structured_outputs = Boolean(
        **about("Its answers can be held to a form. Absent, as the next: not here, or no text.")
    )
    tools = Text(
        choices=("derived", "prompt"),
        **about("Calls in the form of its chat template, or in ours, which the prompt explains."),
    )
    reasoning = Boolean(**about("Its thoughts can be told from its answer."))
    format = AnyObject(
        **about("With `?format=1`: the fields of its `calls` and `thoughts`, which may be null.")
    )


class ModelList(Schema):
    """Every model that is registered, cached or loaded."""

    object = Text(choices=("list",))
    data = Many(Object(Model), longest=1 << 16)
    first_id = Text(allow_none=True)
    last_id = Text(allow_none=True)
    has_more = Boolean()
