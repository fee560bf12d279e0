"""The texts of a body: one of several fields."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers_api.errors import InvalidRequest


def check_one_of(names: Sequence[str], data: Mapping[str, Any]) -> None:
    """Raise InvalidRequest unless ``data`` has exactly one of these fields, not an empty one."""
    inputs = [name for name in names if name in data]
    if len(inputs) != 1:
        named = " and ".join(inputs) or "none"
        raise InvalidRequest(f"give exactly one of {', '.join(names)}; there is {named}")
    if not data[inputs[0]]:
        raise InvalidRequest(f"{inputs[0]} must not be empty", param=inputs[0])
