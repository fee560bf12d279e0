"""Nothing that a client has sent is unpickled: what passes between processes has our types alone."""

from __future__ import annotations

import base64
import io
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch  # noqa: F401 - a front would forbid its import in this process

from tests import direct_transport, tokenizers
from tests.api.tiny_app import save
from tests.direct_transport import DirectTransport
from tests.test_engines import front_of
from transformers_api.cluster.replica import Replica
from transformers_api.config.settings import Settings

PACKAGE = Path(__file__).parents[1] / "transformers_api"
# pickled_file reads the opcodes of foreign checkpoints one by one and runs none of them.
# dataclass_code reads the code of Python's own, from files that this user or root alone can have written.
ALLOWED = {"checkpoints/headers/pickled_file.py", "engine/platform/dataclass_code.py"}
OURS = ("transformers_api.", "builtins", "collections", "numpy", "_codecs", "pathlib", "copyreg")
TOKENIZERS = ("transformers.", "tokenizers", "tests.")
IMPORTS = re.compile(r"^ *(import|from) (pickle|dill|marshal|shelve|joblib)\b", re.MULTILINE)
SAFE_LOADS = re.compile(r"torch\.load\([^)]*weights_only=True")


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


class Watching(pickle.Unpickler):
    """Notes which classes a message asks for."""

    names: set[str]

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(f"{module}.{name}")
        return super().find_class(module, name)


@pytest.fixture
def classes(monkeypatch):
    names: set[str] = set()

    def sent(message: Any) -> Any:
        reader = Watching(io.BytesIO(pickle.dumps(message)))
        reader.names = names
        return reader.load()

    monkeypatch.setattr(direct_transport, "sent", sent)
    return names


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpickling")
    save(folder / "one", tokenizers.byte_level())
    (folder / "models.json").write_text(json.dumps([{"name": "one", "path": str(folder / "one")}]))
    settings = Settings(
        model_registry_path=folder / "models.json",
        include_default_models=False,
        default_model="one",
        preload_model=False,
        model_store=folder / "store",
        hf_home=folder / "hub",
        torch_threads=1,
        rate_limit_per_min=0,
    )
    replica = Replica(replace(settings, metrics_enabled=False), "r1")
    yield front_of(DirectTransport(replica), settings).test_client()
    replica._engine.models.close()


def test_a_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_hostile_bodies_reach_no_unpickling(client, classes, tmp_path):
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary), protocol=0)
    texts = [bomb.decode("latin-1"), base64.b64encode(bomb).decode(), "cos\nsystem\n(S'id'\ntR."]
    for text in texts:
        chat = {"model": "one", "max_tokens": 2, "messages": [{"role": "user", "content": text}]}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        for fields in (
            {"user": text},
            {"stop": [text[:200]]},
            {"model": text},
            {"response_format": {"type": "regex", "value": text}},
            {"tools": [{"type": "function", "function": {"name": text, "parameters": {}}}]},
            {"intervene": {"edits": [{"do": "add", "vector": text, "layer": 0}]}},
            {"trace": {"layers": text}},
        ):
            answer = client.post("/v1/chat/completions", json={**chat, **fields})
            assert answer.status_code < 500
    for kind in ("application/octet-stream", "application/x-python-pickle", "application/json"):
        for path in ("/v1/chat/completions", "/v1/completions", "/inspect/heads", "/generate"):
            assert 400 <= client.post(path, data=bomb, content_type=kind).status_code < 500
    assert not canary.exists()
    strange = {name for name in classes if not name.startswith((*OURS, *TOKENIZERS))}
    assert not strange
    assert not classes & {"builtins.getattr", "builtins.eval", "pathlib.Path", "posix.system"}


def test_archives_of_vectors_with_objects_are_refused(client, tmp_path):
    canary = tmp_path / "canary"
    file = io.BytesIO()
    objects = numpy.array([Bomb(canary)], dtype=object)
    numpy.savez(file, vector=objects)
    answer = client.put("/inspect/vectors/mine", data=file.getvalue())
    assert 400 <= answer.status_code < 500
    assert not canary.exists()


def test_no_module_of_ours_unpickles():
    """torch.load reads weights alone, and numpy no objects; Ray's messages need the token."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if str(path.relative_to(PACKAGE)) not in ALLOWED:
            assert not IMPORTS.search(text), path
        assert text.count("torch.load(") == len(SAFE_LOADS.findall(text)), path
        assert "allow_pickle=True" not in text, path
