from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from tests.engine.reading import ask
from transformers_api.engine.base import TokenStream
from transformers_api.engine.sampling import rng
from transformers_api.engine.sampling.logits_processors import processors_for
from transformers_api.engine.sampling.sampler import Sampler, candidates, distribution, token_scores
from transformers_api.engine.sequence import Sequence

VOCAB = 1000


def sequence(prompt=(5, 6, 7), output=(), **params) -> Sequence:
    request = ask(list(prompt), **({"max_tokens": 50} | params))
    seq = Sequence(
        request,
        TokenStream(1, lambda _: None),
        0,
        eos_token_ids=frozenset({2}),
        max_model_len=10_000,
        processors=processors_for(request.params),
    )
    seq.tokens += output
    return seq


def logits(rows=1, seed=0, scale=3.0):
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample(rows, *sequences) -> list[int]:
    return [token.token_id for token in Sampler().sample(rows, list(sequences))]


def support(row, trials=3000, **params) -> Counter:
    """What comes out, over many seeds."""
    sequences = [sequence(seed=seed, **params) for seed in range(trials)]
    return Counter(sample(row.expand(trials, -1), *sequences))


def test_temperature_zero_takes_the_likeliest_token():
    rows = logits(4)
    chosen = sample(rows, *(sequence(temperature=0.0, seed=s) for s in range(4)))
    assert chosen == rows.argmax(-1).tolist()


def test_a_very_small_temperature_is_greedy_and_does_not_overflow():
    rows = logits(2)
    assert sample(rows, *(sequence(temperature=1e-5) for _ in range(2))) == rows.argmax(-1).tolist()


FILTERS = {
    "top-k": ({"top_k": 7}, [TopKLogitsWarper(7)]),
    "top-p": ({"top_p": 0.8}, [TopPLogitsWarper(0.8)]),
    "top-p-wide": ({"top_p": 0.97, "temperature": 1.8}, [TopPLogitsWarper(0.97)]),
    "min-p": ({"min_p": 0.05}, [MinPLogitsWarper(0.05)]),
    "typical-p": ({"typical_p": 0.6}, [TypicalLogitsWarper(0.6)]),
    "top-k-then-top-p": (
        {"top_k": 20, "top_p": 0.7},
        [TopKLogitsWarper(20), TopPLogitsWarper(0.7)],
    ),
    "wide-top-k-then-top-p": (
        {"top_k": 300, "top_p": 0.9},
        [TopKLogitsWarper(300), TopPLogitsWarper(0.9)],
    ),
    "all": (
        {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
        [TopKLogitsWarper(50), TopPLogitsWarper(0.9), MinPLogitsWarper(0.02)],
    ),
}


def test_a_nucleus_after_top_k_is_a_share_of_all_that_it_leaves():
    row = torch.zeros(256)
    row[:3] = 3.0
    seq = sequence(temperature=0.7, top_k=200, top_p=0.4, min_p=0.05)
    chain = LogitsProcessorList(
        [TemperatureLogitsWarper(0.7), TopKLogitsWarper(200), TopPLogitsWarper(0.4)]
    )
    expected = chain(torch.zeros(1, 1, dtype=torch.long), row[None].clone()).softmax(-1)[0, :3]
    probs, ids = distribution(row, seq)  # min_p leaves the three, and looks at 64 tokens
    left = {token: prob for token, prob in zip(ids.tolist(), probs.tolist(), strict=True) if prob}
    assert left == pytest.approx(dict.fromkeys(range(3), 1 / 3))
    assert expected.min() > 0


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_what_transformers_keeps(name):
    params, warpers = FILTERS[name]
    temperature = params.get("temperature", 1.0)
    row = logits(seed=3)
    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature), *warpers])
    expected = chain(torch.zeros(1, 1, dtype=torch.long), row.clone()).softmax(-1)[0]
    seq = sequence(**params)
    kept, ids = candidates((row / temperature).softmax(-1), [seq.params], VOCAB)
    given = torch.zeros(VOCAB, dtype=torch.float64).scatter(0, ids[0], kept[0] / kept.sum())
    assert torch.allclose(given.float(), expected, atol=1e-6)


@pytest.mark.parametrize("name", FILTERS)
def test_what_comes_out_follows_the_filtered_distribution(name):
    params, warpers = FILTERS[name]
    row = logits(seed=3)
    chain = LogitsProcessorList([TemperatureLogitsWarper(params.get("temperature", 1.0)), *warpers])
    expected = chain(torch.zeros(1, 1, dtype=torch.long), row.clone()).softmax(-1)[0]
    counts = support(row, **params)
    assert all(expected[token] > 0 for token in counts)
    likeliest = expected.topk(3)
    for share, token in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
        assert counts[token] / 3000 == pytest.approx(share, abs=0.04)


def test_plain_sampling_follows_the_softmax():
    row = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None]
    counts = support(row, trials=8000)
    shares = [counts[token] / 8000 for token in range(4)]
    assert shares == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.02)


@pytest.mark.parametrize("name", [*FILTERS, "none"])
def test_a_token_does_not_depend_on_who_shares_the_batch(name):
    params = FILTERS[name][0] if name != "none" else {}
    rows = logits(9, seed=1)
    company = [sequence(seed=s, **p) for s, (p, _) in enumerate(FILTERS.values())]
    for position in range(9):
        me = sequence(seed=1234, **params)
        alone = sample(rows[position : position + 1], me)
        others = [*company[:position], me, *company[position:]]
        assert sample(rows, *others)[position] == alone[0]


