"""The samplers of local servers, against definitions of their own, on every way of sampling."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from tests.engine.models import tiny_model
from tests.engine.reading import ask, complete, read
from tests.engine.test_sampling import VOCAB, logits, sample, sequence
from transformers_api.engine.base import DryParams
from transformers_api.engine.sampling.dry import DryPenalty, repeats_of_end
from transformers_api.engine.sampling.sampler import Sampler, distribution

TRIALS = 400


def outcomes(row, **params):
    sequences = [sequence(seed=seed, **params) for seed in range(TRIALS)]
    return Counter(sample(row.expand(TRIALS, -1), *sequences))


# -- DRY


def penalties_by_definition(tokens, dry, vocab):
    """For each token that could come: the longest repetition that it would go on with."""
    window = tokens if dry.last_n < 0 else tokens[len(tokens) - min(dry.last_n, len(tokens)) :]
    limit = len(window)
    for back in range(len(window)):  # from the end: the first place where a breaker begins
        head, behind = window[-1 - back], tuple(window[len(window) - back :])
        tails = [tail for tail in dry.breakers.get(head, ()) if behind[: len(tail)] == tail]
        if tails:
            limit = back - max(map(len, tails))
            break
    penalties = {}
    if len(window) <= dry.allowed_length or limit < dry.allowed_length:
        return penalties
    for token in range(vocab):
        lengths = []
        for place in range(1, len(window)):
            if window[place] == token:
                length = 0
                while length < place and window[place - 1 - length] == window[-1 - length]:
                    length += 1
                lengths.append(min(length, limit))
        longest = max(lengths, default=-1)
        if longest >= dry.allowed_length and () not in dry.breakers.get(token, ()):
            penalties[token] = dry.multiplier * dry.base ** (longest - dry.allowed_length)
    return penalties


def penalties_of(processor, seq, vocab):
    row = torch.zeros(vocab)
    processor(seq, row)
    return {token: -value for token, value in enumerate(row.tolist()) if value}


@pytest.mark.parametrize("seed", range(12))
def test_dry_penalties_are_those_of_the_definition_as_a_text_grows(seed):
    rng = random.Random(seed)
    vocab = rng.choice([2, 3, 6])
    tails = [(), (1,), (0, 1), (1, 1, 0)]
    breakers = {
        token: frozenset(rng.sample(tails, rng.randint(1, 2)))
        for token in rng.sample(range(vocab), rng.choice([0, 0, 1]))
    }
    dry = DryParams(
        multiplier=0.8,
        base=rng.choice([1.0, 1.75]),
        allowed_length=rng.choice([0, 1, 2, 4]),
        last_n=rng.choice([-1, 1, 5, 20, 1000]),
        breakers=breakers,
    )
    seq = sequence(prompt=[rng.randrange(vocab) for _ in range(rng.choice([1, 2, 100]))])
    processor = DryPenalty(dry)
    for _ in range(60):
        expected = penalties_by_definition(seq.tokens, dry, vocab)
        assert penalties_of(processor, seq, vocab) == pytest.approx(expected, rel=1e-5)
        seq.tokens += [rng.randrange(vocab) for _ in range(rng.choice([1, 1, 1, 80]))]


def test_the_end_is_found_again_in_linear_time():
    tokens = [1, 2] * 20_000
    assert repeats_of_end(tokens)[-2:].tolist() == [39_998, 0]
    assert repeats_of_end([5]).tolist() == []


def test_an_endless_repetition_leaves_finite_numbers():
    seq = sequence(prompt=[7] * 500, dry=DryParams(multiplier=100.0, base=100.0))
    row = torch.zeros(1, VOCAB)
    row[0, 7] = 1e4
    (token,) = sample(row, seq)
    assert token != 7


# -- top-n-sigma


@pytest.mark.parametrize("n", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("masked", [False, True])
def test_top_n_sigma_keeps_logits_near_the_largest(n, masked):
    row = logits(seed=5)
    allowed = range(0, VOCAB, 7) if masked else range(VOCAB)
    finite = [row[0, token].item() for token in allowed]
    mean = sum(finite) / len(finite)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in finite) / len(finite))
    kept = {t for t in allowed if row[0, t].item() >= max(finite) - n * deviation}
    ids = frozenset(allowed) if masked else None
    counts = outcomes(row, top_n_sigma=n, allowed_token_ids=ids, temperature=2.0)
    assert set(counts) <= kept
    assert len(kept) > 50 or set(counts) == kept


@pytest.mark.parametrize("fields", [{"top_n_sigma": 1.0}, {"xtc_probability": 1.0}])
def test_a_row_in_which_nothing_may_come_fails_alone(fields):
    rows = torch.cat([torch.full((1, VOCAB), -torch.inf), logits(seed=5)])
    sequences = [sequence(seed=1, **fields), sequence(seed=1, **fields)]
    broken, whole = Sampler().sample(rows, sequences)
    assert broken.error is not None
    assert whole.error is None
    assert [whole.token_id] == sample(rows[1:], sequences[1])


@pytest.mark.parametrize("n", [0.0, -1.0])
def test_top_n_sigma_of_nothing_keeps_all(n):
    assert outcomes(logits(seed=5), top_n_sigma=n) == outcomes(logits(seed=5))


# -- XTC

SHARES = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05]).log()[None]


def test_xtc_leaves_the_least_likely_of_the_likely_and_all_below():
    counts = outcomes(SHARES, xtc_probability=1.0, xtc_threshold=0.12)
    assert set(counts) == {2, 3, 4}
    assert counts[2] / TRIALS == pytest.approx(0.5, abs=0.08)


def test_xtc_works_as_often_as_it_should():
    counts = outcomes(SHARES, xtc_probability=0.5, xtc_threshold=0.12)
    excluded = counts[0] + counts[1]
    assert excluded / TRIALS == pytest.approx(0.5 * 0.7, abs=0.08)


@pytest.mark.parametrize("fields", [{"xtc_threshold": 0.35}, {"top_k": 1}, {"xtc_threshold": 0.6}])
def test_xtc_needs_two_likely_tokens(fields):
    plain = {name: value for name, value in fields.items() if name == "top_k"}
    counts = outcomes(SHARES, xtc_probability=1.0, **fields)
    assert counts == outcomes(SHARES, **plain)


def test_xtc_looks_at_what_the_filters_left():
    counts = outcomes(SHARES, xtc_probability=1.0, xtc_threshold=0.4, top_k=2)
    assert set(counts) == {1}  # 4/7 and 3/7


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_xtc_looks_at_shares_without_the_temperature(temperature):
    counts = outcomes(
        SHARES, xtc_probability=1.0, xtc_threshold=0.12, temperature=temperature, top_k=4
    )
    assert set(counts) <= {2, 3}
    ratio = (0.15 / 0.1) ** (1 / temperature)
    assert counts[2] / TRIALS == pytest.approx(ratio / (1 + ratio), abs=0.08)


@pytest.mark.parametrize(("threshold", "token"), [(0.12, 2), (0.35, 0), (0.01, 4)])
def test_xtc_at_temperature_zero_takes_the_likeliest_that_is_left(threshold, token):
    fields = {"xtc_probability": 1.0, "xtc_threshold": threshold, "temperature": 0.0}
    assert set(outcomes(SHARES, **fields)) == {token}
    seq = sequence(**fields)
    probabilities, ids = distribution(SHARES[0], seq)
    assert ids[probabilities.argmax()] == token
    assert probabilities.max() == 1
    half = outcomes(SHARES, **{**fields, "xtc_probability": 0.5})
    assert set(half) == {0, token}


# -- on every way of sampling

FIELDS = {
    "allowed": {"allowed_token_ids": frozenset({5, 9, 40, 77})},
    "dry": {"dry": DryParams(multiplier=4.0, allowed_length=0, base=1.1)},
    "sigma": {"top_n_sigma": 1.0},
    "xtc": {"xtc_probability": 0.5, "xtc_threshold": 0.01},
    "window": {"repetition_penalty": 1.8, "repeat_last_n": 3},
    "all": {
        "allowed_token_ids": frozenset(range(3, 60)),
        "dry": DryParams(multiplier=1.0, breakers={9: frozenset({()})}),
        "top_n_sigma": 2.0,
        "xtc_probability": 0.5,
        "xtc_threshold": 0.02,
        "top_p": 0.95,
    },
}
WAYS = {
    "native": ("gpt2", {}),
    "torch": ("gpt2", {"native": None}),
    "alone": ("recurrent-gemma", {}),
}
PROMPT = [11, 12, 13, 11, 12]


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_same_tokens_alone_and_in_company(make_engine, way):
    name, options = WAYS[way]
    engine = make_engine(name, **options)
    requests = [
        ask(PROMPT, max_tokens=12, seed=seed, ignore_eos=True, logprobs=0, **fields)
        for seed, fields in enumerate(FIELDS.values())
    ]
    plain = [ask(PROMPT, max_tokens=12, seed=90 + i, ignore_eos=True) for i in range(3)]
    alone = [complete(engine, request)[0] for request in [*requests, *plain]]
    assert complete(engine, *requests, *plain) == alone
    assert len(set(map(tuple, alone))) == len(alone)


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_the_definitions(make_engine, way):
    name, options = WAYS[way]
    engine = make_engine(name, **options)
    model = tiny_model(name)
    for fields in FIELDS.values():
        certain = {"xtc_probability": 1.0} if "xtc_probability" in fields else {}
        fields = {**fields, **certain, "top_p": 1.0}
        request = ask(PROMPT, max_tokens=10, temperature=0.0, ignore_eos=True, **fields)
        tokens = list(PROMPT)
        for token in complete(engine, request)[0]:
            with torch.inference_mode():
                row = model(torch.tensor([tokens])).logits[0, -1]
            assert token == likeliest_by_definition(row.tolist(), tokens, request.params)
            tokens.append(token)


def likeliest_by_definition(row, tokens, params):
    if params.repetition_penalty != 1:
        for token in set(tokens[-params.repeat_last_n :]):
            factor = params.repetition_penalty
            row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
    if params.dry is not None:
        for token, penalty in penalties_by_definition(tokens, params.dry, len(row)).items():
            row[token] -= penalty
    allowed = set(params.allowed_token_ids or range(len(row)))
    if params.top_n_sigma:
        left = torch.tensor([row[token] for token in allowed]).double()
        least = left.max() - params.top_n_sigma * left.std(correction=0)
        allowed = {token for token in allowed if row[token] >= least}
    if params.xtc_probability == 1:
        total = sum(math.exp(row[token]) for token in allowed)
        likely = [t for t in allowed if math.exp(row[t]) / total >= params.xtc_threshold]
        least = min(likely, key=lambda token: row[token], default=None)
        allowed -= {token for token in likely if token != least}
    return max(allowed, key=lambda token: row[token])


def test_ranks_of_a_prompt_are_places_among_all_tokens(make_engine):
    (outputs,) = read(
        make_engine("gpt2").submit([ask(PROMPT, max_tokens=1, prompt_logprobs=0)])
    ).values()
    with torch.inference_mode():
        rows = tiny_model("gpt2")(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    first, *scores = outputs[0].prompt_scores
    assert first is None
    for row, score, token in zip(rows, scores, PROMPT[1:], strict=False):
        order = row.argsort(descending=True).tolist()
        assert (score.token_id, score.rank) == (token, order.index(token) + 1)
