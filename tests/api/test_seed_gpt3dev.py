"""The GPT3dev API's document, section by section, and the recorded answers of both its revisions."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import httpx2
import openai
import pytest
from openai.types import Completion
from openai.types import Model as SdkModel

from tests.api.conftest import events
from tests.api.live import live
from tests.api.recordings import complaints, recording
from tests.fakes import FakeEngine, FakeLoader, fake_model, fake_spec, say
from tests.hub_server import HubServer
from tests.model_folders import model_files
from transformers_api.app import create_app
from transformers_api.config.settings import SettingError, Settings
from transformers_api.serving.models.builtin import builtin_models
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import HubSource

ROOT = Path(__file__).parent.parent.parent
ADDRESS = "http://localhost:8000"
HAIKU = " Swift bytes"
BASE_MODELS = [spec for spec in builtin_models() if spec.name.startswith("GPT3-dev")]

COMPLETION = """curl http://localhost:8000/v1/completions \\
  -H "Content-Type: application/json" \\
  -d '{
        "model": "GPT3-dev",
        "prompt": "Write a haiku about fast APIs",
        "max_tokens": 64
      }'"""
REGISTRY = """[
  {
    "name": "GPT3-dev-350m-2805",
    "hf_repo": "k050506koch/GPT3-dev-350m-2805",
    "dtype": "float16",
    "device": "auto",
    "max_context_tokens": 4096
  }
]"""


@pytest.fixture
def gpt3dev(serve):
    """Its base models, as they are built in, none of them loaded."""
    served = serve(specs=tuple(BASE_MODELS), default_model="GPT3-dev")
    for engine in served.engines.values():
        engine.reply = say(HAIKU)
    return served


@pytest.fixture
def server(gpt3dev):
    with live(gpt3dev.app, ADDRESS) as running:
        yield running


@pytest.fixture
def configured(tmp_path):
    """Make the whole application, without torch, from the environment of the document."""
    made = []

    def start(**environ):
        folders = {"MODEL_STORE": str(tmp_path / "store"), "HF_HOME": str(tmp_path / "hub")}
        settings = Settings.from_env({"PRELOAD_MODEL": "false", **folders, **environ})
        loader = FakeLoader(lambda spec: fake_model(spec, FakeEngine(say(HAIKU))))
        made.append(create_app(settings, loader))
        return made[-1].test_client()

    yield start
    for app in made:
        app.extensions["transformers_api"].drain(0.0)


def ids(client):
    return [model["id"] for model in client.get("/v1/models").get_json()["data"]]


# Features


def test_a_stream_is_in_openai_frames_and_ends_in_done(gpt3dev):
    stream = events(gpt3dev.complete("Hi", model="GPT3-dev", stream=True))
    assert stream.done
    assert stream.text() == HAIKU
    assert {chunk["object"] for chunk in stream.payloads} == {"text_completion"}
    assert len({chunk["id"] for chunk in stream.payloads}) == 1
    assert [reason for _, reason in stream.reasons()] == ["stop"]


def test_a_stream_reports_usage_where_it_is_asked_for(gpt3dev):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = events(gpt3dev.complete("Hi", model="GPT3-dev", **options))
    last = stream.payloads[-1]
    assert (last["choices"], last["usage"]["prompt_tokens"]) == ([], 2)


def test_models_are_loaded_at_their_first_use(gpt3dev):
    gpt3dev.client.get("/v1/models")
    assert gpt3dev.loader.calls == []
    gpt3dev.complete("Hi", model="GPT3-dev")
    gpt3dev.complete("Hi", model="GPT3-dev")
    assert gpt3dev.loader.count("load", "GPT3-dev") == 1


def test_usage_counts_the_models_own_tokens_and_never_more_than_were_asked_for(gpt3dev):
    usage = gpt3dev.complete("Hello", model="GPT3-dev", max_tokens=6).get_json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5, 6, 11)


def test_the_health_probe(server):
    assert json.loads(server.curl(f"curl {ADDRESS}/healthz")) == {"status": "ok"}


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (
            {"model": "nope", "prompt": "x"},
            404,
            {"type": "model_not_found", "param": "model", "code": "model_not_found"},
        ),
        ({"model": "GPT3-dev"}, 400, {"type": "invalid_request_error", "param": "prompt"}),
        (
            {"model": "GPT3-dev", "prompt": "x", "temperature": "hot"},
            400,
            {"type": "invalid_request_error", "param": "temperature"},
        ),
        (
            {"model": "GPT3-dev", "prompt": "x", "max_tokens": 5000},
            400,
            {"type": "invalid_request_error", "param": "max_tokens"},
        ),
    ],
)
def test_errors_are_openais(gpt3dev, body, status, error):
    answer = gpt3dev.client.post("/v1/completions", json=body)
    found = answer.get_json()["error"]
    assert answer.status_code == status
    assert found.keys() == {"message", "type", "param", "code"}
    assert {name: found[name] for name in error} == error


