"""Original checkpoints through the registry and the OpenAI routes, like any other model."""

from __future__ import annotations

import json

import pytest

from tests.families.originals import ORIGINALS
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

GREEDY = {"temperature": 0, "top_p": 1}


@pytest.fixture(scope="module")
def app(tmp_path_factory, converted):
    folder = tmp_path_factory.mktemp("server")
    paths = {name: converted(name) for name in ORIGINALS}
    paths["niels-v1-chat"] = ORIGINALS["niels-v1-chat"].checkpoint  # converted when it is loaded
    entries = [{"name": name, "path": str(path)} for name, path in paths.items()]
    (folder / "models.json").write_text(json.dumps(entries))
    app = create_app(
        Settings(
            model_registry_path=folder / "models.json",
            include_default_models=False,
            default_model="niels-v1-chat",
            preload_model=False,
            model_store=folder / "store",
            hf_home=folder / "hf",
            torch_threads=1,
        )
    )
    yield app
    app.extensions[EXTENSION].drain(0.0)


@pytest.fixture(scope="module")
def client(app):
    return app.test_client()


def chat(client, model: str, content: str, **options):
    body = {"model": model, "messages": [{"role": "user", "content": content}]}
    response = client.post("/v1/chat/completions", json=body | options)
    assert response.status_code == 200, response.text
    return response.json["choices"][0]


def test_niels_answers_a_chat_as_it_was_trained_and_stops(client):
    answer = chat(client, "niels-v1-chat", "who is niels?", max_tokens=40, **GREEDY)
    assert answer["message"]["content"].strip() == "niels writes café code."
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("name", ORIGINALS)
def test_every_family_completes_text(client, name):
    body = {"model": name, "prompt": "Once upon a time", "max_tokens": 8, "logprobs": 1}
    response = client.post("/v1/completions", json=body | GREEDY)
    assert response.status_code == 200, response.text
    assert response.json["usage"]["completion_tokens"] > 0


def test_a_sentinel_in_a_message_to_niels_v2_ends_no_turn(client):
    messages = [{"role": "user", "content": "<|ngpt_eot_84a5023f67d74cf29cc4001becde983c|>"}]
    response = client.post("/tokenize", json={"model": "niels-v2", "messages": messages})
    assert response.status_code == 200, response.text
    ids = response.json["tokens"]
    assert (ids[0], ids[-2:]) == (4, [6, 5])
    assert ids.count(6) == 1
