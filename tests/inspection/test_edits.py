"""Edits of sequences that are served: their formulas beside torch's own hooks, and their reach."""

from __future__ import annotations

import copy
import functools

import numpy
import pytest
import torch

from tests import lora
from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import tiny
from tests.repeats import slow
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.places import model_places
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.inspection.base import TracePlan
from transformers_api.inspection.edit_plan import Edit, EditPlan, InterventionFailed
from transformers_api.kernels.graph.hooks import HookReplay

PROMPT = prompts_of(3)[2]
LAYER, STEPS = 1, 4
WIDTH = 32
NORMED = numpy.random.default_rng(0).normal(size=WIDTH).astype(numpy.float32)
VECTOR = 2 * NORMED
DIRECTION = (NORMED / numpy.linalg.norm(NORMED))[None]


def edit(**fields):
    given = {"do": "add", "part": "resid", "layer": LAYER, "positions": ((0, None),)}
    return Edit(**(given | fields))


def plan(*edits, identity="an edit"):
    return EditPlan(edits=edits, identity=identity)


FORMULAS = {
    "add": (edit(vector=VECTOR), lambda x: x + torch.tensor(VECTOR)),
    "add to the embedding": (edit(layer=-1, vector=VECTOR), lambda x: x + torch.tensor(VECTOR)),
    "erase": (edit(do="erase", vector=DIRECTION), lambda x: x - (x @ D.T) @ D),
    "scale attn": (edit(do="scale", part="attn", by=0.25), lambda x: x * 0.25),
    "zero mlp": (edit(do="scale", part="mlp", by=0.0), lambda x: x * 0),
    "set mlp": (edit(do="set", part="mlp", vector=VECTOR), lambda x: torch.tensor(VECTOR) + 0 * x),
    "keep norm": (
        edit(vector=VECTOR, keeps_norm=True),
        lambda x: _as_long(x + torch.tensor(VECTOR), x),
    ),
    "zero heads": (
        edit(do="scale", part="head", units=(1, 3), by=0.0),
        lambda x: _heads(x, lambda heads: heads * torch.tensor([1.0, 0, 1, 0])[:, None]),
    ),
    "set a head": (
        edit(do="set", part="head", units=(2,), vector=VECTOR[:8]),
        lambda x: _heads(x, lambda heads: _put(heads, 2, torch.tensor(VECTOR[:8]))),
    ),
    "set neurons": (
        edit(do="set", part="neuron", units=(5, 7), vector=numpy.array([3, -4], numpy.float32)),
        lambda x: _put_last(x, [5, 7], torch.tensor([3.0, -4.0])),
    ),
    "scale neurons": (
        edit(do="scale", part="neuron", units=(0, 9, 30), by=-2.0),
        lambda x: _put_last(x, [0, 9, 30], -2 * x[..., [0, 9, 30]]),
    ),
}
D = torch.tensor(DIRECTION)


def _as_long(x, other):
    return x * (other.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True))


def _heads(x, change):
    return change(x.unflatten(-1, (4, -1))).flatten(-2)


def _put(heads, head, vector):
    heads = heads.clone()
    heads[..., head, :] = vector
    return heads


def _put_last(x, units, values):
    x = x.clone()
    x[..., units] = values
    return x


def written(engine, requests, **params):
    """(token, logprob of each of three) of every step, by sequence."""
    given = {"max_tokens": STEPS, "temperature": 0, "logprobs": 3, "ignore_eos": True} | params
    outputs = read(
        engine.submit(
            [
                SequenceRequest(prompt, SamplingParams(**given), edits=edits)
                for prompt, edits in requests
            ]
        )
    )
    return [[(o.token_id, o.score) for o in outputs[index]] for index in sorted(outputs)]


