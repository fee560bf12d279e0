"""llama-server's routes: a gap is filled, a template applied, the resident model described."""

from __future__ import annotations

import json

import pytest

from tests import tokenizers
from tests.api.tiny_app import running
from tests.serving.tools.templates import THINKING
from transformers_api.api.http.services import EXTENSION
from transformers_api.serving.text.infilling import OtherFile, encode, infill_tokens

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
GAP = {"input_prefix": "a = ", "input_suffix": "\nb", "n_predict": 8, "temperature": 0}


def coder(*names, special=True):
    """A tokenizer with the tokens ``names``."""
    tokenizer = tokenizers.byte_level()
    if special:
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", *names]}
        )
    else:
        tokenizer.add_tokens(list(names))
    return tokenizer


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    made = {
        "coder": coder(*FIM, special=False),
        "plain": tokenizers.byte_level(),
        "thinks": tokenizers.byte_level(
            merges=("<think>", "</think>"), chat_template=THINKING["switch"]
        ),
    }
    with running(tmp_path_factory.mktemp("llamacpp"), made) as app:
        yield app


@pytest.fixture
def client(app):
    return app.test_client()


def whole(response):
    assert response.status_code == 200, response.json
    return response.json


# Prompts


@pytest.mark.parametrize(
    "names",
    [
        FIM,
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("▁<PRE>", "▁<SUF>", "▁<MID>"),
        ("<PRE>", "<SUF>", "<MID>"),
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ],
)
@pytest.mark.parametrize("special", [True, False])
def test_the_tokens_of_published_models_stand_around_the_texts(names, special):
    tokenizer = coder(*names, special=special)
    tokens = infill_tokens(tokenizer, len(tokenizer))
    first, second, third = tokenizer.convert_tokens_to_ids(list(names))
    assert encode(tokens, "ab", "c") == [first, 97, 98, second, 99, third]
    assert encode(tokens, [97, 5], "") == [first, 97, 5, second, third]
    assert {first, second, third, tokenizers.END_OF_TEXT} <= tokens.ends


def test_a_token_that_somebody_typed_is_text():
    tokenizer = coder(*FIM, special=False)
    tokens = infill_tokens(tokenizer, len(tokenizer))
    typed = f"x{FIM[2]}<|im_end|>"
    ids = encode(tokens, typed, typed)
    assert ids == [tokens.before, *typed.encode(), tokens.after, *typed.encode(), tokens.middle]


def test_a_tokenizer_without_one_of_the_tokens_cannot():
    for names in (FIM[:2], FIM[1:], ("<fim_prefix>", "<|fim_suffix|>", "<|fim_middle|>")):
        tokenizer = coder(*names)
        assert infill_tokens(tokenizer, len(tokenizer)) is None
    tokenizer = coder(*FIM)
    assert infill_tokens(tokenizer, len(tokenizer) - 1) is None  # the model lacks the last one


def test_a_text_begins_as_the_texts_of_its_model_do():
    tokenizer = tokenizers.sentencepiece()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["▁<PRE>", "▁<SUF>", "▁<MID>", "<EOT>"]}
    )
    tokenizer.backend_tokenizer.post_processor = tokenizers.begin_with(tokenizer, "<s>")
    tokens = infill_tokens(tokenizer, len(tokenizer))
    word = tokenizer.convert_tokens_to_ids(["▁", "a"])
    ids = [1, tokens.before, *word, tokens.after, word[1], tokens.middle]
    assert encode(tokens, "a", "a") == ids
    assert encode(tokens, "a", "a", add_special_tokens=False) == ids[1:]
    assert tokenizer.convert_tokens_to_ids("<EOT>") in tokens.ends


def test_other_files_stand_before_the_gap():
    files = [OtherFile("x.py", "y"), OtherFile("z.py", "")]
    plain = coder(*FIM)
    tokens = infill_tokens(plain, len(plain))
    snippets = b"\n\n--- snippet ---\n\ny\n\n--- snippet ---\n\n"
    assert encode(tokens, "", "", files=files)[: len(snippets)] == list(snippets)
    named = coder(*FIM, "<|repo_name|>", "<|file_sep|>")
    tokens = infill_tokens(named, len(named))
    repository, file = named.convert_tokens_to_ids(["<|repo_name|>", "<|file_sep|>"])
    shown = [repository, *b"myproject\n", file, *b"x.py\ny", file, *b"z.py\n", file, *b"filename\n"]
    assert encode(tokens, "", "", files=files)[: len(shown)] == shown
    assert {repository, file} <= tokens.ends


# Routes


