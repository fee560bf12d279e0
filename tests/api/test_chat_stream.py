"""POST /chat/stream, and the dialect of errors that it shares with /inspect/*."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import Any

import pytest

from tests.fake_inspection import FakeInspector, fake_anatomy, fake_layer
from tests.fakes import FakeEngine, fake_model, fake_spec, say
from transformers_api.errors import EngineFailed
from transformers_api.serving.limits.token_bucket import Rate

URL = "/chat/stream"
HI = [{"role": "user", "content": "Hi"}]
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Stream:
    """The named events of an answer."""

    events: list[tuple[str, dict[str, Any]]]
    pings: int

    def of(self, name: str) -> list[dict[str, Any]]:
        return [data for found, data in self.events if found == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def ask(served, **fields):
    return served.client.post(URL, json={"messages": HI, "trace_layer": 0, **fields})


def read(response) -> Stream:
    assert response.status_code == 200, response.get_data(as_text=True)
    body = response.get_data(as_text=True)
    response.close()
    assert body.endswith("\n\n")
    frames = body[:-2].split("\n\n")
    found = []
    for frame in frames:
        if frame != ": ping":
            name, data = frame.split("\n")
            assert name.startswith("event: ")
            assert data.startswith("data: ")
            found.append((name[7:], json.loads(data[6:])))
    return Stream(found, frames.count(": ping"))


def saying(serve, text, **settings):
    return serve(FakeEngine(say(text)), **settings)


# The stream


def test_every_token_is_followed_by_its_trace_and_the_last_event_is_done(serve):
    stream = read(ask(saying(serve, "Ja!")))
    assert stream.names == ["token", "trace"] * 3 + ["done"]
    assert [token["token_text"] for token in stream.of("token")] == ["J", "a", "!"]
    assert [token["step"] for token in stream.of("token")] == [0, 1, 2]
    assert [trace["step"] for trace in stream.of("trace")] == [0, 1, 2]
    assert stream.of("done")[0]["reply"] == "Ja!"


def test_a_token_has_the_documented_fields_first_and_then_ours(serve):
    (token,) = read(ask(saying(serve, "J"))).of("token")
    size = len(PROMPT) - 3 * len("<|im_start|>") + 3 + 2  # the special ones are one token each
    assert list(token) == ["step", "token_id", "token_text", "token_display", "position"]
    assert (token["token_id"], token["token_display"]) == (ord("J"), "J")
    assert token["position"] == size


def test_a_trace_has_the_documented_fields_first_and_then_ours(serve):
    (trace,) = read(ask(saying(serve, "J"))).of("trace")
    assert list(trace)[:4] == ["step", "entropy", "topk", "attn"]
    assert {"layer", "key_start", "model"} <= trace.keys()
    assert len(trace["topk"]) == 10
    assert trace["topk"][0].keys() == {"token_id", "token_text", "token_display", "prob"}
    assert trace["entropy"] == 1.0  # of what was drawn from
    model = trace["model"]
    assert model["entropy"] == 1.25  # of the model itself
    assert (
        model["surprisal"] == pytest.approx(-model["logprob"]) == pytest.approx(0.51083, abs=1e-4)
    )
    assert (model["prob"], model["rank"]) == (0.6, 0)
    assert (model["topk"][0]["token_id"], model["topk"][0]["prob"]) == (ord("J"), 0.6)


def test_a_row_of_attention_has_a_number_for_every_token_before(serve):
    stream = read(ask(saying(serve, "Jaja"), trace_layer=1))
    start = stream.of("token")[0]["position"]
    for trace in stream.of("trace"):
        assert trace["layer"] == 1
        assert len(trace["attn"]) == 4
        assert {len(row) for row in trace["attn"]} == {start + trace["step"]}
        assert all(sum(row) == pytest.approx(1, abs=1e-3) for row in trace["attn"])
        assert all(round(weight, 5) == weight for row in trace["attn"] for weight in row)


def test_more_layers_stand_beside_the_first_one(serve):
    stream = read(ask(saying(serve, "J"), trace_layer=1, trace={"layers": [0, 1]}))
    (trace,) = stream.of("trace")
    assert trace["layer"] == 1
    assert list(trace["attn_layers"]) == ["0"]
    assert trace["attn_layers"]["0"] != trace["attn"]
    only = read(ask(saying(serve, "J"), trace_layer=0)).of("trace")[0]
    assert trace["attn_layers"]["0"] == only["attn"]
    assert "attn_layers" not in only


def test_a_trace_without_layers_has_no_attention(serve):
    served = saying(serve, "J")
    response = served.client.post(URL, json={"messages": HI, "trace": {"topk": 2}})
    (trace,) = read(response).of("trace")
    assert (trace["layer"], trace["attn"]) == (None, [])
    assert len(trace["topk"]) == 2


def test_bytes_are_shown_as_themselves_or_by_their_number(serve):
    stream = read(ask(saying(serve, "é\n~")))
    shown = [(token["token_text"], token["token_display"]) for token in stream.of("token")]
    assert shown == [("�", r"\xc3"), ("�", r"\xa9"), ("\n", r"\x0a"), ("~", "~")]
    assert stream.of("done")[0]["reply"] == "é\n~"


def test_the_reply_is_stripped(serve):
    assert read(ask(saying(serve, "\n Ja \n"))).of("done")[0]["reply"] == "Ja"


def test_done_says_why_it_ended_and_what_it_took(serve):
    stream = read(ask(saying(serve, "Jaja")))
    (done,) = stream.of("done")
    assert done["finish_reason"] == "stop"
    assert done["completion_id"].startswith("chatcmpl-")
    usage = done["usage"]
    assert usage["prompt_tokens"] == stream.of("token")[0]["position"]
    assert usage["completion_tokens"] == 5  # the end is one too
    sent = sum(len(json.dumps(trace, separators=(",", ":"))) for trace in stream.of("trace"))
    assert usage["trace"]["bytes"] == pytest.approx(sent, rel=0.05)
    assert usage["trace"]["ms"] >= 0
    (done,) = read(ask(saying(serve, "Jaja"), max_new_tokens=2)).of("done")
    assert (done["finish_reason"], done["usage"]["completion_tokens"]) == ("length", 2)


def test_no_new_tokens_give_done_alone(serve):
    served = saying(serve, "Jaja")
    stream = read(ask(served, max_new_tokens=0))
    assert stream.names == ["done"]
    assert stream.of("done")[0]["reply"] == ""
    assert stream.of("done")[0]["finish_reason"] == "length"
    assert served.engine.submitted == []
    assert served.swapper.status().leases == 0


def test_the_token_that_ends_the_answer_is_shown_when_asked_for(serve):
    stream = read(ask(saying(serve, "J"), trace={"specials": True}))
    assert stream.names == ["token", "trace"] * 2 + ["done"]
    assert stream.of("token")[1]["token_text"] == ""
    assert stream.of("done")[0]["reply"] == "J"


def test_tokens_of_a_stop_string_come_at_once_and_only_the_reply_is_cut(serve):
    gate = threading.Semaphore(1)
    served = serve(FakeEngine(say("Ja END more"), gate=gate), keepalive_s=20)
    response = ask(served, stop=" END")
    chunks = response.iter_encoded()
    for character in "Ja E":  # nothing of " E" may be text yet
        token, _trace = next(chunks), next(chunks)
        assert json.loads(token.split(b"data: ")[1])["token_text"] == character
        gate.release()
    for _ in range(40):
        gate.release()
    rest = b"".join(chunks).decode()
    response.close()
    assert rest.count("event: token") == 2  # N and D
    done = json.loads(rest.rsplit("data: ", 1)[1])
    assert (done["reply"], done["finish_reason"]) == ("Ja", "stop")


def test_meta_comes_first_when_asked_for(serve):
    stream = read(ask(saying(serve, "J"), trace={"meta": True}))
    assert stream.names == ["meta", "token", "trace", "done"]
    (meta,) = stream.of("meta")
    assert {"prompt", "model", "layers", "heads", "kv_heads", "units"} <= meta.keys()
    assert (meta["layers"], meta["heads"], meta["kv_heads"]) == (2, 4, 2)
    assert len(meta["prompt"]["token_ids"]) == stream.of("token")[0]["position"]
    assert "".join(meta["prompt"]["tokens"][1:5]) == "user"


def test_a_quiet_stream_has_signs_of_life(serve):
    gate = threading.Event()
    served = serve(FakeEngine(say("Ja"), gate=gate), keepalive_s=0.05)
    response = ask(served)
    chunks = response.iter_encoded()
    assert next(chunks) == b": ping\n\n"
    gate.set()
    rest = b"".join(chunks)
    response.close()
    assert rest.count(b"event: token") == 2


def test_an_error_after_the_first_byte_is_an_event_and_no_done(serve):
    engine = FakeEngine(say("Jaja"), error=EngineFailed("It broke"), error_after=2)
    served = serve(engine)
    stream = read(ask(served))
    assert stream.names == ["token", "trace"] * 2 + ["error"]
    assert stream.of("error") == [{"error": "It broke", "code": "engine_failed"}]
    assert served.swapper.status().leases == 0


def test_it_is_sent_as_the_original_sent_it(serve):
    response = ask(saying(serve, "J"))
    assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert response.headers["Cache-Control"] == "no-cache"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert b"[DONE]" not in response.get_data()


def test_a_client_that_leaves_gives_everything_back(serve):
    served = serve(
        FakeEngine(say("Ja" * 50), gate=threading.Semaphore(2)),
        trace_max_requests=1,
        inspect_queue=0,
    )
    response = ask(served)
    next(response.iter_encoded())
    response.close()
    assert served.engine.aborted
    assert served.swapper.status().leases == 0
    served.engine.gate = None
    assert ask(served).status_code == 200  # its place among the traced is free again


# What is asked of the engine


def test_the_documented_defaults(serve):
    served = saying(serve, "J")
    ask(served).close()
    params = served.params()
    assert (params.max_tokens, params.temperature, params.top_k) == (256, 0.9, 50)
    assert (params.seed, params.top_p) == (42, 1.0)


def test_null_as_top_k_keeps_all_and_other_nulls_mean_default(serve):
    served = saying(serve, "J")
    ask(served, top_k=None, temperature=None, model=None, stop=None, trace=None).close()
    assert (served.params().top_k, served.params().temperature) == (0, 0.9)


def test_temperature_0_is_greedy_and_its_distribution_is_one_token(serve):
    (trace,) = read(ask(saying(serve, "J"), temperature=0)).of("trace")
    assert trace["entropy"] == 0
    assert trace["topk"][0]["prob"] == 1
    assert trace["model"]["entropy"] == 1.25


def test_the_registry_may_have_other_defaults_and_stops(serve):
    generation = {"temperature": 0.5, "max_tokens": 7, "stop": "<end>"}
    engine = FakeEngine(say("Ja<end>nein"))
    served = serve(engine, specs=(fake_spec("fake", generation=generation),))
    stream = read(ask(served))
    assert (served.params().max_tokens, served.params().temperature) == (7, 0.5)
    assert stream.of("done")[0]["reply"] == "Ja"
    ask(served, temperature=0.25, max_new_tokens=3, stop="x").close()
    assert (served.params().max_tokens, served.params().temperature) == (3, 0.25)


def test_a_default_length_is_cut_and_one_that_was_asked_for_is_refused(serve):
    served = serve(FakeEngine(say("J"), max_model_len=100))
    stream = read(ask(served))
    assert served.params().max_tokens == 100 - stream.of("done")[0]["usage"]["prompt_tokens"]
    body = refused(ask(served, max_new_tokens=200))
    assert "maximum context length is 100" in body["detail"]
    assert body["code"] == "context_length_exceeded"


def test_a_window_that_slides_takes_more_than_it_sees(serve):
    engine = FakeEngine(say("J"), max_model_len=4096)
    engine.context_overflow = "slide"
    served = serve(engine)
    assert ask(served, max_new_tokens=4000).status_code == 200
    text = refused(ask(served, max_new_tokens=4097))["detail"]
    assert text == "max_new_tokens must be at most 4096 for this model"


# Refusals, in their order


def refused(response, status=422):
    assert response.status_code == status, response.get_data(as_text=True)
    assert response.mimetype == "application/json"
    return response.get_json()


@pytest.mark.parametrize(
    ("fields", "detail"),
    [
        ({"trace_layer": None}, "trace_layer is required"),
        ({"messages": []}, "messages must not be empty"),
        ({"messages": None}, "messages is required"),
        ({"messages": "Hi"}, "messages must be a list"),
        (
            {"messages": [{"role": "tool", "content": "Hi"}]},
            "messages[0].role must be one of 'system', 'user', 'assistant'",
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content is required"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content must be a string"),
        ({"trace_layer": "0"}, "trace_layer must be an integer"),
        ({"trace_layer": 0.0}, "trace_layer must be an integer"),
        ({"trace_layer": 2}, "trace_layer must be in [0, 1]"),
        ({"trace_layer": -1}, "trace_layer must be in [0, 1]"),
        ({"max_new_tokens": -1}, "max_new_tokens must be an integer from 0 to 16 777 216"),
        ({"temperature": -0.1}, "temperature must be a number from 0 to 100"),
        ({"top_k": 0}, "top_k must be an integer from 1 to 2 147 483 647"),
        ({"top_p": 1.1}, "top_p must be a number from 0 to 1"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"stop": [""]}, "stop[0] must have from 1 to 256 characters"),
        ({"trace": []}, "trace must be an object"),
    ],
)
def test_a_wrong_field_is_422_and_named(serve, fields, detail):
    assert refused(ask(serve(), **fields)) == {"detail": detail}


@pytest.mark.parametrize("url", [URL, "/inspect/full_attn"])
@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"a": NaN}', b"\xff"])
def test_a_body_that_is_no_object_is_422(serve, url, body):
    assert refused(serve().client.post(url, data=body)).keys() == {"detail"}


def test_unknown_fields_are_ignored(serve):
    assert ask(saying(serve, "J"), stream=True, foo=1).status_code == 200


def test_what_is_not_the_clients_fault_has_an_error_and_a_code(serve):
    served = serve()
    body = refused(ask(served, model="nope"), 404)
    assert body == {"error": "Model 'nope' not found", "code": "model_not_found"}
    body = refused(served.client.get(URL), 405)
    assert body == {"error": f"GET is not allowed for {URL}", "code": "method_not_allowed"}
    for url in ("/inspect", "/inspect/nope", "/chat/stream/nope"):
        body = refused(served.client.get(url), 404)
        assert body == {"error": f"Unknown URL: GET {url}", "code": "not_found"}
    assert served.client.get("/chat").get_json() == {"detail": "Unknown URL: GET /chat"}


def test_a_model_for_completions_only_is_501_and_evicts_nothing(serve):
    served = serve(specs=(fake_spec("base", chat="off"),))
    ask(served).close()
    assert refused(ask(served, model="base"), 501)["code"] == "chat_completions_not_available"
    assert served.swapper.status().model == "fake"


def test_inspection_that_is_off_is_403(serve):
    body = refused(ask(serve(inspect_enabled=False)), 403)
    assert body == {"error": "Inspection is disabled on this server", "code": "inspect_disabled"}


def test_a_server_that_is_starting_is_503(serve):
    served = serve(ready=lambda: (False, "Loading fake"))
    hold = served.loader.hold["load"] = threading.Event()
    served.swapper.load("fake", wait=False)
    assert served.loader.entered["load"].acquire(timeout=30)
    response = ask(served)
    body = refused(response, 503)
    assert body == {"error": "Model not ready yet, please retry", "code": "model_loading"}
    assert response.headers["Retry-After"] == "1"
    hold.set()


def test_a_start_that_failed_is_tried_again(serve):
    served = serve(FakeEngine(say("J")), ready=lambda: (False, "It does not fit"))
    assert read(ask(served)).of("done")[0]["reply"] == "J"


@pytest.fixture
def limited(serve):
    """One request, then one more in each minute; the clock stands still."""
    served = saying(serve, "J", rates={"requests": Rate(1, 1)})
    served.services.limits.strategy.clock = lambda: 0.0
    return served


def test_who_asks_too_often_is_told_when_to_come_again(limited):
    assert ask(limited).status_code == 200
    response = ask(limited)
    body = refused(response, 429)
    assert body == {"error": "Rate limit exceeded", "code": "rate_limited"}
    assert response.headers["Retry-After"] == "60"


def test_each_address_has_a_bucket_of_its_own(limited):
    def post(address):
        body = {"messages": HI, "trace_layer": 0, "max_new_tokens": 0}
        return limited.client.post(
            URL, json=body, environ_overrides={"REMOTE_ADDR": address}
        ).status_code

    addresses = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "192.0.2.1"]
    assert [post(address) for address in addresses] == [200, 200, 200, 429, 429]


def test_other_routes_are_not_limited(limited):
    for _ in range(3):
        assert limited.chat().status_code == 200


def test_a_wrong_body_does_not_use_up_the_rate(limited):
    for _ in range(5):
        refused(ask(limited, messages=[]))
    assert ask(limited).status_code == 200


def test_size_counts_the_bytes_of_the_whole_conversation_as_the_model_reads_it(serve):
    served = saying(serve, "J", max_prompt_bytes=len(PROMPT) + 2)
    assert ask(served, messages=[{"role": "user", "content": "Hié"}]).status_code == 200
    body = refused(ask(served, messages=[{"role": "user", "content": "Hié!"}]), 413)
    size = len(PROMPT) + 2
    assert body == {
        "error": f"Prompt too large: {size + 1} bytes (max {size})",
        "code": "prompt_too_large",
    }


def test_the_documented_size_is_16_kilobytes(serve):
    messages = [{"role": "user", "content": "x" * 20000}]
    body = refused(ask(serve(), messages=messages), 413)
    size = 20000 + len(PROMPT) - len("Hi")
    assert body["error"] == f"Prompt too large: {size} bytes (max 16384)"


def test_the_checks_come_in_the_documented_order(limited):
    long = [{"role": "user", "content": "x" * 20000}]
    assert ask(limited, messages=long, trace_layer=9).status_code == 413  # size, then range
    assert ask(limited, messages=long, trace_layer=9).status_code == 429  # rate, then size
    assert ask(limited, messages=long, trace_layer="9").status_code == 422  # the body, then rate


def looked_into(serve, **anatomy):
    """A server whose model is made otherwise."""
    served = serve(FakeEngine(say("J")))
    inspector = FakeInspector(fake_anatomy(**anatomy))
    served.loader.build = lambda spec: fake_model(spec, served.engine, inspector=inspector)
    return served


def test_a_model_without_attention_shows_everything_else(serve):
    served = looked_into(
        serve,
        model_type="mamba",
        traces_attention=False,
        attention=tuple(fake_layer(i, type="mamba", available=False) for i in range(2)),
    )
    body = refused(ask(served))
    assert body == {
        "detail": "model type mamba has no attention weights",
        "code": "attention_unavailable",
    }
    response = served.client.post(URL, json={"messages": HI, "trace": {}})
    assert read(response).names == ["token", "trace", "done"]


def test_a_trace_that_is_too_large_is_refused_before_the_first_byte(serve):
    served = serve(trace_max_bytes_per_token=2000)
    assert refused(ask(served))["detail"].startswith("trace too large: 4 heads x ")
    assert served.engine.submitted == []


def test_no_more_requests_are_traced_at_once_than_allowed(serve):
    gate = threading.Event()
    served = serve(FakeEngine(say("J"), gate=gate), trace_max_requests=1, inspect_queue=0)
    first = ask(served)
    response = ask(served)
    assert refused(response, 429)["code"] == "trace_busy"
    assert response.headers["Retry-After"] == "1"
    gate.set()
    assert read(first).of("done")
    assert ask(served).status_code == 200


def test_the_answer_is_what_it_would_have_been_on_another_route(serve):
    served = serve()
    stream = read(ask(served, seed=5))
    said = served.chat("Hi", seed=5).get_json()["choices"][0]["message"]["content"]
    assert stream.of("done")[0]["reply"] == said


# The documents


def test_the_openapi_document_shows_the_dialect(serve):
    paths = serve().client.get("/openapi.json").get_json()["paths"]
    answers = paths[URL]["post"]["responses"]

    def schema(status):
        return answers[status]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]

    assert "text/event-stream" in answers["200"]["content"]
    assert schema("422") == "Refused"
    assert [schema(status) for status in ("413", "429", "503", "default")] == ["Failed"] * 4
