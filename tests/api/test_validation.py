"""Every bad field of every type is a 400 that names it; everything else is left in peace."""

import pytest

from tests.api.test_bodies import error
from transformers_api.api.openai.schemas.chat import ChatRequest
from transformers_api.api.openai.schemas.completions import CompletionRequest

NUMBERS = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
INTEGERS = {
    "n": (1, 128),
    "max_tokens": (1, 1 << 24),
    "top_k": (-1, (1 << 31) - 1),
    "min_tokens": (0, 1 << 24),
    "seed": (-(2**63), 2**63 - 1),
}
BOOLEANS = ("stream", "ignore_eos", "return_token_ids")
NOT_NUMBERS = ("5", True, False, [], [1], {}, "")
ROUTES = ("chat", "complete")


def refused(served, route, param, **body):
    response = getattr(served, route)(**body)
    assert error(response)["param"] == param
    assert served.engine.submitted == []
    return error(response)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", [*NUMBERS, *INTEGERS])
def test_numbers_are_numbers_within_bounds(served, route, name):
    low, high = (NUMBERS | INTEGERS)[name]
    whole = name in INTEGERS
    wrong = [*NOT_NUMBERS, *([0.5, 1.0] if whole else [])]
    wrong += [v for v in (low - 1, high + 1) if not whole or -(2**63) <= v < 2**63]
    for value in wrong:
        message = refused(served, route, name, **{name: value})["message"]
        assert message.startswith(f"'{name}' must be a")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", BOOLEANS)
def test_booleans_are_booleans(served, route, name):
    for value in ("true", "yes", 1, 0, "", [], {}):
        refused(served, route, name, **{name: value})


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("model", {"model": 5}),
        ("model", {"model": ""}),
        ("model", {"model": "x" * 300}),
        ("user", {"user": 5}),
        ("stop", {"stop": 5}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": ["x"] * 17}),
        ("stop[1]", {"stop": ["x", 5]}),
        ("stop[0]", {"stop": [None]}),
        ("stop[0]", {"stop": ["x" * 257]}),
        ("stop_token_ids", {"stop_token_ids": 5}),
        ("stop_token_ids[0]", {"stop_token_ids": ["5"]}),
        ("stop_token_ids[1]", {"stop_token_ids": [5, -1]}),
        ("stop_token_ids", {"stop_token_ids": [259]}),
        ("logit_bias", {"logit_bias": [5]}),
        ("logit_bias", {"logit_bias": {"x": 5}}),
        ("logit_bias", {"logit_bias": {"-1": 5}}),
        ("logit_bias", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"5": "1"}}),
        ("logit_bias", {"logit_bias": {"5": True}}),
        ("logit_bias", {"logit_bias": {"259": 5}}),
        ("logit_bias", {"logit_bias": {str(i): 1 for i in range(301)}}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("typical_p", {"typical_p": 0}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options", {"stream": True, "stream_options": 5}),
        ("stream_options.include_usage", {"stream": True, "stream_options": {"include_usage": 1}}),
        ("min_tokens", {"min_tokens": 10, "max_tokens": 5}),
    ],
)
def test_a_bad_field_is_named(served, route, param, body):
    refused(served, route, param, **body)


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {"prompt": 5}),
        ("prompt", {"prompt": None}),
        ("prompt", {"prompt": {}}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": ["a", ""]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": [None]}),
        ("prompt", {"prompt": ["a", 5]}),
        ("prompt", {"prompt": ["a", [5]]}),
        ("prompt", {"prompt": ["a"] * 1025}),
        ("prompt[1]", {"prompt": [5, "a"]}),
        ("prompt[1]", {"prompt": [5, True]}),
        ("prompt[0]", {"prompt": [-1]}),
        ("prompt[1][0]", {"prompt": [[5], [1.5]]}),
        ("prompt[0]", {"prompt": [[]]}),
        ("prompt", {"prompt": [259]}),
        ("prompt", {"prompt": [[5], [259]]}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("echo", {"echo": "yes"}),
        ("best_of", {"best_of": 129}),
        ("best_of", {"n": 3, "best_of": 2}),
        ("best_of", {"best_of": 2, "stream": True}),
        ("max_tokens", {"max_tokens": 0}),
    ],
)
def test_a_bad_field_of_completions_is_named(served, param, body):
    refused(served, "complete", param, **body)


