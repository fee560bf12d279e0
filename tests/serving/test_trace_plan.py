"""What may be traced: ranges, capabilities and sizes, before anything is generated."""

import pytest

from tests.fake_inspection import FakeInspector, fake_anatomy, fake_layer
from tests.fakes import FakeEngine, fake_model
from transformers_api.config.settings import Settings
from transformers_api.errors import (
    AttentionUnavailable,
    InspectionDisabled,
    InvalidRequest,
    ModelNotCapable,
)
from transformers_api.inspection.base import AttentionMode, Routing, TracePlan
from transformers_api.serving.inspect import trace_plan
from transformers_api.serving.inspect.trace_plan import LensRequest, TraceRequest

MOE = Routing(layers=(0, 1), experts=8, experts_per_token=2)
HYBRID = tuple(
    fake_layer(i)
    if i % 4 == 3
    else fake_layer(i, type="linear_attention", available=False, reason="linear_attention")
    for i in range(12)
)


def planned(anatomy=None, prompt_tokens=100, max_tokens=100, choices=1, **fields):
    """``fields`` are of TraceRequest; those in capitals are settings; ``whole`` is a way to ask."""
    settings = {name.lower(): fields.pop(name) for name in [*fields] if name.isupper()}
    whole = fields.pop("whole", False)
    window = fields.pop("window", 16384)
    engine = FakeEngine(max_model_len=window)
    model = fake_model(engine=engine, inspector=FakeInspector(anatomy or fake_anatomy()))
    return trace_plan.plan(
        model,
        TraceRequest(**fields),
        Settings(**settings),
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        choices=choices,
        whole=whole,
    )


def refused(kind, param, **asked):
    with pytest.raises(kind) as caught:
        planned(**asked)
    assert type(caught.value) is kind
    assert caught.value.param == param
    return caught.value.message


def test_by_default_only_the_likeliest_tokens_are_noted():
    assert planned() == TracePlan(topk=5)


def test_what_is_asked_is_what_is_noted():
    plan = planned(
        fake_anatomy(routing=MOE),
        layers=(1, 0, 1),
        heads=(3, 0),
        attn="topk",
        attn_topk=8,
        topk=0,
        sampled_topk=10,
        lens=LensRequest(layers=(-1, 1), topk=2),
        resid_norms=True,
        router=True,
    )
    assert plan == TracePlan(
        layers=(1, 0),
        heads=(3, 0),
        attn_topk=8,
        topk=0,
        sampled_topk=10,
        lens_layers=(-1, 1),
        lens_topk=2,
        resid_norms=True,
        router=True,
    )


def test_all_layers_are_those_with_attention():
    assert planned(fake_anatomy(layers=12, attention=HYBRID), layers="all").layers == (3, 7, 11)


@pytest.mark.parametrize("layer", [-1, 2])
def test_a_layer_that_is_not_there(layer):
    text = refused(InvalidRequest, "trace.layers", layers=(0, layer))
    assert text == "trace.layers must be in [0, 1]"


def test_the_field_that_names_the_layer_may_have_another_name():
    text = refused(InvalidRequest, "trace_layer", layers=(30,), layers_name="trace_layer")
    assert text == "trace_layer must be in [0, 1]"


def test_a_layer_without_attention():
    hybrid = fake_anatomy(layers=12, attention=HYBRID)
    text = refused(AttentionUnavailable, "trace.layers", anatomy=hybrid, layers=(0,))
    assert text == (
        "layer 0 is linear_attention and has no attention weights; "
        "layers with attention: [3, 7, 11]"
    )


def test_a_layer_that_was_not_verified_says_so():
    layers = (fake_layer(0, available=False, reason="not verified"), fake_layer(1))
    anatomy = fake_anatomy(attention=layers)
    text = refused(AttentionUnavailable, "trace.layers", anatomy=anatomy, layers=(0,))
    assert text.startswith("layer 0 is full_attention and has no attention weights (not verified)")


@pytest.mark.parametrize("layers", [(0,), "all"])
def test_a_model_without_attention_traces_all_but_attention(layers):
    mamba = fake_anatomy(
        model_type="mamba",
        attention=tuple(fake_layer(i, type="mamba", available=False) for i in range(2)),
        mode=AttentionMode.NONE,
        traces_attention=False,
    )
    text = refused(AttentionUnavailable, "trace.layers", anatomy=mamba, layers=layers)
    assert text == "model type mamba has no attention weights"
    assert planned(mamba, lens=LensRequest(layers=(0,))).lens_layers == (0,)


def test_attention_that_cannot_be_traced_while_it_writes():
    legacy = fake_anatomy(mode=AttentionMode.LEGACY, traces_attention=False)
    text = refused(AttentionUnavailable, "trace.layers", anatomy=legacy, layers=(0,))
    assert "cannot be traced while it writes (mode legacy)" in text
    assert planned(legacy).layers == ()


@pytest.mark.parametrize("head", [-1, 4])
def test_a_head_that_is_not_there(head):
    text = refused(InvalidRequest, "trace.heads", layers=(0,), heads=(0, head))
    assert text == "trace.heads must be in [0, 3]"


@pytest.mark.parametrize("attn", ["f16", "u8", "json", "json64"])
def test_full_rows_of_many_layers_are_refused(attn):
    deep = fake_anatomy(layers=6)
    text = refused(InvalidRequest, "trace.layers", anatomy=deep, layers="all", attn=attn)
    assert text == f'trace.layers may name at most 4 layers with attn "{attn}"'
    assert len(planned(deep, layers=(0, 1, 2, 3), attn=attn, TRACE_MAX_LAYERS=4).layers) == 4


