"""The TinyGPT service's document, section by section: its curl lines and programs as they stand."""

from __future__ import annotations

import json
import re
import threading
import time

import pytest

import api_client
from tests.api.live import live
from tests.fakes import FakeEngine, say
from transformers_api.config.settings import Settings
from transformers_api.errors import EngineFailed
from transformers_api.serving.models.builtin import builtin_models

ADDRESS = "http://localhost:8000"
STORY = ", there was a brave little mouse..."


@pytest.fixture
def tinygpt(serve):
    """Both documented models; tinygpt is in memory, as after their start."""
    specs = tuple(spec for spec in builtin_models() if spec.name in ("tinygpt", "tinygpt-moe"))
    served = serve(specs=specs, default_model="tinygpt")
    for name in ("tinygpt", "tinygpt-moe"):
        served.engines[name].reply = say(STORY)
    served.swapper.load("tinygpt")
    return served


@pytest.fixture
def server(tinygpt):
    with live(tinygpt.app, ADDRESS) as running:
        yield running


def wait_until_loaded(tinygpt, name):
    deadline = time.monotonic() + 30
    while tinygpt.swapper.status().model != name:
        assert time.monotonic() < deadline
        time.sleep(0.005)  # polling, with a deadline


# API Endpoints


def test_the_root_has_information_and_links(server):
    body = json.loads(server.curl(f"curl {ADDRESS}/"))
    assert {"message", "version"} <= body.keys()
    assert (body["documentation"], body["health"]) == ("/docs", "/health")
    assert "swagger" in server.curl(f"curl {ADDRESS}/docs").lower()
    assert "/generate" in json.loads(server.curl(f"curl {ADDRESS}/openapi.json"))["paths"]


def test_health_is_as_documented(server):
    body = json.loads(server.curl(f"curl {ADDRESS}/health"))
    assert body["status"] == "healthy"
    assert body["models_loaded"] == ["tinygpt"]  # one model is in memory at a time
    assert isinstance(body["total_models"], int)
    assert re.fullmatch(r"\d+h \d+m \d+s", body["uptime"])


def test_the_list_of_models_is_as_documented(server):
    models = json.loads(server.curl(f"curl {ADDRESS}/models"))
    documented = {
        "name": "tinygpt",
        "description": "Standard 51M parameter GPT model for general story generation",
        "parameters": "51M",
        "loaded": True,
        "config": {
            "vocab_size": 50304,
            "block_size": 512,
            "n_embd": 512,
            "n_head": 8,
            "n_layer": 8,
        },
    }
    assert documented in models
    assert "tinygpt-moe" in [model["name"] for model in models]


# Model Management


def test_a_model_is_loaded_in_the_background_and_unloaded(server, tinygpt):
    hold = tinygpt.loader.hold["load"] = threading.Event()
    said = server.curl("curl -X POST http://localhost:8000/models/tinygpt-moe/load")
    assert json.loads(said) == {"message": "Loading model 'tinygpt-moe' in background"}
    hold.set()
    wait_until_loaded(tinygpt, "tinygpt-moe")
    said = server.curl("curl -X DELETE http://localhost:8000/models/tinygpt-moe/unload")
    assert json.loads(said) == {"message": "Model 'tinygpt-moe' unloaded successfully"}
    assert json.loads(server.curl(f"curl {ADDRESS}/health"))["status"] == "degraded"


# Text Generation

REQUEST = {
    "prompt": "Once upon a time",
    "model": "tinygpt",
    "max_new_tokens": 100,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.95,
    "word_repetition_penalty": 1.0,
}


def test_generate_answers_as_documented(tinygpt):
    body = tinygpt.client.post("/generate", json=REQUEST).get_json()
    assert body["generated_text"] == f"Once upon a time{STORY}"
    assert (body["prompt"], body["model_used"]) == ("Once upon a time", "tinygpt")
    assert body["tokens_generated"] == len(STORY)
    assert isinstance(body["generation_time"], float)
    assert isinstance(body["tokens_per_second"], float)
    assert body["parameters"] == {
        "max_new_tokens": 100,
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.95,
        "word_repetition_penalty": 1.0,
    }


def test_the_documented_values_are_the_defaults(tinygpt):
    whole = tinygpt.client.post("/generate", json=REQUEST).get_json()
    short = tinygpt.client.post("/generate", json={"prompt": REQUEST["prompt"]}).get_json()
    assert short["parameters"] == whole["parameters"]
    assert short["model_used"] == whole["model_used"]


# Usage Examples

PYTHON = """
import requests

# Generate text
response = requests.post("http://localhost:8000/generate", json={
    "prompt": "The dragon flew over",
    "model": "tinygpt-moe",
    "max_new_tokens": 80,
    "temperature": 0.8
})

result = response.json()
print(f"Generated: {result['generated_text']}")
"""

