"""What is said of each token while it is written: the parts of its logit, and how sure it was."""

from __future__ import annotations

import copy

import numpy
import pytest

from tests.engine.models import prompts_of
from tests.inspection.models import tiny
from tests.inspection.test_edits import edit, plan
from tests.inspection.test_recording import run, scored
from tests.repeats import slow
from transformers_api.inspection.base import TracePlan
from transformers_api.inspection.logit_share import LogitPartsQuestion
from transformers_api.inspection.uncertainty import agreement, settled_layer

BY_HEAD = LogitPartsQuestion(position=-1, by="head")


@pytest.mark.parametrize(
    ("name", "by", "against"),
    [
        ("llama", "layer", None),
        ("gemma2", "head", "mean"),  # with norms behind its writers, and a cap
        *slow(
            *(
                (name, by, against)
                for name in ("gpt2", "olmo2", "granite", "mixtral", "gpt-oss-sinks")
                for by in ("layer", "head")
                for against in (None, "mean")
            )
        ),
    ],
)
def test_the_parts_of_each_token_are_those_of_the_question_about_it(watch, name, by, against):
    watched = watch(name, dtype="float32")
    asked = LogitPartsQuestion(position=-1, by=by, against=against)
    prompts = prompts_of(4)[2:]
    traced = TracePlan(parts=asked)
    for prompt, outputs in zip(prompts, run(watched.engine, prompts, [traced] * 2), strict=True):
        ids = [*prompt, *(output.token_id for output in outputs)]
        for output in outputs:
            trace = output.extras["trace"]
            own, at = trace.parts, trace.position
            question = LogitPartsQuestion(
                position=at - 1, token_id=trace.token_id, by=by, against=against
            )
            right = watched.run(watched.inspector.logit_parts(ids[:at], question))
            assert [share[:3] for share in map(tuple_of, own.shares)] == [
                share[:3] for share in map(tuple_of, right.shares)
            ]
            numpy.testing.assert_allclose(
                [share.value for share in own.shares],
                [share.value for share in right.shares],
                rtol=2e-4,
                atol=2e-4,
            )
            total = sum(share.value for share in own.shares) + own.constant + own.rounding
            assert total == pytest.approx(own.logit, abs=1e-9)
            assert own.model_logit == pytest.approx(right.model_logit, rel=1e-4, abs=1e-4)
            assert abs(own.rounding) < 1e-4


def tuple_of(share):
    return share.part, share.layer, share.index, share.value


def test_rounding_makes_up_for_what_bfloat16_loses(watch):
    watched = watch("llama", dtype="bfloat16")
    (outputs,) = run(watched.engine, [prompts_of(4)[3]], [TracePlan(parts=BY_HEAD)])
    for output in outputs:
        own = output.extras["trace"].parts
        total = sum(share.value for share in own.shares) + own.constant
        assert total + own.rounding == pytest.approx(own.logit, abs=1e-9)
        assert abs(own.rounding) < 0.05 * sum(abs(share.value) for share in own.shares)


def test_what_an_edit_takes_away_is_a_share_of_its_own(watch):
    watched = watch("llama", dtype="float32")
    silent = edit(do="scale", part="attn", layer=1, by=0.0, positions=((0, None),))
    traced = TracePlan(parts=LogitPartsQuestion(position=-1))
    (outputs,) = run(watched.engine, [prompts_of(4)[3]], [traced], plan(silent, identity="silent"))
    for output in outputs:
        parts = output.extras["trace"].parts
        shares = {(s.part, s.layer): s.value for s in parts.shares}
        assert shares["edit", 1] == -shares["attn", 1] != 0
        assert abs(parts.rounding) < 1e-4


def test_what_is_said_of_tokens_changes_none(watch):
    figures = TracePlan(parts=BY_HEAD, uncertainty=True, lens_layers=(0, 1), lens_topk=1)
    prompts = prompts_of(3)
    own = run(watch(copy.deepcopy(tiny("llama"))).engine, prompts, [figures, None, figures])
    right = run(watch(copy.deepcopy(tiny("llama"))).engine, prompts, [None] * 3)
    assert [scored(each) for each in own] == [scored(each) for each in right]


@pytest.mark.parametrize("name", ["llama", *slow("gemma2", "gpt2")])
def test_uncertainty_is_that_of_the_whole_distribution(watch, name):
    watched = watch(name, dtype="float32")
    last = watched.examined.anatomy.layers - 1
    figures = TracePlan(uncertainty=True, lens_layers=(-1, 0, last), lens_topk=97, topk=97)
    (outputs,) = run(watched.engine, [prompts_of(4)[3]], [figures])
    for output in outputs:
        trace = output.extras["trace"]
        own = trace.uncertainty
        probs = numpy.array(trace.top.probs, numpy.float64)
        surprisal = -numpy.log(probs)
        assert own.entropy == pytest.approx((probs * surprisal).sum(), abs=1e-4)
        variance = (probs * (surprisal - own.entropy) ** 2).sum()
        assert own.varentropy == pytest.approx(variance, abs=1e-4)
        assert own.margin == pytest.approx(probs[0] - probs[1], abs=1e-5)
        middle, end = (
            dict(zip(each.top.token_ids, each.top.probs, strict=True)) for each in trace.lens[1:]
        )
        kl = sum(p * numpy.log(p / middle[token]) for token, p in end.items())
        assert own.lens_kl == pytest.approx(kl, abs=1e-4)
        choices = [each.top.token_ids[0] for each in trace.lens]
        settled = next(i for i in range(3) if len({*choices[i:]}) == 1)
        assert own.settled_layer == (-1, 0, last)[settled]


def test_without_a_lens_nothing_settles(watch):
    (outputs,) = run(watch("llama").engine, [prompts_of(4)[3]], [TracePlan(uncertainty=True)])
    own = outputs[0].extras["trace"].uncertainty
    assert (own.settled_layer, own.lens_kl) == (None, None)


@pytest.mark.parametrize(
    ("choices", "settled"), [([5, 5, 5], 0), ([1, 5, 5], 1), ([5, 1, 5], 2), ([], None)]
)
def test_the_settled_layer_is_the_first_whose_choice_stays(choices, settled):
    assert settled_layer(list(enumerate(choices))[::-1]) == settled


def test_answers_agree_as_far_as_they_are_the_same():
    assert agreement([[1, 2], [1, 2]]) == {"share": 1, "distinct": 1, "prefix": 1}
    figures = agreement([[1, 2, 3, 4], [1, 2], [1, 9, 3, 4]])
    assert figures["share"] == pytest.approx(1 / 3)
    assert figures["distinct"] == 3
    assert figures["prefix"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert agreement([[], []])["prefix"] == 1
