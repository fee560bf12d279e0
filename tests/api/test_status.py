"""GET /status: what is resident, coming, queued and running, at any moment."""

from __future__ import annotations

import threading
import time

from tests.fakes import FakeEngine, say
from tests.metrics_app import make_app, post, wait_for
from transformers_api import __version__
from transformers_api.errors import ModelLoadFailed


def status_of(app):
    answer = app.test_client().get("/status")
    assert answer.status_code == 200
    return answer.json


def test_an_empty_server_says_what_it_is_and_what_it_takes(tmp_path):
    app, _ = make_app(tmp_path, max_inflight=3, max_queue=5)
    said = status_of(app)
    assert said["version"] == __version__
    assert (said["state"], said["resident"], said["loading"]) == ("empty", None, None)
    assert said["ready"] is True
    assert said["uptime_s"] >= 0
    assert (said["limits"]["max_inflight"], said["limits"]["max_queue"]) == (3, 5)
    assert said["limits"]["threads"] == 3 + 5 + 32


def test_what_is_resident_running_and_since_when(tmp_path):
    gate = threading.Semaphore(0)
    app, _ = make_app(tmp_path, {"one": FakeEngine(say("abc"), gate=gate)})
    began = time.time()
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": True}
    response = app.test_client().post("/v1/chat/completions", json=body)
    next(iter(response.response))
    said = status_of(app)
    gate.release(100)
    response.close()
    resident = said["resident"]
    assert (resident["model"], resident["device"], resident["dtype"]) == ("one", "cpu", "float32")
    assert (resident["bytes"], resident["running"], resident["leases"]) == (1000, 1, 1)
    assert began - 2 <= resident["since"] <= time.time() + 1
    assert (said["requests"], resident["draining"]) == (1, False)
    wait_for(lambda: status_of(app)["requests"] == 0)


def test_what_is_loading_and_who_waits_for_it(tmp_path):
    app, loader = make_app(tmp_path)
    post(app.test_client(), model="one")
    loader.hold["load", "two"] = threading.Event()
    asking = threading.Thread(target=lambda: post(app.test_client(), model="two"))
    asking.start()
    assert loader.entered["load"].acquire(timeout=10)
    assert loader.entered["load"].acquire(timeout=10)
    said = status_of(app)
    loader.hold["load", "two"].set()
    asking.join(10)
    assert said["state"] == "loading"
    assert said["loading"]["model"] == "two"
    assert 0 <= said["loading"]["progress"] <= 1
    assert said["queued"] == {"two": 1}
    after = status_of(app)
    assert (after["resident"]["model"], after["queued"]) == ("two", {})


def test_why_a_model_could_not_be_loaded(tmp_path):
    app, loader = make_app(tmp_path)
    loader.fail["load"] = ModelLoadFailed("broken weights")
    assert post(app.test_client(), model="one") == 503
    assert status_of(app)["failed"] == {"one": "broken weights"}


def test_it_is_in_the_openapi_document_with_every_field_that_it_has(tmp_path):
    app, _ = make_app(tmp_path)
    post(app.test_client())
    spec = app.test_client().get("/openapi.json").json
    answer = spec["paths"]["/status"]["get"]["responses"]["200"]
    name = answer["content"]["application/json"]["schema"]["$ref"].split("/")[-1]
    said = status_of(app)
    schemas = spec["components"]["schemas"]
    assert set(schemas[name]["properties"]) == set(said)
    assert set(schemas["Resident"]["properties"]) == set(said["resident"])
    assert set(schemas["Limits"]["properties"]) == set(said["limits"])
    assert "text/plain" in spec["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
