"""simple_llm_host's document, section by section: its curl lines and programs as they stand."""

from __future__ import annotations

import json

import pytest

from tests.api.live import live
from tests.fakes import say
from transformers_api.config.settings import Settings
from transformers_api.serving.models.builtin import builtin_models

ADDRESS = "http://localhost:8000"
HELLO = "Hello! How may I help?"
TABLE = (
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "distilgpt2",
    "EleutherAI/gpt-neo-125m",
    "EleutherAI/gpt-neo-1.3B",
)


@pytest.fixture
def host(serve):
    served = serve(specs=builtin_models(), default_model="gpt2")
    for engine in served.engines.values():
        engine.reply = say(HELLO)
    return served


@pytest.fixture
def server(host):
    with live(host.app, ADDRESS) as running:
        yield running


# API Documentation


@pytest.mark.parametrize("page", ["docs", "redoc"])
def test_the_pages_of_the_documentation_are_there(server, page):
    assert "<html" in server.curl(f"curl http://localhost:8000/{page}")


def test_the_root_names_the_endpoints(host):
    body = host.client.get("/").get_json()
    assert {"name", "version"} <= body.keys()
    assert body["endpoints"]["docs"] == "/docs"
    assert body["endpoints"]["openapi"] == "/openapi.json"
    assert body["endpoints"]["models"] == "/v1/models"
    assert body["endpoints"]["chat"] == "/v1/chat/completions"


# API Usage

LOAD = r"""curl -X POST "http://localhost:8000/v1/models" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "gpt2",
    "device": "cpu"
  }'"""

CHAT = r"""curl -X POST "http://localhost:8000/v1/chat/completions" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "gpt2",
    "messages": [
      {"role": "system", "content": "You are a helpful assistant."},
      {"role": "user", "content": "What is AI?"}
    ],
    "max_tokens": 100,
    "temperature": 0.7
  }'"""


def test_the_four_steps_load_list_chat_unload(server, host):
    loaded = json.loads(server.curl(LOAD))
    assert (loaded["id"], loaded["object"], loaded["status"]) == ("gpt2", "model", "loaded")
    assert (loaded["device"], loaded["owned_by"]) == ("cpu", "huggingface")
    assert json.loads(server.curl(LOAD))["status"] == "already_loaded"

    listed = json.loads(server.curl("curl http://localhost:8000/v1/models"))["data"]
    assert [model["id"] for model in listed if model["loaded"]] == ["gpt2"]

    answer = json.loads(server.curl(CHAT))
    assert answer["choices"][0]["message"] == {
        "role": "assistant",
        "content": HELLO,
        "refusal": None,
    }
    assert answer["usage"]["completion_tokens"] >= len(HELLO)  # the model's tokens, not words

    gone = json.loads(server.curl('curl -X DELETE "http://localhost:8000/v1/models/gpt2"'))
    assert gone == {"id": "gpt2", "object": "model", "deleted": True}
    assert host.swapper.status().model is None


def test_the_documented_defaults_of_chat(host):
    messages = [{"role": "user", "content": "What is AI?"}]
    host.client.post("/v1/chat/completions", json={"model": "gpt2", "messages": messages})
    params = host.engines["gpt2"].submitted[-1][0].params
    assert (params.max_tokens, params.temperature, params.top_p) == (512, 0.7, 0.9)


# Python Client Example

PYTHON = """
import requests

# Load model
requests.post("http://localhost:8000/v1/models",
    json={"model": "gpt2", "device": "cpu"})

# Chat completion
response = requests.post("http://localhost:8000/v1/chat/completions",
    json={
        "model": "gpt2",
        "messages": [
            {"role": "user", "content": "Hello!"}
        ],
        "max_tokens": 50
    })

print(response.json()["choices"][0]["message"]["content"])
"""


def test_the_python_example_runs(server):
    assert server.python(PYTHON) == f"{HELLO}\n"


# Recommended Models


def test_the_recommended_models_can_be_asked_for_and_unloaded(host):
    for name in TABLE:
        assert host.client.post("/v1/models", json={"model": name}).get_json()["id"] == name
        assert host.client.delete(f"/v1/models/{name}").get_json()["deleted"] is True


# OpenAI SDK Compatibility

SDK = """
from openai import OpenAI

client = OpenAI(
    base_url="http://localhost:8000/v1",
    api_key="not-needed"  # API key not required
)

response = client.chat.completions.create(
    model="gpt2",
    messages=[
        {"role": "user", "content": "Hello!"}
    ]
)

print(response.choices[0].message.content)
"""


def test_the_sdk_example_runs(server):
    assert server.python(SDK) == f"{HELLO}\n"


# Environment Variables


def test_hf_home_is_the_cache_folder(serve):
    assert str(Settings.from_env({"HF_HOME": "/path/to/cache"}).hf_home) == "/path/to/cache"
    # The key is there for whoever reads it; the folder is the operator's.
    assert serve().client.get("/health").get_json()["cache_dir"] is None


# GPU Support and Troubleshooting: no content type

ON_CPU = r"""curl -X POST "http://localhost:8000/v1/models" \
  -d '{"model": "gpt2", "device": "cpu"}'"""
ON_GPU = r"""curl -X POST "http://localhost:8000/v1/models" \
  -d '{"model": "gpt2", "device": "cuda"}'"""
SMALLER = r"""curl -X POST "http://localhost:8000/v1/models" \
  -d '{"model": "distilgpt2", "device": "cpu"}'"""


def test_a_device_may_be_named_without_a_content_type(server, host):
    assert json.loads(server.curl(ON_CPU))["status"] == "loaded"
    assert json.loads(server.curl(SMALLER))["id"] == "distilgpt2"
    assert host.swapper.status().model == "distilgpt2"


def test_a_gpu_that_is_not_there_is_a_clear_error(server, host):
    error = json.loads(server.curl(ON_GPU))["error"]
    assert error["param"] == "device"
    assert "cuda" in error["message"]
    assert host.swapper.status().model is None
