"""The real huggingface_hub against a small Hub: tokens, silence, interruptions, what stays."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys

import pytest

from tests.fakes import FakeLoader
from tests.hub_server import HubServer
from tests.model_folders import model_files, write_files
from transformers_api.config.settings import Settings
from transformers_api.errors import ModelLoadFailed, ModelNotFound
from transformers_api.serving.models.spec import HubSource, ModelSpec
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.swapper import Swapper

REPO = "someone/tiny"
TOKEN = "hf_rightrightright"


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = HubServer({REPO: model_files()})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


@pytest.fixture
def make_store(tmp_path):
    def make(**settings):
        folders = {"model_store": tmp_path / "store", "hf_home": tmp_path / "hf"}
        return ModelStore(Settings(**{**folders, **settings}))

    return make


def spec_of(repo=REPO, registered=True):
    return ModelSpec(name=repo, source=HubSource(repo), registered=registered)


def prepare(store, spec=None):
    return store.prepare(spec or spec_of(), lambda share, what: None)


def test_a_private_repository_opens_for_its_token_alone(hub, make_store):
    hub.private[REPO] = TOKEN
    for token in (None, "hf_wrongwrongwrong"):
        with pytest.raises(ModelLoadFailed, match="is private and HF_TOKEN does not open it") as no:
            prepare(make_store(hf_token=token))
        assert "wrong" not in str(no.value)
    assert hub.fetched("model.safetensors") == []
    assert prepare(make_store(hf_token=TOKEN)).parameters == 36


def test_what_a_token_fetched_is_served_without_it(hub, make_store):
    hub.private[REPO] = TOKEN
    prepare(make_store(hf_token=TOKEN))
    assert prepare(make_store(hf_token=None)).parameters == 36


def test_an_id_of_a_client_that_the_hub_does_not_show_is_not_found(hub, make_store):
    hub.private[REPO] = TOKEN
    for repo in (REPO, "someone/else"):
        with pytest.raises(ModelNotFound):
            prepare(make_store(), spec_of(repo, registered=False))


def test_a_hub_that_does_not_answer_is_a_clear_error(hub, make_store, monkeypatch):
    from huggingface_hub import HfApi

    hub.silent.add(REPO)
    asked = HfApi.model_info
    monkeypatch.setattr(
        HfApi, "model_info", lambda api, *a, **k: asked(api, *a, **{**k, "timeout": 0.2})
    )
    with pytest.raises(ModelLoadFailed, match=r"someone/tiny could not be fetched: \w*Timeout"):
        prepare(make_store())


def test_a_start_without_a_network_serves_what_is_cached(hub, make_store, monkeypatch):
    from huggingface_hub import constants

    prepare(make_store())
    hub.close()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert prepare(make_store()).parameters == 36
    with pytest.raises(ModelLoadFailed, match="someone/other could not be fetched"):
        prepare(make_store(), spec_of("someone/other"))


def test_unloading_a_model_keeps_its_files(hub, make_store):
    store = make_store()

    class Loader(FakeLoader):
        def prepare(self, spec, progress):
            return store.prepare(spec, progress)

    class Registry:
        resolve = functools.partial(spec_of)

    swapper = Swapper(Registry(), Loader(), SwapRules(swap_after_s=0, drain_s=5), wait_s=5)
    try:
        swapper.lease(spec_of()).release()
        hub.requests.clear()
        assert swapper.evict(REPO)
        assert store.is_cached(spec_of())
        swapper.lease(spec_of()).release()
        assert hub.requests == []
    finally:
        swapper.close()


def test_the_hubs_own_name_of_its_folder_wins_over_older_ones():
    environ = {"TRANSFORMERS_CACHE": "/older", "HF_HOME": "/home"}
    assert str(Settings.from_env(environ).hub_cache) == "/older"
    assert str(Settings.from_env(environ | {"HF_HUB_CACHE": "/hub"}).hub_cache) == "/hub"
    assert str(Settings.from_env({"HF_HOME": "/home"}).hub_cache) == "/home/hub"


def test_a_cache_that_other_programs_filled_is_used(tmp_path):
    commit = "0" * 40
    repo = tmp_path / "models--someone--tiny"
    write_files(repo / "snapshots" / commit, model_files())
    write_files(repo / "refs", {"main": commit.encode()})
    environ = {"TRANSFORMERS_CACHE": str(tmp_path), "MODEL_STORE": str(tmp_path / "store")}
    assert ModelStore(Settings.from_env(environ)).cached_hub_repos() == ["someone/tiny"]


@pytest.mark.parametrize(
    ("name", "hub"),
    [
        ("HF_HOME", "elsewhere/hub"),
        ("HF_HUB_CACHE", "elsewhere"),
        ("HUGGINGFACE_HUB_CACHE", "elsewhere"),
        ("TRANSFORMERS_CACHE", "elsewhere"),
    ],
)
def test_the_environment_says_where_downloads_lie(tmp_path, name, hub):
    server = HubServer({REPO: model_files()})
    server.private[REPO] = TOKEN
    environ = {
        "PATH": os.environ["PATH"],
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "MODEL_STORE": str(tmp_path / "store"),
        "HOME": str(tmp_path / "home"),
        name: str(tmp_path / "elsewhere"),
    }
    entry = [{"name": "tiny", "hf_repo": REPO}]
    (tmp_path / "models.json").write_text(json.dumps(entry))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "transformers_api", "pull", "tiny"],
            env=environ | {"MODEL_REGISTRY_PATH": str(tmp_path / "models.json")},
            capture_output=True,
            text=True,
            timeout=50,
        )
    finally:
        server.close()
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / hub).glob("models--*/snapshots/*/model.safetensors"))
    assert not (tmp_path / "home").exists() or not list((tmp_path / "home").rglob("*.safetensors"))
    assert TOKEN not in done.stdout + done.stderr
