"""What may be changed: parts, layers, positions and sizes, before anything is generated."""

from __future__ import annotations

from dataclasses import replace

import numpy
import pytest

from tests.fake_inspection import FakeInspector, fake_anatomy, fake_layer
from tests.fakes import fake_model
from transformers_api.errors import InvalidRequest, ModelNotCapable
from transformers_api.inspection.base import Routing
from transformers_api.inspection.editable import Editable
from transformers_api.inspection.sae import Sae
from transformers_api.serving.inspect.edit_positions import (
    PromptPlaces,
    SpanAt,
    StepsAt,
    TextAt,
    resolve,
)
from transformers_api.serving.inspect.edit_request import EditRequest, InterveneRequest
from transformers_api.serving.inspect.edit_vectors import Facts
from transformers_api.serving.inspect.interventions import plan_edits
from transformers_api.serving.inspect.vector_store import VectorStore
from transformers_api.serving.text.spans import Span

TEXT = "The cat and the cat"
VECTOR = numpy.arange(8, dtype=numpy.float32)
NORMS = (1.0, 20.0, 300.0)


def prompt(text=TEXT, **fields):
    model = fake_model()
    ids = model.tokenizer.encode(text)
    given = {"ids": ids, "most": len(ids) + 4, "vocabulary": model.vocabulary, "spans": list}
    return PromptPlaces(**given | fields)


SAE = Sae(
    name="s",
    digest="d",
    architecture="standard",
    part="mlp",
    layer=1,
    encoder=numpy.ones((8, 4), numpy.float32),
    decoder=numpy.ones((4, 8), numpy.float32),
    encoder_bias=numpy.zeros(4, numpy.float32),
    decoder_bias=numpy.zeros(8, numpy.float32),
)
SAES = {"s": SAE, "same": replace(SAE, name="same"), "other": replace(SAE, digest="e")}


def planned(*edits, editable=None, anatomy=None, store=None, **fields):
    inspector = FakeInspector(anatomy or fake_anatomy())
    facts = Facts(
        editable=editable or inspector.editable,
        norms=lambda: NORMS,
        numbers=lambda _text, places: [numpy.ones((3, 8), numpy.float32) for _ in places],
        vector=lambda name: (store or VectorStore()).get("me", name),
        sae=lambda name, _param: SAES[name],
        prompt=prompt,
        run=lambda run_id: pytest.fail(run_id),
    )
    (made,) = plan_edits(
        fake_model(inspector=inspector),
        InterveneRequest(edits=edits),
        facts,
        [prompt(**fields)],
    )
    return made


def refused(*edits, kind=InvalidRequest, **fields):
    with pytest.raises(kind) as caught:
        planned(*edits, **fields)
    return caught.value.message


def add(**fields):
    return EditRequest(**{"do": "add", "vector": VECTOR, "layers": (0,)} | fields)


def test_a_vector_is_scaled_as_it_was_asked_for():
    (edit,) = planned(add(scale=-2)).plan.edits
    numpy.testing.assert_array_equal(edit.vector, -2 * VECTOR)
    for layer, norm in zip((-1, 0, 1), NORMS, strict=True):
        (edit,) = planned(add(layers=(layer,), scale=0.5, units="norm")).plan.edits
        assert numpy.linalg.norm(edit.vector) == pytest.approx(norm / 2, rel=1e-5)


def test_what_is_erased_is_orthonormal_and_has_no_more_directions_than_there_are():
    rows = numpy.stack([VECTOR, 2 * VECTOR, VECTOR[::-1]])
    (edit,) = planned(EditRequest(do="erase", vector=rows, layers=(1,))).plan.edits
    numpy.testing.assert_allclose(edit.vector @ edit.vector.T, numpy.eye(2), atol=1e-6)
    left = VECTOR - edit.vector.T @ (edit.vector @ VECTOR)
    numpy.testing.assert_allclose(left, 0, atol=1e-5)


