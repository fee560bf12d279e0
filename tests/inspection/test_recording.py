"""Activations specs while a model reads and writes: whose they are, and that they are exact."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy
import pytest
import torch

from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import tiny
from tests.inspection.test_edits import VECTOR, edit, plan
from tests.repeats import slow
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.errors import ModelNotCapable
from transformers_api.inspection.activations import ActivationSpec, numbers
from transformers_api.inspection.base import TracePlan
from transformers_api.inspection.editable import Editable
from transformers_api.inspection.logit_share import LogitPartsQuestion
from transformers_api.serving.inspect.activation_plan import planned
from transformers_api.serving.inspect.trace_plan import ActivationRequest

MODULES = ("resid", "attn", "mlp", "head", "neuron", "q", "k", "v")
FAMILIES = [
    "llama",
    "gemma2",
    "granite",
    *slow("gpt2", "qwen3", "mistral-window-8", "olmo2", "opt"),
]
TOGETHER = {"temperature": 0.8, "seed": 3, "logprobs": 2, "ignore_eos": True, "max_tokens": 5}


def records_of(anatomy, parts=MODULES):
    layers = range(anatomy.layers)
    return ((-1, "resid"), *((layer, part) for layer in layers for part in parts))


def run(engine, prompts, plans, edits=None):
    """The outputs of all prompts, submitted together."""
    streams = [
        engine.submit(
            [
                SequenceRequest(
                    prompt, SamplingParams(**TOGETHER), edits=edits, reads_anew=plan is not None
                )
            ],
            observe={} if plan is None else {"trace": plan},
        )
        for prompt, plan in zip(prompts, plans, strict=True)
    ]
    return [read(stream)[0] for stream in streams]


def scored(outputs):
    return [(output.token_id, output.score) for output in outputs]


def joined(outputs, part, layer):
    """The rows of a part, in order, and the number of positions that were missing or doubled."""
    pieces = [
        rows
        for output in outputs
        for rows in output.extras["trace"].recorded
        if (rows.part, rows.layer) == (part, layer)
    ]
    starts = numpy.cumsum([0, *(len(rows.bits) for rows in pieces)])
    assert [rows.start for rows in pieces] == starts[:-1].tolist()
    own = numpy.concatenate([numbers(rows.bits, rows.dtype) for rows in pieces])
    return own, pieces[0].factor


@pytest.mark.parametrize("name", FAMILIES)
def test_records_are_the_numbers_of_every_token_that_was_read(watch, name):
    watched = watch(name, dtype="float32")
    plans = [TracePlan(records=records_of(watched.examined.anatomy)), None, TracePlan(topk=1)]
    prompts = prompts_of(4)[1:]
    outputs = run(watched.engine, prompts, plans)[0]
    ids = [*prompts[0], *(output.token_id for output in outputs)][:-1]
    places = [(layer, part) for layer, part in plans[0].records]
    expected = watched.run(watched.inspector.part_numbers(ids, places))
    for (layer, part), right in zip(places, expected, strict=True):
        own, factor = joined(outputs, part, layer)
        assert own.shape == right.shape
        numpy.testing.assert_allclose(own * factor, right, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("weights", "native"), [("bfloat16", True), ("bfloat16", False), *slow(("float32", True))]
)
def test_what_was_recorded_put_back_is_the_same_answer_to_the_bit(watch, weights, native):
    if native:
        watched = watch("granite", dtype=weights)
    else:
        watched = watch(copy.deepcopy(tiny("granite")).bfloat16(), native=None)
    records = ((-1, "resid"), (1, "resid"), (0, "attn"), (1, "mlp"), (1, "neuron"))
    prompt = prompts_of(4)[3]
    (outputs,) = run(watched.engine, [prompt], [TracePlan(records=records)])
    assert outputs[0].extras["trace"].recorded[0].dtype == ("float32" if native else weights)
    count = len(prompt) + len(outputs) - 1
    edits = []
    for layer, part in records:
        own, factor = joined(outputs, part, layer)
        own = own if factor == 1 else own.astype(numpy.float64) * factor
        units = tuple(range(own.shape[1])) if part == "neuron" else ()
        fields = {"part": part, "layer": layer, "units": units}
        put = edit(do="set", positions=((0, count),), vector=own, is_aligned=True, **fields)
        edits.append(put)
    (again,) = run(watched.engine, [prompt], [None], plan(*edits, identity="again"))
    assert scored(again) == scored(outputs)


@pytest.mark.parametrize("name", ["llama", *slow("gemma2", "mixtral", "gpt-1-without-cache")])
def test_neither_the_recorded_nor_their_neighbours_write_anything_else(watch, name):
    watched, plain = watch(copy.deepcopy(tiny(name))), watch(copy.deepcopy(tiny(name)))
    anatomy = watched.examined.anatomy
    specs = (ActivationSpec(part="resid", layer=0),)
    if anatomy.mode == "tap":
        specs += (ActivationSpec(part="q", layer=0), ActivationSpec(part="k", layer=1, units=(0,)))
    parts = ("resid", "q", "k", "v") if anatomy.mode == "tap" else ("resid",)
    full = TracePlan(records=records_of(anatomy, parts), activations=specs)
    prompts = prompts_of(4)
    own = run(watched.engine, prompts, [full, None, full, TracePlan(topk=1)])
    right = run(plain.engine, prompts, [None] * 4)
    assert [scored(each) for each in own] == [scored(each) for each in right]


def test_notes_of_rounded_keys_and_values_round_nothing_again(watch):
    options = {"dtype": "bfloat16", "kv_cache_dtype": "int8"}
    prompts = prompts_of(4)[2:]
    full = TracePlan(records=tuple((layer, part) for layer in range(3) for part in "qkv"))
    own, right = (
        run(watch(copy.deepcopy(tiny("llama")), **options).engine, prompts, [noted, None])
        for noted in (full, None)
    )
    assert [scored(each) for each in own] == [scored(each) for each in right]
    assert joined(own[0], "k", 1)[0].any()


def test_what_a_model_cannot_have_changed_is_not_stored(watch):
    anatomy = watch("llama").examined.anatomy
    asked = ActivationRequest(
        part="k", layers=(0,), heads=None, neurons=None, format="stored", topk=1
    )
    with pytest.raises(
        ModelNotCapable, match="the k that layer 0 of model type llama reads cannot"
    ):
        planned([asked], anatomy, Editable, stores=True)
    shown = planned([replace(asked, format="f16")], anatomy, Editable, stores=True)
    assert (len(shown.specs), shown.records) == (1, ())


def test_a_recorded_prompt_is_read_by_its_own_passes_though_others_have_read_it(watch):
    watched = watch(copy.deepcopy(tiny("llama")))
    prompt = prompts_of(4)[3]
    run(watched.engine, [prompt], [None])
    (outputs,) = run(watched.engine, [prompt], [TracePlan(records=((0, "resid"),))])
    assert outputs[0].cached_tokens == 0
    assert len(joined(outputs, "resid", 0)[0]) == len(prompt) + len(outputs) - 1
    (others,) = run(watched.engine, [prompt], [None])
    assert others[0].cached_tokens == len(prompt) - 1


@pytest.mark.parametrize("name", ["llama", *slow("qwen3", "mixtral", "mistral-window-8")])
def test_activations_of_a_step_are_those_of_the_last_token_that_was_read(watch, name):
    watched = watch(name, dtype="float32")
    specs = (
        ActivationSpec(part="resid", layer=-1),
        ActivationSpec(part="mlp", layer=1, topk=4),
        ActivationSpec(part="head", layer=1, units=(2, 0)),
        *(ActivationSpec(part=part, layer=1) for part in ("q", "k", "v")),
        ActivationSpec(part="v", layer=0, units=(1,)),
    )
    records = ((-1, "resid"), (1, "mlp"), (1, "head"), (1, "q"), (1, "k"), (1, "v"))
    plan = TracePlan(activations=specs, records=records)
    prompts = prompts_of(3)
    for prompt, outputs in zip(
        prompts, run(watched.engine, prompts, [plan] * len(prompts)), strict=True
    ):
        attended = attended_of(name, [*prompt, *(output.token_id for output in outputs)])
        rows = {part: joined(outputs, part, layer)[0] for layer, part in records}
        for output in outputs:
            trace = output.extras["trace"]
            stream, mlp, heads, *qkv = trace.activations
            at = trace.position - 1
            numpy.testing.assert_array_equal(stream.values[0], rows["resid"][at])
            largest = numpy.argsort(-numpy.abs(rows["mlp"][at]))[:4]
            assert mlp.places[0].tolist() == largest.tolist()
            numpy.testing.assert_array_equal(mlp.values[0], rows["mlp"][at][largest])
            split = rows["head"][at].reshape(4, -1)
            numpy.testing.assert_array_equal(heads.values, split[[2, 0]])
            for each, part in zip(qkv, "qkv", strict=False):
                numpy.testing.assert_array_equal(each.values.flatten(), rows[part][at])
            for each, right in zip(qkv, (*attended[1], attended[0][2][1:2]), strict=True):
                numpy.testing.assert_allclose(each.values, right[:, at], rtol=1e-4, atol=1e-4)


def attended_of(name, ids):
    """(q, k, v) of each layer, (heads, n, D), as plain torch's attention is given them."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = copy.deepcopy(tiny(name)).float()
    config = model.config.get_text_config(decoder=True)
    function = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
    seen = {}

    def specs(module, query, key, value, *args, **options):
        seen[module.layer_idx] = [each[0].float().numpy() for each in (query, key, value)]
        return function(module, query, key, value, *args, **options)

    ALL_ATTENTION_FUNCTIONS[config._attn_implementation] = specs
    try:
        with torch.inference_mode():
            model(input_ids=torch.tensor([ids]), use_cache=False)
    finally:
        ALL_ATTENTION_FUNCTIONS[config._attn_implementation] = function
    return seen


