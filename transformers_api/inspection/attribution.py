"""Which tokens a prediction rests on: by taking each away, or by gradients of the embeddings.

Embeddings are replaced by a hook on the embedding module, so that every model takes them.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from transformers_api.errors import PromptTooLarge
from transformers_api.inspection.attribution_question import Attribution, AttributionQuestion
from transformers_api.inspection.reading import Way, read, unarmed

log = logging.getLogger(__name__)
CONVERGED = 0.05  # of the largest score: what one may still change when steps are doubled
FEWEST_STEPS, MOST_STEPS = 8, 128  # of integrated gradients, where nobody says how many
ONE_STEP = "with one step nothing is known of it"
FIRST_NOTE = "the first token is on the path, and attention that rests on it makes gradients leap"
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
        """Sequences that make one slice together, a token costing ``cost`` times its reading.

        Edits are of one sequence.
        """
        if self.way.edits is not None:
            return 1
        tokens = self.way.slice_tokens // cost if self.way.reads_in_chunks else 0
        return max(tokens // self.length, 1)

    def read(self, embeds: Tensor) -> Generator[None, None, Tensor]:
        """Logits (B, V) float32 that follow embeddings (B, T, C); in several slices if long."""
        rows = self.ids.expand(len(embeds), -1)

        def arm(start: int, stop: int) -> AbstractContextManager[None]:
            return embedded(self.model, embeds[:, start:stop])

        logits = torch.empty(0)
        armed = self.way.armed(self.model, arm)
        for chunk in read(self.model, rows, self.way.width(len(embeds)), armed):
            logits = chunk.logits
            yield
        return self._cut(logits)

    def value(self, logits: Tensor) -> Tensor:
        """Values (B,) of f for logits (B, V)."""
        scores = logits if self.of == "logit" else logits.log_softmax(-1)
        return scores[:, self.token_id]

    def gradients(self, embeds: Tensor) -> Tensor:
        """Of f at embeddings (B, T, C), by one forward and one backward pass.

        Raises ModelNotCapable.
        """
        self.way.check_gradients()
        with torch.inference_mode(False), torch.enable_grad():
            leaf = embeds.clone().requires_grad_()
            rows = self.ids.clone().expand(len(leaf), -1)
            with embedded(self.model, leaf):
                (chunk,) = read(self.model, rows, 0, self.way.armed(self.model, unarmed))
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
    path: dict[str, Any] = {}
    if question.method == "occlusion":
        scores = yield from _occlusion(function, question, value)
    elif question.method == "integrated_gradients":
        scores, path = yield from _integrated(function, question, value)
    else:
        gradient = function.gradients(function.embeds[None])
        yield
        scores = _reduced(gradient[0].float(), function.embeds.float(), question.method)
    return Attribution(
        scores=scores.float().cpu().numpy(),
        token_id=function.token_id,
        logprob=float(logits[0].log_softmax(-1)[function.token_id]),
        value=value,
        **path,
    )


def _occlusion(
    function: _Function, question: AttributionQuestion, value: float
) -> Generator[None, None, Tensor]:
    """The loss of f (T,) when the embeddings of a group become the mean embedding; NaN elsewhere.

    Raises PromptTooLarge as soon as the first slice shows that it would take too long.
    """
    groups = question.groups or tuple((place,) for place in range(function.length))
    if 0 < question.screen < len(groups):
        groups = yield from _screened(function, groups, question.screen)
    mean = (yield from _mean_embedding(function.model)).to(function.embeds.dtype)
    scores = torch.full((function.length,), torch.nan)
    clock = _Estimate(question.within_s, len(groups), function.length)
    size = function.rows_per_slice()
    for start in range(0, len(groups), size):
        some = groups[start : start + size]
        embeds = function.embeds.repeat(len(some), 1, 1)
        for row, group in enumerate(some):
            embeds[row, list(group)] = mean
        logits = yield from function.read(embeds)
        for group, loss in zip(some, (value - function.value(logits)).tolist(), strict=True):
            scores[list(group)] = loss
        clock.check(start + len(some))
    return scores


def _screened(
    function: _Function, groups: tuple[tuple[int, ...], ...], most: int
) -> Generator[None, None, tuple[tuple[int, ...], ...]]:
    """The groups whose gradient times input is the largest, in their order."""
    gradient = function.gradients(function.embeds[None])[0].float()
    yield
    scores = _reduced(gradient, function.embeds.float(), "gradient_x_input").tolist()
    sizes = [abs(sum(scores[place] for place in group)) for group in groups]
    largest = sorted(range(len(groups)), key=lambda i: -sizes[i])[:most]
    return tuple(groups[i] for i in sorted(largest))


class _Estimate:
    """The time that something takes in all, judged by its beginning: with whoever is beside it."""

    def __init__(self, within_s: float, count: int, tokens: int) -> None:
        self.within_s = within_s
        self.count = count
        self.tokens = tokens
        self.began = time.monotonic()

    def check(self, done: int) -> None:
        """Raise PromptTooLarge where the rest would take longer than there is."""
        spent = time.monotonic() - self.began
        whole = spent * self.count / done
        if whole <= self.within_s:
            return
        most = max(int(done * self.within_s / spent), 1)
        raise PromptTooLarge(
            f"Occlusion of {self.count} places in {self.tokens} tokens would take about "
            f"{whole:.0f} s here (max {self.within_s:g}); ask for up to {most} positions, or "
            f'"screen": {min(most, 32)}'
        )


def _integrated(
    function: _Function, question: AttributionQuestion, value: float
) -> Generator[None, None, tuple[Tensor, dict[str, Any]]]:
    """Scores (T,) along the straight line from the baseline, and what is to be said of them.

    Sundararajan and others 2017, arXiv:1703.01365, equation 3, with the middle of each step.
    Their sum can be right by accident, so what counts is that no score moves when steps are
    doubled.
    """
    end = function.embeds.float()
    start = yield from _path_begin(function, question)
    most = question.steps or MOST_STEPS
    steps = max(most // 2, 1) if question.steps else FEWEST_STEPS
    began = time.monotonic()
    scores = yield from _along(function, start, end, steps)
    change, is_late = math.nan, False
    while steps < most:
        spent = time.monotonic() - began  # and about as much more for twice the steps
        is_late = question.steps is None and 2.5 * spent > question.within_s
        if is_late:
            break
        steps = min(2 * steps, most) if question.steps is None else most
        before, scores = scores, (yield from _along(function, start, end, steps))
        change = float((scores - before).abs().max())
        if change <= CONVERGED * float(scores.abs().max()):
            break
    logits = yield from function.read(start[None].to(function.embeds.dtype))
    largest = float(scores.abs().max())
    notes = []
    if not change <= CONVERGED * largest:
        moved = f"nothing is known of it after {steps} steps" if steps > 1 else ONE_STEP
        if not math.isnan(change):
            moved = f"with {steps} steps a score still changes by {change:.3g} of {largest:.3g}"
        if is_late:
            moved += f", and more would take longer than {question.within_s:g} s"
        notes.append(f"did not converge: {moved}")
    if question.baseline != "token":
        notes.append(FIRST_NOTE)
    path = {
        "convergence_delta": value - float(function.value(logits)[0]) - float(scores.sum()),
        "steps": steps,
        "largest_change": None if math.isnan(change) else change,
        "note": "; ".join(notes) or None,
    }
    if question.baseline == "token":
        scores[0] = torch.nan  # it was never away
    return scores, path


def _path_begin(
    function: _Function, question: AttributionQuestion
) -> Generator[None, None, Tensor]:
    """The embeddings (T, C) float32 that stand for nothing.

    The first token stays where it is, with ``token``: attention rests on it, and without it the
    model is another one. The others become a token that the model knows: near the mean embedding
    its norms divide by little, and gradients leap.
    """
    end = function.embeds.float()
    if question.baseline == "token":
        other = torch.tensor([question.baseline_token_id], device=end.device)
        embedding: Tensor = function.model.get_input_embeddings()(other).float()
        start = embedding.expand_as(end).clone()
        start[0] = end[0]
        return start
    start = torch.zeros_like(end)
    if question.baseline == "mean":
        start += yield from _mean_embedding(function.model)
    return start


def _along(
    function: _Function, start: Tensor, end: Tensor, steps: int
) -> Generator[None, None, Tensor]:
    """(T,): the line from ``start`` to ``end`` times the mean gradient on it."""
    total, line = torch.zeros_like(end), end - start
    shares = (torch.arange(steps, device=end.device) + 0.5) / steps
    for some in torch.split(shares, function.rows_per_slice(GRADIENT_COST)):
        points = (start + some[:, None, None] * line).to(function.embeds.dtype)
        total += function.gradients(points).float().sum(0)
        yield
    scores: Tensor = (line * total / steps).sum(-1)
    return scores


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
