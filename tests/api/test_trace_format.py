"""What was noted of a token, on the wire: the cases that a small model does not show."""

import json
import math
from dataclasses import replace

import numpy
import pytest

from tests.fake_inspection import fake_step
from tests.fakes import fake_model, fake_tokenizer
from transformers_api.api.http import strict_json
from transformers_api.api.trace import format as trace_format
from transformers_api.api.trace.format import TraceWriter
from transformers_api.inspection.base import AttentionRow, Routed, TracePlan
from transformers_api.serving.inspect.trace_plan import TraceRequest
from transformers_api.serving.text.spans import Span
from transformers_api.serving.text.vocabulary import Vocabulary

WORDS = Vocabulary(fake_tokenizer())
PROMPT = [*b"Hello"]
PLAN = TracePlan(layers=(1, 0), topk=2, sampled_topk=3)
ASKED = TraceRequest(layers=(1, 0), attn="json", topk=2, sampled_topk=3)


def noted(plan=PLAN, token_id=168, greedy=False, **fields):
    return replace(fake_step(plan, PROMPT, 2, token_id, greedy), **fields)


def row(**fields):
    given = {
        "layer": 3,
        "key_start": 5,
        "width": 3,
        "weights": numpy.array([[0.5, 0.25, 0.125]], numpy.float32),
        "sink": numpy.array([0.125], numpy.float32),
    }
    return AttentionRow(**(given | fields))


def shown(trace, asked=ASKED):
    """As a client reads it."""
    return json.loads(strict_json.dump(trace_format.step(trace, 0, asked, WORDS)))


def test_what_a_head_leaves_unread_is_beside_its_row():
    [attn] = shown(noted(attention=(row(),)))["attn"]
    assert attn == {
        "layer": 3,
        "key_start": 5,
        "weights": [[0.5, 0.25, 0.125]],
        "sink": [0.125],
        "state": "exact",
    }


def test_a_window_that_has_moved_is_told():
    [attn] = shown(noted(attention=(row(),), start=4))["attn"]
    assert (attn["key_start"], attn["state"]) == (5, "truncated")


def test_heaviest_keys_have_their_positions_and_the_width_of_the_row():
    keys = numpy.array([[7, 5]])
    heavy = row(
        weights=numpy.array([[0.5, 0.25]], numpy.float32), keys=keys, rest=numpy.ones(1) / 8
    )
    [attn] = shown(noted(attention=(heavy,)), replace(ASKED, attn="topk"))["attn"]
    assert attn["shape"] == [1, 3]
    assert (attn["idx"], attn["w"], attn["rest"]) == ([[7, 5]], [[0.5, 0.25]], [0.125])


def test_routers_are_shown_where_asked():
    routed = Routed(layer=2, experts=(5, 1), weights=(0.62, 0.38), entropy=1.1)
    trace = noted(router=(routed,))
    assert "router" not in shown(trace)
    assert shown(trace, replace(ASKED, router=True))["router"] == [
        {"layer": 2, "experts": [5, 1], "weights": [0.62, 0.38], "entropy": 1.1}
    ]


def test_what_the_model_held_impossible_is_a_number_all_the_same():
    step = shown(noted(logprob=-math.inf))
    assert (step["logprob"], step["surprisal"]) == (-9999.0, 9999.0)


def test_certainty_is_no_negative_zero():
    text = strict_json.dump(trace_format.step(noted(logprob=0.0), 0, ASKED, WORDS))
    assert b'"surprisal":0.0' in text


def test_the_event_of_niels_gpt_has_its_names_and_the_models_own_view():
    event = trace_format.seed_event(noted(), ASKED, WORDS)
    assert event["step"] == 2
    assert event["entropy"] == 1.0
    assert event["topk"] == [
        {"token_id": 168, "token_text": "�", "token_display": "\\xa8", "prob": 0.6},
        {"token_id": 169, "token_text": "�", "token_display": "\\xa9", "prob": 0.3},
        {"token_id": 170, "token_text": "�", "token_display": "\\xaa", "prob": 0.15},
    ]
    assert event["model"]["prob"] == 0.6
    assert event["model"]["surprisal"] == -event["model"]["logprob"] == 0.510826
    assert [top["token_id"] for top in event["model"]["topk"]] == [168, 169]
    assert (event["layer"], event["key_start"]) == (1, 0)
    assert [len(head) for head in event["attn"]] == [7] * 4
    assert list(event["attn_layers"]) == ["0"]


def test_the_event_of_one_layer_has_no_others():
    plan = TracePlan(layers=(1,))
    event = trace_format.seed_event(noted(plan), replace(ASKED, layers=(1,)), WORDS)
    assert "attn_layers" not in event
    assert {len(str(weight)) <= 7 for head in event["attn"] for weight in head} == {True}


def test_the_event_without_layers_has_no_attention():
    event = trace_format.seed_event(noted(TracePlan()), TraceRequest(), WORDS)
    assert (event["attn"], event["layer"]) == ([], None)


@pytest.mark.parametrize("attn", ["f16", "u8"])
def test_the_event_can_have_an_envelope(attn):
    event = trace_format.seed_event(noted(), replace(ASKED, attn=attn), WORDS)
    assert event["attn"]["shape"] == [4, 7]


def test_the_writer_counts_what_it_writes():
    writer = TraceWriter(fake_model(), ASKED, [PROMPT], [Span("user", 0, 5)])
    assert writer.usage["bytes"] == 0
    texts = [writer.header(0, 0, {}), writer.step(noted(), 0), writer.event(noted())]
    assert writer.usage["bytes"] == sum(len(strict_json.dump(text)) for text in texts)
    spans = json.loads(strict_json.dump(texts[0]))["prompt"]["spans"]
    assert spans == [{"role": "user", "start": 0, "end": 5, "section": "content"}]
