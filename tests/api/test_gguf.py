"""GGUF models through the public interface: what is said of them, parts on a Hub, paths."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from tests.checkpoints.gguf_models import tensors, write, write_parts
from tests.hub_server import HubServer
from tests.servers import started
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.cli import main
from transformers_api.config.settings import Settings

REPO = "someone/parts"
ASK = {"model": "m", "prompt": "!!", "max_tokens": 3, "temperature": 0}
QUANTIZED = {
    f"blk.{layer}.ffn_{part}.weight": "Q4_0" for layer in (0, 1) for part in ("up", "gate")
}


def weights():
    return tensors("llama")


@pytest.fixture
def serve(tmp_path):
    """serve(registry entry): a client of an application with the model "m"."""
    apps = []

    def make(**entry):
        (tmp_path / "models.json").write_text(json.dumps([{"name": "m", **entry}]))
        app = create_app(
            Settings(
                model_registry_path=tmp_path / "models.json",
                include_default_models=False,
                default_model="m",
                preload_model=False,
                model_store=tmp_path / "store",
                hf_home=tmp_path / "hub",
                torch_threads=1,
                rate_limit_per_min=0,
                allow_download=True,
            )
        )
        apps.append(app)
        return app.test_client()

    yield make
    for app in apps:
        app.extensions[EXTENSION].swapper.close()


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = HubServer({})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


def answer(client):
    response = client.post("/v1/completions", json=ASK)
    assert response.status_code == 200, response.get_data(as_text=True)
    return response.json["choices"][0]["text"]


@pytest.mark.parametrize(
    ("quantization", "kept"),
    [
        ("gguf", {"F32": "bfloat16", "Q4_0": "exact"}),
        ("auto", {"F32": "exact", "Q4_0": "exact"}),
        ("int8", {"F32": "int8, rounded anew", "Q4_0": "int8, rounded anew"}),
    ],
)
def test_the_status_says_what_is_kept_of_each_type(
    serve, tmp_path, native_cache, quantization, kept
):
    path = write(tmp_path / "m.gguf", "llama", weights(), {"general.file_type": 2}, QUANTIZED)
    client = serve(path=str(path), quantization=quantization)
    answer(client)
    resident = client.get("/status").json["resident"]
    assert resident["quantization"] == {"auto": "none"}.get(quantization, quantization)
    assert resident["weights"] == kept
    shown = client.post("/api/show", json={"model": "m"}).json
    assert shown["model_info"]["transformers_api.weights"] == kept
    assert (shown["details"]["format"], shown["details"]["quantization_level"]) == ("gguf", "Q4_0")
    (listed,) = client.get("/api/tags").json["models"]
    assert listed["details"]["quantization_level"] == "Q4_0"


@pytest.mark.parametrize(
    ("file_type", "level"), [(15, "Q4_K_M"), (7, "Q8_0"), (1, "F16"), (None, "F32"), (999, "F32")]
)
def test_the_level_is_the_file_type_before_anything_is_loaded(serve, tmp_path, file_type, level):
    metadata = {} if file_type is None else {"general.file_type": file_type}
    path = write(tmp_path / "m.gguf", "llama", weights(), metadata)
    (listed,) = serve(path=str(path)).get("/api/tags").json["models"]
    assert (listed["details"]["format"], listed["details"]["quantization_level"]) == ("gguf", level)


def test_a_model_in_parts_on_the_hub_is_fetched_whole_and_answers(serve, hub, tmp_path):
    whole = write(tmp_path / "whole.gguf", "llama", weights())
    (tmp_path / "parts").mkdir()
    parts = write_parts(tmp_path / "parts", "llama", weights())
    hub.repos[REPO] = {f"q/{part.name}": part.read_bytes() for part in parts}
    hub.repos[REPO]["q/other.gguf"] = b"other"
    client = serve(hf_repo=REPO, file=f"q/{parts[0].name}")
    text = answer(client)
    assert [hub.fetched(part.name) for part in parts] == [[None]] * 3
    assert hub.fetched("other.gguf") == []
    assert answer(serve(path=str(whole))) == text


def test_a_part_that_the_hub_lacks_is_named(serve, hub, tmp_path):
    parts = write_parts(tmp_path, "llama", weights())
    hub.repos[REPO] = {part.name: part.read_bytes() for part in parts[:2]}
    response = serve(hf_repo=REPO, file=parts[0].name).post("/v1/completions", json=ASK)
    assert response.status_code >= 400
    assert parts[2].name in response.get_data(as_text=True)


def test_the_sidecar_of_a_file_that_was_replaced_is_removed(serve, tmp_path):
    path = write(tmp_path / "m.gguf", "llama", weights())
    client = serve(path=str(path))
    first = answer(client)
    (sidecar,) = [table.parent for table in (tmp_path / "store").glob("*/weights.json")]
    client.post("/v1/models/unload", json={"model": "m"})
    client.delete("/v1/models/m")
    path.unlink()
    write(path, "llama", tensors("llama", seed=5))
    client = serve(path=str(path))
    assert answer(client) != first
    (other,) = [table.parent for table in (tmp_path / "store").glob("*/weights.json")]
    assert other != sidecar
    assert not sidecar.exists()


@pytest.fixture
def environment(tmp_path, monkeypatch):
    settings = {
        "MODEL_STORE": f"{tmp_path}/store",
        "HF_HOME": f"{tmp_path}/hf",
        "HOST": "127.0.0.1",
        "ALLOW_DOWNLOAD": "true",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return settings


def test_serve_and_check_take_the_path_of_a_file(tmp_path, environment, capsys):
    path = write(tmp_path / "m.gguf", "llama", weights(), {}, QUANTIZED)
    environment |= {"QUANTIZATION": "none", "PORT": "0"}
    command = [sys.executable, "-m", "transformers_api", "serve", str(path)]
    with started(*command, **environment) as server:
        host, port = server.address()[:2]
        body = json.dumps({**ASK, "model": None}).encode()
        request = urllib.request.Request(
            f"http://{host}:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert len(json.load(response)["choices"]) == 1
    assert main(["check", str(path)]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"ready in {tmp_path}/store/m-\w+, for .*completion", output)
    assert "its weights become plain numbers" in output


def test_check_says_what_will_be_kept_of_each_type(tmp_path, environment, capsys, monkeypatch):
    from transformers_api.checkpoints.sidecar import write_sidecar
    from transformers_api.serving.models.registry import ModelRegistry
    from transformers_api.serving.models.store import ModelStore

    path = write(tmp_path / "m.gguf", "llama", weights(), {}, QUANTIZED)
    assert main(["check", str(path)]) == 0
    assert "when it is first loaded" in capsys.readouterr().out
    store = ModelStore(Settings.from_env())
    store.write_sidecar = lambda source, folder, progress, warn: write_sidecar(
        source, folder, progress, warn
    )
    settings = replace(Settings.from_env(), default_model=str(path))
    spec = ModelRegistry.from_settings(settings).resolve(str(path))
    store.prepare(spec, lambda share, what: None)
    monkeypatch.setenv("QUANTIZATION", "gguf")
    assert main(["check", str(path)]) == 0
    assert re.search(r"weights: F32 bfloat16, Q4_0 exact", capsys.readouterr().out)


def test_pull_takes_an_id_of_the_hub_that_no_entry_names(hub, environment, capsys, tmp_path):
    from tests.model_folders import model_files

    hub.repos["someone/tiny"] = model_files()
    assert main(["pull", "someone/tiny"]) == 0
    assert f"someone/tiny is ready in {tmp_path}/hf/hub" in capsys.readouterr().out
    assert main(["check", "someone/tiny"]) == 0
    assert f"ready in {Path(tmp_path)}/hf/hub" in capsys.readouterr().out
