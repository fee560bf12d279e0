"""Edited beside unedited predictions of an answer, against two plain passes of torch's own."""

from __future__ import annotations

import copy

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.inspection.models import tiny
from tests.inspection.test_edits import DIRECTION, VECTOR, edit, plan
from transformers_api.engine.places import model_places
from transformers_api.inspection.divergence_question import DivergenceQuestion
from transformers_api.inspection.edit_plan import InterventionFailed

PROMPT = prompts_of(5)[4]
ANSWER = [7, 3, 90, 12, 12, 40, 1, 5, 23]  # with the prompt four slices of 8
CHANGES = {
    "add": (edit(vector=VECTOR), lambda x: x + torch.tensor(VECTOR)),
    "erase": (
        edit(do="erase", vector=DIRECTION),
        lambda x: x - (x @ torch.tensor(DIRECTION).T) @ torch.tensor(DIRECTION),
    ),
    "scale": (edit(do="scale", by=0.5), lambda x: x * 0.5),
}


@torch.inference_mode()
def logprobs(name, ids, answer, change=None, first=0):
    """(T, V) of an answer by one plain pass, whose stream after layer 1 is changed."""
    model = copy.deepcopy(tiny(name))
    if change is not None:

        def hook(_module, _inputs, output):
            stream = output[0] if isinstance(output, tuple) else output
            moved = torch.cat([stream[:, :first], change(stream[:, first:])], 1)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        model.get_submodule(model_places(model)[1].layer).register_forward_hook(hook)
    text = torch.tensor([[*ids, *answer]])
    logits = model(input_ids=text, use_cache=False).logits[0].float()
    return logits[len(ids) - 1 : -1].log_softmax(-1)


def diverged(watched, ids, answer, edits):
    question = DivergenceQuestion(answer=answer, plan=edits, topk=3)
    return watched.run(watched.inspector.diverge(ids, question))


def is_as_by_hand(result, plain, other, answer):
    own = plain.gather(1, torch.tensor(answer)[:, None])[:, 0]
    top = plain.topk(3)
    kl = (other.double().exp() * (other - plain).double()).sum(-1)
    numpy.testing.assert_allclose(result.kl, kl, rtol=1e-3, atol=2e-6)
    numpy.testing.assert_allclose(result.logprob_without, own, atol=2e-5)
    numpy.testing.assert_allclose(result.top_logprobs, top.values, atol=2e-5)
    numpy.testing.assert_array_equal(result.top_ids, top.indices)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_each_token_is_pushed_as_two_plain_passes_say(watch, native, change):
    watched = watch("llama", **({} if native else {"native": None}))
    edits, formula = CHANGES[change]
    plain, other = (logprobs("llama", PROMPT, ANSWER, each) for each in (None, formula))
    result = diverged(watched, PROMPT, ANSWER, plan(edits))
    assert result.kl.min() > 2e-5  # ten times what rounding makes of it
    is_as_by_hand(result, plain, other, ANSWER)


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_so_it_is_in_other_families(watch, name):
    edits, formula = CHANGES["add"]
    plain, other = (logprobs(name, PROMPT, ANSWER, each) for each in (None, formula))
    is_as_by_hand(diverged(watch(name), PROMPT, ANSWER, plan(edits)), plain, other, ANSWER)


@pytest.mark.parametrize(("ids", "answer"), [(PROMPT, [9]), ([4], ANSWER), ([4], [9])])
def test_texts_may_be_short(watch, ids, answer):
    edits, formula = CHANGES["add"]
    plain, other = (logprobs("llama", ids, answer, each) for each in (None, formula))
    is_as_by_hand(diverged(watch("llama"), ids, answer, plan(edits)), plain, other, answer)


def test_an_edit_of_the_answer_leaves_its_first_token_as_it_is(watch):
    start = len(PROMPT)
    late, formula = edit(vector=VECTOR, positions=((start, None),)), CHANGES["add"][1]
    result = diverged(watch("llama"), PROMPT, ANSWER, plan(late))
    assert result.kl[0] == 0
    assert result.kl[1:].min() > 1e-3
    plain = logprobs("llama", PROMPT, ANSWER)
    other = logprobs("llama", PROMPT, ANSWER, formula, start)
    is_as_by_hand(result, plain, other, ANSWER)


def test_without_edits_nothing_is_pushed(watch):
    result = diverged(watch("llama"), PROMPT, ANSWER, None)
    assert not result.kl.any()
    plain = logprobs("llama", PROMPT, ANSWER)
    is_as_by_hand(result, plain, plain, ANSWER)


def test_a_comparison_counts_no_edits_of_the_answer_and_fails_as_edits_do(watch):
    counted = plan(CHANGES["add"][0])
    diverged(watch("llama"), PROMPT, ANSWER, counted)
    assert counted.tally.tokens == 0
    huge = plan(edit(vector=numpy.full(32, 1e38, numpy.float32)))
    with pytest.raises(InterventionFailed):
        diverged(watch("llama"), PROMPT, ANSWER, huge)
