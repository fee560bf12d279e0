"""Questions to an upstream, and what comes back of them. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Route = Literal["chat/completions", "completions", "embeddings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamCall:
    """One request to an upstream: the fields of its body, but for ``model`` and ``stream``."""

    route: Route
    body: Mapping[str, Any]


@dataclass(slots=True)
class UpstreamUsage:
    """Tokens of one answer, as its upstream counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