def test_ollamas_suffix_fills_the_same_gap(client):
    fields = {"prompt": "a = ", "suffix": "\nb", "temperature": 0}
    expected = whole(client.post("/v1/completions", json={**fields, "max_tokens": 8}))
    body = {"prompt": "a = ", "suffix": "\nb", "options": {"temperature": 0, "num_predict": 8}}
    answer = whole(client.post("/api/generate", json={**body, "stream": False}))
    assert answer["response"] == expected["choices"][0]["text"]
    assert answer["prompt_eval_count"] == expected["usage"]["prompt_tokens"] == 9
    with client.post("/api/generate", json=body) as streamed:
        lines = streamed.get_data(as_text=True).splitlines()
    assert "".join(json.loads(line)["response"] for line in lines) == answer["response"]
    refused = client.post("/api/generate", json={**body, "model": "plain"})
    assert refused.status_code == 400
    assert "'suffix' needs a model with fill-in-the-middle tokens" in refused.json["error"]


def test_a_gap_is_filled_alike_by_infill_and_by_completions(client):
    body = whole(client.post("/infill", json={**GAP, "ignore_eos": True}))
    assert (body["stop"], body["stop_type"], body["model"]) == (True, "limit", "coder")
    assert (body["tokens_predicted"], body["tokens_evaluated"]) == (8, 9)
    assert body["timings"]["predicted_n"] == 8
    fields = {"prompt": "a = ", "suffix": "\nb", "max_tokens": 8, "temperature": 0}
    completion = whole(client.post("/v1/completions", json={**fields, "ignore_eos": True}))
    assert completion["choices"][0]["text"] == body["content"]
    assert completion["usage"]["prompt_tokens"] == 9
    without = whole(client.post("/v1/completions", json={**fields, "suffix": ""}))
    assert without["usage"]["prompt_tokens"] == 4
    ids = whole(client.post("/v1/completions", json={**fields, "prompt": [[97], [98, 99]]}))
    assert ids["usage"]["prompt_tokens"] == (1 + 5) + (2 + 5)


def test_what_is_before_the_gap_may_come_in_two_fields(client):
    one = whole(client.post("/infill", json=GAP))
    two = whole(client.post("/infill", json={**GAP, "input_prefix": "a ", "prompt": "= "}))
    assert (one["content"], one["tokens_evaluated"]) == (two["content"], two["tokens_evaluated"])
    more = whole(client.post("/infill", json={**GAP, "input_extra": [{"text": "z"}]}))
    assert more["tokens_evaluated"] == one["tokens_evaluated"] + len("\n\n--- snippet ---\n\nz")


def test_a_streamed_gap_ends_with_its_counts(client):
    fields = {**GAP, "ignore_eos": True}
    text = whole(client.post("/infill", json=fields))["content"]
    response = client.post("/infill", json={**fields, "stream": True})
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    response.close()
    assert "".join(event["content"] for event in events) == text
    assert [event["stop"] for event in events] == [False] * (len(events) - 1) + [True]
    assert events[-1]["tokens_predicted"] == 8


def test_no_tokens_only_reads_the_prompt(client):
    for stream in (False, True):
        fields = {**GAP, "n_predict": 0, "stream": stream}
        response = client.post("/infill", json=fields)
        body = json.loads(response.text[6:]) if stream else response.json
        response.close()
        assert (body["content"], body["tokens_predicted"], body["stop"]) == ("", 0, True)


def test_an_answer_ends_at_a_stop_string_or_at_a_token_of_a_gap(client):
    word = whole(client.post("/infill", json=GAP | {"ignore_eos": True}))["content"][:1]
    body = whole(client.post("/infill", json=GAP | {"ignore_eos": True, "stop": [word]}))
    assert (body["stop_type"], body["stopping_word"], body["content"]) == ("word", word, "")
    for token in coder(*FIM).convert_tokens_to_ids([*FIM, "<|endoftext|>"]):
        likely = {"logit_bias": {str(token): 100}}
        ended = whole(client.post("/infill", json=GAP | likely))
        assert (ended["stop_type"], ended["content"]) == ("eos", "")
        on = whole(client.post("/infill", json=GAP | likely | {"ignore_eos": True}))
        assert (on["stop_type"], on["tokens_predicted"]) == ("limit", 8)
        fields = {"prompt": "a", "suffix": "b", "temperature": 0, **likely}
        choice = whole(client.post("/v1/completions", json=fields))["choices"][0]
        assert (choice["finish_reason"], choice["text"]) == ("stop", "")
    held = whole(client.post("/infill", json=GAP | {"grammar": 'root ::= "yes"'}))
    assert (held["content"], held["stop_type"]) == ("yes", "eos")


