"""Logits to tokens: every row by its own parameters, in one pass.

A row's choice depends on its own logits, parameters, seed and step only.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from transformers_api.engine.base import SamplingParams, TokenScore
from transformers_api.engine.not_finite import not_finite
from transformers_api.engine.sampling import rng
from transformers_api.engine.sampling.changed_rows import RowChanges, changed_row
from transformers_api.engine.sampling.fast_sampler import (
    UNSURE,
    FastSampler,
    TorchFastSampler,
    largest,
)
from transformers_api.engine.sequence import SampledToken, Sequence
from transformers_api.errors import ApiError, ConstraintFailed

FIRST_CANDIDATES = 64  # looked at before more; nearly always enough for top_p 0.9


class TokenSampler(Protocol):
    """The sampler that ``BatchingEngine`` drives; wrappers that observe are the same outside."""

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """One token for each row of ``logits`` (B, V), float32, which stay as they are."""
        ...


class Sampler:
    """Stateless, but for what the logits processors of a sequence remember, and some memory.

    ``fast`` draws the tokens that it is sure of; the rest is drawn by definition.
    """

    def __init__(self, fast: FastSampler | None = None) -> None:
        self.fast = fast or TorchFastSampler()
        self._changes = RowChanges()

    def sample(self, logits: Tensor, sequences: list[Sequence]) -> list[SampledToken]:
        """One token for each row of ``logits`` (B, V), float32."""
        changed = self._changes.find(logits, sequences)
        if not self.fast.applies_masks:
            self._changes.apply_masks(logits, changed)
        ids = self.fast(logits, sequences, changed)
        left = [row for row, token in enumerate(ids) if token == UNSURE]
        if left:
            self._changes.apply_masks(logits, changed)
            rows = logits[left]
            for place, row in enumerate(left):
                if row in changed.logits:
                    rows[place] = changed.logits[row]
            chosen = by_definition(rows, [sequences[row] for row in left])
            for row, token in zip(left, chosen, strict=True):
                ids[row] = token
        scores = token_scores(logits, ids, [seq.params.logprobs for seq in sequences])
        return [
            _failed(seq, changed.errors.get(row))
            if token == UNSURE or row in changed.errors
            else SampledToken(token, score)
            for row, (seq, token, score) in enumerate(zip(sequences, ids, scores, strict=True))
        ]


def is_greedy(params: SamplingParams) -> bool:
    """True where the likeliest token comes, whatever the filters."""
    return params.temperature == 0 and not params.xtc_probability


def by_definition(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """A token for each row of ``logits`` (B, V), processed; UNSURE in one that is not finite."""
    best, tokens = logits.max(-1)  # (B,); a NaN anywhere in a row comes out as best
    drawn = [row for row, seq in enumerate(sequences) if not is_greedy(seq.params)]
    if drawn:
        rows = tokens.new_tensor(drawn)
        scaled = logits if len(drawn) == len(sequences) else logits[rows]
        tokens[rows] = draw(scaled, [sequences[row] for row in drawn])
    return tokens.where(torch.isfinite(best), UNSURE).tolist()


def distribution(logits: Tensor, seq: Sequence, least: int = 1) -> tuple[Tensor, Tensor]:
    """The distribution of the next token of ``seq``: probabilities (K,), float64, and ids (K,).

    ``logits`` (V,) of the model. Tokens that are not among the K have none; K is ``least`` or more.
    Temperature 0 has everything on the likeliest.
    """
    row = changed_row(logits, seq)
    if is_greedy(seq.params):
        ids = row.new_tensor([row.cpu().numpy().argmax()], dtype=torch.long)  # the first of equals
        if least > 1:
            ids = torch.cat([ids, largest(row, min(least, len(row)))[1][1:]])
        return (torch.arange(len(ids), device=row.device) == 0).double(), ids
    row = _top_n_sigma(row[None], [seq.params])[0]
    probs = ((row - row.max()) / (seq.params.temperature or 1)).softmax(-1)[None]
    ((_, count),) = _by_candidates(probs, [seq.params])
    filtered, ids = candidates(probs, [seq.params], count)
    filtered = _xtc(filtered, ids, row[None], [seq])
    if seq.params.temperature == 0:
        filtered = (filtered == filtered.max()).double()
    return filtered[0] / filtered.sum(), ids[0]


def draw(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Sample one token per row: temperature, then the filters, then the exponential race.

    A row with temperature 0, which only XTC brings here, takes the likeliest that is left.
    ``logits`` (B, V), processed. Gives ids (B,).
    """
    params = [seq.params for seq in sequences]
    logits = _top_n_sigma(logits, params)
    temperature = _column(logits, [p.temperature or 1.0 for p in params])
    # the largest logit is subtracted first: a small temperature must not overflow
    probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    keys = torch.tensor(
        [rng.step_key(seq.seed, seq.num_output) for seq in sequences], device=logits.device
    )
    chosen = torch.empty(len(sequences), dtype=torch.long, device=logits.device)
    for rows, count in _by_candidates(probs, params):
        index = torch.tensor(rows, device=logits.device)
        filtered, ids = candidates(probs[index], [params[row] for row in rows], count)
        group = [sequences[row] for row in rows]
        filtered = _xtc(filtered, ids, logits[index], group)
        noise = _noise(group, keys[index], ids, probs.shape[-1])
        chosen[index] = ids.gather(-1, (filtered / noise).argmax(-1, keepdim=True))[:, 0]
    return chosen


