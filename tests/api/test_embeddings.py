"""POST /v1/embeddings: by fakes to the letter, by the SDK, and whole with the embedded encoder."""

from __future__ import annotations

import base64
import json
import struct
from dataclasses import replace

import httpx2
import openai
import pytest
import torch
from openai.types import CreateEmbeddingResponse

from tests import tokenizers
from tests.fakes import FakeEngine, FakeLoader, fake_model, fake_spec
from transformers_api import model_loader
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import GIB, Settings
from transformers_api.serving.embeddings import EmbeddingModels, EncoderRegistry
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.swapper import Swapper

OFF = {
    "error": {
        "message": "Embeddings backend is not configured. Set ENABLE_EMBEDDINGS_BACKEND=1 to enable.",
        "type": "not_implemented_error",
        "param": None,
        "code": "embeddings_backend_unavailable",
    }
}
MINILM = "all-minilm-l6-v2"


class ThreeNumbers:
    """(tokens, first id, dimensions asked for) of each row."""

    dimensions = 3
    slice_tokens = 16

    def embed(self, rows, dimensions=None, normalize=None):
        return [struct.pack("<3f", len(row), row[0], dimensions or 0) for row in rows]


@pytest.fixture
def embedding(serve):
    """An application with the encoder "vectors" and the writer "fake"."""
    yield from with_encoder(serve)


def with_encoder(serve, **facts):
    """An application whose encoder "vectors" has ``facts``."""
    served = serve(specs=(fake_spec("vectors", embedding="encoder"),))
    known = served.services

    def build(spec):
        return fake_model(
            spec, FakeEngine(max_model_len=32), **{"embedder": ThreeNumbers(), **facts}
        )

    encoders = Swapper(
        EncoderRegistry(known.registry),
        FakeLoader(build),
        SwapRules(swap_after_s=0, drain_s=10),
        wait_s=10,
    )
    models = EmbeddingModels(known.registry, known.swapper, encoders, 4)
    served.app.extensions[EXTENSION] = replace(known, embeddings=models)
    yield served
    encoders.close()


def ask(served, input, **fields):
    return served.client.post("/v1/embeddings", json={"model": "vectors", "input": input, **fields})


def vectors(response):
    assert response.status_code == 200, response.get_data(as_text=True)
    body = response.get_json()
    CreateEmbeddingResponse.model_validate(body, strict=True)
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    return [item["embedding"] for item in body["data"]]


@pytest.mark.parametrize(
    "request_",
    [
        {"json": {"model": "fake", "input": "x"}},
        {"json": {"model": 5}},
        {"json": []},
        {"data": b"not JSON"},
        {"data": b""},
    ],
)
def test_without_a_backend_any_body_gets_the_documented_501(served, request_):
    answer = served.client.post("/v1/embeddings", **request_)
    assert (answer.status_code, answer.get_json()) == (501, OFF)


def test_a_text_becomes_a_vector_with_its_usage(embedding):
    body = ask(embedding, "Hello").get_json()
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": 0, "embedding": [5.0, 72.0, 0.0]}],
        "model": "vectors",
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        pytest.param(["Hello", "A"], [[5, 72, 0], [1, 65, 0]], id="texts"),
        pytest.param([7, 8], [[2, 7, 0]], id="ids"),
        pytest.param([[9, 9, 9], [4]], [[3, 9, 0], [1, 4, 0]], id="lists of ids"),
    ],
)
def test_every_form_of_input_is_answered_in_order(embedding, given, wanted):
    assert vectors(ask(embedding, given)) == wanted


def test_base64_holds_the_same_numbers(embedding):
    (text,) = vectors_as_text(ask(embedding, "Hello", encoding_format="base64"))
    assert struct.unpack("<3f", base64.b64decode(text)) == (5, 72, 0)


def vectors_as_text(response):
    assert response.status_code == 200, response.get_data(as_text=True)
    return [item["embedding"] for item in response.get_json()["data"]]


