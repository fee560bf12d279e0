"""The blueprints of the routes whose errors are not OpenAI's; ``errors.py`` renders those."""

from __future__ import annotations

from typing import Any

from transformers_api.api.http.body import OTHER_ERRORS, Blueprint, StrictParser, with_errors
from transformers_api.api.http.error_schemas import Failed, Refused
from transformers_api.api.seeds.schemas.generate import Detail

WRONG = "A field is wrong, or out of range; the text names it"


class PlainBlueprint(Blueprint):
    """For routes whose errors are ``{"detail": text}``."""

    @staticmethod
    def _prepare_response_doc(doc: Any, doc_info: Any, **known: Any) -> Any:
        doc = Blueprint._prepare_response_doc(doc, doc_info, **known)
        return with_errors(doc, {"default": (Detail, OTHER_ERRORS)})


class BareParser(StrictParser):
    """Names fields as they are: ``head must be in [0, 3]``."""

    DEFAULT_VALIDATION_STATUS = 422
    QUOTE = ""


class InspectionBlueprint(Blueprint):
    """For ``/chat/stream`` and below ``/inspect``: bodies and errors as niels-gpt has them."""

    ARGUMENTS_PARSER = BareParser()

    @staticmethod
    def _prepare_response_doc(doc: Any, doc_info: Any, **known: Any) -> Any:
        doc = Blueprint._prepare_response_doc(doc, doc_info, **known)
        return with_errors(doc, {"422": (Refused, WRONG), "default": (Failed, OTHER_ERRORS)})
