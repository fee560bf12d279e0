"""Constraints over ids: what they allow is drawn, and nobody else's tokens change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.engine.reading import ask, complete, read
from tests.engine.test_sampling import sequence
from transformers_api.engine.base import FinishReason, Mask
from transformers_api.engine.sampling.changed_rows import RowChanges, changed_row
from transformers_api.engine.sampling.sampler import Sampler, by_definition
from transformers_api.errors import ConstraintFailed

PROMPT = prompts_of(4)[-1]
VOCABULARY = 97
EVEN, ODD = frozenset(range(4, 97, 2)), frozenset(range(5, 97, 2))


def mask_of(ids: Sequence[int] | frozenset[int], size: int = VOCABULARY) -> Mask:
    bits = numpy.zeros((size + 31) // 32 * 32, numpy.uint8)
    bits[[token for token in ids if token < size]] = 1
    return numpy.packbits(bits, bitorder="little").view(numpy.uint32)


class Alternating:
    """Even tokens first, then odd ones, by turns; complete after ``count``."""

    def __init__(self, count: int = 99, draft: Sequence[int] = ()) -> None:
        self.count, self.taken, self.proposed = count, [], draft

    def allowed(self) -> Mask | None:
        return mask_of(ODD if len(self.taken) % 2 else EVEN)

    def take(self, token_id: int) -> None:
        self.taken.append(token_id)

    def draft(self, most: int) -> Sequence[int]:
        return self.proposed[len(self.taken) :][:most]

    @property
    def is_complete(self) -> bool:
        return len(self.taken) >= self.count


class Forced(Alternating):
    """Allows one token after the other."""

    def __init__(self, tokens: Sequence[int], draft: Sequence[int]) -> None:
        super().__init__(draft=draft)
        self.tokens = tokens

    def allowed(self) -> Mask | None:
        return mask_of([self.tokens[len(self.taken)]])


class Failing(Alternating):
    """Knows nothing after two tokens."""

    def __init__(self, mask: Callable[[], Mask]) -> None:
        super().__init__()
        self.mask = mask

    def allowed(self) -> Mask | None:
        return self.mask() if len(self.taken) == 2 else None


def nothing() -> Mask:
    raise ConstraintFailed("too hard")


SAMPLING = [{"temperature": 0.0}, {"seed": 3}, {"seed": 4, "top_k": 5, "top_p": 0.9}]
PARAMS = pytest.mark.parametrize("params", [*SAMPLING, {"seed": 5, "repetition_penalty": 1.3}])


@PARAMS
@pytest.mark.parametrize("model", ["llama", "recurrent-gemma"])
def test_what_is_drawn_is_allowed_and_the_same_alone_and_in_company(make_engine, model, params):
    from tests.engine.models import SEQUENTIAL, tiny_model

    assert model in SEQUENTIAL or model == "llama"
    engine = make_engine(tiny_model(model))
    free = ask(prompts_of(3)[0], max_tokens=10, seed=9, ignore_eos=True)

    def bound():
        return replace(
            ask(PROMPT, max_tokens=10, ignore_eos=True, **params), constraint=Alternating()
        )

    (alone,) = complete(engine, bound())
    assert [token % 2 for token in alone] == [0, 1] * 5
    (free_alone,) = complete(engine, free)
    assert complete(engine, bound(), free, bound()) == [alone, free_alone, alone]


def test_a_complete_sequence_ends_with_the_token_it_has(make_engine):
    engine = make_engine()
    request = ask(PROMPT, max_tokens=5, temperature=0.0, ignore_eos=True)
    outputs = read(engine.submit([replace(request, constraint=Alternating(3))]))[0]
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.COMPLETE]
    assert outputs[-1].token_id is not None


def test_completion_comes_before_the_length(make_engine):
    request = ask(PROMPT, max_tokens=3, temperature=0.0, ignore_eos=True)
    outputs = read(make_engine().submit([replace(request, constraint=Alternating(3))]))[0]
    assert outputs[-1].finish_reason is FinishReason.COMPLETE


@pytest.mark.parametrize("mask", [nothing, lambda: mask_of([])], ids=["raises", "empty"])
@pytest.mark.parametrize("native", [True, False])
def test_a_constraint_that_fails_ends_its_own_sequence_only(make_engine, mask, native):
    engine = make_engine() if native else make_engine(native=None)
    request = ask(PROMPT, max_tokens=6, seed=1, ignore_eos=True)
    expected = complete(engine, request)[0]
    outputs = read(engine.submit([request, replace(request, constraint=Failing(mask))]))
    assert [output.token_id for output in outputs[0]] == expected
    assert [output.token_id for output in outputs[1]] == [*expected[:2], None]
    assert isinstance(outputs[1][-1].error, ConstraintFailed)


class Broken(Alternating):
    """Has a fault that nobody has foreseen, in one of its methods."""

    def __init__(self, method: str) -> None:
        super().__init__()
        setattr(self, method, self.fail)

    def fail(self, *_: object) -> None:
        raise ValueError


@pytest.mark.parametrize("method", ["take", "allowed"])
def test_a_fault_of_a_constraint_ends_its_own_sequence_only(make_engine, method):
    engine = make_engine()
    request = ask(PROMPT, max_tokens=6, seed=1, ignore_eos=True)
    expected = complete(engine, request)[0]
    outputs = read(engine.submit([request, replace(request, constraint=Broken(method))]))
    assert [output.token_id for output in outputs[0]] == expected
    assert isinstance(outputs[1][-1].error, ConstraintFailed)


def test_a_bias_against_all_that_is_allowed_is_the_requests_own_error(make_engine):
    class Four(Alternating):
        def allowed(self):
            return mask_of([4])

    request = ask(PROMPT, max_tokens=6, logit_bias={4: -float("inf")}, seed=1)
    outputs = read(make_engine().submit([replace(request, constraint=Four())]))[0]
    assert isinstance(outputs[-1].error, ConstraintFailed)


@pytest.mark.parametrize("right", [True, False])
def test_drafts_of_a_constraint_change_no_token(make_engine, right):
    engine = make_engine(prompt_lookup_tokens=4)
    request = ask(PROMPT, max_tokens=12, seed=2, ignore_eos=True)
    (expected,) = complete(engine, replace(request, constraint=Alternating()))
    draft = expected if right else [6, 7] * 6
    before = engine.stats().steps
    (drafted,) = complete(engine, replace(request, constraint=Alternating(draft=draft)))
    assert drafted == expected
    assert not right or engine.stats().steps - before <= 5


def test_where_a_constraint_leaves_one_token_those_are_read_at_once(make_engine, native_cache):
    forced = [4, 5, 6, 7, 8, 9, 10, 11, 12, 13]
    answers, steps = [], []
    for draft in ([], forced):
        engine = make_engine(native=native_cache)
        request = ask(PROMPT, max_tokens=10, seed=2, ignore_eos=True)
        answers += complete(engine, replace(request, constraint=Forced(forced, draft)))
        steps.append(engine.stats().steps)
    assert answers == [forced, forced]
    assert steps[1] <= steps[0] - 8


def test_scores_are_those_of_the_unconstrained_model(make_engine):
    engine = make_engine()
    request = ask(PROMPT, max_tokens=1, temperature=0.0, logprobs=97, ignore_eos=True)
    free = read(engine.submit([request]))[0][0]
    bound = read(engine.submit([replace(request, constraint=Alternating())]))[0][0]
    assert bound.score.top == free.score.top
    assert dict(free.score.top)[bound.token_id] == bound.score.logprob


@pytest.mark.parametrize("size", [97, 128, 1000])
@PARAMS
def test_every_sampler_draws_what_the_definition_draws_of_the_masked_row(
    native_cache, size, params
):
    from transformers_api.engine.native.sampler import NativeSampler
    from transformers_api.kernels.provider import kernel_provider

    generator = torch.Generator().manual_seed(size)
    native = Sampler(NativeSampler(kernel_provider(native_cache, 1).library()))
    for seed in range(20):
        logits = torch.randn(3, size, generator=generator) * 4
        sequences = [sequence(**params | {"seed": seed}) for _ in range(3)]
        sequences[1].constraint = Alternating()
        sequences[2].constraint = Alternating()
        sequences[2].constraint.take(4)
        rows = torch.stack([changed_row(logits[i], sequences[i]) for i in range(3)])
        expected = by_definition(rows, sequences)
        for sampler in (native, Sampler()):
            drawn = [token.token_id for token in sampler.sample(logits, sequences)]
            assert drawn == expected
        assert expected[1] in EVEN
        assert expected[2] in ODD


def test_a_row_without_changes_is_not_copied():
    logits = torch.randn(3, 50)
    sequences = [sequence(), sequence(repetition_penalty=1.5), sequence()]
    changed = RowChanges().find(logits, sequences)
    assert list(changed.logits) == [1]
