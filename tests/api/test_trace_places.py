"""How many answers are traced at once, who waits, and what becomes of a trace that may be left out."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.api.conftest import events
from tests.api.test_streams import Client
from tests.fakes import FakeEngine, fake_model, say
from tests.metrics_app import wait_for
from transformers_api.api.http.disconnect import DisconnectWatcher
from transformers_api.errors import EngineFailed

ROUTES = ["chat", "complete"]
BEGUN_S = 2.0  # within which a stream begins, on a busy machine too


@pytest.fixture
def watcher(request):
    """Of the test that says when its client leaves; else the one that watches."""
    return Client() if "client" in request.fixturenames else DisconnectWatcher()


@pytest.fixture
def client(watcher):
    return watcher


def post(served, route, stream=False, **fields):
    return getattr(served, route)("Hi", stream=stream, **fields)


# -- how many at once

MUCH = {"resid_norms": True}  # a whole place; one layer or none takes an eighth


def test_one_too_many_is_told_to_come_again(serve):
    gate = threading.Event()
    served = serve(FakeEngine(say("ab"), gate=gate), trace_max_requests=2, inspect_queue=0)
    running = [served.chat(stream=True, trace=MUCH) for _ in range(2)]
    refused = served.chat(trace=MUCH)
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert refused.get_json()["error"]["code"] == "trace_busy"
    gate.set()
    assert served.chat().status_code == 200
    for response in running:
        assert events(response).text() == "ab"
    assert served.chat(trace=MUCH).status_code == 200


def test_the_place_is_free_when_the_last_token_has_been_read(serve):
    """Before the connection is closed: who asks one thing after the other is never too early."""
    served = serve(FakeEngine(say("ab")), trace_max_requests=1, inspect_queue=0)
    response = served.chat(stream=True, trace=MUCH)
    chunks = iter(response.response)
    while next(chunks) != b"data: [DONE]\n\n":
        pass
    assert served.chat(trace=MUCH).status_code == 200
    response.close()
    assert served.chat(trace=MUCH).status_code == 200


def test_a_client_that_leaves_gives_its_place_back(serve, client):
    served = serve(
        FakeEngine(say("ab"), gate=threading.Event()), trace_max_requests=1, inspect_queue=0
    )
    response = served.chat(stream=True, trace=MUCH)
    assert served.chat(trace=MUCH).status_code == 429
    client.leave[0]()
    assert not events(response).done
    served.engine.gate.set()
    assert served.chat(trace=MUCH).status_code == 200


def test_a_stream_that_nobody_reads_gives_its_place_back(serve):
    served = serve(
        FakeEngine(say("ab"), gate=threading.Event()), trace_max_requests=1, inspect_queue=0
    )
    served.chat(stream=True, trace=MUCH).close()
    served.engine.gate.set()
    assert served.chat(trace=MUCH).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_gives_the_place_back(serve, stream):
    engine = FakeEngine(say("abc"), error=EngineFailed("The step failed"), error_after=1)
    served = serve(engine, trace_max_requests=1, inspect_queue=0)
    response = served.chat(stream=stream, trace=MUCH)
    if stream:
        assert [p["error"]["code"] for p in events(response).payloads if "error" in p]
    else:
        assert response.status_code == 500
    engine.error = None
    assert served.chat(trace=MUCH).status_code == 200


@pytest.mark.parametrize(
    ("trace", "at_once"),
    [
        ({}, 8),
        ({"layers": [1], "attn": "u8"}, 8),
        ({"layers": [1], "attn": "topk"}, 8),
        ({"layers": [0, 1], "attn": "u8"}, 1),
        ({"layers": [1], "attn": "json"}, 1),
        ({"lens": {"layers": "all"}}, 1),
        (MUCH, 1),
    ],
)
def test_small_traces_take_an_eighth_of_a_place(serve, trace, at_once):
    engine = FakeEngine(say("ab"), gate=threading.Event())
    served = serve(engine, trace_max_requests=1, inspect_queue=0)
    running = [served.chat(stream=True, trace=trace) for _ in range(at_once)]
    assert {response.status_code for response in running} == {200}
    assert served.chat(trace=trace).status_code == 429
    engine.gate.set()
    assert {events(response).text() for response in running} == {"ab"}


def test_whoever_is_one_too_many_waits_for_a_place(serve):
    engine = FakeEngine(say("ab"), gate=threading.Event())
    served = serve(engine, trace_max_requests=1)
    first = served.chat(stream=True, trace=MUCH)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(served.chat, trace=MUCH) for _ in range(3)]
        wait_for(lambda: len(served.services.admission) == 4)
        assert not [other for other in others if other.done()]
        engine.gate.set()
        assert events(first).text() == "ab"
        assert [other.result(20).status_code for other in others] == [200] * 3


def test_a_wait_for_a_place_ends_with_the_time_of_the_request(serve):
    engine = FakeEngine(say("ab"), gate=threading.Event())
    served = serve(engine, trace_max_requests=1, request_timeout_s=BEGUN_S)
    first = served.chat(stream=True, trace=MUCH)
    late = served.chat(trace=MUCH)
    assert (late.status_code, late.get_json()["error"]["code"]) == (504, "deadline_exceeded")
    engine.gate.set()
    first.close()
    assert served.chat(trace=MUCH).status_code == 200


# -- a trace that may be left out


def no_room(serve):
    """A server whose one place for a trace is taken; its queue has room."""
    engine = FakeEngine(say("ab"), gate=threading.Event())
    served = serve(engine, trace_max_requests=1)
    first = served.chat(stream=True, trace=MUCH)
    engine.gate = None
    return served, first


def headers_of(response):
    """The first trace of a stream, and how many there are."""
    traces = [piece["trace"] for piece in events(response).payloads if "trace" in piece]
    return traces[0].get("header", traces[0]), len(traces)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_without_room_the_answer_goes_on_untraced_and_says_so(serve, route, stream):
    served, first = no_room(serve)
    plain = post(served, route, stream=stream)
    response = post(served, route, stream=stream, trace={**MUCH, "required": False})
    assert response.status_code == 200
    if stream:
        header, count = headers_of(response)
        assert count == 1
        assert events(plain).text() == "ab"
    else:
        traced = response.get_json()["choices"][0]["trace"]
        header, steps = traced["header"], traced["steps"]
        assert steps == []
        assert "trace" not in response.get_json()["usage"]
    assert (header["noted"], header["code"], header["index"]) == (False, "trace_busy", 0)
    assert header["reason"].startswith("As many requests are being traced")
    first.close()


@pytest.mark.parametrize("route", ROUTES)
def test_with_room_it_is_the_trace_that_it_would_have_been(served, route):
    asked = [
        post(served, route, stream=True, seed=1, trace=trace)
        for trace in (
            {"layers": [1]},
            {"layers": [1], "required": False},
        )
    ]
    required, optional = ([p.get("trace") for p in events(a).payloads] for a in asked)
    assert optional == required
    assert headers_of(post(served, route, stream=True, trace={"required": False}))[0]["noted"]


@pytest.mark.parametrize(
    ("trace", "code"),
    [
        ({"layers": [9]}, None),
        ({"router": True}, "model_not_capable"),
    ],
)
def test_what_the_model_cannot_show_is_left_out_where_it_is_not_required(served, trace, code):
    response = served.chat(stream=True, trace={**trace, "required": False})
    header, count = headers_of(response)
    assert (header["noted"], header["code"], count) == (False, code, 1)
    assert header["reason"]
    assert served.chat(trace=trace).status_code == 400


def test_an_answer_that_may_do_without_comes_from_a_server_that_does_not_inspect(serve):
    served = serve(inspect_enabled=False)
    served.loader.build = lambda spec: fake_model(spec, served.engine, inspector=None)
    header, _ = headers_of(served.chat(stream=True, trace={"required": False}))
    assert header["code"] == "inspect_disabled"
