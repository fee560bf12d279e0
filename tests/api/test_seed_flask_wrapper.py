"""The Flask wrapper's document, section by section: its curl lines as they stand."""

from __future__ import annotations

import json
import threading

import pytest

from tests.api.live import live
from tests.api.recordings import frames
from tests.fakes import FakeEngine
from transformers_api.config.settings import Settings
from transformers_api.serving.models.builtin import builtin_models

ADDRESS = "http://your-server:5000"


@pytest.fixture
def wrapper(serve):
    """Every built-in model; nothing is in memory, as after the original's start."""
    return serve(specs=builtin_models(), default_model="gpt2")


@pytest.fixture
def server(wrapper):
    with live(wrapper.app, ADDRESS) as running:
        yield running


# User Workflow and API Usage


def test_1_list_available_models(server):
    listed = json.loads(server.curl("curl http://your-server:5000/v1/models"))
    assert listed["object"] == "list"
    ids = {model["id"] for model in listed["data"]}
    for name in (
        "microsoft/DialoGPT-small",
        "microsoft/DialoGPT-medium",
        "microsoft/DialoGPT-large",
        "distilgpt2",
        "gpt2",
        "gpt2-medium",
        "gpt2-large",
        "facebook/opt-1.3b",
    ):
        assert name in ids


CHAT = r"""curl -X POST http://your-server:5000/v1/chat/completions \
  -H "Content-Type: application/json" \
  -d '{
    "model": "microsoft/DialoGPT-small",
    "messages": [
      {"role": "user", "content": "Hello, how are you?"}
    ],
    "max_tokens": 150,
    "temperature": 0.7
  }'"""

COMPLETION = r"""curl -X POST http://your-server:5000/v1/completions \
  -H "Content-Type: application/json" \
  -d '{
    "model": "gpt2",
    "prompt": "The future of AI is",
    "max_tokens": 100,
    "temperature": 0.7
  }'"""


def test_2_chat_completion_loads_the_model(server, wrapper):
    body = json.loads(server.curl(CHAT))
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"]
    assert wrapper.swapper.status().model == "microsoft/DialoGPT-small"


def test_3_text_completion_loads_the_model(server, wrapper):
    body = json.loads(server.curl(COMPLETION))
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"]
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert wrapper.swapper.status().model == "gpt2"


SWITCHES = (
    r"""curl -X POST http://your-server:5000/v1/chat/completions \
  -H "Content-Type: application/json" \
  -d '{"model": "microsoft/DialoGPT-small", "messages": [{"role": "user", "content": "Hi"}]}'""",
    r"""curl -X POST http://your-server:5000/v1/completions \
  -H "Content-Type: application/json" \
  -d '{"model": "gpt2", "prompt": "Hello world"}'""",
)


def test_4_switch_models_seamlessly_one_in_memory_at_a_time(server, wrapper):
    for command, model in zip(SWITCHES, ("microsoft/DialoGPT-small", "gpt2"), strict=True):
        assert json.loads(server.curl(command))["model"] == model
        assert json.loads(server.curl(f"curl {ADDRESS}/health"))["models_loaded"] == [model]
    assert wrapper.loader.loaded[0].engine.closed.is_set()  # cleared when the next one came


def test_a_switch_never_frees_a_model_in_use(wrapper):
    gate = threading.Semaphore(1)
    engine = wrapper.engines["gpt2"] = FakeEngine(gate=gate)
    running = wrapper.client.post(
        "/v1/completions", json={"model": "gpt2", "prompt": "Hi", "stream": True}
    )
    chunks = running.iter_encoded()
    first = next(chunks)
    switched = []
    other = wrapper.app.test_client()
    thread = threading.Thread(
        target=lambda: switched.append(other.post("/load_model", json={"model_name": "distilgpt2"}))
    )
    thread.start()
    assert wrapper.loader.entered["check_memory"].acquire(timeout=30)
    assert not engine.closed.is_set()
    gate.release(1000)
    assert (first + b"".join(chunks)).endswith(b"data: [DONE]\n\n")
    running.close()
    thread.join(30)
    assert switched[0].status_code == 200


def test_5_health_check(server, wrapper):
    body = json.loads(server.curl("curl http://your-server:5000/health"))
    assert (body["model_loaded"], body["current_model"]) == (False, None)
    wrapper.swapper.load("gpt2")
    body = json.loads(server.curl("curl http://your-server:5000/health"))
    assert (body["status"], body["model_loaded"], body["current_model"]) == (
        "healthy",
        True,
        "gpt2",
    )
    assert body["cuda_available"] is False
    assert {"platform", "python", "cpu_count"} <= body["system"].keys()  # "basic system info"


# Features


def test_streaming_sends_the_tokens_as_they_come(wrapper):
    messages = [{"role": "user", "content": "hello"}]
    response = wrapper.client.post(
        "/v1/chat/completions", json={"model": "gpt2", "messages": messages, "stream": True}
    )
    *chunks, last = frames(response.get_data(as_text=True))
    response.close()
    assert last == "[DONE]"
    assert len(chunks) > 5
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_the_native_routes_of_its_code_are_there(wrapper):
    loaded = wrapper.client.post("/load_model", json={"model_name": "gpt2"}).get_json()
    assert loaded == {
        "message": "Model gpt2 loaded successfully",
        "model_name": "gpt2",
        "task": "text-generation",
    }
    fields = {"model": "gpt2", "prompt": "hi", "max_length": 4, "temperature": 0}
    body = wrapper.client.post("/generate", json=fields).get_json()
    assert {"generated_text", "prompt", "model"} <= body.keys()
    assert (body["prompt"], body["model"], body["tokens_generated"]) == ("hi", "gpt2", 4)


def test_temperature_zero_is_greedy(wrapper):
    fields = {"model": "gpt2", "prompt": "Hello world", "temperature": 0}
    assert wrapper.client.post("/v1/completions", json=fields).status_code == 200
    assert wrapper.engines["gpt2"].submitted[-1][0].params.temperature == 0


def test_a_load_that_fails_leaves_the_server_working(wrapper):
    wrapper.client.post("/load_model", json={"model_name": "gpt2"})
    wrapper.loader.fail["prepare", "distilgpt2"] = RuntimeError("no files")
    failed = wrapper.client.post("/v1/completions", json={"model": "distilgpt2", "prompt": "Hi"})
    assert failed.status_code == 503
    assert wrapper.swapper.status().model == "gpt2"
    assert wrapper.client.post("/load_model", json={"model_name": "gpt2-medium"}).status_code == 200


# Environment Variables


def test_the_environment_names_the_cache():
    settings = Settings.from_env(
        {
            "CUDA_VISIBLE_DEVICES": "0",
            "TRANSFORMERS_CACHE": "/path/to/cache",
            "FLASK_ENV": "production",
        }
    )
    assert str(settings.hub_cache) == "/path/to/cache"  # it names the hub folder itself
    assert settings.port == 5000