def _noise(sequences: list[Sequence], keys: Tensor, ids: Tensor, vocab: int) -> Tensor:
    """Exponential(1) noise (B, K) of the tokens ``ids`` (B, K)."""
    drawn = rng.exponential(keys, ids)
    for row, seq in enumerate(sequences):
        if seq.params.temperature == 0:
            drawn[row] = 1
        elif seq.generator is not None:  # torch.multinomial draws for the whole vocabulary
            whole = torch.empty(vocab).exponential_(generator=seq.generator)
            drawn[row] = whole.to(ids.device)[ids[row]]
    return drawn


def candidates(probs: Tensor, params: list[SamplingParams], count: int) -> tuple[Tensor, Tensor]:
    """The probabilities that the filters keep (others 0) and their token ids, both (B, K).

    ``probs`` (B, V). ``count`` likeliest tokens are looked at; 0 means all of them, unsorted, for
    rows without filters. Order and meaning as in transformers' logits warpers, each filter seeing
    the renormalised result of the one before.
    """
    if not count:
        ids = torch.arange(probs.shape[-1], device=probs.device)
        return probs.double(), ids.expand(probs.shape)
    values, ids = probs.topk(count, -1)  # sorted
    filtered = values.double()
    for keep in (_top_k, _top_p, _min_p, _typical_p):
        filtered = keep(filtered, params)
    return filtered, ids


def _top_k(filtered: Tensor, params: list[SamplingParams]) -> Tensor:
    """Keep the k likeliest."""
    limit = _column(filtered, [float(p.top_k or filtered.shape[-1]) for p in params])
    return filtered.where(torch.arange(filtered.shape[-1], device=filtered.device) < limit, 0)


def _top_p(filtered: Tensor, params: list[SamplingParams]) -> Tensor:
    """Keep the smallest set whose probability reaches p, at least one token.

    Nucleus sampling: Holtzman et al. 2019, arXiv:1904.09751, section 3.1. With p = 1 all stay,
    also where ``filtered`` is only a part of the distribution.
    """
    p = _column(filtered, [param.top_p for param in params])
    filtered_before = _column(filtered, [float(param.top_k > 0) for param in params])
    total = torch.where(filtered_before > 0, filtered.sum(-1, keepdim=True), 1.0)
    before = filtered.cumsum(-1) - filtered
    keep = (before < p * total) | (p >= 1)
    keep[:, 0] = True
    return filtered.where(keep, 0)


def _min_p(filtered: Tensor, params: list[SamplingParams]) -> Tensor:
    """Keep what is at least p times as likely as the likeliest: arXiv:2407.01082."""
    p = _column(filtered, [param.min_p for param in params])
    return filtered.where(filtered >= p * filtered[:, :1], 0)


def _typical_p(filtered: Tensor, params: list[SamplingParams]) -> Tensor:
    """Keep the tokens whose surprise is nearest to the entropy, p of the mass: arXiv:2202.00666."""
    if all(param.typical_p >= 1 for param in params):
        return filtered
    p = _column(filtered, [param.typical_p for param in params])
    normal = filtered / filtered.sum(-1, keepdim=True)
    surprise = -normal.clamp_min(1e-300).log()
    entropy = (normal * surprise).sum(-1, keepdim=True)
    order = (surprise - entropy).abs().argsort(stable=True, dim=-1)
    ordered = normal.gather(-1, order)
    keep = (ordered.cumsum(-1) - ordered < p) | (p >= 1)
    keep[:, 0] = True
    return filtered.where(torch.zeros_like(keep).scatter(-1, order, keep), 0)


def _top_n_sigma(logits: Tensor, params: list[SamplingParams]) -> Tensor:
    """Keep logits within n standard deviations of the largest, of a row (B, V): arXiv:2411.07641.

    What is masked already does not count.
    """
    rows = [row for row, param in enumerate(params) if param.top_n_sigma > 0]
    if rows:
        logits = logits.clone()
    for row in rows:
        finite = logits[row][logits[row] > -torch.inf].double()
        if not len(finite):
            continue  # nothing may come: the caller says so
        least = finite.max() - params[row].top_n_sigma * finite.std(correction=0)
        logits[row, logits[row] < least] = -torch.inf
    return logits


