"""Scores of pairs of texts: a sequence classification head with one label."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from transformers_api.engine.base import Engine, PairIds
from transformers_api.engine.embedding import Visitor, padded
from transformers_api.engine.not_finite import checked
from transformers_api.errors import ModelLoadFailed


class CrossEncoder(Visitor):
    """Meets ``serving.swap.PairScorer``. ``sigmoid``: scores are between 0 and 1, else logits.

    Raises ModelLoadFailed for a head with more labels than one.
    """

    def __init__(self, engine: Engine, slice_tokens: int, *, sigmoid: bool) -> None:
        super().__init__(engine, slice_tokens)
        self._sigmoid = sigmoid
        if (labels := self.visit(lambda model: model.config.num_labels)) != 1:
            raise ModelLoadFailed(f"The model has {labels} labels; a cross encoder has one")
        # A decoder looks for the last token that is no padding: it cannot where none is named.
        self._pads = (
            self.visit(lambda model: getattr(model.config, "pad_token_id", None)) is not None
        )

    def score(self, pairs: Sequence[PairIds]) -> list[float]:
        """See serving.swap.PairScorer."""
        groups = self.of_one_kind([ids for ids, _ in pairs])
        if not self._pads:
            groups = [[number] for number in range(len(pairs))]
        scores: dict[int, float] = {}
        for numbers in groups:
            group = [pairs[number] for number in numbers]
            made = self.visit(partial(_scores, pairs=group, sigmoid=self._sigmoid))
            scores |= zip(numbers, made, strict=True)
        return [scores[number] for number in range(len(pairs))]


def _scores(model: Any, pairs: Sequence[PairIds], *, sigmoid: bool) -> list[float]:
    inputs, _ = padded(model, [ids for ids, _ in pairs])
    if pairs[0][1]:
        width = inputs["input_ids"].shape[1]
        types = [[*types, *[0] * (width - len(types))] for _, types in pairs]
        inputs["token_type_ids"] = torch.tensor(types, device=model.device)
    logits = checked(model(**inputs, return_dict=True).logits[:, 0].float())  # (B)
    scores: list[float] = (logits.sigmoid() if sigmoid else logits).tolist()
    return scores
