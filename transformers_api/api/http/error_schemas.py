"""The bodies of errors, as the OpenAPI document describes them; ``dialects.py`` says whose."""

from __future__ import annotations

from transformers_api.api.http.fields import AnyObject, Object, Schema, Text
from transformers_api.api.http.sampling_schema import about


class ErrorBody(Schema):
    """The error."""

    message = Text(required=True)
    type = Text(required=True)
    param = Text(
        required=True,
        allow_none=True,
        **about("The field that is wrong, such as `messages[0].role`, or null."),
    )
    code = Text(required=True, allow_none=True)


class Error(Schema):
    """Every error of this server."""

    error = Object(ErrorBody, required=True)


class Detail(Schema):
    """Every error of these routes."""

    detail = Text(required=True)


class Refused(Schema):
    """The request is wrong."""

    detail = Text(required=True, **about("What is wrong, with the name of the field."))
    code = Text(**about("Such as `attention_unavailable`; most have none."))


class MessagesErrorBody(Schema):
    """The error."""

    type = Text(required=True)
    message = Text(required=True)
    details = AnyObject(**about("`error_code` and `unsupported`, of a refused `thread`."))


class MessagesError(Schema):
    """Every error of these routes."""

    type = Text(choices=("error",), required=True)
    error = Object(MessagesErrorBody, required=True)
    request_id = Text()


class Explained(Schema):
    """Every error of these routes."""

    error = Text(required=True, **about("What is wrong, with the name of the field."))


class Failed(Schema):
    """The request is not to blame, or not alone."""

    error = Text(required=True, **about("What happened."))
    code = Text(required=True, **about("Such as `rate_limited`."))