# Configuration


def test_the_documented_defaults_hold():
    settings = Settings.from_env({})
    assert settings.hf_token is None
    assert settings.default_device == "auto"
    assert settings.max_context_tokens == 2048
    assert settings.model_registry_path is None
    assert settings.model_allow_list == ()
    assert settings.enable_embeddings_backend is False
    assert settings.cors_allow_origins == ()


def test_every_documented_variable_is_read(tmp_path):
    settings = Settings.from_env(
        {
            "HF_TOKEN": "hf_x",
            "DEFAULT_DEVICE": "cuda",
            "MAX_CONTEXT_TOKENS": "1024",
            "MODEL_REGISTRY_PATH": str(tmp_path),
            "MODEL_ALLOW_LIST": "GPT3-dev, GPT3-dev-125m",
            "ENABLE_EMBEDDINGS_BACKEND": "True",
            "CORS_ALLOW_ORIGINS": "http://a.example,http://b.example",
        }
    )
    assert settings.hf_token == "hf_x"
    assert settings.default_device == "cuda"
    assert settings.max_context_tokens == 1024
    assert settings.model_registry_path == tmp_path
    assert settings.model_allow_list == ("GPT3-dev", "GPT3-dev-125m")
    assert settings.enable_embeddings_backend is True
    assert settings.cors_allow_origins == ("http://a.example", "http://b.example")


@pytest.mark.parametrize("origin", ["http://a.example", "http://b.example"])
def test_origins_come_separated_by_commas(configured, origin):
    client = configured(CORS_ALLOW_ORIGINS="http://a.example,http://b.example")
    answer = client.get("/v1/models", headers={"Origin": origin})
    assert answer.headers["Access-Control-Allow-Origin"] == origin
    other = client.get("/v1/models", headers={"Origin": "http://c.example"})
    assert "Access-Control-Allow-Origin" not in other.headers


def test_the_default_registry_can_be_left_empty_as_theirs_was(configured):
    client = configured(INCLUDE_DEFAULT_MODELS="false")
    listed = client.get("/v1/models").get_json()
    assert (listed["object"], listed["data"]) == ("list", [])


def test_the_default_registry_names_their_models(configured):
    listed = ids(configured())
    for name in ("", "-125m", "-125m-0104", "-125m-1202", "-125m-0612", "-350m-2805"):
        assert f"GPT3-dev{name}" in listed
    assert {"GPT4-dev-177M-1511", "GPT4-dev-177M-1511-Instruct"} <= set(listed)
    assert ModelRegistry.from_settings(Settings()).resolve("GPT-2").name == "gpt2"


def test_an_unknown_id_in_the_allow_list_stops_the_start(configured):
    with pytest.raises(SettingError, match=r"MODEL_ALLOW_LIST=GPT3-dev,nobody .* called nobody"):
        configured(MODEL_ALLOW_LIST="GPT3-dev,nobody")


def test_the_embeddings_backend_is_off_until_it_is_enabled(configured):
    assert configured().post("/v1/embeddings", json={}).status_code == 501
    enabled = configured(ENABLE_EMBEDDINGS_BACKEND="1")
    assert enabled.post("/v1/embeddings", json={}).status_code == 400


# Estimating Model Artifact Sizes


def test_the_size_report_asks_the_hub_for_each_registered_model(tmp_path):
    hub = HubServer({"k050506koch/GPT3-dev": model_files()})
    line = 'python scripts/model_size_report.py --token "$HF_TOKEN"'
    environ = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": "hf_x",
        "MODEL_ALLOW_LIST": "GPT3-dev",
        "PATH": os.environ["PATH"],
    }
    try:
        done = subprocess.run(
            ["sh", "-c", line.replace("python", shlex.quote(sys.executable), 1)],
            cwd=ROOT,
            env=environ,
            capture_output=True,
            text=True,
            timeout=40,
        )
    finally:
        hub.close()
    assert done.returncode == 0, done.stderr
    assert "GPT3-dev  k050506koch/GPT3-dev" in done.stdout
    assert f"{sum(map(len, model_files().values()))}.00 B" in done.stdout.splitlines()[-1]


