"""Values of a body that are checked by hand, where their form depends on others beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers_api.errors import InvalidRequest


def checked_object(value: Any, param: str) -> Mapping[str, Any]:
    """``value``, an object. Raises InvalidRequest."""
    if not isinstance(value, Mapping):
        raise InvalidRequest(f"'{param}' must be an object", param=param)
    return value


def checked_text(value: Any, param: str) -> str:
    """``value``, a string. Raises InvalidRequest."""
    if not isinstance(value, str):
        raise InvalidRequest(f"'{param}' must be a string", param=param)
    return value