def expected(name, prompt, changed, change, first=0, stop=1 << 30):
    """The same by hooks of the plain model, without a cache: positions [first, stop) changed."""
    model, places = plain(name)
    layer = places[max(changed.layer, 0)]

    def hook(x):
        own = x.clone()
        own[:, first:stop] = change(x[:, first:stop])
        return own

    into = {"head": layer.reader, "neuron": layer.down}.get(changed.part)
    if changed.layer < 0:
        into = layer.layer
    if into:
        module = model.get_submodule(into)
        handle = module.register_forward_pre_hook(lambda _, a: (hook(a[0]), *a[1:]))
    else:
        out = {"attn": layer.attn.name, "mlp": layer.mlp.name, "resid": layer.layer}[changed.part]
        handle = model.get_submodule(out).register_forward_hook(
            lambda _m, _a, y: (hook(y[0]), *y[1:]) if isinstance(y, tuple) else hook(y)
        )
    ids, steps = list(prompt), []
    with torch.no_grad():
        for _ in range(STEPS):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            logprobs = logits.float().log_softmax(-1)
            best = logprobs.topk(3)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            steps.append((int(best.indices[0]), tuple(pairs)))
            ids.append(steps[-1][0])
    handle.remove()
    return steps


@functools.cache
def plain(name):
    """A copy of the model, and its places."""
    model = copy.deepcopy(tiny(name))
    return model, model_places(model)


def assert_close(own, right, atol=2e-5):
    assert [token for token, _ in own] == [token for token, _ in right]
    for (_, score), (_, top) in zip(own, right, strict=True):
        assert [token for token, _ in score.top] == [token for token, _ in top]
        values = [[value for _, value in each] for each in (score.top, top)]
        numpy.testing.assert_allclose(*values, atol=atol, rtol=0)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", *slow("llama", "qwen3")])
def test_formulas_are_those_of_hooks_of_the_plain_model(watch, name):
    engine = watch(name).engine
    unedited = written(engine, [(PROMPT, None)])[0]
    for what, (changed, change) in FORMULAS.items():
        (own,) = written(engine, [(PROMPT, plan(changed, identity=what))])
        assert own != unedited, what
        assert_close(own, expected(name, PROMPT, changed, change))


@pytest.mark.parametrize(
    ("positions", "first", "stop"),
    [
        (((0, 12),), 0, 12),
        (((12, None),), 12, 1 << 30),
        (((11, 12),), 11, 12),
        (((3, 5),), 3, 5),
        (((11, 14),), 11, 14),
        (((14, 15), (15, 16)), 14, 16),
    ],
)
def test_only_the_positions_that_are_named_are_changed(watch, positions, first, stop):
    assert len(PROMPT) == 12
    changed = edit(vector=VECTOR, positions=positions)
    (own,) = written(watch("llama").engine, [(PROMPT, plan(changed, identity=str(positions)))])
    change = FORMULAS["add"][1]
    assert_close(own, expected("llama", PROMPT, changed, change, first, stop))


@pytest.mark.parametrize("chunk", [3, *slow(1, 8, 64)])
def test_prompts_are_edited_however_they_are_read(watch, chunk):
    changed, change = FORMULAS["add"]
    watched = watch("mistral-window-8", prefill_chunk=chunk)
    (own,) = written(watched.engine, [(PROMPT, plan(changed))])
    assert_close(own, expected("mistral-window-8", PROMPT, changed, change))


@pytest.mark.parametrize("native", [True, False])
def test_every_formula_holds_in_bfloat16_within_its_rounding(watch, native):
    engine = watch("llama", dtype="bfloat16", **({} if native else {"native": None})).engine
    for name, (changed, change) in FORMULAS.items():
        (own,) = written(engine, [(PROMPT, plan(changed, identity=name))])
        (_, top), *_ = expected("llama", PROMPT, changed, change)  # of the first token
        scores = dict(own[0][1].top)
        right = {token: value for token, value in top if token in scores}
        assert len(right) > 1, name
        assert {token: scores[token] for token in right} == pytest.approx(right, abs=0.06), name


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_stay_as_they_are_to_the_bit(watch, native, dtype):
    options = {"dtype": dtype} | ({} if native else {"native": None})
    engine = watch("qwen3", **options).engine
    prompts = [[*prompt, 7, 8, 9] for prompt in prompts_of(4)]
    company = written(engine, [(prompt, None) for prompt in prompts])
    plans = [None, plan(FORMULAS["add"][0]), None, plan(FORMULAS["zero heads"][0], identity="b")]
    fresh = watch(copy.deepcopy(tiny("qwen3")), **options).engine
    mixed = written(fresh, list(zip(prompts, plans, strict=True)))
    assert [mixed[0], mixed[2]] == [company[0], company[2]]
    assert mixed[1] != company[1]
    assert mixed[3] != company[3]


