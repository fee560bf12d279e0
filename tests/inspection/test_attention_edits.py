"""Blocked edges and temperatures of attention, beside a plain model whose own attention has them."""

from __future__ import annotations

import copy
import sys

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import sharp, tiny
from tests.inspection.test_edits import FORMULAS, LAYER, PROMPT, STEPS, assert_close, plan, written
from tests.repeats import slow
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.inspection.base import TracePlan
from transformers_api.inspection.edit_plan import Edit

HEADS = (0, 1, 2, 3)
COUNT = len(PROMPT)


def attention(**fields):
    fixed = {"do": "block", "part": "weights", "layer": LAYER, "units": HEADS}
    return Edit(**(fixed | {"positions": ((0, None),)} | fields))


def temper(temperature, **fields):
    return attention(do="temper", by=temperature, **fields)


def ranges(spans, count):
    return [at for start, stop in spans for at in range(start, min(stop or count, count))]


def reference(name, prompt, *edits, hooks=()):
    """Steps of a plain copy whose eager attention of one layer is written out, without a cache."""
    model = copy.deepcopy(tiny(name))
    model.config._attn_implementation = "eager"

    def changed(module, query, key, value, mask, scaling=None, softcap=None, **options):
        if module.layer_idx != LAYER:
            extra = {} if softcap is None else {"softcap": softcap}
            return eager(module, query, key, value, mask, scaling=scaling, **extra, **options)
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        count = query.shape[2]
        scores = scores.masked_fill((mask < -1e4)[..., :count], -torch.inf)
        sinks = getattr(module, "sinks", None)
        if sinks is not None:
            scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(1, -1, count, 1)], -1)
        for edit in edits:
            for row in ranges(edit.positions, count):
                for head in edit.units:
                    if edit.do == "temper":
                        scores[0, head, row] /= edit.by
                    else:
                        scores[0, head, row, ranges(edit.keys, count)] = -torch.inf
        weights = scores.softmax(-1).nan_to_num(0)[..., :count]
        return (weights @ value).transpose(1, 2).contiguous(), weights

    module = sys.modules[type(model).__module__]
    eager = module.eager_attention_forward
    module.eager_attention_forward = changed
    handles = [model.get_submodule(at).register_forward_hook(hook) for at, hook in hooks]
    try:
        return generated(model, prompt)
    finally:
        module.eager_attention_forward = eager
        for handle in handles:
            handle.remove()


@torch.no_grad()
def generated(model, prompt):
    ids, steps = list(prompt), []
    for _ in range(STEPS):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        best = logits.float().log_softmax(-1).topk(3)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        steps.append((int(best.indices[0]), tuple(pairs)))
        ids.append(steps[-1][0])
    return steps


EDITS = {
    "an edge": (attention(positions=((8, 9),), keys=((3, 5),)),),
    "the last token": (attention(positions=((COUNT - 1, COUNT),), keys=((4, 7),)),),
    "of some heads, while it writes": (
        attention(positions=((COUNT, None),), keys=((0, 2), (5, COUNT)), units=(1, 2)),
    ),
    "hot and cold": (temper(3.0, units=(0,)), temper(0.3, units=(2, 3), positions=((4, None),))),
    "both": (temper(2.0), attention(keys=((2, 3),), units=(3,)), temper(1.5, units=(3,))),
    "what was written": (attention(keys=((COUNT, None),)),),
    "all but itself": (attention(positions=((9, 10),), keys=((0, 9),)),),
    "all": (attention(positions=((9, 11),), keys=((0, None),)),),
}
MODELS = ["llama", "gpt2", "gemma2", "mistral-window-8", "gpt-oss-sinks"]


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_of_a_model_that_computes_them_so(watch, name):
    engine = watch(name).engine
    unedited = written(engine, [(PROMPT, None)])[0]
    for what, edits in EDITS.items():
        (own,) = written(engine, [(PROMPT, plan(*edits, identity=what))])
        assert own != unedited, what
        assert_close(own, reference(name, PROMPT, *edits))


