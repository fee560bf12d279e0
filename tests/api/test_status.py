"""GET /status: what is resident, coming, queued and running, at any moment."""

from __future__ import annotations

import threading
import time

from tests.fakes import FakeEngine, say
from tests.metrics_app import make_app, post, wait_for
from transformers_api import __version__
from transformers_api.errors import ModelLoadFailed
from transformers_api.serving.swap.history import LENGTH, SwapHistory


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
    loader.progress = [(0.5, "reading the weights")]
    asking = threading.Thread(target=lambda: post(app.test_client(), model="two"))
    asking.start()
    assert loader.entered["load"].acquire(timeout=30)
    assert loader.entered["load"].acquire(timeout=30)
    said = status_of(app)
    loader.hold["load", "two"].set()
    asking.join(30)
    assert said["state"] == "loading"
    assert said["loading"]["model"] == "two"
    assert (said["loading"]["progress"], said["loading"]["doing"]) == (0.5, "reading the weights")
    assert said["loading"]["stage"] == "loading"
    assert said["loading"]["last_load_s"] is None
    assert 0 <= time.time() - said["loading"]["since"] < 60
    assert said["queued"] == {"two": 1}
    after = status_of(app)
    assert (after["resident"]["model"], after["queued"]) == ("two", {})


def test_why_a_model_could_not_be_loaded(tmp_path):
    app, loader = make_app(tmp_path)
    loader.fail["load"] = ModelLoadFailed("broken weights")
    assert post(app.test_client(), model="one") == 503
    assert status_of(app)["failed"] == {"one": "broken weights"}


def test_files_that_are_fetched_are_another_stage_than_a_load(tmp_path):
    app, loader = make_app(tmp_path)
    loader.hold["prepare", "two"] = threading.Event()
    asking = threading.Thread(target=lambda: post(app.test_client(), model="two"))
    asking.start()
    assert loader.entered["prepare"].acquire(timeout=30)
    said = status_of(app)["loading"]
    loader.hold["prepare", "two"].set()
    asking.join(30)
    assert (said["stage"], said["doing"]) == ("preparing", "preparing")


def test_what_a_model_took_last_time_is_told_when_it_is_loaded_again(tmp_path):
    app, loader = make_app(tmp_path)
    for model in ("one", "two"):
        post(app.test_client(), model=model)
    loader.hold["load", "one"] = threading.Event()
    asking = threading.Thread(target=lambda: post(app.test_client(), model="one"))
    asking.start()
    wait_for(lambda: (status_of(app)["loading"] or {}).get("stage") == "loading")
    said = status_of(app)["loading"]
    loader.hold["load", "one"].set()
    asking.join(30)
    assert said["last_load_s"] == 0.1


def test_the_log_of_swaps_says_what_came_and_what_went(tmp_path):
    app, loader = make_app(tmp_path)
    client = app.test_client()
    post(client, model="one")
    post(client, model="two")
    loader.fail["load", "one"] = ModelLoadFailed(f"broken weights in {tmp_path / 'store'}")
    post(client, model="one")  # which brings "two" back
    wait_for(lambda: len(status_of(app)["swaps"]) == 4)
    assert client.delete("/v1/models/two").status_code == 200
    swaps = status_of(app)["swaps"]
    assert [(s["model"], s["outcome"], s["evicted"]) for s in swaps] == [
        ("one", "loaded", None),
        ("two", "loaded", "one"),
        ("one", "failed", "two"),
        ("two", "loaded", None),
        ("two", "unloaded", None),
    ]
    assert [s["load_s"] for s in swaps] == [0.1, 0.1, None, 0.1, None]
    assert swaps[2]["error"].startswith("broken weights in ")
    assert str(tmp_path) not in swaps[2]["error"]
    assert all(0 <= time.time() - s["at"] < 60 for s in swaps)


def test_the_log_of_swaps_is_bounded():
    history = SwapHistory(clock=lambda: 5.0)
    for number in range(LENGTH + 3):
        history.loaded(f"m{number}", number, None)
    assert [event.model for event in history.events] == [f"m{n}" for n in range(3, LENGTH + 3)]
    assert history.load_s("m0") == 0


def test_memory_of_the_machine_and_of_this_process(tmp_path):
    memory = status_of(make_app(tmp_path)[0])["memory"]
    assert 10_000_000 < memory["process_bytes"] < memory["machine_bytes"]
    assert 0 < memory["free_bytes"] < memory["machine_bytes"]


def test_tokens_are_counted_so_that_a_rate_can_be_shown(tmp_path):
    app, _ = make_app(tmp_path, {"one": FakeEngine(say("abc"))})
    post(app.test_client())
    before = status_of(app)["resident"]
    post(app.test_client())
    after = status_of(app)["resident"]
    assert after["generated_tokens"] - before["generated_tokens"] == 4  # "abc" and its end
    assert after["prompt_tokens"] == 2 * before["prompt_tokens"] > 0


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
    assert set(schemas["Memory"]["properties"]) == set(said["memory"])
    assert set(schemas["Swap"]["properties"]) == set(said["swaps"][0])
    assert set(schemas["Limits"]["properties"]) == set(said["limits"])
    assert "text/plain" in spec["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
