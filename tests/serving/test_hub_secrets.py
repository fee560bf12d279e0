"""However a download goes wrong, the token is in no error, no trace and no line of any log."""

from __future__ import annotations

import logging
import traceback
from contextlib import suppress

import pytest

from tests.hub_server import HubServer
from tests.model_folders import model_files
from transformers_api.config.settings import Settings
from transformers_api.errors import ApiError
from transformers_api.serving.models.spec import HubSource, ModelSpec
from transformers_api.serving.models.store import ModelStore

REPO = "someone/tiny"
TOKENS = ("hf_" + "c4n4ry" * 5, "c4n4ry-of-another-kind-of-hub")


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


def fail_all(hub):
    hub.failing |= set(hub.repos[REPO])


def cut(hub):
    hub.breaks["model.safetensors"] = 10
    hub.failing.add("config.json")


def move(hub):
    from huggingface_hub import constants

    constants.ENDPOINT = f"{hub.url}/nowhere"


WAYS = {
    "it is not there": lambda hub: hub.close(),
    "every file is a 500": fail_all,
    "a file arrives damaged": lambda hub: hub.damaged.add("model.safetensors"),
    "a transfer breaks off": cut,
    "gated": lambda hub: hub.gated.add(REPO),
    "the token is not right": lambda hub: hub.private.update({REPO: "hf_anotherone"}),
    "no such repository": lambda hub: hub.repos.clear(),
    "not even a Hub": move,
}


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("way", WAYS)
def test_the_token_is_nowhere(hub, tmp_path, caplog, way, token, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # and back, when it was moved
    WAYS[way](hub)
    settings = Settings(model_store=tmp_path / "store", hf_home=tmp_path / "hub", hf_token=token)
    spec = ModelSpec(name=REPO, source=HubSource(REPO))
    with caplog.at_level(logging.DEBUG), pytest.raises(ApiError) as caught:
        ModelStore(settings).prepare(spec, lambda share, what: None)
    told = [str(caught.value), *traceback.format_exception(caught.value)]
    told += [repr(vars(caught.value)), caplog.text]
    for record in caplog.records:
        with suppress(TypeError):
            told.append(record.getMessage())
    assert told[0]
    assert "c4n4ry" not in "".join(told)


def test_settings_show_no_token(tmp_path):
    settings = Settings(hf_token=TOKENS[0], redis_url="redis://:c4n4ry@127.0.0.1")
    assert "c4n4ry" not in repr(settings)
    assert "c4n4ry" not in str(settings)