@pytest.mark.parametrize("name", ["llama", *slow("gpt2", "mistral-window-8")])
def test_torch_changes_them_in_the_same_way(watch, name):
    engine = watch(name, native=None).engine
    for what, edits in EDITS.items():
        (own,) = written(engine, [(PROMPT, plan(*edits, identity=what))])
        assert_close(own, reference(name, PROMPT, *edits))


@pytest.mark.parametrize("native", [True, False])
def test_weights_that_a_model_computes_itself_are_changed_where_it_does(watch, native):
    """BLOOM: with ALiBi; the kernel attends in its place, torch calls its modules."""
    engine = watch("bloom-alibi", **({} if native else {"native": None})).engine
    for edits in (EDITS["an edge"], EDITS["both"], EDITS["all"]):
        (own,) = written(engine, [(PROMPT, plan(*edits, identity=repr(edits)))])
        assert_close(own, by_dropout(edits))


def by_dropout(edits):
    """BLOOM's steps with weights changed in its dropout."""
    model = copy.deepcopy(tiny("bloom-alibi"))

    def hook(_module, _args, weights):
        own, count = weights.clone(), weights.shape[-1]
        for edit in edits:
            for row in ranges(edit.positions, count):
                for head in edit.units:
                    if edit.do == "temper":
                        own[0, head, row] **= 1 / edit.by
                    else:
                        own[0, head, row, ranges(edit.keys, count)] = 0
                    own[0, head, row] /= own[0, head, row].sum().clamp_min(1e-30)
        return own

    dropout = model.transformer.h[LAYER].self_attention.attention_dropout
    dropout.register_forward_hook(hook)
    return generated(model, PROMPT)


@pytest.mark.parametrize("chunk", [1, *slow(3, 64)])
def test_prompts_are_changed_however_they_are_read(watch, chunk):
    edits = EDITS["both"]
    engine = watch("mistral-window-8", prefill_chunk=chunk).engine
    (own,) = written(engine, [(PROMPT, plan(*edits))])
    assert_close(own, reference("mistral-window-8", PROMPT, *edits))


def test_a_temperature_of_one_changes_nothing_but_rounding(watch, native_cache):
    engine = watch(sharp("llama"), native=native_cache, dtype="bfloat16").engine
    (own,) = written(engine, [(PROMPT, plan(temper(1.0)))])
    (plain,) = written(engine, [(PROMPT, None)])
    for (token, score), (same, unedited) in zip(own, plain, strict=True):
        assert token == same
        assert abs(score.logprob - unedited.logprob) < 2e-4


def test_blocked_edges_and_a_steered_stream_compose(watch):
    steered, _ = FORMULAS["add"]
    edits = EDITS["an edge"]
    (own,) = written(watch("llama").engine, [(PROMPT, plan(*edits, steered))])

    def steer(_module, _args, out):
        return out + torch.tensor(steered.vector)

    hooks = [(f"model.layers.{LAYER}", steer)]
    assert_close(own, reference("llama", PROMPT, *edits, hooks=hooks))


@pytest.mark.parametrize("native", [True, False])
def test_neighbours_stay_as_they_are_to_the_bit(watch, native):
    options = {} if native else {"native": None}
    prompts = [[*prompt, 7, 8, 9] for prompt in prompts_of(4)]
    plans = [None, plan(*EDITS["both"]), None, plan(*EDITS["an edge"], identity="b")]
    company, mixed = (
        written(watch(copy.deepcopy(tiny("qwen3")), **options).engine, requests)
        for requests in (
            [(prompt, None) for prompt in prompts],
            list(zip(prompts, plans, strict=True)),
        )
    )
    assert [mixed[0], mixed[2]] == [company[0], company[2]]
    assert mixed[1] != company[1]
    assert mixed[3] != company[3]


