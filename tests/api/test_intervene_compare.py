"""``intervene.compare``: what the unedited model makes of each token of an edited answer."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import tokenizers
from tests.api.test_intervene import ADD, MESSAGES, PROMPT, events, inspected
from tests.api.tiny_app import running
from transformers_api.api.http.services import EXTENSION
from transformers_api.engine.base import SamplingParams
from transformers_api.errors import InvalidRequest
from transformers_api.serving.generation import GenerationRequest
from transformers_api.serving.inspect.comparing import check_comparable
from transformers_api.serving.inspect.edit_positions import PromptPlaces
from transformers_api.serving.inspect.edit_request import InterveneRequest

BODIES = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": MESSAGES},
}
FORMS = {
    "text": {},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},  # has parts
}


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared")
    with running(folder, {"tiny": tokenizers.byte_level()}) as app:
        yield app


@pytest.fixture
def client(app):
    return app.test_client()


def answered(client, route, *edits, status=200, compare="forced", **fields):
    body = {"max_tokens": 6, "temperature": 0, "ignore_eos": True, **BODIES[route], **fields}
    body["intervene"] = {"edits": list(edits)}
    if compare is not None:
        body["intervene"]["compare"] = compare
    response = client.post(route, json=body)
    assert response.status_code == status, response.get_data(as_text=True)
    return events(response) if fields.get("stream") and status == 200 else response.get_json()


def compared(choice):
    return choice["compare"]["tokens"]


def test_the_unedited_model_says_what_it_makes_of_each_token(client):
    (choice,) = answered(client, "/v1/completions", ADD, return_token_ids=True)["choices"]
    tokens = compared(choice)
    assert choice["compare"]["index"] == 0
    assert [each["token_id"] for each in tokens] == choice["token_ids"]
    assert "".join(each["token"] for each in tokens) == choice["text"]
    assert all(each["kl"] > 0 for each in tokens)
    # The plain model's own scores of the same text.
    ids = [*choice["prompt_token_ids"], *choice["token_ids"]]
    fields = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 3}
    scores = client.post("/v1/completions", json=fields).get_json()["choices"][0]["logprobs"]
    last = -len(tokens)
    expected = scores["token_logprobs"][last:]
    assert [each["logprob_without"] for each in tokens] == pytest.approx(expected, abs=1e-4)
    for each, top in zip(tokens, scores["top_logprobs"][last:], strict=True):
        first = sorted(top.values(), reverse=True)[:3]
        assert [one["logprob"] for one in each["top_without"]] == pytest.approx(first, abs=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", BODIES)
def test_streams_end_with_the_same_for_each_of_n_answers(client, route, form):
    if form == "tools" and route == "/v1/completions":
        form = "text"
    fields = {"n": 2, "temperature": 1, "seed": 3, **FORMS[form]}
    whole = answered(client, route, ADD, **fields)
    usage = {"stream_options": {"include_usage": True}}
    stream = answered(client, route, ADD, stream=True, **usage, **fields)
    *others, first, second, last = stream
    assert not any("compare" in chunk for chunk in others)
    assert last["usage"]["completion_tokens"] == 12
    for place, (chunk, choice) in enumerate(zip((first, second), whole["choices"], strict=True)):
        assert chunk["choices"] == []
        assert chunk["compare"]["index"] == choice["compare"]["index"] == place
        assert chunk["compare"] == choice["compare"]
        assert len(compared(choice)) == 6
    assert compared(whole["choices"][0]) != compared(whole["choices"][1])


def test_each_prompt_is_compared_with_its_own(client):
    prompts = {"prompt": [PROMPT, "Once upon"], "n": 2}
    together = answered(client, "/v1/completions", ADD, **prompts)["choices"]
    alone = answered(client, "/v1/completions", ADD, prompt="Once upon")["choices"]
    assert [choice["compare"]["index"] for choice in together] == [0, 1, 2, 3]
    for choice in together[2:]:
        expected = [each["kl"] for each in compared(alone[0])]
        assert [each["kl"] for each in compared(choice)] == pytest.approx(expected, abs=1e-4)


def test_an_answer_is_the_same_and_costs_the_same_with_a_twin(client):
    plain, twin = (answered(client, "/v1/completions", ADD, compare=c) for c in (None, "forced"))
    assert "compare" not in plain["choices"][0]
    assert twin["choices"][0]["text"] == plain["choices"][0]["text"]
    counts = [each["usage"]["intervene"]["tokens"] for each in (plain, twin)]
    cached = [each["usage"]["prompt_tokens_details"]["cached_tokens"] for each in (plain, twin)]
    assert counts[0] + cached[0] == counts[1] + cached[1]


def test_others_get_the_same_bits_beside_a_comparison(client):
    body = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0, "logprobs": 3, "n": 2}
    before = client.post("/v1/completions", json=body).get_json()["choices"]
    response = client.post("/v1/completions", json={**body, "stream": True})
    beside = iter(response.response)
    next(beside)
    edited = answered(client, "/v1/completions", ADD)
    assert compared(edited["choices"][0])
    response.close()
    after = client.post("/v1/completions", json=body).get_json()["choices"]
    assert after == before
    assert answered(client, "/v1/completions", ADD)["choices"] == edited["choices"]


def test_what_changes_nothing_pushes_nothing(client):
    for edit in ({**ADD, "scale": 0}, {"do": "force", "step": 1, "token_ids": [ord("x")]}):
        (choice,) = answered(client, "/v1/completions", edit)["choices"]
        assert [each["kl"] for each in compared(choice)] == [0] * 6
    assert compared(choice)[1]["token"] == "x"
    assert compared(choice)[1]["logprob_without"] < -0.1


def test_the_token_that_ends_an_answer_is_compared_too(client):
    first = answered(client, "/v1/completions", ADD)["choices"][0]["compare"]["tokens"]
    stop = first[2]["token_id"]
    (choice,) = answered(client, "/v1/completions", ADD, stop_token_ids=[stop])["choices"]
    ids = [each["token_id"] for each in first]
    assert [each["token_id"] for each in compared(choice)] == ids[: ids.index(stop) + 1]


def test_its_place_and_its_turn_are_given_back(app, client):
    for stream in (False, True):
        answered(client, "/v1/completions", ADD, stream=stream)
    services = app.extensions[EXTENSION]
    assert not services.inspections._line


def test_tokens_that_are_read_twice_count_twice_where_tokens_are_limited():
    params = SamplingParams(max_tokens=5)
    plain = GenerationRequest([[1, 2], [3]], params, n=2)
    twin = replace(plain, intervene=InterveneRequest(edits=(), compares=True))
    assert plain.most_tokens == 3 + 2 * 2 * 5
    assert twin.most_tokens == plain.most_tokens + 2 * 3 + 2 * 2 * 5


def test_what_outgrows_the_window_is_refused_with_what_fits():
    place = PromptPlaces(ids=[1] * 9, most=40, vocabulary=None, spans=tuple, window=32)
    intervene = InterveneRequest(edits=(), compares=True)
    request = GenerationRequest([[1] * 9], SamplingParams(max_tokens=31), intervene=intervene)
    check_comparable(request, 32, [replace(place, window=None)])
    with pytest.raises(InvalidRequest) as refused:
        check_comparable(request, 32, [place])
    assert refused.value.param == "intervene.compare"
    assert refused.value.message.endswith("within the model's window; use max_tokens <= 23")


REFUSED = {
    "other words": ({"compare": "loose"}, "'intervene.compare' must be one of 'forced', 'free'"),
    "prompt scores": ({"prompt_logprobs": 1}, "intervene.compare cannot go with scores of the pro"),
    "echoed scores": ({"echo": True, "logprobs": 1}, "intervene.compare cannot go with scores of"),
    "best of": ({"best_of": 2}, "intervene.compare cannot go with best_of above n"),
    "best twins": ({"best_of": 2, "compare": "free"}, "intervene.compare cannot go with best_of"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_name_where_it_cannot_be(client, what):
    fields, words = REFUSED[what]
    error = answered(client, "/v1/completions", ADD, status=400, **fields)["error"]
    assert error["message"].startswith(words)
    assert error["param"] == "intervene.compare"


def test_other_routes_refuse_it_by_name(client):
    intervene = {"edits": [ADD], "compare": "forced"}
    response = client.post("/v1/responses", json={"input": "Hi", "intervene": intervene})
    assert response.status_code == 400
    assert "intervene.compare" in response.get_json()["error"]["message"]
    response = client.post("/inspect/tokens", json={"prompt": PROMPT, "intervene": intervene})
    assert response.status_code == 422
    assert "intervene.compare" in response.get_data(as_text=True)
    assert inspected(client, "tokens", ADD)["tokens"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("route", BODIES)
def test_an_unedited_twin_writes_beside_each_answer(client, route, form):
    """As it is edited alone, and as it is without edits; of the same seed, not of the same words."""
    if form != "text" and route == "/v1/completions":
        return
    given = {"temperature": 1, "seed": 7, "return_token_ids": True, **FORMS[form]}
    force = {"do": "force", "step": 1, "token_ids": [65]}
    edits = (ADD, force)
    both = answered(client, route, *edits, n=2, compare="free", **given)
    alone = answered(client, route, *edits, n=2, compare=None, **given)
    plain = client.post(
        route, json={"max_tokens": 6, "ignore_eos": True, **BODIES[route], "n": 2, **given}
    ).get_json()
    ids = [choice["token_ids"] for choice in both["choices"]]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert ids[:2] == [choice["token_ids"] for choice in alone["choices"]]
    assert ids[2:] == [choice["token_ids"] for choice in plain["choices"]]
    assert [each[1] for each in ids[:2]] == [65, 65]
    assert both["choices"][3]["intervene"] == {"edits": [], "twin_of": 1}
    assert both["choices"][1]["intervene"]["edits"][0]["do"] == "add"
    usage = both["usage"]
    assert (usage["intervene"]["rows"], usage["intervene"]["twins"]) == (2, 2)
    assert usage["completion_tokens"] == sum(map(len, ids))
    assert "twins" not in alone["usage"]["intervene"]


@pytest.mark.parametrize("route", BODIES)
def test_twins_of_several_prompts_say_in_a_stream_and_in_traces_what_they_are(client, route):
    several = {"prompt": [PROMPT, PROMPT[:9]]} if route == "/v1/completions" else {}
    edit = {"do": "scale", "part": "mlp", "layers": "all", "by": -3}
    fields = {"trace": {"topk": 1}, "stream": True, "compare": "free"} | several
    chunks = answered(client, route, edit, **fields)
    steps: dict[int, list[bool]] = {}
    twins: dict[int, int] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            trace = chunk.get("trace", {})
            if "token_id" in trace:
                steps.setdefault(choice["index"], []).append(trace.get("twin", False))
            if "twin_of" in chunk.get("intervene", {}):
                twins[choice["index"]] = chunk["intervene"]["twin_of"]
    count = 2 * len(several.get("prompt", [PROMPT]))
    assert sorted(steps) == list(range(count))
    for index, are_twins in steps.items():
        assert len(are_twins) == 6
        assert set(are_twins) == {index % 2 == 1}
    assert twins == {index: index - 1 for index in range(1, count, 2)}


def test_a_twin_is_not_kept_as_a_run(client):
    body = {"prompt": PROMPT, "max_tokens": 2}
    intervene = {"edits": [ADD], "compare": "free", "store": True}
    response = client.post("/v1/completions", json={**body, "intervene": intervene})
    assert response.status_code == 400
    assert response.get_json()["error"]["param"] == "intervene.compare"