def test_the_same_seed_gives_the_same_tokens_and_another_one_others():
    row = logits().expand(200, -1)
    steps = [sequence(output=[9] * n, seed=7) for n in range(200)]
    again = [sequence(output=[9] * n, seed=7) for n in range(200)]
    other = [sequence(output=[9] * n, seed=8) for n in range(200)]
    assert sample(row, *steps) == sample(row, *again) != sample(row, *other)
    assert len(set(sample(row, *steps))) > 20  # steps differ from each other


@pytest.mark.parametrize("seed", [0, -1, 2**63, -(2**63), 10**30])
def test_any_whole_number_is_a_seed(seed):
    assert sample(logits(), sequence(seed=seed)) == sample(logits(), sequence(seed=seed))


def test_noise_is_exponential_and_independent_between_neighbours():
    keys = torch.tensor([rng.step_key(seed, 0) for seed in range(400)])
    draws = rng.exponential(keys, torch.arange(500))
    assert draws.mean().item() == pytest.approx(1, abs=0.01)
    assert draws.var().item() == pytest.approx(1, abs=0.02)
    flat = draws - 1
    for neighbour in (flat[1:] * flat[:-1], flat[:, 1:] * flat[:, :-1]):
        assert neighbour.mean().item() == pytest.approx(0, abs=0.01)


def test_repetition_penalty_is_that_of_transformers():
    row = logits(seed=5)
    seq = sequence(prompt=[1, 2, 3, 3], output=[4, 999], temperature=0.0, repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([seq.tokens]), row.clone())
    processed = row.clone()
    seq.processors[0](seq, processed[0])
    assert torch.allclose(processed, expected)


def test_presence_and_frequency_penalties_are_additive_and_count_the_output_only():
    row = torch.zeros(1, VOCAB)
    seq = sequence(prompt=[7, 7, 7], output=[4, 4, 9], presence_penalty=0.5, frequency_penalty=0.25)
    seq.processors[0](seq, row[0])
    assert row[0, 4].item() == pytest.approx(-(0.5 + 2 * 0.25))
    assert row[0, 9].item() == pytest.approx(-(0.5 + 0.25))
    assert row[0, 7].item() == 0
    seq.tokens.append(9)
    row.zero_()
    seq.processors[0](seq, row[0])
    assert row[0, 9].item() == pytest.approx(-(0.5 + 2 * 0.25))


def test_logit_bias_can_force_and_forbid_a_token():
    row = logits()
    best = row.argmax().item()
    assert sample(row, sequence(temperature=0.0, logit_bias={17: 100.0})) == [17]
    assert sample(row, sequence(temperature=0.0, logit_bias={best: -100.0})) != [best]


def test_stop_tokens_cannot_come_before_min_tokens():
    row = torch.zeros(1, VOCAB)
    row[0, 2], row[0, 30], row[0, 40] = 9, 8, 7
    early = sequence(temperature=0.0, min_tokens=2, stop_token_ids=frozenset({30}), output=[5])
    late = sequence(temperature=0.0, min_tokens=2, stop_token_ids=frozenset({30}), output=[5, 5])
    assert sample(row, early) == [40]
    assert sample(row, late) == [2]


def test_processors_of_one_row_leave_the_others_alone():
    rows = logits(3)
    plain = [sequence(temperature=0.0) for _ in range(3)]
    mixed = [plain[0], sequence(temperature=0.0, logit_bias={17: 100.0}), plain[2]]
    expected = sample(rows, *plain)
    assert sample(rows, *mixed) == [expected[0], 17, expected[2]]


def test_scores_are_log_probabilities_of_the_unprocessed_distribution():
    row = logits()
    seq = sequence(temperature=0.3, logit_bias={17: 100.0}, logprobs=3)
    (token,) = Sampler().sample(row, [seq])
    logprobs = row[0].log_softmax(-1)
    assert token.token_id == 17
    assert token.score.logprob == pytest.approx(logprobs[17].item(), abs=1e-5)
    values, ids = logprobs.topk(3)
    assert [i for i, _ in token.score.top] == ids.tolist()
    assert [v for _, v in token.score.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_scores_come_only_for_rows_that_asked():
    scores = token_scores(logits(3), [1, 2, 3], [None, 0, 2])
    assert scores[0] is None
    assert scores[1].top == ()
    assert len(scores[2].top) == 2


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_fail_their_own_row_only(broken):
    rows = logits(3)
    rows[1, 500] = broken
    outputs = Sampler().sample(
        rows, [sequence(seed=1), sequence(seed=1), sequence(temperature=0.0)]
    )
    assert [output.error is not None for output in outputs] == [False, True, False]


def test_word_repetition_penalty_divides_whatever_the_sign():
    row = logits(seed=5)
    seq = sequence(prompt=[1, 2, 2], output=[4], temperature=0.0, word_repetition_penalty=1.5)
    expected = row[0].clone()
    expected[[1, 2, 4]] /= 1.5
    processed = row[0].clone()
    seq.processors[0](seq, processed)
    assert torch.equal(processed, expected)


def test_torch_noise_draws_what_multinomial_draws():
    """For models whose published samples came from torch.multinomial with a seeded generator."""
    seq = sequence(temperature=0.9, top_k=50, seed=42)
    seq.generator = torch.Generator().manual_seed(42)
    generator = torch.Generator().manual_seed(42)
    for step in range(40):
        row = logits(seed=step)
        kept = row[0] / 0.9
        kept[kept < kept.topk(50).values[-1]] = -torch.inf
        expected = torch.multinomial(kept.softmax(-1), 1, generator=generator).item()
        assert sample(row, seq) == [expected]
