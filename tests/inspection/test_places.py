"""The places where a model can be changed: found without names, verified on the path that serves."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.engine.models import prompts_of
from tests.engine.reading import read
from tests.inspection.models import ALL, tiny
from tests.repeats import slow
from transformers_api.engine.base import SamplingParams, SequenceRequest
from transformers_api.engine.native.runner import NativeRunner
from transformers_api.engine.places import is_linear, model_places
from transformers_api.engine.runners.model_runner import innermost
from transformers_api.inspection.editable import INPUTS, PARTS

WRITERS = {
    "llama": ("self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn", "mlp", "attn.c_proj", "mlp.c_proj"),  # whose Conv1D is square
    "gemma2": (
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
        "mlp.down_proj",
    ),
    "opt": ("self_attn", "fc2", "self_attn.out_proj", "fc2"),
    "mixtral": ("self_attn", "mlp", "self_attn.o_proj", None),
    "phi": ("self_attn", "mlp", "self_attn.dense", "mlp.fc2"),
}
SERVED = ["llama", "gpt2", "gemma2", "qwen3", "mixtral"]
ALWAYS = ["gpt2", "gemma2", "mixtral", "qwen3-next"]  # the last one has recurrent layers, too
MORE = [name for name in ALL if name not in ALWAYS]


@pytest.mark.parametrize("name", WRITERS)
def test_writers_and_what_reads_heads_and_neurons_are_found(name):
    model = copy.deepcopy(tiny(name))
    for place in model_places(model):
        names = (place.attn.name, place.mlp.name, place.reader, place.down)
        own = tuple(each and each.removeprefix(f"{place.layer}.") for each in names)
        assert own == WRITERS[name]
        assert (place.attn.factor, place.mlp.factor) == (1, 1)
        assert place.error < 1e-5


def test_the_factor_of_a_writer_is_found():
    model = copy.deepcopy(tiny("granite"))
    for layer in model.model.layers:
        layer.residual_multiplier = 0.3
    for place in model_places(model):
        factors = [writer.factor for writer in place.writers]
        torch.testing.assert_close(factors, [0.3, 0.3], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("module", "linear"),
    [
        (torch.nn.Linear(8, 8), True),
        (torch.nn.Linear(8, 4, bias=False), True),
        (torch.nn.LayerNorm(8), False),
        (torch.nn.RMSNorm(8), False),
        (torch.nn.Dropout(0.0), False),
        (torch.nn.ReLU(), False),
        (torch.nn.Flatten(), False),
    ],
)
@torch.no_grad()
def test_a_module_is_linear_by_what_it_does(module, linear):
    assert is_linear(module.eval(), torch.randn(1, 3, 8)) is linear


@pytest.mark.parametrize("name", [*ALWAYS, *slow(*MORE)])
def test_every_place_acts_as_the_models_own_modules_do(watch, name):
    watched = watch(name)
    anatomy, editable = watched.examined.anatomy, watched.run(watched.inspector.check_places())
    assert [places.layer for places in editable.places] == [*range(-1, anatomy.layers)]
    for places in editable.places:
        assert places.can("resid")
        assert not places.unverified
        assert places.verified < 1e-5
    if name in SERVED:
        is_native = isinstance(innermost(watched.engine.runner), NativeRunner)
        assert editable.neighbours_are_equal or (anatomy.routing and not is_native)
        assert editable.of(0).heads == anatomy.heads
        dense = set({*PARTS, *INPUTS, "weights"}) - ({"neuron"} if anatomy.routing else set())
        assert all(set(places.off) == dense for places in editable.places[1:])


def test_a_place_where_edits_do_not_act_is_told_and_cannot_be_edited(watch, monkeypatch):
    real = NativeRunner._replay

    def deaf(self, *inputs):
        *others, edits, attention = inputs
        edits = [edit for edit in edits if "layers.1.mlp" not in edit.module]
        return real(self, *others, edits, [edit for edit in attention if edit.layer != 2])

    monkeypatch.setattr(NativeRunner, "_replay", deaf)
    watched = watch(copy.deepcopy(tiny("llama")))
    if not isinstance(innermost(watched.engine.runner), NativeRunner):
        pytest.skip("without the kernels")
    embedding, first, second, third = watched.run(watched.inspector.check_places()).places
    assert second.unverified == {"mlp", "neuron"}
    assert second.off["mlp"] > 0.01
    assert not second.can("mlp")
    assert second.can("head")
    assert third.unverified == {"q", "k", "v", "weights"}
    assert not embedding.unverified | first.unverified


def test_bfloat16_is_verified_to_its_rounding(watch):
    watched = watch("llama", dtype="bfloat16")
    editable = watched.run(watched.inspector.check_places())
    assert all(
        places.can(part) for places in editable.places[1:] for part in {*PARTS, *INPUTS, "weights"}
    )
    assert all(places.verified < 3e-2 for places in editable.places)
    assert editable.neighbours_are_equal


def test_the_check_disturbs_nobody_who_is_answered_meanwhile(watch):
    watched = watch("qwen3", num_slots=2)
    request = SequenceRequest(prompts_of(5)[0], SamplingParams(max_tokens=24, temperature=0))
    alone = [output.token_id for output in read(watched.engine.submit([request]))[0]]
    stream = watched.engine.submit([request])
    editable = watched.run(watched.inspector.check_places())
    assert [output.token_id for output in read(stream)[0]] == alone
    assert all(places.verified < 1e-5 for places in editable.places)


def test_the_check_waits_for_room_and_lets_others_go_on_meanwhile(watch, monkeypatch):
    watched = watch("qwen3", num_slots=4, prefill_chunk=4)
    cache = watched.engine.scheduler.cache
    real, refused = cache.reserve, [None] * 3
    monkeypatch.setattr(cache, "reserve", lambda *a: refused.pop() if refused else real(*a))
    editable = watched.run(watched.inspector.check_places())
    assert not refused
    assert all(places.verified < 1e-5 for places in editable.places)