# Split Deployments for Large Models


def test_deployments_of_one_code_serve_what_their_allow_lists_name(configured):
    small = configured(MODEL_ALLOW_LIST="GPT3-dev")
    large = configured(MODEL_ALLOW_LIST="GPT3-dev-350m-2805,GPT3-dev-125m")
    assert ids(small) == ["GPT3-dev"]
    assert set(ids(large)) == {"GPT3-dev-350m-2805", "GPT3-dev-125m"}
    asked = {"model": "GPT3-dev-125m", "prompt": "Hi"}
    assert small.post("/v1/completions", json=asked).status_code == 404
    assert large.post("/v1/completions", json=asked).status_code == 200


# Usage Examples


def test_listing_models(server):
    listed = json.loads(server.curl(f"curl {ADDRESS}/v1/models"))
    assert listed["object"] == "list"
    assert {spec.name for spec in BASE_MODELS} <= {model["id"] for model in listed["data"]}
    for model in listed["data"]:
        SdkModel.model_validate(model, strict=True)
        assert model["permission"] == []
        assert type(model["created"]) is int


def test_a_text_completion(server):
    answer = json.loads(server.curl(COMPLETION))
    Completion.model_validate(answer, strict=True)
    assert answer["model"] == "GPT3-dev"
    assert answer["choices"][0]["text"] == HAIKU
    assert answer["usage"]["total_tokens"] == len("Write a haiku about fast APIs") + len(HAIKU) + 1


@pytest.mark.parametrize("model", [spec.name for spec in BASE_MODELS])
@pytest.mark.parametrize("stream", [False, True])
def test_chat_is_refused_with_guidance_and_nothing_is_loaded_for_it(gpt3dev, model, stream):
    gpt3dev.loader.fail["prepare"] = AssertionError("a model was prepared")
    answer = gpt3dev.chat("Hi", model=model, stream=stream)
    assert answer.status_code == 501
    assert answer.get_json() == {
        "error": {
            "message": "Chat completions are currently disabled; please use /v1/completions "
            "instead.",
            "type": "not_implemented_error",
            "param": None,
            "code": "chat_completions_not_available",
        }
    }
    assert gpt3dev.loader.calls == []


def test_embeddings_are_refused_with_guidance(server):
    body = """curl http://localhost:8000/v1/embeddings -d '{"model": "GPT3-dev", "input": "x"}'"""
    assert json.loads(server.curl(body)) == {
        "error": {
            "message": "Embeddings backend is not configured. Set ENABLE_EMBEDDINGS_BACKEND=1 to "
            "enable.",
            "type": "not_implemented_error",
            "param": None,
            "code": "embeddings_backend_unavailable",
        }
    }


def test_their_client_demo(gpt3dev):
    transport = httpx2.WSGITransport(gpt3dev.app)
    client = openai.OpenAI(
        base_url="http://testserver/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx2.Client(transport=transport),
    )
    with client:
        assert "GPT3-dev-350m-2805" in [model.id for model in client.models.list()]
        answer = client.completions.create(
            model="GPT3-dev-350m-2805",
            prompt="he is a doctor. His main goal is",
            max_tokens=64,
            temperature=0.0,
        )
        assert answer.choices[0].text == HAIKU
        with pytest.raises(openai.InternalServerError) as caught:
            client.embeddings.create(model="GPT3-dev", input="x")
    assert caught.value.status_code == 501
    assert caught.value.body["code"] == "embeddings_backend_unavailable"


# Testing: what their own tests assert


def test_a_list_of_prompts_is_answered_in_order_and_counted_together(gpt3dev):
    gpt3dev.engines["GPT3-dev"].reply = lambda prompt, *_: [*prompt, *prompt]
    answer = gpt3dev.complete(["ab", "xyz"], model="GPT3-dev", n=2).get_json()
    texts = [(choice["index"], choice["text"]) for choice in answer["choices"]]
    assert texts == [(0, "abab"), (1, "abab"), (2, "xyzxyz"), (3, "xyzxyz")]
    assert answer["usage"]["prompt_tokens"] == 5


def test_details_of_a_model_have_its_metadata_and_the_list_has_none(gpt3dev):
    listed = gpt3dev.client.get("/v1/models").get_json()["data"]
    assert all("metadata" not in model for model in listed)
    metadata = gpt3dev.client.get("/v1/models/GPT3-dev").get_json()["metadata"]
    assert metadata["huggingface_repo"] == "k050506koch/GPT3-dev"
    assert {"description", "parameter_count", "max_context_tokens", "dtype", "default_device"} <= (
        metadata.keys()
    )