def _xtc(filtered: Tensor, ids: Tensor, logits: Tensor, sequences: list[Sequence]) -> Tensor:
    """Exclude top choices: with a chance, of the tokens from a share on keep the least likely.

    Shares are those of what the filters have left of ``ids`` (B, K), without the temperature: in
    llama.cpp, whose parameters these are, it comes last. ``logits`` (B, V).
    """
    for row, seq in enumerate(sequences):
        params = seq.params
        if not params.xtc_probability:
            continue
        if rng.chance(rng.step_key(seq.seed, seq.num_output)) >= params.xtc_probability:
            continue
        left = filtered[row] > 0
        shares = logits[row, ids[row]].double().where(left, -torch.inf).softmax(-1)
        likely = left & (shares >= params.xtc_threshold)
        places = likely.nonzero()[:, 0]
        if len(places) > 1:
            least = places[shares[places].argmin()]
            filtered = filtered.clone()
            filtered[row, places[places != least]] = 0
    return filtered


def _by_candidates(probs: Tensor, params: list[SamplingParams]) -> list[tuple[list[int], int]]:
    """Group rows by how many of their likeliest tokens decide the filters: [(rows, count)].

    Sorting a whole vocabulary costs more than a forward pass of a small model; a nucleus is
    small. Rows whose filters reach further are looked at again, wider.
    """
    vocab = probs.shape[-1]
    plain = [row for row, param in enumerate(params) if not _has_filter(param, vocab)]
    whole = [row for row, param in enumerate(params) if param.typical_p < 1]
    open_rows = sorted(set(range(len(params))) - set(plain) - set(whole))
    groups = [(plain, 0), (whole, vocab)]
    count = FIRST_CANDIDATES
    while open_rows and count < vocab:
        values = probs[torch.tensor(open_rows, device=probs.device)].topk(count, -1).values
        covered = values.double().sum(-1).tolist()
        ratios = (values[:, -1] / values[:, 0]).tolist()
        decided = [
            row
            for row, mass, ratio in zip(open_rows, covered, ratios, strict=True)
            if _is_decided(params[row], count, mass, ratio)
        ]
        groups.append((decided, count))
        open_rows = sorted(set(open_rows) - set(decided))
        count *= 8
    groups.append((open_rows, vocab))
    return [(rows, size) for rows, size in groups if rows]


def _has_filter(param: SamplingParams, vocab: int) -> bool:
    return 0 < param.top_k < vocab or param.top_p < 1 or param.min_p > 0 or param.typical_p < 1


def _is_decided(param: SamplingParams, count: int, mass: float, ratio: float) -> bool:
    """True where a filter cuts within the ``count`` likeliest tokens: no other matters then."""
    by_top_k = 0 < param.top_k <= count
    by_top_p = param.top_p < 1 and mass >= param.top_p
    # The nucleus after top_k is a share of all that this leaves.
    by_min_p = param.min_p > 0 and ratio < param.min_p and not (param.top_k and param.top_p < 1)
    return by_top_k or by_min_p or (by_top_p and not param.top_k)


def token_scores(
    logits: Tensor, token_ids: list[int], top_counts: list[int | None], *, ranked: bool = False
) -> list[TokenScore | None]:
    """Log probabilities under the model of ``token_ids``, one a row of ``logits`` (B, V).

    ``top_counts``: None for no score, else how many of the likeliest tokens come with it.
    ``ranked``: with the place of each among all.
    """
    rows = [row for row, count in enumerate(top_counts) if count is not None]
    scores: list[TokenScore | None] = [None] * len(top_counts)
    if not rows:
        return scores
    logprobs = logits[torch.tensor(rows, device=logits.device)].float().log_softmax(-1)
    width = min(max(top_counts[row] or 0 for row in rows), logits.shape[-1])
    values, ids = (t.tolist() for t in logprobs.topk(width, -1))
    for i, row in enumerate(rows):
        top = tuple(zip(ids[i], values[i], strict=True))[: top_counts[row]]
        token = token_ids[row]
        rank = 1 + int((logprobs[i] > logprobs[i, token]).sum()) if ranked else None
        scores[row] = TokenScore(token, float(logprobs[i, token]), top, rank)
    return scores


def _column(like: Tensor, values: list[float]) -> Tensor:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.tensor(values, dtype=dtype, device=like.device)[:, None]


def _failed(seq: Sequence, error: ApiError | None) -> SampledToken:
    if error is None and seq.constraint is not None:
        error = ConstraintFailed(
            "No token can follow that both the requested format and the other parameters allow"
        )
    return SampledToken(0, error=error or not_finite())