JAVASCRIPT = """
const response = await fetch("http://localhost:8000/generate", {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({
    prompt: "In a magical forest",
    model: "tinygpt-moe",
    max_new_tokens: 100,
    temperature: 0.8,
  }),
});

const result = await response.json();
console.log(result.generated_text);
"""

CURL = r"""curl -X POST http://localhost:8000/generate \
  -H "Content-Type: application/json" \
  -d '{
    "prompt": "A brave knight",
    "model": "tinygpt",
    "max_new_tokens": 50,
    "temperature": 0.7
  }'"""


def test_the_python_client_runs(server):
    assert server.python(PYTHON) == f"Generated: The dragon flew over{STORY}\n"


def test_the_javascript_runs(server):
    assert server.node(JAVASCRIPT) == f"In a magical forest{STORY}\n"


def test_the_curl_examples_run(server):
    assert json.loads(server.curl("curl http://localhost:8000/health"))["status"] == "healthy"
    assert json.loads(server.curl("curl http://localhost:8000/models"))
    body = json.loads(server.curl(CURL))
    assert body["generated_text"] == f"A brave knight{STORY}"
    assert body["parameters"]["max_new_tokens"] == 50


# Configuration


def test_the_environment_names_the_address():
    settings = Settings.from_env({"HOST": "0.0.0.0", "PORT": "8000", "PYTHONPATH": "/app"})
    assert (settings.host, settings.port) == ("0.0.0.0", 8000)


# Performance: Batch Requests


def test_requests_are_processed_in_batches(tinygpt):
    prompts = ["Once upon a time", "A brave knight"]
    body = tinygpt.client.post("/generate", json={"prompt": prompts}).get_json()
    assert body["generated_text"] == [prompt + STORY for prompt in prompts]
    assert [len(submit) for submit in tinygpt.engines["tinygpt"].submitted] == [2]


# Error Handling


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (REQUEST, 200),
        (REQUEST | {"temperature": 5}, 400),
        (REQUEST | {"top_p": "high"}, 400),
        (REQUEST | {"prompt": ""}, 400),
        (REQUEST | {"model": "invalid-model"}, 404),
    ],
)
def test_status_codes_are_those_of_the_table(tinygpt, body, status):
    response = tinygpt.client.post("/generate", json=body)
    assert response.status_code == status
    if status != 200:
        assert isinstance(response.get_json()["detail"], str)


def test_an_error_looks_as_documented(tinygpt):
    body = REQUEST | {"model": "invalid-model"}
    assert tinygpt.client.post("/generate", json=body).get_json() == {
        "detail": "Model 'invalid-model' not found"
    }


def test_a_model_that_is_not_loaded_is_503_where_requests_load_none(serve):
    specs = tuple(spec for spec in builtin_models() if spec.name == "tinygpt")
    served = serve(specs=specs, auto_load=False)
    response = served.client.post("/generate", json=REQUEST)
    assert response.status_code == 503
    assert response.get_json() == {"detail": "Model 'tinygpt' is not loaded"}


def test_a_failure_of_the_server_is_500(serve):
    served = serve(FakeEngine(error=EngineFailed("The engine could not finish this step")))
    response = served.client.post("/generate", json={"prompt": "Once"})
    assert response.status_code == 500
    assert response.get_json() == {"detail": "The engine could not finish this step"}


# Monitoring


def test_monitoring_tells_status_uptime_and_memory(server):
    body = json.loads(server.curl("curl http://localhost:8000/health"))
    assert body["memory"]["model_bytes"] == 1000
    assert {"status", "uptime"} <= body.keys()


def test_loads_generations_and_errors_are_logged(tinygpt, caplog):
    with caplog.at_level("INFO", "transformers_api"):
        tinygpt.client.post("/generate", json=REQUEST | {"model": "tinygpt-moe"})
        tinygpt.client.delete("/models/tinygpt-moe/unload")
        tinygpt.loader.fail["load"] = RuntimeError("no weights")
        tinygpt.client.post("/generate", json=REQUEST)
    for event in (
        r"Loaded tinygpt-moe in ",
        r"tinygpt-moe: \d+ tokens in [\d.]+ s \([\d.]+/s\)",
        r"Evicted tinygpt-moe",
        r"Model tinygpt failed: .*no weights",
    ):
        assert re.search(event, caplog.text), event


# Support: "Use the example client: `python api_client.py`"


def test_the_example_client_talks_to_the_service(server, capsys):
    assert api_client.main(["--base-url", server.url, "--demo"]) == 0
    shown = capsys.readouterr().out
    assert "tinygpt-moe: 85M parameter" in shown
    assert STORY in shown