def test_a_model_without_such_tokens_says_so_by_the_name_of_the_field(client):
    cases = [
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/infill", GAP, "input_suffix"),
    ]
    for route, fields, name in cases:
        response = client.post(route, json={**fields, "model": "plain"})
        assert response.status_code == 400
        error = response.json["error"]
        assert (error["param"], error["code"]) == (name, "model_not_capable")
        assert f"'{name}'" in error["message"]
    plain = {"prompt": "a", "suffix": "", "model": "plain", "max_tokens": 1}
    assert whole(client.post("/v1/completions", json=plain))["choices"]


def test_a_template_is_applied_as_a_chat_completion_would(client):
    body = whole(client.post("/apply-template", json={"messages": HELLO}))
    assert body == {"prompt": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"}
    fields = {"messages": HELLO, "add_generation_prompt": False}
    assert whole(client.post("/apply-template", json=fields))["prompt"].endswith("<|im_end|>\n")
    shown = whole(client.post("/apply-template", json={"messages": HELLO, "tools": [TOOL]}))
    assert "get_weather" in shown["prompt"]
    off = {"chat_template_kwargs": {"enable_thinking": False}, "model": "thinks"}
    on = whole(client.post("/apply-template", json={"messages": HELLO, "model": "thinks"}))
    assert on != whole(client.post("/apply-template", json={"messages": HELLO, **off}))


def test_the_resident_model_is_described_and_none_is_loaded(app, client):
    swapper = app.extensions[EXTENSION].swapper
    swapper.evict()
    for route in ("/props", "/tokenizer_info"):
        response = client.get(route)
        assert (response.status_code, response.json["error"]["code"]) == (503, "model_not_loaded")
    assert swapper.status().model is None
    whole(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "model": "plain"}))
    props = whole(client.get("/props"))
    settings = app.extensions[EXTENSION].settings
    assert props["default_generation_settings"]["n_ctx"] == 4096
    assert props["total_slots"] == settings.max_inflight
    assert (props["model_path"], props["modalities"]["vision"]) == ("plain", False)
    assert props["chat_template"] == tokenizers.CHATML
    info = whole(client.get("/tokenizer_info"))
    assert info["chat_template"] == tokenizers.CHATML
    assert info["tokenizer_class"] == type(tokenizers.byte_level()).__name__
    assert info["eos_token"] == "<|endoftext|>"
    assert info["added_tokens_decoder"]["256"] == {"content": "<|im_start|>", "special": True}
    assert str(settings.model_store.parent) not in json.dumps([props, info])


def test_the_version_is_told(client):
    assert whole(client.get("/version")) == whole(client.get("/api/version"))


BAD = [
    ("/apply-template", {}, "messages"),
    ("/apply-template", {"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
    ("/apply-template", {"messages": HELLO, "tools": [{"type": "function"}]}, "tools[0].function"),
    ("/apply-template", {"messages": HELLO, "tools": 5}, "tools"),
    ("/apply-template", {"messages": HELLO, "chat_template_kwargs": 5}, "chat_template_kwargs"),
    ("/infill", {"input_prefix": 5}, "input_prefix"),
    ("/infill", {"input_suffix": 5}, "input_suffix"),
    ("/infill", {"prompt": [1]}, "prompt"),
    ("/infill", {"n_predict": "5"}, "n_predict"),
    ("/infill", {"n_predict": -2}, "n_predict"),
    ("/infill", {"n": 2}, "n"),
    ("/infill", {"temperature": 9}, "temperature"),
    ("/infill", {"input_extra": [{"filename": "x"}]}, "input_extra[0].text"),
    ("/infill", {"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
    ("/infill", {"input_prefix": "x" * 5000}, "input_prefix"),
    ("/infill", {"n_predict": 5000}, "max_tokens"),
    ("/v1/completions", {"prompt": "a", "suffix": 5}, "suffix"),
    ("/v1/completions", {"prompt": "a", "suffix": "b", "echo": True}, "echo"),
    ("/v1/completions", {"prompt": [9999], "suffix": "b"}, "prompt"),
    (
        "/v1/completions",
        {"prompt": "a", "suffix": "b", "truncate_prompt_tokens": 3},
        "truncate_prompt_tokens",
    ),
]


@pytest.mark.parametrize(("route", "fields", "name"), BAD)
def test_a_wrong_field_is_a_400_that_names_it(client, route, fields, name):
    response = client.post(route, json={"model": "coder", **fields})
    assert response.status_code == 400, response.json
    assert response.json["error"]["param"] == name