def test_what_does_the_same_has_one_identity_and_nothing_else_has():
    one, same = (planned(add(layers=(0, 1))).plan.identity for _ in range(2))
    others = [
        planned(each).plan.identity
        for each in (
            add(layers=(0,)),
            add(layers=(0, 1), scale=2),
            add(layers=(0, 1), at="generated"),
            add(layers=(0, 1), part="mlp"),
            add(layers=(0, 1), keep_norm=True),
            add(layers=(0, 1), vector=VECTOR[::-1].copy()),
        )
    ]
    assert one == same
    assert len({one, *others}) == len(others) + 1


def test_prefixes_are_shared_up_to_the_first_edit():
    length = len(TEXT)
    for at, unedited in (
        ("all", 0),
        ("generated", length),
        ("last", length - 1),
        ((3, 9), 3),
        (StepsAt(2, 4), length + 1),
    ):
        assert planned(add(at=at)).plan.unedited == unedited


def test_all_layers_are_those_that_have_the_part():
    inspector = FakeInspector()
    embedding, first, second = inspector.editable.places
    no_heads = replace(first, off={"resid": 0.0, "mlp": 0.0})
    some = Editable((embedding, no_heads, second))
    heads = EditRequest(do="ablate", part="head", heads=(0,))
    assert [edit.layer for edit in planned(heads, editable=some).plan.edits] == [1]
    assert refused(replace(heads, layers=(0,)), editable=some, kind=ModelNotCapable) == (
        "layer 0 of model type fake has no heads that can be addressed"
    )
    none = Editable((embedding, no_heads, no_heads))
    assert "no heads" in refused(heads, editable=none, kind=ModelNotCapable)


def test_a_part_that_is_not_there_or_not_verified_is_refused_with_the_reason():
    embedding, first, second = FakeInspector().editable.places
    moe = fake_anatomy(routing=Routing(layers=(0, 1), experts=4, experts_per_token=2))
    off = {part: number for part, number in first.off.items() if part != "neuron"}
    some = Editable((embedding, replace(first, off=off), second))
    neurons = EditRequest(do="scale", part="neuron", neurons=(0,), by=0.0, layers=(0,))
    assert refused(neurons, editable=some, anatomy=moe, kind=ModelNotCapable) == (
        "layer 0 of model type fake has no neurons that can be addressed: "
        'it is a mixture of experts; use part "mlp"'
    )
    wrong = replace(second, off={**second.off, "head": 0.031}, unverified=frozenset({"head"}))
    some = Editable((embedding, first, wrong))
    heads = EditRequest(do="ablate", part="head", heads=(0,), layers=(1,))
    assert refused(heads, editable=some, kind=ModelNotCapable) == (
        'part "head" of layer 1 was not verified at load (off by 0.031); see GET /inspect/model'
    )


def test_what_has_no_attention_weights_is_refused_by_its_kind():
    linear = fake_layer(1, type="linear_attention", available=False, reason="linear_attention")
    anatomy = fake_anatomy(attention=(fake_layer(0), linear), layers=2)
    places = FakeInspector(anatomy).editable.places
    off = {part: 1e-7 for part in places[2].off if part != "weights"}
    editable = Editable((*places[:2], replace(places[2], off=off)))
    given = {"anatomy": anatomy, "editable": editable, "kind": ModelNotCapable}
    for do in ("block", "temper"):
        edit = EditRequest(do=do, part="weights", layers=(0, 1), keys=(0,), temperature=2.0)
        message = f"{do} needs attention weights; layer 1 is linear_attention"
        assert refused(edit, **given) == message
        planned_layers = planned(
            replace(edit, layers="all"), anatomy=anatomy, editable=editable
        ).described[0]["layers"]
        assert planned_layers == [0]
    hidden = Editable((*places[:1], replace(places[1], off=off), *places[2:]))
    edit = EditRequest(do="temper", part="weights", layers=(0,), temperature=2.0)
    assert refused(edit, editable=hidden, kind=ModelNotCapable) == (
        "temper needs attention weights; model type fake does not show where layer 0 uses them"
    )


