"""GET, POST and DELETE under /v1/models."""

import threading

import pytest
from openai.types import Model, ModelDeleted

from tests.api.test_bodies import error
from tests.fakes import fake_spec
from tests.model_folders import LLAMA, model_files, write_files
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.models.hub import HubUnreachable
from transformers_api.serving.models.spec import HubSource, PathSource


def listed(served):
    body = served.client.get("/v1/models").get_json()
    assert body["object"] == "list"
    return {entry["id"]: entry for entry in body["data"]}


def test_registered_models_are_listed_loaded_or_not(served):
    models = listed(served)
    assert list(models) == ["fake", "owner/second"]
    assert [entry["loaded"] for entry in models.values()] == [False, False]
    for entry in models.values():
        model = Model.model_validate(entry, strict=True)
        assert (model.object, entry["permission"], entry["parent"]) == ("model", [], None)
        assert entry["root"] == model.id
        assert model.created > 1_700_000_000
        assert "max_model_len" not in entry
    assert listed(served) == models


def test_the_resident_model_tells_its_context(served):
    served.chat()
    models = listed(served)
    assert (models["fake"]["loaded"], models["fake"]["max_model_len"]) == (True, 2048)
    assert not models["owner/second"]["loaded"]


def test_cached_repositories_are_listed_once(serve, monkeypatch):
    served = serve(specs=(fake_spec(), fake_spec("known", source=HubSource("owner/known"))))
    repos = ["owner/known", "owner/cached", "owner/../strange"]
    monkeypatch.setattr(served.services.store, "cached_hub_repos", lambda: repos)
    monkeypatch.setattr(served.services.store, "locate", lambda spec: None)
    monkeypatch.setattr(served.services.registry, "_is_cached", lambda repo: repo in repos)
    models = listed(served)
    assert list(models) == ["fake", "known", "owner/cached"]
    assert models["owner/cached"]["owned_by"] == "huggingface"
    assert models["fake"]["owned_by"] == "local"


def test_a_list_says_what_can_be_done_where_it_lies_and_how_large_it_is(serve, tmp_path):
    folder = write_files(tmp_path / "here", model_files(LLAMA | {"max_position_embeddings": 99}))
    specs = (
        fake_spec("here", source=PathSource(folder)),
        fake_spec("away", source=HubSource("owner/away"), max_context_tokens=7),
        fake_spec("vectors", source=HubSource("owner/vectors"), embedding="encoder"),
        fake_spec("never", source=HubSource("owner/t5"), refusal="an encoder-decoder"),
    )
    served = serve(specs=specs)
    models = listed(served)
    weights = (folder / "model.safetensors").stat().st_size
    told = {
        name: [entry[k] for k in ("local", "size_bytes", "context_length", "capabilities")]
        for name, entry in models.items()
    }
    writes = ["chat", "completion", "trace"]
    assert told["here"] == [True, weights, 99, writes]
    assert told["away"] == [False, None, 7, writes]
    assert told["vectors"] == [False, None, None, []]  # embeddings are off
    assert told["never"][3] == []
    assert served.loader.calls == []
    assert served.client.get("/v1/models/here").get_json()["size_bytes"] == weights
    for name in ("away", "vectors", "never"):  # nothing is fetched for it
        assert "tools" not in served.client.get(f"/v1/models/{name}").get_json()
    assert served.loader.calls == [("text", "here")]
    on = listed(serve(specs=specs, enable_embeddings_backend=True))
    assert on["vectors"]["capabilities"] == ["embedding", "rerank"]


def test_without_its_tokenizer_a_model_is_described_all_the_same(serve, tmp_path):
    folder = write_files(tmp_path / "here", model_files())
    served = serve(specs=(fake_spec("here", source=PathSource(folder)), fake_spec("other")))
    served.loader.fail["text"] = ModelLoadFailed("no tokenizer")
    described = served.client.get("/v1/models/here").get_json()
    assert described["capabilities"] == ["chat", "completion", "trace"]
    assert not {"tools", "reasoning", "structured_outputs"} & set(described)


def test_a_model_is_described_while_another_is_loaded(serve, tmp_path):
    folder = write_files(tmp_path / "here", model_files())
    served = serve(specs=(fake_spec("here", source=PathSource(folder)), fake_spec("other")))
    served.loader.hold["load"] = threading.Event()
    served.services.swapper.load("other", wait=False)
    assert served.loader.entered["load"].acquire(timeout=30)
    assert "tools" not in served.client.get("/v1/models/here").get_json()
    served.loader.hold["load"].set()
    assert ("text", "here") not in served.loader.calls


@pytest.mark.parametrize("url", ["owner/second", "owner%2Fsecond", "two"])
def test_one_model_is_described_under_any_of_its_names(served, url):
    body = served.client.get(f"/v1/models/{url}").get_json()
    assert body["id"] == url.replace("%2F", "/")
    assert body["root"] == "owner/second"
    Model.model_validate(body, strict=True)