# Extending the Model Registry


def test_the_documented_registry_file_is_read_as_it_stands(configured, tmp_path):
    (tmp_path / "models.json").write_text(REGISTRY)
    client = configured(
        MODEL_REGISTRY_PATH=str(tmp_path / "models.json"), INCLUDE_DEFAULT_MODELS="false"
    )
    assert ids(client) == ["GPT3-dev-350m-2805"]
    metadata = client.get("/v1/models/GPT3-dev-350m-2805").get_json()["metadata"]
    assert metadata == {
        "huggingface_repo": "k050506koch/GPT3-dev-350m-2805",
        "dtype": "float16",
        "default_device": "auto",
        "max_context_tokens": 4096,
    }


def test_a_registry_file_extends_and_overrides_the_built_in_entries(configured, tmp_path):
    (tmp_path / "models.json").write_text(REGISTRY.replace("k050506koch", "somebody"))
    client = configured(MODEL_REGISTRY_PATH=str(tmp_path / "models.json"))
    assert ids(client).count("GPT3-dev-350m-2805") == 1
    assert "GPT3-dev" in ids(client)
    metadata = client.get("/v1/models/GPT3-dev-350m-2805").get_json()["metadata"]
    assert metadata["huggingface_repo"] == "somebody/GPT3-dev-350m-2805"


def test_the_file_may_hold_all_that_theirs_may(configured, tmp_path):
    told = {
        "description": "d",
        "parameter_count": "17M",
        "training_datasets": ["a"],
        "training_tokens": "1B",
        "training_steps": 5,
        "evaluation": {"x": 1},
        "notes": "n",
        "sources": ["s"],
    }
    entry = {"name": "m", "hf_repo": "a/b", "is_instruct": False, "metadata": told}
    (tmp_path / "models.yaml").write_text(json.dumps([entry]))  # JSON is YAML
    client = configured(MODEL_REGISTRY_PATH=str(tmp_path / "models.yaml"))
    assert told.items() <= client.get("/v1/models/m").get_json()["metadata"].items()


def test_the_built_in_entries_point_at_their_repositories():
    for spec in BASE_MODELS:
        assert spec.source == HubSource(f"k050506koch/{spec.name}")
        assert spec.chat == "off"


# Recorded answers

VALIDATION = "an error under /v1 is OpenAI's object with 400, as the document's features say"
USAGE_FRAME = "a stream has a usage event where stream_options ask for it, as OpenAI's do"
WRAPPED = "the later revision wrapped its own 400 in a 500"
BOTH = {
    6: (200, USAGE_FRAME),
    14: (400, VALIDATION),
    15: (400, VALIDATION),
}
# By recording: place of the request, our status, why it differs.
DIFFERENT = {
    "gpt3dev_doc": BOTH
    | {
        1: (200, "other documents promise the root"),
        3: (200, "the later revision describes single models"),
        4: (404, VALIDATION),
        17: (200, "chat works for instruct models, as in the later revision"),
        18: (200, "the same, streamed"),
    },
    "gpt3dev_head": BOTH
    | {
        11: (400, WRAPPED),
        12: (400, WRAPPED),
        16: (501, "the document says 501 for completion-only models"),
        18: (200, "the last delta is empty, as OpenAI's; theirs has explicit nulls"),
    },
}


@pytest.mark.parametrize("name", sorted(DIFFERENT))
def test_recorded_requests_are_answered_alike(serve, name):
    metadata = {"description": "d", "parameter_count": "17M", "huggingface_repo": "m/base"}
    base = fake_spec(
        "GPT3-dev",
        chat="off",
        dtype="float32",
        device="cpu",
        max_context_tokens=64,
        metadata=metadata,
    )
    served = serve(specs=(base, fake_spec("tiny-instruct")), default_model="GPT3-dev")
    for engine in served.engines.values():
        engine.max_model_len = 64
    found = {}
    for place, recorded in enumerate(recording(name)):
        status, differs = complaints(recorded, served.client)
        if differs:
            found[place] = (status, str(recorded), differs)
    assert {place: found[place] for place in found.keys() - DIFFERENT[name].keys()} == {}
    assert {place: status for place, (status, *_) in found.items()} == {
        place: status for place, (status, _) in DIFFERENT[name].items()
    }