@pytest.mark.parametrize("native", [True, False])
def test_what_is_noted_leaves_every_kind_of_edit_as_it_is(watch, native):
    """Values that attention reads are changed, and what it writes, with notes beside them."""
    options = {} if native else {"native": None}
    records = ((1, "resid"), (1, "attn"), (1, "v"), (1, "q"))
    full = TracePlan(records=records, parts=LogitPartsQuestion(position=-1, by="head"))
    changes = plan(
        edit(do="scale", part="v", layer=1, units=(0,), by=0.5, positions=((0, None),)),
        edit(do="scale", part="attn", layer=1, by=2.0, positions=((1, None),)),
        edit(do="add", layer=0, vector=VECTOR / 3, positions=((0, None),)),
        edit(do="scale", part="head", layer=2, units=(1,), by=0.3, positions=((0, None),)),
        identity="several",
    )
    prompt = prompts_of(4)[3]
    (own,) = run(watch(copy.deepcopy(tiny("llama")), **options).engine, [prompt], [full], changes)
    (right,) = run(watch(copy.deepcopy(tiny("llama")), **options).engine, [prompt], [None], changes)
    assert scored(own) == scored(right)
    (plain,) = run(watch(copy.deepcopy(tiny("llama")), **options).engine, [prompt], [None])
    assert scored(plain) != scored(right)