def test_a_name_that_is_not_in_the_store_is_told():
    with pytest.raises(Exception, match="No vector 'formal' in the store; it is empty"):
        planned(add(vector="formal"))


def test_there_are_at_most_so_many_places():
    edits = [EditRequest(do="scale", part="mlp", by=0.5, layers=(0, 1) * 5)] * 30
    assert refused(*edits) == "intervene edits 300 places per step (max 256)"


@pytest.mark.parametrize(
    ("at", "ranges"),
    [
        ("all", ((0, None),)),
        ("prompt", ((0, 19),)),
        ("generated", ((19, None),)),
        ("last", ((18, 19),)),
        ((5, 4, -1, 20), ((4, 6), (18, 19), (20, 21))),
        (StepsAt(0, 3), ((18, 21),)),
        (TextAt("cat"), ((4, 7),)),
        (TextAt("cat", 1), ((16, 19),)),
        (SpanAt("user"), ((2, 5), (7, 8))),
    ],
)
def test_positions_are_those_of_tokens(at, ranges):
    spans = [Span("user", 2, 5), Span("assistant", 5, 7), Span("user", 7, 8)]
    assert resolve(at, prompt(spans=lambda: spans), "at") == ranges


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((23,), "at must be in [-19, 22]"),
        ((-20,), "at must be in [-19, 22]"),
        (TextAt("dog"), "at: the prompt has the text 'dog' 0 times, and not at 0"),
        (TextAt("cat", 2), "at: the prompt has the text 'cat' 2 times, and not at 2"),
        (
            SpanAt("system"),
            "at: the prompt has no message of role 'system' whose place is known; there are: none",
        ),
    ],
)
def test_positions_outside_of_the_text_are_refused(at, message):
    with pytest.raises(InvalidRequest) as caught:
        resolve(at, prompt(), "at")
    assert caught.value.message == message


@pytest.mark.parametrize("at", ["prompt", "last", (0,), StepsAt(0, 1), TextAt("cat")])
def test_a_window_that_may_move_refuses_fixed_positions(at):
    with pytest.raises(InvalidRequest) as caught:
        resolve(at, prompt(window=831), "at")
    assert caught.value.message == (
        "the text may become longer than the model's window; edits at fixed positions would move: "
        "use max_tokens <= 812"
    )


@pytest.mark.parametrize("at", ["all", "generated"])
def test_a_window_that_may_move_takes_others(at):
    assert resolve(at, prompt(window=831), "at")


def test_numbers_of_another_prompt_are_aligned_at_the_ends():
    patch = EditRequest(do="ablate", layers=(0,), source="cat", at=(-1, -3))
    made = planned(patch)
    spans = [edit.positions for edit in made.plan.edits]
    assert spans == [((16, 17),), ((18, 19),)]
    assert all(edit.is_aligned and edit.do == "set" for edit in made.plan.edits)
    message = refused(replace(patch, at=(0,)))
    assert "a text of 3 tokens has no numbers for all positions [0, 1) of one of 19" in message


def test_a_feature_is_edited_where_its_autoencoder_is():
    def clamped(sae="s", feature=3, value=2.0):
        return planned(EditRequest(do="feature", sae=sae, feature=feature, value=value))

    made = clamped()
    (edit,) = made.plan.edits
    assert (edit.do, edit.part, edit.layer, edit.feature.number) == ("feature", "mlp", 1, 3)
    assert made.described[0] | {"sae": "s", "feature": 3, "value": 2.0} == made.described[0]
    assert clamped("same").plan.identity == made.plan.identity
    others = [clamped("other"), clamped(feature=2), clamped(value=1.0)]
    assert len({made.plan.identity, *(each.plan.identity for each in others)}) == 4
    message = refused(EditRequest(do="feature", sae="s", feature=4, value=1.0))
    assert message == "intervene.edits[0].feature must be in [0, 3]"
