"""Edits of queries, keys and values as attention reads them, beside a plain model's own."""

from __future__ import annotations

import copy
import sys

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.inspection.models import tiny
from tests.inspection.test_attention_edits import attention, generated
from tests.inspection.test_edits import LAYER, PROMPT, assert_close, plan, written
from tests.repeats import slow
from transformers_api.inspection.edit_plan import Edit

VECTOR = numpy.linspace(-3, 3, 8, dtype=numpy.float32)
COUNT = len(PROMPT)


def inputs(do, part, units=(0, 1), positions=((0, None),), **fields):
    return Edit(do=do, part=part, layer=LAYER, units=units, positions=positions, **fields)


EDITS = {
    "queries of two heads": (inputs("scale", "q", (1, 3), by=-40.0),),
    "keys of the prompt": (inputs("add", "k", (1,), ((2, 5),), vector=20 * VECTOR),),
    "values while it writes": (inputs("set", "v", (0,), ((COUNT, None),), vector=VECTOR),),
    "no value": (inputs("scale", "v", (1,), ((3, 4), (8, 9)), by=0.0),),
    "all three": (
        inputs("scale", "k", by=30.0),
        inputs("add", "q", (2,), vector=9 * VECTOR),
        inputs("scale", "v", (0,), by=2.0),
        attention(positions=((9, None),), keys=((1, 3),)),
    ),
}
MODELS = ["llama", "gpt2", "gemma2", *slow("mistral-window-8", "qwen3")]


def made(edit, rows):
    if edit.do == "scale":
        return rows * edit.by
    vector = torch.tensor(edit.vector)
    return rows + vector if edit.do == "add" else vector.expand_as(rows)


def expected(name, edits):
    """Steps of a plain copy, whose attention function gets what the edits have made."""
    model = copy.deepcopy(tiny(name))
    model.config._attn_implementation = "eager"
    module = sys.modules[type(model).__module__]
    eager = module.eager_attention_forward

    def changed(layer, query, key, value, mask, **options):
        if layer.layer_idx == LAYER:
            mask = mask.clone().expand(-1, query.shape[1], -1, -1).clone()
            states = {"q": query, "k": key, "v": value}
            for edit in edits:
                rows = [at for start, stop in edit.positions for at in range(COUNT + 9)[start:stop]]
                rows = [at for at in rows if at < query.shape[2]]
                if edit.do == "block":
                    for row in rows:
                        mask[:, :, row, 1:3] = torch.finfo(mask.dtype).min
                    continue
                own = states[edit.part] = states[edit.part].clone()
                for head in edit.units:
                    own[0, head, rows] = made(edit, own[0, head, rows])
            query, key, value = states.values()
        return eager(layer, query, key, value, mask, **options)

    module.eager_attention_forward = changed
    try:
        return generated(model, PROMPT)
    finally:
        module.eager_attention_forward = eager


@pytest.mark.parametrize("name", MODELS)
def test_attention_reads_what_the_edits_have_made(watch, name):
    engine = watch(name).engine
    unedited = written(engine, [(PROMPT, None)])[0]
    for what, edits in EDITS.items():
        (own,) = written(engine, [(PROMPT, plan(*edits, identity=what))])
        assert own != unedited, what
        assert_close(own, expected(name, edits))


@pytest.mark.parametrize("options", [{"native": None}, {"prefill_chunk": 1}])
def test_torch_and_other_chunks_do_the_same(watch, options):
    engine = watch("llama", **options).engine
    for what, edits in EDITS.items():
        (own,) = written(engine, [(PROMPT, plan(*edits, identity=what))])
        assert_close(own, expected("llama", edits))


def test_keys_and_values_in_int8_are_rounded_again(watch):
    engine = watch("llama", dtype="bfloat16", kv_cache_dtype="int8").engine
    (own,) = written(engine, [(PROMPT, plan(*EDITS["keys of the prompt"]))])
    (_, top), *_ = expected("llama", EDITS["keys of the prompt"])
    scores = dict(own[0][1].top)
    right = {token: value for token, value in top if token in scores}
    assert right
    assert {token: scores[token] for token in right} == pytest.approx(right, abs=0.1)


@pytest.mark.parametrize("native", [True, False])
def test_neighbours_and_later_prompts_read_nothing_of_it(watch, native):
    options = {} if native else {"native": None}
    edits = plan(*EDITS["all three"])
    prompts = [[*prompt, 7, 8, 9] for prompt in prompts_of(3)]
    company = written(
        watch(copy.deepcopy(tiny("llama")), **options).engine, [(p, None) for p in prompts]
    )
    engine = watch(copy.deepcopy(tiny("llama")), **options).engine
    mixed = written(engine, [(prompts[0], None), (prompts[1], edits), (prompts[2], None)])
    assert [mixed[0], mixed[2]] == [company[0], company[2]]
    assert mixed[1] != company[1]
    again = written(engine, [(prompt, None) for prompt in prompts])
    for own, before in zip(again, company, strict=True):
        assert_close(own, [(token, score.top) for token, score in before])


def test_what_they_are_can_be_read_and_put_where_it_was(watch):
    """Self-patch: the numbers of the very prompt change nothing."""
    watched = watch(copy.deepcopy(tiny("llama")))
    engine = watched.engine
    unedited = written(engine, [(PROMPT, None)])[0]
    for part, heads in (("q", 4), ("k", 2), ("v", 2)):
        numbers = watched.run(watched.inspector.part_numbers(PROMPT, [(LAYER, part)]))[0]
        assert numbers.shape == (COUNT, heads * 8)
        own = numbers.reshape(COUNT, heads, 8)
        edit = inputs("set", part, tuple(range(heads)), ((0, COUNT),), vector=own, is_aligned=True)
        (patched,) = written(engine, [(PROMPT, plan(edit, identity=part))])
        assert_close(patched, [(token, score.top) for token, score in unedited])


def test_latent_keys_that_are_made_anew_each_time_are_not_offered(watch):
    """DeepSeek's cache on torch has what keys and values are made from."""
    watched = watch("deepseek-mla", native=None)
    places = watched.run(watched.inspector.check_places()).of(LAYER)
    assert places.unverified == {"k", "v"}
    assert places.can("q")
