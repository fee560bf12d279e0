"""Edited and unedited predictions of one text, compared token by token; on the engine thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transformers_api.inspection.divergence_question import Divergence
from transformers_api.inspection.reading import Way, each_logits

_ENDED = object()


@dataclass
class _Compared:
    """The figures of T tokens so far, a few at a time."""

    targets: Tensor  # (T,) ids
    topk: int
    kl: list[Tensor] = field(default_factory=list)
    logprobs: list[Tensor] = field(default_factory=list)
    top_ids: list[Tensor] = field(default_factory=list)
    top_logprobs: list[Tensor] = field(default_factory=list)

    def take(self, unedited: Tensor, edited: Tensor) -> None:
        """Logits (R, V) float32 of the next R tokens; beyond the last one they are left out."""
        done = sum(map(len, self.kl))
        targets = self.targets[done : done + len(unedited)]
        plain = unedited[: len(targets)].log_softmax(-1)
        other = edited[: len(targets)].log_softmax(-1)
        shares = torch.where(other.isfinite(), other.exp() * (other - plain), 0.0)
        top = plain.topk(min(self.topk, plain.shape[1]), dim=-1)
        self.kl.append(shares.sum(-1).clamp(min=0))
        self.logprobs.append(plain.gather(1, targets[:, None])[:, 0])
        self.top_ids.append(top.indices)
        self.top_logprobs.append(top.values)


def diverge(
    model: Any, way: Way, edited: Way | None, ids: list[int], answer: list[int], topk: int
) -> Generator[None, None, Divergence]:
    """Compare the predictions of ``answer`` after ``ids`` along two ways; None: there is but one.

    Both read the same pieces by turns, so that the logits of a few tokens are there at a time.
    """
    compared = _Compared(torch.tensor(answer, device=model.device), topk)
    text, first = [*ids, *answer][:-1], len(ids) - 1
    ways = [way] if edited is None else [way, edited]
    pieces: list[list[Tensor]] = [[] for _ in ways]
    passes = [
        each_logits(model, each, text, partial(_keep, own), first)
        for each, own in zip(ways, pieces, strict=True)
    ]
    running = deque(passes)
    while running:
        each = running.popleft()
        if next(each, _ENDED) is not _ENDED:
            running.append(each)
            yield
        while all(pieces):
            logits = [own.pop(0) for own in pieces]
            compared.take(logits[0], logits[-1])
    return Divergence(
        kl=torch.cat(compared.kl).float().cpu().numpy(),
        logprob_without=torch.cat(compared.logprobs).float().cpu().numpy(),
        top_ids=torch.cat(compared.top_ids).long().cpu().numpy(),
        top_logprobs=torch.cat(compared.top_logprobs).float().cpu().numpy(),
    )


def _keep(pieces: list[Tensor], _start: int, logits: Tensor) -> None:
    pieces.append(logits)
