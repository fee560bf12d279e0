"""What inspection is told by the kernels is what the definitions give."""

from __future__ import annotations

import pytest
import torch

from transformers_api.kernels.stats import token_stats


def logits(size, seed=0):
    return 4 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [5, 16, 100, 1000, 49157])
@pytest.mark.parametrize("scale", [1, 300])
def test_statistics_are_those_of_the_distribution(library, size, scale):
    row = scale * logits(size, size)
    logprobs = row.double().log_softmax(-1)
    best = logprobs.topk(5)
    for token in (0, size - 1, int(best.indices[0])):
        found = token_stats(library, row, token, 5)
        assert found.logprob == pytest.approx(float(logprobs[token]), rel=1e-5, abs=1e-5)
        assert found.entropy == pytest.approx(-float(logprobs.exp() @ logprobs), abs=1e-4)
        assert found.rank == int((row > row[token]).sum())
        assert found.ids == best.indices.tolist()
        assert found.probs == pytest.approx(best.values.exp().tolist(), rel=1e-5, abs=1e-30)


def test_tokens_that_cannot_be_drawn_are_the_last(library):
    row = torch.full((70,), -torch.inf)
    row[[3, 65]] = torch.tensor([2.0, 2.0])
    found = token_stats(library, row, 65, 4)
    assert found.ids[:2] == [3, 65]
    assert found.probs == pytest.approx([0.5, 0.5, 0, 0])
    assert (found.rank, found.entropy) == (0, pytest.approx(0.693147, abs=1e-5))


def test_no_candidates_and_more_than_there_are(library):
    row = logits(6)
    assert token_stats(library, row, 1, 0).ids == []
    assert sorted(token_stats(library, row, 1, 9).ids) == list(range(6))
