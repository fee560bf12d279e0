"""No body names a folder of the server's machine; the log does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from tests.model_folders import LLAMA, model_files, sharded_files, write_files
from tests.repeats import slow
from transformers_api.api.http.private_paths import PrivatePaths
from transformers_api.app import create_app
from transformers_api.config.settings import Settings
from transformers_api.errors import ApiError, InsufficientStorage, InvalidRequest, ModelLoadFailed
from transformers_api.serving.models.spec import ModelSpec, PathSource

SECRET = "Zebra crossing"  # with a space, as folders of people have
FILES = model_files()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


def without(*names: str) -> dict[str, bytes]:
    return {name: data for name, data in FILES.items() if name not in names}


def one_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return write_files(folder, {name: content}) / name

    return make


def folder_of(files: dict[str, bytes]) -> Callable[[Path], Path]:
    return lambda folder: write_files(folder, files)


def shards_without_one(folder: Path) -> Path:
    write_files(folder, sharded_files())
    (folder / "model-00002-of-00002.safetensors").unlink()
    return folder


def unreadable(folder: Path) -> Path:
    write_files(folder, without("config.json"))
    (folder / "config.json").mkdir()
    return folder


MODELS: dict[str, Callable[[Path], Path]] = {
    "missing": lambda folder: folder,
    "missing-file": lambda folder: folder / "model.gguf",
    "a-text": one_file("notes.txt", b"no model"),
    "no-weights": folder_of(without("model.safetensors")),
    "no-config": folder_of(without("config.json")),
    "no-tokenizer": folder_of(without("tokenizer.json")),
    "truncated": folder_of(FILES | {"model.safetensors": FILES["model.safetensors"][:-3]}),
    "padded": folder_of(FILES | {"model.safetensors": FILES["model.safetensors"] + b"x"}),
    "too-short": folder_of(FILES | {"model.safetensors": b"1234"}),
    "no-json": folder_of(FILES | {"config.json": b"{"}),
    "a-list": folder_of(FILES | {"config.json": b"[]"}),
    "unreadable": unreadable,
    "pickle": folder_of(without("model.safetensors") | {"pytorch_model.bin": b"x"}),
    "pointer": folder_of(FILES | {"model.safetensors": POINTER}),
    "shard": shards_without_one,
    "no-type": folder_of(FILES | {"config.json": b'{"architectures": ["No"]}'}),
    "many-layers": folder_of(
        FILES | {"config.json": json.dumps(LLAMA | {"num_hidden_layers": 9**9}).encode()}
    ),
    "bad-tokenizer": folder_of(FILES),
    "gguf": one_file("model.gguf", b"GGUF" + b"\xff" * 60),
    "pt": one_file("model.pt", b"no zip"),
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    folder = tmp_path_factory.mktemp("machine") / SECRET
    entries = [
        {"name": name, "path": str(make(folder / "models" / name))} for name, make in MODELS.items()
    ]
    (folder / "registry.json").write_text(json.dumps(entries))
    settings = Settings(
        model_registry_path=folder / "registry.json",
        include_default_models=False,
        default_model="missing",
        model_store=folder / "store",
        hf_home=folder / "hub",
        preload_model=False,
        residency_lock=False,
        enable_embeddings_backend=True,
    )
    return create_app(settings).test_client()


def bodies(client: FlaskClient, name: str) -> Iterator[tuple[str, str]]:
    """(route, body) of all that a client may ask of a model that cannot be loaded."""
    messages = [{"role": "user", "content": "hi"}]
    posts = {
        "/v1/chat/completions": {"model": name, "messages": messages},
        "/v1/completions": {"model": name, "prompt": "a", "stream": True},
        "/generate": {"model": name, "prompt": "a"},
        "/generate/stream": {"model": name, "prompt": "a"},
        "/chat/stream": {"model": name, "messages": messages},
        "/tokenize": {"model": name, "text": "a"},
        "/inspect/logit_lens": {"model": name, "prompt": "a"},
        "/v1/embeddings": {"model": name, "input": "a"},
        "/v1/messages": {"model": name, "messages": messages, "max_tokens": 1},
        "/v1/responses": {"model": name, "input": "a", "stream": True},
        "/v1/models": {"model": name},
        f"/models/{name}/load": {},
        "/load_model": {"model_name": name},
    }
    for route, body in posts.items():
        yield route, client.post(route, json=body).get_data(as_text=True)
    gets = ("/v1/models", f"/v1/models/{name}", "/models", f"/models/{name}", "/status")
    for route in (*gets, "/health", "/readyz", "/metrics", "/inspect/model"):
        yield route, client.get(route).get_data(as_text=True)


QUICK = ("missing", "truncated", "shard")


@pytest.mark.parametrize("name", [*QUICK, *slow(*(sorted(MODELS.keys() - QUICK)))])
def test_no_body_names_a_folder_of_the_server(client, name, caplog) -> None:
    refused = 0
    for route, body in bodies(client, name):
        assert "Zebra" not in body, (route, body)
        assert "crossing" not in body, (route, body)
        refused += "model_load_failed" in body
    assert refused >= 5
    if name not in ("pt", "gguf", "bad-tokenizer", "a-text"):  # these messages have no path
        assert SECRET in caplog.text  # for the operator


@pytest.fixture
def paths() -> PrivatePaths:
    spec = ModelSpec(name="m", source=PathSource(Path("/srv/big models/m")))
    return PrivatePaths(Settings(model_store=Path("/data"), hf_home=Path("/var/hub")), [spec])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/srv/big models/m is not a folder", "… is not a folder"),
        ("/srv/big models/m/config.json: no", "…/config.json: no"),
        ("/srv/big models/m2 differs", "/srv/big models/m2 differs"),
        ("[Errno 28] No space: '/data/x/y.bin'", "[Errno 28] No space: '…/x/y.bin'"),
        ("see /etc/ssl/certs.pem, (/usr/lib/x)", "see …/certs.pem, (…/x)"),
        ("https://huggingface.co/a/b is away", "https://huggingface.co/a/b is away"),
        ("use /v1/completions instead", "use /v1/completions instead"),
        ("owner/model/etc/x and 3 tokens/s", "owner/model/etc/x and 3 tokens/s"),
        ("File '/var/hub'", "File '…'"),
    ],
)
def test_folders_are_taken_out_of_texts_and_nothing_else(paths, text, shown) -> None:
    assert paths.hide(text) == shown.replace("/srv/big models/m2", "…/big models/m2")


@pytest.mark.parametrize(
    ("error", "is_hidden"),
    [
        (ModelLoadFailed("/data/x is broken"), True),
        (InsufficientStorage("/data is full"), True),
        (InvalidRequest("'/data/x' is not a role"), False),
    ],
)
def test_what_a_client_has_sent_is_said_to_it_as_it_was(paths, error, is_hidden) -> None:
    shown: ApiError = paths.public(error)
    assert ("/data" not in shown.message) is is_hidden
    assert (shown.status, shown.code, type(shown)) == (error.status, error.code, type(error))
    assert "/data" in error.message  # for the log