@pytest.mark.parametrize("small", [{"attn": "topk"}, {"heads": "mean"}, {"heads": "max"}])
def test_all_layers_may_be_had_in_a_small_form(small):
    assert len(planned(fake_anatomy(layers=30), layers="all", **small).layers) == 30


@pytest.mark.parametrize(
    ("wanted", "layers"),
    [
        ((3, 3, -1), (3, -1)),
        (6, (0, 6, 12, 18, 24, 29)),
        (1, tuple(range(30))),
        (100, (0, 29)),
    ],
)
def test_layers_of_the_lens(wanted, layers):
    plan = planned(fake_anatomy(layers=30), lens=LensRequest(layers=wanted))
    assert plan.lens_layers == layers


def test_all_layers_of_the_lens_are_those_of_a_small_model():
    assert planned(lens=LensRequest(layers="all")).lens_layers == (-1, 0, 1)
    deep = fake_anatomy(layers=30)
    text = refused(
        InvalidRequest, "trace.lens.layers", anatomy=deep, lens=LensRequest(layers="all")
    )
    assert text == 'trace.lens.layers may name at most 8 layers; use "every:N" for more'


@pytest.mark.parametrize("layer", [-2, 2])
def test_a_layer_of_the_lens_that_is_not_there(layer):
    lens = LensRequest(layers=(layer,))
    text = refused(InvalidRequest, "trace.lens.layers", lens=lens)
    assert text == "trace.lens.layers must be in [-1, 1]"


@pytest.mark.parametrize(
    ("field", "anatomy", "asked"),
    [
        ("trace.lens", fake_anatomy(lens=False), {"lens": LensRequest(layers=(0,))}),
        ("trace.resid_norms", fake_anatomy(final_norm=None), {"resid_norms": True}),
        ("trace.router", fake_anatomy(), {"router": True}),
    ],
)
def test_what_a_model_does_not_have(field, anatomy, asked):
    assert "model type fake has no " in refused(ModelNotCapable, field, anatomy=anatomy, **asked)


def test_a_model_without_an_inspector():
    request = TraceRequest()
    model = fake_model(inspector=None)
    with pytest.raises(InspectionDisabled):
        trace_plan.plan(
            model, request, Settings(inspect_enabled=False), prompt_tokens=1, max_tokens=1
        )
    with pytest.raises(ModelNotCapable) as caught:
        trace_plan.plan(model, request, Settings(), prompt_tokens=1, max_tokens=1)
    assert caught.value.message == "Model 'fake' cannot be inspected"


# -- sizes

WIDE = fake_anatomy(layers=2, heads=32, attention=tuple(fake_layer(i, heads=32) for i in range(2)))


def test_a_trace_that_is_too_large_says_what_to_do():
    text = refused(
        InvalidRequest,
        "trace",
        anatomy=WIDE,
        layers=(0, 1),
        attn="json",
        prompt_tokens=8000,
        max_tokens=192,
    )
    assert text == (
        "trace too large: 32 heads x 8192 keys x 2 layers as json is about 4.2 MB per token "
        '(max 262144 bytes); use attn "topk" or "u8", or fewer layers'
    )


@pytest.mark.parametrize(
    ("attn", "advice"),
    [("u8", 'use attn "topk", or fewer layers'), ("topk", "use a smaller attn_topk")],
)
def test_the_advice_is_something_else_than_what_was_asked(attn, advice):
    text = refused(
        InvalidRequest,
        "trace",
        anatomy=WIDE,
        layers=(0, 1),
        attn=attn,
        attn_topk=4096,
        prompt_tokens=8000,
    )
    assert advice in text


def test_every_answer_counts():
    asked = {"anatomy": WIDE, "layers": (0,), "prompt_tokens": 1900}
    planned(**asked)
    text = refused(InvalidRequest, "trace", choices=2, **asked)
    assert "32 heads x 2000 keys x 1 layers x 2 answers as f16 is about 0.3 MB" in text


def test_no_more_keys_are_counted_than_the_model_sees():
    asked = {"layers": (0, 1), "attn": "json", "prompt_tokens": 8000}
    refused(InvalidRequest, "trace", anatomy=WIDE, **asked)
    assert planned(WIDE, window=256, **asked)
    narrow = fake_anatomy(
        heads=32, attention=tuple(fake_layer(i, heads=32, window=256) for i in range(2))
    )
    assert planned(narrow, **asked)


@pytest.mark.parametrize("heads", [(0,), "mean", "max"])
def test_fewer_heads_are_smaller(heads):
    assert planned(WIDE, layers=(0, 1), heads=heads, attn="f16", prompt_tokens=8000)


def test_a_lens_can_be_too_large_as_well():
    deep = fake_anatomy(layers=200)
    lens = LensRequest(layers=1, topk=20)
    text = refused(InvalidRequest, "trace", anatomy=deep, lens=lens)
    assert text.startswith("trace too large: it is about 0.7 MB per token")
    assert text.endswith("fewer layers of the lens, or a smaller topk")


def test_what_can_be_streamed_may_be_too_large_for_one_answer():
    asked = {"anatomy": WIDE, "layers": (0,), "prompt_tokens": 100, "max_tokens": 2000}
    planned(**asked)
    text = refused(InvalidRequest, "trace", whole=True, **asked)
    assert "too large for an answer in one piece" in text
    assert '(max 67108864 bytes); use "stream": true or fewer tokens' in text
    planned(**{**asked, "max_tokens": 100}, whole=True)
