"""Errors of /chat/stream and /inspect/*, as niels-gpt has them."""

from __future__ import annotations

from transformers_api.api.http.fields import Schema, Text
from transformers_api.api.http.sampling_schema import about


class Refused(Schema):
    """The request is wrong."""

    detail = Text(required=True, **about("What is wrong, with the name of the field."))
    code = Text(**about("Such as `attention_unavailable`; most have none."))


class Failed(Schema):
    """The request is not to blame, or not alone."""

    error = Text(required=True, **about("What happened."))
    code = Text(required=True, **about("Such as `rate_limited`."))