@pytest.mark.parametrize(
    ("fields", "vector"),
    [
        ({"truncate_prompt_tokens": 2}, [2, 72, 0]),
        ({"truncate_prompt_tokens": 2, "truncation_side": "left"}, [2, 108, 0]),
        ({"truncate_prompt_tokens": 2, "input": [1, 2, 3]}, [2, 1, 0]),
        ({"truncate_prompt_tokens": -1, "input": "x" * 40}, [32, 120, 0]),
        ({"embed_dtype": "float32", "endianness": "little", "normalize": True}, [5, 72, 0]),
        ({"prompt": "Hello", "input": None}, [5, 72, 0]),
    ],
)
def test_fields_of_other_servers_are_understood(embedding, fields, vector):
    assert vectors(ask(embedding, **{"input": "Hello", **fields})) == [vector]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embed_dtype", "float16"),
        ("endianness", "big"),
        ("messages", [{"role": "user", "content": "x"}]),
        ("truncate", True),
        ("use_activation", False),
        ("embd_normalize", -1),
        ("options", {"num_ctx": 5}),
        ("add_special_tokens", False),
    ],
)
def test_fields_that_would_change_vectors_are_refused_by_name(embedding, name, value):
    body = ask(embedding, "Hello", **{name: value}).get_json()["error"]
    assert (body["param"], body["code"]) == (name, "unsupported_parameter")


def test_dimensions_reach_the_model(embedding):
    assert vectors(ask(embedding, "Hello", dimensions=3)) == [[5, 72, 3]]


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"input": ""}, 400, "input", None),
        ({"input": []}, 400, "input", None),
        ({"input": ["a", ""]}, 400, "input[1]", None),
        ({"input": [[]]}, 400, "input[0]", None),
        ({"input": [1, "a"]}, 400, "input[1]", None),
        ({"input": [-1]}, 400, "input[0]", None),
        ({"input": {"text": "a"}}, 400, "input", None),
        ({"input": None}, 400, "input", None),
        ({"input": ["a"] * 2049}, 400, "input", None),
        ({"input": [300]}, 400, "input", None),
        ({"input": "x" * 33}, 400, "input", "context_length_exceeded"),
        ({"input": ["x", "x" * 33]}, 400, "input[1]", "context_length_exceeded"),
        ({"dimensions": 4}, 400, "dimensions", None),
        ({"dimensions": 0}, 400, "dimensions", None),
        ({"encoding_format": "hex"}, 400, "encoding_format", None),
        ({"model": None}, 400, "model", None),
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"model": "fake"}, 400, "model", "model_not_capable"),
        ({"input": "x" * (1 << 20) + "x"}, 413, "input", "payload_too_large"),
    ],
)
def test_what_is_wrong_is_named(embedding, fields, status, param, code):
    answer = embedding.client.post(
        "/v1/embeddings", json={"model": "vectors", "input": "x", **fields}
    )
    error = answer.get_json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)


def sdk_of(app):
    http = httpx2.Client(transport=httpx2.WSGITransport(app))
    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http
    )


@pytest.mark.parametrize(
    "format_", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}]
)
def test_the_sdk_reads_the_answer(embedding, format_):
    with sdk_of(embedding.app) as client:
        answer = client.embeddings.create(model="vectors", input=["Hello", "A"], **format_)
    given = [item.embedding for item in answer.data]
    if format_.get("encoding_format") == "base64":  # asked for by name, it is left as it came
        given = [list(struct.unpack("<3f", base64.b64decode(text))) for text in given]
    assert given == [[5, 72, 0], [1, 65, 0]]
    assert answer.usage.total_tokens == 6


def test_an_encoder_in_memory_is_listed_as_loaded_and_can_be_unloaded(embedding):
    def loaded():
        data = embedding.client.get("/v1/models").get_json()["data"]
        return {model["id"] for model in data if model["loaded"]}

    assert embedding.client.delete("/v1/models/vectors").status_code == 404
    embedding.client.post("/v1/models", json={"model": "fake"})
    ask(embedding, "Hello")
    assert loaded() == {"fake", "vectors"}
    assert embedding.client.delete("/v1/models/vectors").status_code == 200
    assert loaded() == {"fake"}
    assert embedding.client.delete("/v1/models/vectors").status_code == 404


def test_the_document_describes_the_route(embedding):
    document = embedding.client.get("/openapi.json").get_json()
    assert set(document["paths"]["/v1/embeddings"]["post"]["responses"]) >= {"200", "400", "501"}


# The whole application


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a random causal model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = tokenizers.byte_level()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=4, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("models")
    entries = [
        {"name": "pooled", "path": str(tiny), "embedding": {"pooling": "mean"}},
        {"name": "writer", "path": str(tiny)},
    ]
    (folder / "models.json").write_text(json.dumps(entries))
    app = create_app(
        Settings(
            preload_model=False,
            enable_embeddings_backend=True,
            model_registry_path=folder / "models.json",
            model_store=folder,
            hf_home=folder,
            allow_download=False,
            torch_threads=1,
            max_inflight=2,
            kv_cache_gib=0.01,
        )
    )
    yield app
    app.extensions[EXTENSION].drain(0.0)


@pytest.fixture
def client(whole):
    with sdk_of(whole) as client:
        yield client


