"""Pairs of texts as a cross encoder reads them, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers_api.engine.base import PairIds
from transformers_api.errors import InvalidRequest, ModelNotCapable
from transformers_api.serving.embeddings import check_row, check_total, slices
from transformers_api.serving.limits.cancellation import Cancellation
from transformers_api.serving.swap.loaded_model import LoadedModel
from transformers_api.serving.text import chat_template

_Typed = tuple[list[int], list[int]]  # ids, and their types where the model has some


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens around the texts of a pair, and the types of all."""

    before: _Typed
    between: _Typed
    after: _Typed
    types: _Typed  # of a token of the first text, of one of the second; empty: there are none

    @property
    def size(self) -> int:
        return sum(len(ids) for ids, _ in (self.before, self.between, self.after))

    def around(self, first: Sequence[int], second: Sequence[int]) -> PairIds:
        parts = (
            self.before,
            (first, self.types[0] * len(first)),
            self.between,
            (second, self.types[1] * len(second)),
            self.after,
        )
        return [i for ids, _ in parts for i in ids], [kind for _, types in parts for kind in types]


def encode(
    model: LoadedModel,
    firsts: Sequence[str],
    seconds: Sequence[str],
    *,
    limit: int | None = None,
    second_limit: int | None = None,
    fields: tuple[str, str] = ("text_1", "text_2"),
) -> list[PairIds]:
    """The pairs of one text with each of several, or of as many with as many.

    The longer text of a pair is cut until it fits, as by transformers' ``longest_first``.
    ``limit``: tokens of a pair, special ones included; -1, None and more than the model reads: as
    many as it reads. ``second_limit``: tokens of the second text alone. Raises InvalidRequest,
    ModelNotCapable for a tokenizer that does not make pairs.
    """
    frame = _frame(model)
    most = model.engine.max_model_len
    room = (most if limit in (None, -1) else min(limit or most, most)) - frame.size
    if room < 2:
        raise InvalidRequest(
            f"A pair has at least {frame.size + 2} tokens with this model",
            param="truncate_prompt_tokens",
        )
    left = _ids(model, firsts, fields[0])
    right = [ids[:second_limit] for ids in _ids(model, seconds, fields[1])]
    pairs = [
        frame.around(*_cut(one, other, room))
        for one, other in zip(left * len(right) if len(left) == 1 else left, right, strict=True)
    ]
    check_total(sum(len(ids) for ids, _ in pairs), fields[1])
    return pairs


def _ids(model: LoadedModel, texts: Sequence[str], field: str) -> list[list[int]]:
    rows = []
    for index, text in enumerate(texts):
        param = f"{field}[{index}]" if len(texts) > 1 else field
        rows.append(chat_template.encode_text(model, text, False, param))
        if rows[-1]:  # beside special tokens there may be none
            check_row(model, rows[-1][: model.engine.max_model_len], param)
    return rows


def _cut(one: list[int], other: list[int], room: int) -> _Typed:
    short = min(len(one), len(other))
    if len(one) + len(other) <= room:
        return one, other
    short = min(short, room // 2)
    if len(one) <= len(other):
        return one[:short], other[: room - short]
    return one[: room - short], other[:short]


def _frame(model: LoadedModel) -> _Frame:
    """The frame, as the tokenizer shows it around two letters."""
    (first,), (second,) = (_ids(model, [letter], "model") for letter in "ab")
    encoded = model.tokenizer("a", "b")
    ids, types = list(encoded["input_ids"]), list(encoded.get("token_type_ids") or ())
    starts = range(len(ids))
    at = next((i for i in starts if ids[i : i + len(first)] == first), None)
    to = next((i for i in reversed(starts) if ids[i : i + len(second)] == second), None)
    if not first or not second or at is None or to is None or to < at + len(first):
        raise ModelNotCapable(
            f"The tokenizer of '{model.spec.name}' makes no pairs of texts", param="model"
        )
    end = at + len(first)
    spans = (slice(0, at), slice(end, to), slice(to + len(second), None))
    before, between, after = ((ids[span], types[span]) for span in spans)
    return _Frame(before, between, after, (types[at:end][:1], types[to:][:1]))


def score(model: LoadedModel, pairs: Sequence[PairIds], cancellation: Cancellation) -> list[float]:
    """A score per pair, in their order. Raises ClientGone."""
    scorer = model.scorer
    assert scorer is not None  # only cross encoders are asked
    scores = [0.0] * len(pairs)
    for indices in slices([len(ids) for ids, _ in pairs], scorer.slice_tokens):
        cancellation.check()
        made = scorer.score([pairs[index] for index in indices])
        for index, value in zip(indices, made, strict=True):
            scores[index] = value
    return scores
