"""Scores of tokens, as each route shows them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers_api.serving.text.choice_text import TokenDetail, TopToken

Json = dict[str, Any]
_LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def chat_logprobs(details: Iterable[TokenDetail], *, as_ids: bool = False) -> Json:
    """Scores as chat completions show them; ``as_ids``: tokens by their ids."""
    content = [
        {**_scored(detail, as_ids), "top_logprobs": [_scored(top, as_ids) for top in detail.top]}
        for detail in details
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    details: Iterable[TokenDetail], offsets: list[int], *, as_ids: bool = False
) -> Json:
    """Scores as completions show them, with the offset of each token in the text."""
    details = list(details)
    return {
        "tokens": [token_name(detail, as_ids) for detail in details],
        "token_logprobs": [logprob(detail.logprob) for detail in details],
        "top_logprobs": [_top(detail, as_ids) for detail in details],
        "text_offset": offsets,
    }


def prompt_logprobs(details: Iterable[TokenDetail], count: int) -> list[Json | None]:
    """Scores of a prompt's tokens as vLLM shows them: by id, the token's own and the likeliest."""
    return [None if detail.logprob is None else _ranked(detail, count) for detail in details]


def token_name(token: TokenDetail | TopToken, as_ids: bool) -> str:
    """The token's text, or its id, which is there where the text is not whole characters."""
    return f"token_id:{token.token_id}" if as_ids else token.text


def logprob(value: float | None) -> float | None:
    """A number that JSON has."""
    return None if value is None else max(value, _LOWEST_LOGPROB)


def _scored(token: TokenDetail | TopToken, as_ids: bool) -> Json:
    return {
        "token": token_name(token, as_ids),
        "logprob": logprob(token.logprob),
        "bytes": list(token.bytes),
    }


def _top(detail: TokenDetail, as_ids: bool) -> dict[str, float | None] | None:
    """The likeliest tokens by text, and the one that stands there; None where nothing predicts."""
    if detail.logprob is None:
        return None
    top: dict[str, float | None] = {}
    for token in detail.top:
        top.setdefault(token_name(token, as_ids), logprob(token.logprob))
    top.setdefault(token_name(detail, as_ids), logprob(detail.logprob))
    return top


def _ranked(detail: TokenDetail, count: int) -> Json:
    scores = {str(detail.token_id): _with_rank(detail, detail.rank)}
    for rank, token in enumerate(detail.top[:count], 1):
        scores.setdefault(str(token.token_id), _with_rank(token, rank))
    return scores


def _with_rank(token: TokenDetail | TopToken, rank: int | None) -> Json:
    return {"logprob": logprob(token.logprob), "rank": rank, "decoded_token": token.text}
