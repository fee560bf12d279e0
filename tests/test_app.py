"""The wiring: readiness, preloading and the way out, without torch."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from tests.fakes import FakeLoader
from transformers_api.app import create_app
from transformers_api.config.settings import SettingError, Settings
from transformers_api.errors import ModelLoadFailed, ServerShuttingDown
from transformers_api.server.readiness import Readiness


@pytest.fixture
def make_app(tmp_path):
    made = []

    def make(loader=None, **settings):
        registry = tmp_path / "models.json"
        registry.write_text(f'[{{"name": "fake", "path": "{tmp_path}"}}]')
        given = {
            "default_model": "fake",
            "include_default_models": False,
            "model_registry_path": registry,
            "model_store": tmp_path / "store",
            "hf_home": tmp_path / "hub",
        } | settings
        app = create_app(Settings(**given), loader or FakeLoader())
        made.append(app.extensions["transformers_api"])
        return app, made[-1]

    yield make
    for services in made:
        services.swapper.close()


def wait_for(condition, limit=2000):
    gate = threading.Event()
    for _ in range(limit):
        if condition():
            return
        gate.wait(0.005)
    pytest.fail("it did not happen")


def test_not_ready_until_the_default_model_is_loaded(make_app):
    loader = FakeLoader()
    loader.hold["load"] = threading.Event()
    app, _ = make_app(loader)
    client = app.test_client()
    assert loader.entered["load"].acquire(timeout=30)
    answer = client.get("/readyz")
    assert (answer.status_code, answer.json["reason"]) == (503, "Loading fake")
    assert client.get("/healthz").status_code == 200
    loader.hold["load"].set()
    wait_for(lambda: client.get("/readyz").status_code == 200)


def test_not_ready_with_the_reason_when_the_default_model_cannot_be_loaded(make_app):
    loader = FakeLoader()
    loader.fail["prepare"] = ModelLoadFailed("the weights are torn")
    app, _ = make_app(loader)
    client = app.test_client()
    wait_for(lambda: client.get("/readyz").json["reason"] == "the weights are torn")
    assert client.get("/readyz").status_code == 503


def test_ready_at_once_without_preloading(make_app):
    app, services = make_app(preload_model=False)
    assert app.test_client().get("/readyz").status_code == 200
    assert services.swapper.status().model is None


def test_a_default_model_that_is_not_registered_stops_the_start(make_app):
    with pytest.raises(SettingError, match=r"DEFAULT_MODEL='nothing'.*PRELOAD_MODEL=false"):
        make_app(default_model="nothing")
    make_app(default_model="nothing", preload_model=False)


def test_not_ready_once_the_engine_thread_has_ended():
    thread = SimpleNamespace(is_alive=True)
    readiness = Readiness(None, thread)
    assert readiness() == (True, "ready")
    thread.is_alive = False
    ready, reason = readiness()
    assert not ready
    assert "engine" in reason


def test_draining_refuses_new_work_at_once_and_ends_what_is_left_in_time(make_app):
    app, services = make_app()
    client = app.test_client()
    wait_for(lambda: client.get("/readyz").status_code == 200)
    lease = services.swapper.lease(services.registry.resolve("fake"))
    engine = lease.model.engine
    services.drain(2.0)  # seconds, which are all kept for the last words
    assert client.get("/readyz").status_code == 503
    body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
    refused = client.post("/v1/chat/completions", json=body)
    assert (refused.status_code, refused.json["error"]["code"]) == (503, "server_shutting_down")
    assert engine.closed.wait(30)
    assert isinstance(engine.closed_with, ServerShuttingDown)
    lease.release()
