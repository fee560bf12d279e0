"""POST /tokenize and /detokenize."""

import pytest

from tests.api.test_bodies import error
from transformers_api.errors import ModelLoadFailed

USER = {"role": "user", "content": "Hi"}


def test_a_text_becomes_ids_under_each_of_its_names(served):
    for name in ("prompt", "text", "content"):
        answer = served.client.post("/tokenize", json={name: "Hé"}).get_json()
        assert answer == {"tokens": [72, 0xC3, 0xA9], "count": 3, "max_model_len": 2048}
    assert served.engine.submitted == []


def test_tokens_can_be_shown_as_text(served):
    answer = served.client.post("/tokenize", json={"text": "Hé", "return_token_strs": True})
    assert answer.get_json()["token_strs"] == ["H", "bytes:\\xc3", "bytes:\\xa9"]


def test_a_conversation_becomes_the_ids_that_the_model_reads(served):
    served.chat()
    ids = list(served.engine.submitted[0][0].prompt_ids)
    assert served.client.post("/tokenize", json={"messages": [USER]}).get_json()["tokens"] == ids
    less = {"messages": [USER], "add_generation_prompt": False}
    assert served.client.post("/tokenize", json=less).get_json()["count"] < len(ids)


def test_ids_become_text_again(served):
    answer = served.client.post("/detokenize", json={"tokens": [72, 0xC3, 0xA9, 258]}).get_json()
    assert answer == {"prompt": "Hé<|endoftext|>", "text": "Hé<|endoftext|>"}
    assert served.client.post("/detokenize", json={"tokens": []}).get_json()["text"] == ""


def test_another_model_can_be_named(served):
    assert served.client.post("/tokenize", json={"text": "a", "model": "two"}).status_code == 200
    assert served.loader.calls == [("text", "owner/second")]
    unknown = {"tokens": [1], "model": "none"}
    assert error(served.client.post("/detokenize", json=unknown), 404)["param"] == "model"


COUNTS = [
    ("/v1/messages/count_tokens", {"messages": [USER]}),
    ("/v1/responses/input_tokens", {"input": "Hi"}),
    ("/tokenize", {"messages": [USER]}),
    ("/tokenize", {"prompt": "Hi"}),
    ("/detokenize", {"tokens": [72]}),
    ("/apply-template", {"messages": [USER]}),
]


@pytest.mark.parametrize(("url", "body"), COUNTS)
def test_nothing_is_loaded_and_nobody_evicted_for_a_count(served, url, body):
    alone = served.client.post(url, json=body | {"model": "two"})
    assert alone.status_code == 200
    assert served.loader.calls == [("text", "owner/second")]
    served.chat()
    assert served.client.post(url, json=body | {"model": "two"}).get_json() == alone.get_json()
    assert served.swapper.status().model == "fake"
    assert served.loader.count("load") == 1
    served.client.post(url, json=body)  # the one in memory has its own
    assert served.loader.count("text", "fake") == 0


@pytest.mark.parametrize(("url", "body"), COUNTS)
def test_a_count_of_a_model_without_files_says_so(served, url, body):
    served.loader.fail["text"] = ModelLoadFailed("no files")
    response = served.client.post(url, json=body)
    assert response.status_code in (503, 529)
    assert len(served.services.admission) == 0


@pytest.mark.parametrize(
    ("url", "param", "body"),
    [
        ("/tokenize", "prompt", {}),
        ("/tokenize", "text", {"text": 5}),
        ("/tokenize", "text", {"prompt": "a", "text": "b"}),
        ("/tokenize", "messages", {"prompt": "a", "messages": [USER]}),
        ("/tokenize", "messages[0].role", {"messages": [{"content": "a"}]}),
        ("/tokenize", "add_special_tokens", {"text": "a", "add_special_tokens": 1}),
        ("/detokenize", "tokens", {}),
        ("/detokenize", "tokens", {"tokens": "a"}),
        ("/detokenize", "tokens[1]", {"tokens": [1, -1]}),
        ("/detokenize", "tokens[0]", {"tokens": [True]}),
        ("/detokenize", "tokens", {"tokens": [259]}),
    ],
)
def test_a_bad_field_is_named(served, url, param, body):
    assert error(served.client.post(url, json=body))["param"] == param