def test_a_description_has_the_metadata_of_the_registry(serve):
    spec = fake_spec(
        "described",
        source=HubSource("owner/repo"),
        metadata={"description": "A model"},
        max_context_tokens=512,
        is_instruct=True,
    )
    served = serve(specs=(fake_spec(), spec))
    metadata = served.client.get("/v1/models/described").get_json()["metadata"]
    assert metadata == {
        "description": "A model",
        "huggingface_repo": "owner/repo",
        "max_context_tokens": 512,
        "dtype": "auto",
        "default_device": "auto",
        "is_instruct": True,
    }
    assert "metadata" not in listed(served)["described"]


def test_an_unknown_model_is_404(served):
    for url in ("nothing", "owner/nothing", "..%2F..%2Fetc%2Fpasswd", "a%00b"):
        assert error(served.client.get(f"/v1/models/{url}"), 404)["code"] == "model_not_found"
        assert error(served.client.delete(f"/v1/models/{url}"), 404)["code"] == "model_not_found"
    assert (
        error(served.client.post("/v1/models", json={"model": "../etc"}), 404)["param"] == "model"
    )


def test_a_model_is_loaded_and_loaded_already_and_unloaded(served):
    answer = served.client.post("/v1/models", json={"model": "owner/second"}).get_json()
    assert answer["status"] == "loaded"
    assert (answer["id"], answer["object"], answer["device"]) == ("owner/second", "model", "cpu")
    assert type(answer["created"]) is int
    assert answer["owned_by"] == "local"
    again = served.client.post("/v1/models", json={"model": "two", "device": "cpu"}).get_json()
    assert (again["id"], again["status"], again["device"]) == ("two", "already_loaded", "cpu")
    assert served.loader.count("load") == 1
    gone = served.client.delete("/v1/models/owner/second")
    assert gone.get_json() == {"id": "owner/second", "object": "model", "deleted": True}
    ModelDeleted.model_validate(gone.get_json(), strict=True)
    assert served.swapper.status().model is None
    body = error(served.client.delete("/v1/models/owner%2Fsecond"), 404)
    assert body["message"] == "Model 'owner/second' is not loaded"


def test_loading_switches_models(served):
    served.chat()
    served.client.post("/v1/models", json={"model": "two"})
    assert served.engine.closed.is_set()
    assert listed(served)["owner/second"]["loaded"]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("model", {}),
        ("model", {"model": None}),
        ("model", {"model": ["fake"]}),
        ("device", {"model": "fake", "device": "tpu"}),
        ("device", {"model": "fake", "device": 5}),
        ("device", {"model": "fake", "device": "cuda"}),
        ("device", {"model": "fake", "device": "cuda:0"}),
    ],
)
def test_a_bad_load_is_named_and_evicts_nothing(served, param, body):
    served.chat()
    assert error(served.client.post("/v1/models", json=body))["param"] == param
    assert served.swapper.status().model == "fake"


def test_a_device_is_passed_on_where_the_machine_has_it(serve):
    served = serve(devices=("cpu", "cuda", "cuda:0"))
    seen = []
    build = served.loader.build
    served.loader.build = lambda spec: (seen.append(spec.device), build(spec))[1]
    served.client.post("/v1/models", json={"model": "fake", "device": "cuda:0"})
    served.client.post("/v1/models", json={"model": "two", "device": None})
    assert seen == ["cuda:0", "auto"]


def test_many_loads_of_one_model_are_one(served):
    served.loader.hold["load"] = threading.Event()
    statuses = []

    def load():
        client = served.app.test_client()
        statuses.append(client.post("/v1/models", json={"model": "fake"}).get_json()["status"])

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    assert served.loader.entered["load"].acquire(timeout=30)
    served.loader.hold["load"].set()
    for thread in threads:
        thread.join(30)
    assert len(statuses) == 8
    assert served.loader.count("load") == 1


def test_a_model_that_can_never_be_served_says_so_in_both_lists(serve):
    reason = "an encoder-decoder model cannot be served"
    served = serve(specs=(fake_spec(), fake_spec("t5", refusal=reason)))
    entry = listed(served)["t5"]
    assert (entry["servable"], entry["reason"]) == (False, reason)
    assert "servable" not in listed(served)["fake"]
    [first, second] = served.client.get("/models").get_json()
    assert "servable" not in first
    assert (second["servable"], second["reason"]) == (False, reason)


def test_an_id_that_nobody_knows_is_a_404_everywhere(served, monkeypatch):
    registry, hub = served.services.registry, served.services.store._hub
    monkeypatch.setattr(registry, "_allow_unregistered", True)

    def unknown(source):
        raise HubUnreachable(f"{source.repo} could not be fetched")

    monkeypatch.setattr(hub, "check_exists", unknown)
    for url in ("/v1/models/owner/typo", "/models/owner/typo"):
        answer = served.client.get(url)
        assert answer.status_code == 404, url
        assert "owner/typo" in answer.get_data(as_text=True)