def test_queries_that_no_edit_concerns_keep_every_bit(watch):
    """What nobody reads from yet, and a prompt before the first query."""
    engine = watch(copy.deepcopy(tiny("llama"))).engine
    unedited = written(engine, [(PROMPT, None)])[0]
    behind = attention(positions=((0, COUNT),), keys=((COUNT, None),))
    later = attention(positions=((COUNT + STEPS, None),), keys=((0, 3),))
    for number, edit in enumerate((behind, later)):
        own = plan(edit, identity=str(number))
        assert written(engine, [(PROMPT, own)])[0] == unedited
        assert own.tally.tokens == 0


def test_edited_rows_are_not_offered_to_others_and_their_beginning_is(watch):
    """Poison: the same prompt unedited, edited, unedited, both at once."""
    fresh = {
        what: written(watch(copy.deepcopy(tiny("llama"))).engine, [(PROMPT, own)])[0]
        for what, own in (("off", None), ("on", plan(*EDITS["an edge"])))
    }
    engine = watch(copy.deepcopy(tiny("llama"))).engine
    for order in ("off", "on", "off", "on", "on", "off"):
        own = None if order == "off" else plan(*EDITS["an edge"])
        assert written(engine, [(PROMPT, own)])[0] == fresh[order], order
    both = written(engine, [(PROMPT, plan(*EDITS["an edge"])), (PROMPT, None)])
    assert both == [fresh["on"], fresh["off"]]
    assert plan(*EDITS["an edge"]).unedited == 8


@pytest.mark.parametrize("name", ["llama", *slow("bloom-alibi", "gpt-oss-sinks")])
def test_what_is_shown_of_attention_is_what_was_read(watch, name):
    watched = watch(name)
    edit = attention(positions=((8, 10),), keys=((3, 5),))
    inspector = watched.inspector.edited(plan(edit))
    own, plain = (
        watched.run(each.attention(PROMPT, LAYER, "all", (0, COUNT), (0, COUNT))).weights
        for each in (inspector, watched.inspector)
    )
    assert (own[:, 8:10, 3:5] == 0).all()
    others = [row for row in range(COUNT) if row not in (8, 9)]
    assert (own[:, others] == plain[:, others]).all()
    assert (own[:, 8:10] != plain[:, 8:10]).any()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("company", [0, 1])
def test_an_answer_is_changed_once_where_its_attention_is_shown_too(watch, native, company):
    """In a prompt and in steps, alone and beside an unedited one."""
    engine = watch("llama", **({} if native else {"native": None})).engine
    edge = attention(positions=((COUNT - 1, None),), keys=((3, 5),))
    for name, edits in {"edge": (edge,), "both": (temper(2.0), edge)}.items():
        requests = [(PROMPT, plan(*edits, identity=f"shown {name}"))] + company * [(PROMPT, None)]
        shown = {"trace": TracePlan(layers=(LAYER,))}
        rows = traced(engine, requests, shown)
        for own in rows:
            weights = [row.weights for row in own]
            assert numpy.allclose([each.sum(-1) for each in weights], 1, atol=1e-5)
            is_edited = own is rows[0]
            assert all((each[:, 3:5] == 0).all() == is_edited for each in weights)


def traced(engine, requests, shown):
    """The attention of every step, by sequence; each says what it says untraced."""
    untraced = written(engine, requests)
    params = SamplingParams(max_tokens=STEPS, temperature=0, logprobs=3, ignore_eos=True)
    sequences = [SequenceRequest(prompt, params, edits=edits) for prompt, edits in requests]
    outputs = read(engine.submit(sequences, observe=shown))
    own = [outputs[index] for index in sorted(outputs)]
    assert [[(o.token_id, o.score) for o in each] for each in own] == untraced
    return [[output.extras["trace"].attention[0] for output in each] for each in own]


def test_layers_whose_weights_only_pass_by_are_not_offered(watch):
    """MPT's attention returns the weights that it has used; nothing reads them."""
    watched = watch("mpt-alibi")
    editable = watched.run(watched.inspector.check_places())
    assert not any(places.can("weights") for places in editable.places)
    assert all(places.can("resid") for places in editable.places)