def test_several_edits_of_one_place_compose_in_their_order(watch):
    add, scale = edit(vector=VECTOR), edit(do="scale", by=0.5)
    engine = watch("llama").engine
    one = written(engine, [(PROMPT, plan(add, scale, identity="1"))])[0]
    other = written(engine, [(PROMPT, plan(scale, add, identity="2"))])[0]
    assert_close(one, expected("llama", PROMPT, add, lambda x: (x + torch.tensor(VECTOR)) / 2))
    assert_close(other, expected("llama", PROMPT, add, lambda x: x / 2 + torch.tensor(VECTOR)))


def test_the_kernels_make_plain_edits_and_copy_attention_without_a_pause(watch, monkeypatch):
    engine = watch("llama").engine
    if not isinstance(innermost(engine.runner), NativeRunner):
        pytest.skip("without the kernels")
    paused = []
    monkeypatch.setattr(HookReplay, "show", lambda _, call: paused.append(call))
    trace = {"trace": TracePlan(layers=(LAYER,))}
    params = SamplingParams(max_tokens=STEPS, temperature=0)
    for name, (changed, _) in FORMULAS.items():
        outputs = read(
            engine.submit(
                [
                    SequenceRequest(
                        PROMPT, params, edits=plan(changed, identity=f"no pause: {name}")
                    )
                ],
                observe=trace,
            )
        )
        rows = [output.extras["trace"].attention[0].weights for output in outputs[0]]
        assert numpy.allclose([row.sum(-1) for row in rows], 1, atol=1e-5)
        pauses, is_plain = len(paused), name not in ("erase", "keep norm")
        paused.clear()
        assert (pauses == 0) is is_plain, name


def test_the_tally_counts_every_token_that_was_changed(watch):
    every, steps = plan(edit(vector=VECTOR)), plan(edit(vector=VECTOR, positions=((12, None),)))
    engine = watch("llama").engine
    written(engine, [(PROMPT, every)])
    written(engine, [(PROMPT, steps)])
    assert steps.tally.tokens == STEPS - 1  # the last one is read by nobody
    assert every.tally.tokens == len(PROMPT) + STEPS - 1


@pytest.mark.parametrize("vector", [numpy.full(WIDTH, 3e38), numpy.full(WIDTH, numpy.nan)])
def test_numbers_that_are_not_finite_end_the_sequence_and_no_other(watch, vector):
    engine = watch("llama").engine
    alone = written(engine, [(PROMPT[:7], None)])
    failing = plan(
        edit(vector=vector.astype(numpy.float32), positions=((13, None),)), identity="too much"
    )
    params = SamplingParams(max_tokens=STEPS, temperature=0, logprobs=3, ignore_eos=True)
    both = [SequenceRequest(PROMPT, params, edits=failing), SequenceRequest(PROMPT[:7], params)]
    outputs = read(engine.submit(both))
    error = outputs[0][-1].error
    assert isinstance(error, InterventionFailed)
    assert error.message == (
        "the edited stream of layer 1 became infinite at step 2; use a smaller scale"
    )
    assert [(o.token_id, o.score) for o in outputs[1]] == alone[0]
    assert written(engine, [(PROMPT[:7], None)]) == alone


def test_edits_go_together_with_adapters_and_with_scored_prompts(watch, tmp_path):
    source = lora.source(lora.adapter(tmp_path, tiny("llama")))
    changed = plan(FORMULAS["add"][0], FORMULAS["zero heads"][0])
    answers = []
    for native in ({}, {"native": None}):
        engine = watch("llama", **native).engine
        adapted = engine.adapted(source)
        (both,) = written(adapted, [(PROMPT, changed)])
        (alone,) = written(adapted, [(PROMPT, None)])
        (edited,) = written(engine, [(PROMPT, changed)])
        assert both not in (alone, edited)
        params = {"max_tokens": 1, "prompt_logprobs": 0}
        asked = SequenceRequest(PROMPT, SamplingParams(**params), edits=changed)
        scores = read(engine.submit([asked]))[0][0].prompt_scores
        adapted.close()
        answers.append([*both, *((each.token_id, each) for each in scores[1:])])
    assert [token for token, _ in answers[0]] == [token for token, _ in answers[1]]
    logprobs = [[score.logprob for _, score in each] for each in answers]
    numpy.testing.assert_allclose(*logprobs, atol=1e-4)
