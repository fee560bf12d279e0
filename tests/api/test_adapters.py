"""Adapters over HTTP: an entry each, one resident base, told by name everywhere."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests import lora, tokenizers
from tests.engine.test_gguf_adapters import write as write_gguf_adapter
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

PROMPT = "The capital of France is"
NAMES = ("base", "one", "two")
BASES = ("gguf", "numbers")


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
    }
    tokenizer = tokenizers.byte_level()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return LlamaForCausalLM(LlamaConfig(**(config | sizes), **ids))


def saved(model, folder):
    model.save_pretrained(folder)
    tokenizers.byte_level().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    model = saved(tiny(), folder / "base")
    saved(tiny(1, num_hidden_layers=1, hidden_size=16), folder / "other")
    lora.adapter(folder / "one", model, ["q_proj", "v_proj", "up_proj"], seed=1)
    lora.adapter(folder / "two", model, ["o_proj", "down_proj"], seed=2, rank=3)
    for name in ("one", "two"):
        saved(lora.merged(model, folder / name), folder / f"merged-{name}")
    lora.adapter(folder / "biased", model, lora_bias=True)
    lora.adapter(folder / "huge", model, lora.ALL, lora_alpha=1e9)
    lora.adapter(folder / "nan", model)
    broken = folder / "nan" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-4] + b"\0\0\xc0\x7f")
    lora.adapter(folder / "changing", model, seed=3)
    entries = [
        {"name": "base", "path": "base", "embedding": {"pooling": "mean"}},
        {"name": "other", "path": "other"},
        *({"name": f"merged-{name}", "path": f"merged-{name}"} for name in ("one", "two")),
        {"name": "one", "adapter": "one", "base": "base", "aliases": ["first"]},
        {"name": "two", "adapter": "two", "base": "base", "generation": {"max_tokens": 3}},
        {"name": "biased", "adapter": "biased", "base": "base"},
        {"name": "huge", "adapter": "huge", "base": "base"},
        {"name": "nan", "adapter": "nan", "base": "base"},
        {"name": "misfit", "adapter": "one", "base": "other"},
        {"name": "absent", "adapter": "absent", "base": "base"},
        {"name": "changing", "adapter": "changing", "base": "base"},
    ]
    (folder / "models.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture(scope="module")
def start(folder, native_default):
    apps = []

    def make(**options):
        settings = {
            "native_kernels": native_default is not None,
            "native_cache": native_default or Settings().native_cache,
            "model_registry_path": folder / "models.json",
            "include_default_models": False,
            "default_model": "base",
            "preload_model": False,
            "model_store": folder / "store",
            "hf_home": folder / "hub",
            "torch_threads": 1,
            "rate_limit_per_min": 0,
            "allow_download": False,
            "enable_embeddings_backend": True,
            "metrics_enabled": True,
            **options,
        }
        apps.append(create_app(Settings(**settings)))
        return apps[-1].test_client()

    yield make
    for app in apps:
        app.extensions[EXTENSION].swapper.close()


@pytest.fixture(scope="module")
def client(start):
    return start()


def complete(client, model, **fields):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, **fields}
    return client.post("/v1/completions", json=body)


def said(client, model, **fields):
    answer = complete(client, model, return_token_ids=True, **fields)
    assert answer.status_code == 200, answer.get_data(as_text=True)
    return answer.get_json()["choices"][0]["token_ids"]


def status(client):
    return client.get("/status").get_json()


@pytest.fixture(scope="module")
def expected(client):
    """The tokens of the base and of each adapter merged into it."""
    names = {"base": "base", "one": "merged-one", "two": "merged-two"}
    tokens = {name: said(client, model) for name, model in names.items()}
    assert len(set(map(tuple, tokens.values()))) == 3
    return tokens


def test_base_and_adapters_are_served_from_one_resident_model(client, expected):
    said(client, "base")
    before = status(client)
    for name in ("one", "base", "two", "one", "first", "two", "base"):
        own = "one" if name == "first" else name
        answer = complete(client, name, return_token_ids=True).get_json()
        assert answer["choices"][0]["token_ids"] == expected[own]
        assert answer["model"] == name
        assert answer["usage"]["completion_tokens"] == 8
    after = status(client)
    assert after["swaps"] == before["swaps"]
    assert after["resident"]["since"] == before["resident"]["since"]
    assert {each["model"] for each in after["resident"]["adapters"]} == {"one", "two"}
    assert all(each["leases"] == 0 < each["bytes"] for each in after["resident"]["adapters"])


def test_requests_for_all_of_them_at_once_get_what_each_gets_alone(client, expected):
    with ThreadPoolExecutor(9) as pool:
        answers = list(pool.map(lambda name: said(client, name), NAMES * 3))
    assert answers == [expected[name] for name in NAMES * 3]


def test_an_adapter_whose_base_is_not_in_memory_brings_it(client, expected):
    said(client, "other")
    assert status(client)["resident"]["model"] == "other"
    assert said(client, "one") == expected["one"]
    seen = status(client)
    assert seen["resident"]["model"] == "base"
    assert seen["swaps"][-1]["model"] == "base"
    assert [each["model"] for each in seen["resident"]["adapters"]] == ["one"]


def test_streams_choices_and_chats_go_through_the_adapter(client, expected):
    text = complete(client, "one").get_json()["choices"][0]["text"]
    with complete(client, "one", stream=True) as answer:
        events = answer.get_data(as_text=True).split("\n\n")
    pieces = [json.loads(event.removeprefix("data: ")) for event in events if "choices" in event]
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == text
    assert {piece["model"] for piece in pieces} == {"one"}
    several = complete(client, "one", n=3).get_json()["choices"]
    assert [choice["text"] for choice in several] == [text] * 3
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
    answers = {
        name: client.post("/v1/chat/completions", json=chat | {"model": name}).get_json()
        for name in ("base", "one", "merged-one")
    }
    texts = {name: each["choices"][0]["message"]["content"] for name, each in answers.items()}
    assert texts["one"] == texts["merged-one"] != texts["base"]
    assert answers["one"]["model"] == "one"


def test_an_adapter_whose_numbers_are_too_large_answers_with_an_error(client, expected):
    with ThreadPoolExecutor(6) as pool:
        answers = pool.map(lambda name: complete(client, name), ["huge", "base"] * 3)
        bodies = [answer.get_json() for answer in answers]
    assert {body["error"]["code"] for body in bodies[::2]} == {"engine_failed"}
    assert len({body["choices"][0]["text"] for body in bodies[1::2]}) == 1
    with complete(client, "huge", stream=True) as answer:
        assert "not finite" in answer.get_data(as_text=True)
    body = {"model": "huge", "input": "The sea"}
    assert client.post("/v1/embeddings", json=body).get_json()["error"]["code"] == "engine_failed"
    assert said(client, "base") == expected["base"]


def test_an_entry_may_have_its_own_defaults(client):
    body = {"model": "two", "prompt": PROMPT, "temperature": 0}
    assert client.post("/v1/completions", json=body).get_json()["usage"]["completion_tokens"] == 3


def test_adapters_are_in_every_list(client):
    said(client, "one")
    models = {each["id"]: each for each in client.get("/v1/models").get_json()["data"]}
    assert (models["one"]["parent"], models["one"]["root"]) == ("base", "base")
    assert (models["base"]["parent"], models["base"]["root"]) == (None, "base")
    assert models["one"]["loaded"] is models["base"]["loaded"] is True
    assert models["one"]["max_model_len"] == models["base"]["max_model_len"]
    assert models["one"]["capabilities"] == models["base"]["capabilities"]
    assert (models["one"]["local"], models["absent"]["local"]) == (True, False)
    assert 0 < models["one"]["size_bytes"] < models["base"]["size_bytes"]
    assert models["absent"]["size_bytes"] is None
    shown = client.get("/v1/models/first").get_json()
    assert (shown["id"], shown["parent"], shown["loaded"]) == ("first", "base", True)
    tags = {each["name"]: each for each in client.get("/api/tags").get_json()["models"]}
    assert tags["one"]["details"]["parent_model"] == "base"
    held = [each["name"] for each in client.get("/api/ps").get_json()["models"]]
    assert held[0] == "base"
    assert "one" in held[1:]
    assert {"base", "one"} <= set(client.get("/health").get_json()["models_loaded"])
    listed = {each["name"]: each["loaded"] for each in client.get("/models").get_json()}
    assert listed["one"] is listed["base"] is True
    assert listed["other"] is False
    assert client.get("/models/one").get_json()["state"] == "loaded"


def test_metrics_and_usage_are_the_adapters_own(client):
    def tokens(name):
        page = client.get("/metrics").get_data(as_text=True).splitlines()
        label = f'vllm:generation_tokens_total{{model_name="{name}"}} '
        return next((float(line.split()[-1]) for line in page if line.startswith(label)), 0.0)

    before = {name: tokens(name) for name in NAMES}
    said(client, "one", max_tokens=5)
    said(client, "base", max_tokens=4)
    assert {name: tokens(name) - before[name] for name in NAMES} == {"base": 4, "one": 5, "two": 0}
    page = client.get("/metrics").get_data(as_text=True)
    assert 'adapter_bytes{model_name="one"}' in page


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("biased", "adapter_config.json: lora_bias: biases cannot be applied"),
        ("nan", "lora_B.weight has numbers that are not finite"),
        ("misfit", "Adapter 'misfit' does not fit its base"),
        ("absent", "is not a folder"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_evicted(client, name, message):
    said(client, "merged-one")
    before = status(client)
    error = complete(client, name).get_json()["error"]
    assert message in error["message"]
    assert error["code"] == "model_load_failed"
    after = status(client)
    assert after["resident"]["model"] == "merged-one"
    assert after["swaps"] == before["swaps"]
    assert message in after["failed"][name]


def test_an_adapter_can_be_loaded_and_taken_out_alone(client, expected):
    said(client, "base")
    client.delete("/v1/models/one")
    assert client.delete("/v1/models/one").status_code == 404
    assert client.post("/v1/models", json={"model": "one"}).get_json()["status"] == "loaded"
    again = client.post("/v1/models", json={"model": "one"}).get_json()
    assert (again["status"], again["device"]) == ("already_loaded", "cpu")
    assert client.delete("/v1/models/one").get_json()["deleted"] is True
    seen = status(client)["resident"]
    assert seen["model"] == "base"
    assert "one" not in [each["model"] for each in seen["adapters"]]
    assert said(client, "one") == expected["one"]


def test_a_load_in_the_background_can_be_watched(client):
    said(client, "other")
    assert client.post("/models/two/load").status_code == 200
    states = []
    while not states or states[-1] == "loading":
        states.append(client.get("/models/two").get_json()["state"])
    assert states[-1] == "loaded"
    client.post("/models/biased/load")
    while client.get("/models/biased").get_json()["state"] == "loading":
        pass
    failed = client.get("/models/biased").get_json()
    assert failed["state"] == "failed"
    assert "lora_bias" in failed["error"]


def test_files_that_change_are_read_anew(client, folder):
    first = said(client, "changing")
    lora.adapter(folder / "changing", tiny(), ["q_proj", "up_proj"], seed=9)
    assert said(client, "changing") != first
    names = [each["model"] for each in status(client)["resident"]["adapters"]]
    assert names.count("changing") == 1


def test_embeddings_of_an_adapter_are_those_of_the_merged_model(client, folder):
    def vector(model):
        answer = client.post("/v1/embeddings", json={"model": model, "input": "The sea"})
        assert answer.status_code == 200, answer.get_data(as_text=True)
        assert answer.get_json()["model"] == model
        return torch.tensor(answer.get_json()["data"][0]["embedding"])

    from transformers import AutoModelForCausalLM

    ids = torch.tensor([tokenizers.byte_level()("The sea")["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder / "merged-one")
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state.mean(1)[0]
    merged = torch.nn.functional.normalize(hidden, dim=0)
    assert torch.allclose(vector("one"), merged, atol=2e-3)
    assert not torch.allclose(vector("base"), merged, atol=2e-2)


def test_a_trace_changes_nothing_and_shows_the_adapted_model(client):
    plain = said(client, "one")
    asked = {"layers": [1], "attn": "json", "lens": {"layers": "every:1", "topk": 1}}
    weights, lenses = {}, {}
    for name in ("base", "one", "merged-one"):
        answer = complete(client, name, return_token_ids=True, trace=asked).get_json()
        choice = answer["choices"][0]
        assert name != "one" or choice["token_ids"] == plain
        first = choice["trace"]["steps"][0]
        weights[name] = torch.tensor(first["attn"][0]["weights"])
        lenses[name] = [reading["topk"][0]["token_id"] for reading in first["lens"]]
    assert torch.allclose(weights["one"], weights["merged-one"], atol=1e-3)
    assert not torch.allclose(weights["one"], weights["base"], atol=1e-3)
    assert lenses["one"] == lenses["merged-one"] != lenses["base"]


def test_questions_about_the_inside_are_answered_by_the_adapted_model(client):
    def lens(model):
        body = {"model": model, "prompt": PROMPT, "topk": 1}
        answer = client.post("/inspect/logit_lens", json=body)
        assert answer.status_code == 200, answer.get_data(as_text=True)
        return [row[-1]["topk"][0]["token_id"] for row in answer.get_json()["cells"]]

    assert lens("one") == lens("merged-one") != lens("base")
    said(client, "one")
    assert client.get("/inspect/model?model=one&load=false").get_json()["loaded"] is True
    assert client.get("/inspect/model?model=one").get_json()["gradients"] is True
    body = {"prompt": PROMPT, "method": "gradient_x_input"}
    scores = {
        name: client.post("/inspect/attribution", json=body | {"model": name}).get_json()["scores"]
        for name in ("base", "one", "merged-one")
    }
    assert scores["one"] == pytest.approx(scores["merged-one"], abs=1e-3)
    assert scores["one"] != pytest.approx(scores["base"], abs=1e-3)


def test_edits_put_in_what_the_adapted_model_reads(client):
    def written(model, *edits):
        more = {"intervene": {"edits": list(edits)}} if edits else {}
        answer = complete(client, model, logprobs=2, **more)
        assert answer.status_code == 200, answer.get_data(as_text=True)
        return answer.get_json()["choices"][0]["logprobs"]

    places = (
        {"part": "resid", "layers": "all"},
        {"part": "k", "layer": 0},
        {"part": "v", "layer": 1},
    )
    for place in places:
        own = {"do": "patch", **place, "at": "prompt", "from": {"prompt": PROMPT}}
        other = {"do": "ablate", **place, "at": "prompt", "with": {"prompt": PROMPT}}
        for model in ("one", "base", "two"):
            assert written(model, own) == written(model, other) == written(model)
    mean = {"do": "ablate", "part": "mlp", "layer": 0, "with": "mean"}
    numbers = {name: written(name, mean)["token_logprobs"][0] for name in ("one", "merged-one")}
    assert numbers["one"] == pytest.approx(numbers["merged-one"], abs=1e-3)


def test_the_usual_length_of_the_stream_is_the_adapted_models(client):
    norms = {
        name: client.get(f"/inspect/model?model={name}").get_json()["resid_norm"]
        for name in ("base", "one", "merged-one")
    }
    assert norms["one"] == pytest.approx(norms["merged-one"], rel=1e-3)
    assert norms["one"] != pytest.approx(norms["base"], rel=1e-3)


def test_without_room_an_adapter_is_refused_with_the_setting(start, folder):
    client = start(max_adapters_mb=1)
    lora.adapter(folder / "changing", tiny(), lora.ALL, rank=1024)
    error = complete(client, "changing").get_json()["error"]
    assert "MAX_ADAPTERS_MB allows 1" in error["message"]
    assert error["code"] == "insufficient_memory"
    assert status(client)["resident"] is None
    lora.adapter(folder / "changing", tiny())


def test_without_auto_load_only_what_is_in_memory_answers(start):
    client = start(auto_load=False)
    assert complete(client, "one").get_json()["error"]["code"] == "model_not_loaded"
    assert client.post("/v1/models", json={"model": "one"}).get_json()["status"] == "loaded"
    assert complete(client, "one").status_code == complete(client, "two").status_code == 200


def test_an_adapter_may_be_the_model_of_the_start(start, expected):
    client = start(default_model="one", preload_model=True)
    answer = client.post(
        "/v1/completions",
        json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True},
    ).get_json()
    assert answer["choices"][0]["token_ids"] == expected["one"]


def test_torch_serves_the_same(start, expected):
    client = start(native_kernels=False)
    for name in (*NAMES, *NAMES):
        assert said(client, name) == expected[name]
    assert status(client)["resident"]["kernels"] == "torch"


def test_an_adapter_is_applied_to_a_gguf_file_as_to_the_numbers_in_it(start, tmp_path):
    from transformers import AutoModelForCausalLM

    from tests.checkpoints import gguf_models
    from transformers_api.checkpoints.convert import convert

    file = gguf_models.write(
        tmp_path / "base.gguf", "llama", gguf_models.tensors("llama"), metadata=None
    )
    convert(file, tmp_path / "numbers", lambda _share, _what: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "numbers")
    parts = lora.matrices(model, lora.matching(model, lora.ALL), 4, seed=5)
    lora.save(tmp_path / "own", parts, lora_alpha=8)
    write_gguf_adapter(tmp_path / "own.gguf", "llama", model, parts)
    entries = [
        {"name": "no-model", "path": "own.gguf"},
        *({"name": f"file-on-{base}", "adapter": "own.gguf", "base": base} for base in BASES),
        {"name": "gguf", "path": "base.gguf"},
        {"name": "numbers", "path": "numbers"},
        *({"name": f"on-{base}", "adapter": "own", "base": base} for base in BASES),
    ]
    (tmp_path / "models.json").write_text(json.dumps(entries))
    client = start(model_registry_path=tmp_path / "models.json", default_model="gguf")
    names = ("on-gguf", "on-numbers", "file-on-gguf", "file-on-numbers")
    answers = {name: said(client, name, prompt=[3, 9, 27, 5]) for name in names}
    assert len(set(map(tuple, answers.values()))) == 1
    assert "is an adapter, no model" in complete(client, "no-model").get_json()["error"]["message"]
    assert said(client, "gguf", prompt=[3, 9, 27, 5]) != answers["on-gguf"]


def test_keys_and_values_of_eight_bits_go_with_adapters_and_traces(start):
    client = start(kv_cache_dtype="int8", dtype="float32")
    asked = {"layers": [0, 1], "attn": "json", "lens": {"layers": "every:1", "topk": 1}}
    answers = {}
    for name in (*NAMES, *NAMES):
        plain = said(client, name, max_tokens=20)
        traced = complete(client, name, max_tokens=20, return_token_ids=True, trace=asked)
        assert traced.status_code == 200, traced.get_data(as_text=True)
        choice = traced.get_json()["choices"][0]
        assert choice["token_ids"] == plain == answers.setdefault(name, plain)
        rows = [torch.tensor(own["weights"]) for own in choice["trace"]["steps"][0]["attn"]]
        assert all(torch.allclose(row.sum(-1), torch.ones(()), atol=1e-2) for row in rows)
    assert len({tuple(tokens) for tokens in answers.values()}) == len(NAMES)
    with ThreadPoolExecutor(9) as pool:
        together = pool.map(lambda name: said(client, name, max_tokens=20), NAMES * 3)
        assert list(together) == [answers[name] for name in NAMES * 3]