def test_a_missing_prompt_is_named(served):
    assert error(served.client.post("/v1/completions", json={}))["param"] == "prompt"


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {"messages": None}),
        ("messages", {"messages": []}),
        ("messages", {"messages": "Hi"}),
        ("messages", {"messages": {"role": "user"}}),
        ("messages", {"messages": [USER] * 1025}),
        ("messages[0]", {"messages": ["Hi"]}),
        ("messages[0]", {"messages": [None]}),
        ("messages[0].role", {"messages": [{"content": "Hi"}]}),
        ("messages[1].role", {"messages": [USER, {"role": "robot", "content": "Hi"}]}),
        ("messages[0].role", {"messages": [{"role": 5, "content": "Hi"}]}),
        ("messages[0].content", {"messages": [{"role": "user"}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": None}]}),
        ("messages[0].content", {"messages": [{"role": "user", "content": 5}]}),
        ("messages[0].content[0]", {"content": ["Hi"]}),
        ("messages[0].content[0]", {"content": [{"text": "Hi"}]}),
        ("messages[0].content[0].text", {"content": [{"type": "text"}]}),
        ("messages[0].content[0].text", {"content": [{"type": "text", "text": 5}]}),
        ("messages[0].name", {"messages": [{**USER, "name": 5}]}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("logprobs", {"logprobs": 1}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("chat_template_kwargs", {"chat_template_kwargs": []}),
        ("chat_template_kwargs", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
        ("add_generation_prompt", {"add_generation_prompt": "no"}),
        ("continue_final_message", {"continue_final_message": True}),
        (
            "continue_final_message",
            {"continue_final_message": True, "add_generation_prompt": True},
        ),
    ],
)
def test_a_bad_field_of_chat_is_named(served, param, body):
    refused(served, "chat", param, **body)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "alloy"}),
        ("web_search_options", {}),
        ("use_beam_search", True),
    ],
)
def test_what_is_not_supported_is_refused_by_name(served, param, value):
    body = refused(served, "chat", param, **{param: value})
    assert body["code"] == "unsupported_parameter"


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_a_part_that_is_no_text_is_refused_by_name(served, kind):
    parts = [{"type": "text", "text": "Hi"}, {"type": kind, kind: {}}]
    body = refused(served, "chat", "messages[0].content[1]", content=parts)
    assert kind in body["message"]


def test_a_suffix_is_refused_where_nothing_can_be_put_before_it(served):
    assert refused(served, "chat", "suffix", suffix="x")["code"] == "unsupported_parameter"
    assert refused(served, "complete", "suffix", suffix="x")["code"] == "model_not_capable"


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [], "tool_choice": "none"},
        {"tool_choice": "auto", "parallel_tool_calls": True},
        {"functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"use_beam_search": False},
        {"tools": None, "audio": None, "response_format": None, "web_search_options": None},
        {"logit_bias": {}},
        *({"reasoning_effort": effort} for effort in ("none", "minimal", "low", "medium", "high")),
        {"stop": []},
    ],
)
def test_a_field_that_asks_for_nothing_is_fine(served, fields):
    assert served.chat(**fields).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_unknown_fields_are_ignored(served, route):
    response = getattr(served, route)(metadata={"a": "b"}, store=True, service_tier="x", zz=[1])
    assert response.status_code == 200


def test_null_means_default(served):
    plain = served.chat()
    nulls = served.chat(**dict.fromkeys(set(ChatRequest().fields) - {"messages"}))
    assert nulls.get_json()["choices"] == plain.get_json()["choices"]
    first, second = served.engine.submitted
    assert first[0].prompt_ids == second[0].prompt_ids
    names = set(CompletionRequest().fields) - {"prompt"}
    assert served.complete(**dict.fromkeys(names)).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_bounds_themselves_are_allowed(served, route):
    for position in (0, 1):
        body = {name: bounds[position] for name, bounds in NUMBERS.items()}
        body |= {"top_k": INTEGERS["top_k"][position], "seed": INTEGERS["seed"][position]}
        body |= {"n": INTEGERS["n"][position]}
        assert getattr(served, route)(**body).status_code == 200


def test_more_sequences_than_ever_fit_are_refused(serve):
    served = serve(max_inflight=4, max_queue=4)
    assert error(served.complete(["a"] * 9))["param"] == "prompt"
    assert error(served.complete(["a"] * 3, n=3))["param"] == "prompt"
    assert served.complete(["a"] * 8).status_code == 200
    assert error(serve(max_inflight=2, max_queue=0).chat(n=3))["param"] == "n"


def test_what_does_not_fit_the_context_is_named(serve):
    from tests.fakes import FakeEngine

    served = serve(FakeEngine(max_model_len=64))
    body = error(served.complete("x" * 70))
    assert (body["param"], body["code"]) == ("prompt", "context_length_exceeded")
    body = error(served.complete("x" * 50, max_tokens=20))
    assert (body["param"], body["code"]) == ("max_tokens", "context_length_exceeded")
    body = error(served.chat("x" * 70))
    assert (body["param"], body["code"]) == ("messages", "context_length_exceeded")
    body = error(served.chat(max_completion_tokens=64))
    assert (body["param"], body["code"]) == ("max_completion_tokens", "context_length_exceeded")


def test_a_default_is_cut_to_the_context(serve):
    from tests.fakes import FakeEngine

    served = serve(FakeEngine(max_model_len=64))
    assert served.chat("x").status_code == 200
    prompt = served.engine.submitted[0][0].prompt_ids
    assert served.params().max_tokens == 64 - len(prompt)
