"""Which tokens a prediction rests on: by taking each away, or by gradients of the embeddings.

Embeddings are replaced by a hook on the embedding module, so that every model takes them.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from transformers_api.inspection.base import Attribution, AttributionQuestion
from transformers_api.inspection.reading import Way, read

log = logging.getLogger(__name__)
CONVERGED = 0.1  # of f(x) - f(baseline): what integrated gradients may miss
GRADIENT_COST = 4  # a token's share in a gradient, in tokens that are read
MEAN_ROWS = 8192  # embeddings that are averaged together


class _Function:
    """f: embeddings (B, T, C) of the tokens up to the query, to (B,): the logprob or the logit."""

    def __init__(self, model: Any, way: Way, ids: list[int], question: AttributionQuestion) -> None:
        self.model = model
        self.way = way
        self.ids = torch.tensor([ids[: question.position + 1]], device=model.device)  # (1, T)
        self.embeds: Tensor = model.get_input_embeddings()(self.ids)[0]  # (T, C)
        self.token_id = -1 if question.token_id is None else question.token_id
        self.of: Literal["logprob", "logit"] = question.of

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def rows_per_slice(self, cost: int = 1) -> int:
        """Sequences that make one slice together, a token costing ``cost`` times its reading."""
        tokens = self.way.slice_tokens // cost if self.way.reads_in_chunks else 0
        return max(tokens // self.length, 1)

    def read(self, embeds: Tensor) -> Generator[None, None, Tensor]:
        """Logits (B, V) float32 that follow embeddings (B, T, C); in several slices if long."""
        rows = self.ids.expand(len(embeds), -1)

        def arm(start: int, stop: int) -> AbstractContextManager[None]:
            return embedded(self.model, embeds[:, start:stop])

        logits = torch.empty(0)
        for chunk in read(self.model, rows, self.way.width(len(embeds)), arm):
            logits = chunk.logits
            yield
        return self._cut(logits)

    def value(self, logits: Tensor) -> Tensor:
        """Values (B,) of f for logits (B, V)."""
        scores = logits if self.of == "logit" else logits.log_softmax(-1)
        return scores[:, self.token_id]

    def gradients(self, embeds: Tensor) -> Tensor:
        """Of f at embeddings (B, T, C), by one forward and one backward pass."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = embeds.clone().requires_grad_()
            rows = self.ids.clone().expand(len(leaf), -1)
            with embedded(self.model, leaf):
                (chunk,) = read(self.model, rows, 0)
            value = self.value(self._cut(chunk.logits))
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
            return gradient

    def _cut(self, logits: Tensor) -> Tensor:
        return logits[:, -1, : self.way.vocab_size].float()


@contextmanager
def embedded(model: Any, embeds: Tensor) -> Iterator[None]:
    """While it lasts, tokens have the embeddings ``embeds`` (B, T, C)."""
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda _module, _args, _output: embeds)
    try:
        yield
    finally:
        handle.remove()


def attribute(
    model: Any, way: Way, ids: list[int], question: AttributionQuestion
) -> Generator[None, None, Attribution]:
    """See ``base.Inspector``."""
    function = _Function(model, way, ids, question)
    logits = yield from function.read(function.embeds[None])
    if question.token_id is None:
        function.token_id = int(logits[0].argmax())
    value = float(function.value(logits)[0])
    delta = note = None
    if question.method == "occlusion":
        scores = yield from _occlusion(function, value)
    elif question.method == "integrated_gradients":
        scores, gap = yield from _integrated(function, question, value)
        delta = gap - float(scores.sum())
        note = "did not converge" if abs(delta) > CONVERGED * abs(gap) else None
    else:
        gradient = function.gradients(function.embeds[None])
        yield
        scores = _reduced(gradient[0].float(), function.embeds.float(), question.method)
    return Attribution(
        scores=scores.float().cpu().numpy(),
        token_id=function.token_id,
        logprob=float(logits[0].log_softmax(-1)[function.token_id]),
        value=value,
        convergence_delta=delta,
        note=note,
    )


def _occlusion(function: _Function, value: float) -> Generator[None, None, Tensor]:
    """The loss of f (T,) when one token's embedding becomes the mean embedding."""
    mean = yield from _mean_embedding(function.model)
    values = []
    for places in torch.split(torch.arange(function.length), function.rows_per_slice()):
        embeds = function.embeds.repeat(len(places), 1, 1)
        embeds[torch.arange(len(places)), places] = mean.to(embeds.dtype)
        logits = yield from function.read(embeds)
        values.append(function.value(logits))
    return value - torch.cat(values)


def _integrated(
    function: _Function, question: AttributionQuestion, value: float
) -> Generator[None, None, tuple[Tensor, float]]:
    """Scores (T,) along the straight line from the baseline, and f(x) - f(baseline).

    Sundararajan and others 2017, arXiv:1703.01365, equation 3, with the middle of each step.
    """
    dtype, end = function.embeds.dtype, function.embeds.float()
    start = torch.zeros_like(end)
    if question.baseline == "mean":
        start += yield from _mean_embedding(function.model)
    line = end - start
    total = torch.zeros_like(end)
    shares = (torch.arange(question.steps, device=end.device) + 0.5) / question.steps
    for some in torch.split(shares, function.rows_per_slice(GRADIENT_COST)):
        gradients = function.gradients((start + some[:, None, None] * line).to(dtype))
        total += gradients.float().sum(0)
        yield
    logits = yield from function.read(start[None].to(dtype))
    scores = (line * total / question.steps).sum(-1)
    return scores, value - float(function.value(logits)[0])


def _reduced(gradient: Tensor, embeds: Tensor, method: str) -> Tensor:
    """(T, C) each, to (T,)."""
    return gradient.norm(dim=-1) if method == "gradient_norm" else (gradient * embeds).sum(-1)


def _mean_embedding(model: Any) -> Generator[None, None, Tensor]:
    """The mean of all embeddings (C,) float32 as the module gives them: some scale their weight."""
    embedding = model.get_input_embeddings()
    count = embedding.weight.shape[0]
    total = torch.zeros(embedding.weight.shape[1], dtype=torch.float64)
    for ids in torch.split(torch.arange(count), MEAN_ROWS):
        total += embedding(ids.to(model.device)).float().sum(0).cpu()
        yield
    mean: Tensor = (total / count).float().to(model.device)
    return mean


def check_gradients(model: Any, way: Way) -> Generator[None, None, bool]:
    """See ``base.Inspector``."""
    question = AttributionQuestion(position=1, token_id=0)
    try:
        gradient = _Function(model, way, [0, 1], question).gradients(
            model.get_input_embeddings()(torch.tensor([[0, 1]], device=model.device))
        )
    except Exception:  # whatever it is: this model has none
        log.info("%s has no gradients", type(model).__name__, exc_info=True)
        return False
    yield
    return bool(gradient.isfinite().all()) and bool(gradient.any())