def resident(app):
    return app.extensions[EXTENSION].swapper.status().model


def encoder(app):
    return app.extensions[EXTENSION].embeddings.encoder


def embedded(client, texts, model=MINILM, **fields):
    answer = client.embeddings.create(model=model, input=texts, **fields)
    return torch.tensor([item.embedding for item in answer.data])


def test_the_embedded_encoder_knows_what_texts_have_in_common(client):
    cat, kitten, market = embedded(
        client, ["A cat sleeps.", "A kitten naps.", "The stock market fell."]
    )
    assert torch.dot(cat, kitten) > 0.6 > 0.2 > torch.dot(cat, market)
    assert cat.shape == (384,)
    assert cat.norm().item() == pytest.approx(1, abs=1e-5)


def test_the_embedded_encoder_agrees_with_transformers_alone_and_in_company(client, whole):
    from transformers import AutoModel, AutoTokenizer

    known = whole.extensions[EXTENSION]
    folder = known.store.locate(known.registry.resolve(MINILM))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    texts = ["Short.", "A somewhat longer sentence, with a comma.", "word " * 120]
    wanted = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
            wanted.append(torch.nn.functional.normalize(hidden.mean(1), dim=1))
    together = embedded(client, texts)
    torch.testing.assert_close(together, torch.cat(wanted), atol=1e-5, rtol=0)
    alone = torch.cat([embedded(client, [text]) for text in texts])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    ids = [tokenizer(text)["input_ids"] for text in texts]
    torch.testing.assert_close(together, embedded(client, ids), atol=1e-5, rtol=0)


def test_fewer_dimensions_have_length_one(client):
    whole_vector, cut = (embedded(client, ["Hi"], **f)[0] for f in ({}, {"dimensions": 64}))
    wanted = torch.nn.functional.normalize(whole_vector[:64], dim=0)
    torch.testing.assert_close(cut, wanted, atol=1e-5, rtol=0)


def test_the_encoder_and_the_resident_model_leave_each_other_alone(client, whole):
    client.completions.create(model="writer", prompt="Hi", max_tokens=1)
    embedded(client, ["Hi"])
    assert resident(whole) == "writer"
    with pytest.raises(openai.BadRequestError, match="does not generate text"):
        client.completions.create(model=MINILM, prompt="Hi")
    assert resident(whole) == "writer"


def test_a_causal_model_embeds_with_its_hidden_states(client, whole, tiny):
    from transformers import AutoModel

    text = "Once upon a time, in a long and winding sentence, " * 8  # longer than a slice
    (vector,) = embedded(client, [text], model="pooled")
    assert resident(whole) == "pooled"
    model = AutoModel.from_pretrained(tiny)
    with torch.inference_mode():
        hidden = model(torch.tensor([list(text.encode())])).last_hidden_state
    wanted = torch.nn.functional.normalize(hidden[0].mean(0), dim=0)
    torch.testing.assert_close(vector, wanted, atol=1e-5, rtol=0)
    assert client.completions.create(model="pooled", prompt="Hi", max_tokens=2).usage


def test_the_encoder_goes_when_a_model_needs_its_memory(client, whole, monkeypatch):
    embedded(client, ["Hi"])
    assert encoder(whole) == MINILM
    whole.extensions[EXTENSION].swapper.evict()  # so that its memory is not counted on
    # before and after the encoder has gone
    monkeypatch.setattr(model_loader, "available_bytes", lambda _: 0 if encoder(whole) else GIB)
    client.completions.create(model="pooled", prompt="Hi", max_tokens=1)
    assert encoder(whole) is None
    assert resident(whole) == "pooled"


def test_an_encoder_that_does_not_fit_is_refused(client, whole, monkeypatch):
    whole.extensions[EXTENSION].embeddings.give_back(0)
    monkeypatch.setattr(model_loader, "available_bytes", lambda device: 1 << 20)
    with pytest.raises(openai.InternalServerError) as caught:
        embedded(client, ["Hi"])
    assert caught.value.body["code"] == "insufficient_memory"
    monkeypatch.undo()
    embedded(client, ["Hi"])


@pytest.mark.parametrize("text", ["Hi", "é", "two words"])
def test_ollamas_older_route_has_the_vector_of_its_newer_one(embedding, text):
    newer = embedding.client.post("/api/embed", json={"model": "vectors", "input": text})
    older = embedding.client.post("/api/embeddings", json={"model": "vectors", "prompt": text})
    assert older.status_code == 200, older.json
    assert older.json == {"embedding": newer.json["embeddings"][0]}
