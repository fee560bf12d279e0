"""Too many requests, requests that take too long, and clients that leave, on every kind of route."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import openai
import pytest

from tests.api.conftest import events
from tests.api.test_sdk import MESSAGES, sdk  # noqa: F401  # a fixture
from tests.fakes import FakeEngine, say
from transformers_api.api.http.disconnect import Watch
from transformers_api.errors import ServerShuttingDown

WAIT_S = 30.0
BEGUN_S = 2.0  # within which a stream begins, on a busy machine too


@pytest.fixture
def pool():
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def watcher():
    """Collects what a client that leaves would call."""
    return Leaving()


class Leaving:
    def __init__(self):
        self.watched = threading.Semaphore(0)
        self.leave = []

    def watch(self, environ, on_gone):
        self.leave.append(on_gone)
        self.watched.release()
        return Watch(lambda: None)


@pytest.fixture
def held(serve):
    """Make an application that answers nothing before its gate is set."""
    gates = []

    def build(**settings):
        gates.append(threading.Event())
        return serve(FakeEngine(say("Hello"), gate=gates[-1]), **settings), gates[-1]

    yield build
    for gate in gates:
        gate.set()


def until(condition):
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "did not come true"


REQUESTS = {
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/completions": {"prompt": "Hi"},
    "/generate": {"prompt": "Hi"},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [65]},
    "/chat/stream": {
        "messages": [{"role": "system", "content": "S"}, *MESSAGES],
        "trace_layer": 0,
    },
    "/inspect/tokens": {"prompt": "Hi"},
    "/inspect/logit_lens": {"prompt": "Hi"},
    "/v1/models": {"model": "two"},
    "/load_model": {"model_name": "two"},
}


@pytest.mark.parametrize("path", REQUESTS)
def test_one_request_too_many_is_429_on_every_route(pool, held, watcher, path):
    served, gate = held(max_inflight=1, max_queue=1)
    first = [pool.submit(served.chat) for _ in range(2)]
    for _ in first:
        assert watcher.watched.acquire(timeout=WAIT_S)
    response = served.client.post(path, json=REQUESTS[path])
    assert response.status_code == 429, response.get_data(as_text=True)
    assert 1 <= int(response.headers["Retry-After"]) <= 120
    body = response.get_json()
    if path.startswith("/v1"):
        assert body["error"]["code"] == "queue_full"
        assert body["error"]["type"] == "rate_limit_error"
    gate.set()
    assert [call.result(WAIT_S).status_code for call in first] == [200, 200]
    assert served.chat().status_code == 200


def test_refusals_and_questions_after_the_server_take_no_place(pool, held, watcher):
    served, gate = held(max_inflight=1, max_queue=0)
    running = pool.submit(served.chat)
    assert watcher.watched.acquire(timeout=WAIT_S)
    for path in ("/health", "/healthz", "/readyz", "/v1/models", "/"):
        assert served.client.get(path).status_code == 200
    assert served.chat(temperature="hot").status_code == 400
    assert served.chat(model="none").status_code == 404
    gate.set()
    assert running.result(WAIT_S).status_code == 200


def test_an_answer_that_takes_too_long_is_504(held):
    served, gate = held(request_timeout_s=0.05)
    response = served.chat()
    assert response.status_code == 504
    error = response.get_json()["error"]
    assert (error["code"], error["type"]) == ("deadline_exceeded", "server_error")
    gate.set()
    assert served.swapper.status().leases == 0
    assert len(served.services.admission) == 0


def test_a_stream_that_takes_too_long_ends_with_an_error(serve):
    gate = threading.Semaphore(3)
    served = serve(FakeEngine(say("Hello"), gate=gate), request_timeout_s=BEGUN_S)
    read = events(served.chat(stream=True))
    assert read.payloads[-1]["error"]["code"] == "deadline_exceeded"
    assert not read.done
    assert served.swapper.status().leases == 0


def test_waiting_for_a_model_counts(serve):
    served = serve(request_timeout_s=0.05)
    served.loader.hold["load"] = threading.Event()
    assert served.chat().get_json()["error"]["code"] == "deadline_exceeded"
    served.loader.hold["load"].set()


@pytest.mark.parametrize("path", ["/v1/models", "/load_model"])
def test_a_load_goes_on_when_its_client_has_left(serve, pool, watcher, path):
    served = serve()
    served.loader.hold["load"] = threading.Event()
    call = pool.submit(served.client.post, path, json=REQUESTS[path])
    assert served.loader.entered["load"].acquire(timeout=WAIT_S)
    watcher.leave[0]()
    assert call.result(WAIT_S).status_code == 499
    served.loader.hold["load"].set()
    served.swapper.load("two", timeout=WAIT_S)
    assert served.loader.count("load", "owner/second") == 1


@pytest.mark.parametrize("path", ["/v1/models/fake", "/models/fake/unload"])
def test_an_unload_goes_on_when_its_client_has_left(pool, held, watcher, path):
    served, gate = held()
    served.swapper.load("fake")
    chat = pool.submit(served.chat)
    assert watcher.watched.acquire(timeout=WAIT_S)
    until(lambda: served.engine.submitted)
    call: Future = pool.submit(served.client.delete, path)
    assert watcher.watched.acquire(timeout=WAIT_S)
    watcher.leave[1]()
    assert call.result(WAIT_S).status_code == 499
    gate.set()
    assert chat.result(WAIT_S).status_code == 200
    until(lambda: served.swapper.status().model is None)


def test_what_ends_with_the_server_is_an_exception_of_the_sdk(serve, sdk):  # noqa: F811
    gate = threading.Semaphore(2)
    client = sdk(FakeEngine(say("Hello"), gate=gate))
    app = client._client._transport.app
    admission = app.extensions["transformers_api"].admission
    with client.chat.completions.create(model="fake", messages=MESSAGES, stream=True) as stream:
        next(stream)
        admission.end_all(ServerShuttingDown("The server is shutting down"))
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "server_shutting_down"


def test_a_reader_who_falls_behind_is_told_so_at_once(serve):
    """The engine has ended its sequence: what was made before is not read to its end first."""
    served = serve()
    begun = []
    submit = served.engine.submit

    def remembered(*requests, **options):
        begun.append(submit(*requests, **options))
        return begun[-1]

    served.engine.submit = remembered
    response = served.chat(stream=True)
    begun[0].overrun = True
    read = events(response)
    assert read.payloads[-1]["error"]["code"] == "slow_reader"
    assert len(read.payloads) < 4
    assert not read.done


@pytest.mark.parametrize(
    ("setting", "code"),
    [("client_max_inflight", "rate_limited"), ("cluster_max_inflight", "queue_full")],
)
def test_more_in_flight_than_there_may_be_is_a_429_until_one_ends(pool, held, setting, code):
    served, gate = held(**{setting: 1})
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    first = pool.submit(served.client.post, "/v1/chat/completions", json=body)
    until(lambda: served.engine.submitted)  # it has taken all its places
    refused = served.app.test_client().post("/v1/chat/completions", json=body)
    assert refused.status_code == 429
    assert refused.json["error"]["code"] == code
    assert 1 <= int(refused.headers["Retry-After"]) <= 120
    gate.set()
    assert first.result(30).status_code == 200
    for _ in range(2):
        streamed = served.client.post("/v1/chat/completions", json={**body, "stream": True})
        assert streamed.text.endswith("data: [DONE]\n\n")
        streamed.close()
