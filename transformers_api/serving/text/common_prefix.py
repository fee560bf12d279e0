"""The start that two texts share."""

from __future__ import annotations


def common_prefix(one: str, other: str) -> int:
    """The number of characters at the start that both share."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
