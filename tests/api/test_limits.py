"""Limits over HTTP: requests and tokens a minute, whose they are, and what the answers say."""

from __future__ import annotations

import threading
import time

import openai
import pytest

from tests.api.conftest import events
from tests.api.live import live
from tests.fakes import FakeEngine, say
from transformers_api.api.http.rate_limit_headers import duration
from transformers_api.config.settings import Settings
from transformers_api.errors import EngineFailed, Overloaded
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.key_file import KeyFile
from transformers_api.serving.limits.token_bucket import Rate

LOOK = {"messages": [{"role": "user", "content": "Hi"}]}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def limited(serve, clock):
    """An application with limits by a clock of the test's own."""

    def build(requests=None, tokens=None, engine=None, **settings):
        if requests is not None:
            per_min, burst = requests
            settings |= {"rate_limit_per_min": per_min, "rate_limit_burst": burst}
        served = serve(engine, rate_limit_tokens_per_min=tokens, **settings)
        served.services.limits.strategy.clock = clock
        return served

    return build


def headers(response, kind):
    found = {
        what: response.headers.get(f"x-ratelimit-{what}-{kind}")
        for what in ("limit", "remaining", "reset")
    }
    return tuple(found.values())


def test_the_burst_passes_and_the_next_request_is_told_when_to_come(limited, clock):
    served = limited(requests=(10, 3))
    answers = [served.chat() for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [headers(answer, "requests") for answer in answers] == [
        ("3", "2", "6s"),
        ("3", "1", "12s"),
        ("3", "0", "18s"),
        ("3", "0", "18s"),
    ]
    assert answers[-1].headers["Retry-After"] == "6"
    assert answers[-1].get_json()["error"] == {
        "message": "Rate limit exceeded",
        "type": "rate_limit_error",
        "param": None,
        "code": "rate_limited",
    }
    assert "Retry-After" not in answers[0].headers
    clock.now += 6
    assert served.chat().status_code == 200
    assert len(served.engine.submitted) == 4


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/completions", {"prompt": "Hi"}),
        ("/generate", {"prompt": "Hi"}),
        ("/generate/stream", {"prompt": "Hi"}),
        ("/tokenize", {"prompt": "Hi"}),
        ("/v1/models", {"model": "fake"}),
        ("/nope", {}),
    ],
)
def test_all_that_is_not_only_read_shares_one_bucket(limited, url, body):
    served = limited(requests=(10, 2))
    served.chat()
    first = served.client.post(url, json=body)
    assert first.status_code in (200, 404)
    assert headers(first, "requests") == ("2", "0", "12s")
    first.close()
    refused = served.client.post(url, json=body)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "6"
    for free in ("/v1/models", "/healthz", "/models"):
        answer = served.client.get(free)
        assert answer.status_code == 200
        assert headers(answer, "requests") == (None, None, None)


def test_wrong_requests_count(limited):
    served = limited(requests=(10, 1))
    assert served.client.post("/v1/completions", data=b"{").status_code == 400
    assert served.client.post("/v1/completions", data=b"{").status_code == 429


def test_without_limits_no_answer_speaks_of_them(served):
    response = served.chat()
    assert not [name for name, _ in response.headers if name.lower().startswith("x-rate")]
    assert len(served.services.limits.strategy.buckets) == 0


def test_the_setting_holds_everywhere_and_its_default_only_where_one_looks_inside(serve):
    by_default = Access.from_settings(serve().services.settings)
    assert (by_default.requests, by_default.limits_all) == (Rate(3, 10), False)
    everywhere = Access.from_settings(serve(rate_limit_per_min=30).services.settings)
    assert (everywhere.requests, everywhere.limits_all) == (Rate(3, 30), True)
    off = Access.from_settings(serve(rate_limit_per_min=0).services.settings)
    assert (off.requests, off.limits_all, off.tokens) == (None, False, None)


def test_looking_inside_takes_from_the_same_bucket_and_once(serve):
    served = serve(rate_limit_per_min=10)
    inside = served.client.post("/inspect/tokens", json={"prompt": "Hi"})
    assert (inside.status_code, headers(inside, "requests")[1]) == (200, "2")
    assert headers(served.chat(), "requests")[1] == "1"


LOCAL, PROXIED = "127.0.0.1", {"X-Forwarded-For": "203.0.113.1"}


@pytest.mark.parametrize(
    ("address", "sent", "status"),
    [
        (LOCAL, {}, 200),
        ("::1", {}, 200),
        ("::ffff:127.0.0.2", {}, 200),
        (LOCAL, PROXIED, 429),
        (LOCAL, {"Forwarded": "for=203.0.113.1"}, 429),
        ("192.0.2.1", {}, 429),
        ("", {}, 429),  # a socket in the file system: of a proxy
    ],
)
def test_who_sits_at_this_machine_looks_inside_without_a_limit(serve, address, sent, status):
    served = serve(rates={"requests": Rate(1, 1), "spares_local": True})
    overrides = {"REMOTE_ADDR": address}
    answers = [
        served.client.post("/inspect/tokens", json=LOOK, headers=sent, environ_overrides=overrides)
        for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [200, status]
    limits = served.client.get("/status", headers=sent, environ_overrides=overrides).get_json()
    assert limits["limits"]["inspections_per_min"] == (None if status == 200 else 1)


@pytest.mark.parametrize(
    ("settings", "is_spared"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "0.0.0.0"}, False),
        ({"trusted_proxies": 1}, False),
        ({"rate_limit_per_min": 10}, False),  # somebody wants it
    ],
)
def test_only_a_loopback_host_without_proxies_spares_anybody(settings, is_spared):
    assert Access.from_settings(Settings(**settings)).spares_local is is_spared


def chat_from(served, address, *, key=None, forwarded=None):
    sent = {} if key is None else {"Authorization": f"Bearer {key}"}
    if forwarded is not None:
        sent["X-Forwarded-For"] = forwarded
    return served.client.post(
        "/v1/chat/completions",
        json=CHAT,
        headers=sent,
        environ_overrides={"REMOTE_ADDR": address},
    ).status_code


def test_each_address_has_a_bucket_and_an_ipv6_network_has_one(limited):
    served = limited(requests=(10, 1))
    assert chat_from(served, "192.0.2.1") == 200
    assert chat_from(served, "192.0.2.1") == 429
    assert chat_from(served, "192.0.2.2") == 200
    assert chat_from(served, "2001:db8:1:2::1") == 200
    assert chat_from(served, "2001:db8:1:2:ffff::9") == 429
    assert chat_from(served, "2001:db8:1:3::1") == 200


def test_a_key_has_one_bucket_wherever_it_is_used(limited, tmp_path):
    path = tmp_path / "keys"
    ann, bob = (KeyFile(path).add(name, "infer") for name in ("ann", "bob"))
    served = limited(requests=(10, 1), api_keys_file=path)
    assert chat_from(served, "192.0.2.1", key=ann) == 200
    assert chat_from(served, "192.0.2.2", key=ann) == 429
    assert chat_from(served, "192.0.2.1", key=bob) == 200
    # A refused key takes nothing, whatever address it comes from.
    assert chat_from(served, "192.0.2.3", key="wrong") == 401
    assert chat_from(served, "192.0.2.3", key="wrong") == 401


def test_clients_without_an_address_share_a_bucket(limited):
    """As behind a socket in the file system; flask-limiter counts no empty name."""
    served = limited(requests=(10, 1))
    assert [chat_from(served, "") for _ in range(2)] == [200, 429]


def test_the_forwarded_address_is_not_believed_unless_a_proxy_is_trusted(limited):
    served = limited(requests=(10, 1))
    assert chat_from(served, "192.0.2.1", forwarded="203.0.113.1") == 200
    for spoofed in ("203.0.113.2", "127.0.0.1", "192.0.2.9, 203.0.113.3", "nonsense"):
        assert chat_from(served, "192.0.2.1", forwarded=spoofed) == 429


@pytest.mark.parametrize("proxies", [1, 2])
def test_behind_trusted_proxies_only_what_they_wrote_counts(limited, proxies):
    """Each adds the address that it saw; what a client wrote before them makes no difference."""
    served = limited(requests=(10, 1), trusted_proxies=proxies)
    inner = "".join(f", 10.0.0.{number}" for number in range(1, proxies))
    assert chat_from(served, "10.0.0.9", forwarded=f"203.0.113.1{inner}") == 200
    for spoofed in ("192.0.2.5, ", "192.0.2.6, 192.0.2.7, ", " , ", "::1, "):
        assert chat_from(served, "10.0.0.9", forwarded=f"{spoofed}203.0.113.1{inner}") == 429
    assert chat_from(served, "10.0.0.9", forwarded=f"203.0.113.2{inner}") == 200


def test_where_the_proxy_says_nothing_its_own_address_counts(limited):
    served = limited(requests=(10, 1), trusted_proxies=2)
    assert chat_from(served, "10.0.0.9") == 200
    assert chat_from(served, "10.0.0.9", forwarded="203.0.113.1") == 429


def remaining(served):
    """Tokens of this client's bucket, without taking any."""
    limits = served.services.limits
    return limits.strategy.take(
        served.services.access.tokens, "127.0.0.1", "tokens", cost=0
    ).remaining


def prompt_tokens(answer):
    return answer.get_json()["usage"]["prompt_tokens"]


def test_an_answer_costs_what_it_used_and_not_what_it_might_have(limited):
    served = limited(tokens=1000, engine=FakeEngine(say("Hello")))
    answer = served.client.post("/v1/chat/completions", json=CHAT)
    usage = answer.get_json()["usage"]
    assert usage["completion_tokens"] == 6
    limit, left, reset = headers(answer, "tokens")
    assert (limit, int(left)) == ("1000", 1000 - usage["prompt_tokens"] - 50)
    assert reset == duration((usage["prompt_tokens"] + 50) * 0.06)
    assert remaining(served) == 1000 - usage["total_tokens"]


def test_all_answers_of_all_prompts_are_reserved(limited):
    served = limited(tokens=1000, engine=FakeEngine(say("Hello")))
    body = {"prompt": ["ab", "abc"], "max_tokens": 20, "n": 2, "best_of": 3}
    answer = served.client.post("/v1/completions", json=body)
    assert int(headers(answer, "tokens")[1]) == 1000 - 5 - 2 * 3 * 20
    assert remaining(served) == 1000 - 5 - 2 * 3 * 6


def test_who_has_too_few_tokens_left_is_told_when_to_come(limited, clock):
    served = limited(tokens=120, engine=FakeEngine(say("x" * 60)))
    body = {"prompt": "abcd", "max_tokens": 56}
    assert served.client.post("/v1/completions", json=body).status_code == 200
    assert served.client.post("/v1/completions", json=body).status_code == 200
    refused = served.client.post("/v1/completions", json=body)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "30"
    error = refused.get_json()["error"]
    assert error["code"] == "rate_limited"
    assert "60 tokens were asked for, 0 of 120 a minute are left" in error["message"]
    assert headers(refused, "tokens") == ("120", "0", "1m0s")
    assert len(served.engine.submitted) == 2
    clock.now += 30
    assert served.client.post("/v1/completions", json=body).status_code == 200


def test_what_never_fits_is_a_wrong_request(limited):
    served = limited(tokens=100)
    answer = served.client.post("/v1/completions", json={"prompt": "abcd", "max_tokens": 97})
    assert answer.status_code == 400
    error = answer.get_json()["error"]
    assert (error["code"], error["param"]) == ("too_many_tokens", "max_tokens")
    assert "101 tokens" in error["message"]
    assert served.engine.submitted == []
    native = served.client.post("/generate", json={"prompt": "abcd", "max_new_tokens": 97})
    assert (native.status_code, list(native.get_json())) == (400, ["detail"])


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_an_error_ended_costs_what_came_of_it(limited, stream):
    engine = FakeEngine(say("Hello!"), error=EngineFailed("The step failed"), error_after=3)
    served = limited(tokens=1000, engine=engine)
    answer = served.client.post(
        "/v1/completions", json={"prompt": "abcd", "max_tokens": 50, "stream": stream}
    )
    assert answer.status_code == (200 if stream else 500)
    answer.get_data()
    answer.close()
    assert remaining(served) == 1000 - 4 - 3


def test_a_refused_answer_costs_nothing(limited):
    served = limited(tokens=1000, engine=FakeEngine(refusal=Overloaded("Full", retry_after=1)))
    assert served.complete("abcd", max_tokens=50).status_code == 429
    assert remaining(served) == 1000


def test_a_stream_costs_what_it_used_before_its_last_byte(limited):
    served = limited(tokens=1000, engine=FakeEngine(say("Hello")))
    stream = served.complete("abcd", max_tokens=50, stream=True)
    left = [remaining(served) for frame in stream.response if b"[DONE]" in frame]
    assert left == [1000 - 4 - 6]
    stream.close()
    assert remaining(served) == 1000 - 4 - 6


def test_a_client_that_leaves_pays_for_what_it_read(limited):
    gate = threading.Semaphore(2)
    served = limited(tokens=1000, engine=FakeEngine(say("Hello"), gate=gate))
    stream = served.complete("abcd", max_tokens=50, stream=True)
    frames = iter(stream.response)
    next(frames), next(frames)
    assert remaining(served) == 1000 - 4 - 50
    stream.close()
    assert 1000 - 4 - 3 <= remaining(served) <= 1000 - 4


def test_a_stream_that_was_never_read_costs_its_prompt(limited):
    served = limited(tokens=1000, engine=FakeEngine(say("Hello"), gate=threading.Semaphore(0)))
    served.complete("abcd", max_tokens=50, stream=True).close()
    assert remaining(served) == 1000 - 4


def test_chats_with_traces_cost_tokens(limited):
    served = limited(tokens=1000, engine=FakeEngine(say("Hello")))
    said = served.client.post("/chat/stream", json={**LOOK, "trace_layer": 0, "max_new_tokens": 20})
    assert said.status_code == 200, said.get_data(as_text=True)
    said.get_data()
    said.close()
    assert remaining(served) < 1000 - 6
    before = remaining(served)
    said = served.client.post(
        "/chat/stream", json={**LOOK, "trace_layer": 0, "max_new_tokens": 1000}
    )
    assert said.status_code == 422
    assert said.get_json()["code"] == "too_many_tokens"
    assert remaining(served) == before


def test_answers_that_run_at_once_never_reserve_more_than_the_bucket(limited):
    served = limited(tokens=300, engine=FakeEngine(say("Hello"), gate=threading.Event()))
    served.swapper.load("fake")
    answers, start = [], threading.Barrier(12)

    def ask():
        start.wait(30)
        body = {"prompt": "abcd", "max_tokens": 96, "stream": True}
        answers.append(served.app.test_client().post("/v1/completions", json=body))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answer.status_code for answer in answers) == [200] * 3 + [429] * 9
    for answer in answers:
        answer.close()
    assert remaining(served) == 300 - 3 * 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0101, "11ms"), (1, "1s"), (59.2, "1m0s"), (7.2, "8s"), (150, "2m30s")],
)
def test_times_are_written_as_openai_writes_them(seconds, text):
    assert duration(seconds) == text


def test_the_sdk_comes_again_when_it_was_told_to(limited, clock):
    """Its first try is refused with a second of Retry-After, in which the bucket fills up."""
    served = limited(requests=(60, 1))
    waits = []

    @served.app.after_request
    def pass_time(response):
        if response.status_code == 429:
            waits.append((response.headers["Retry-After"], time.monotonic()))
            clock.now += 1
        else:
            waits.append((None, time.monotonic()))
        return response

    with live(served.app, "") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=1)
        first = client.chat.completions.with_raw_response.create(model="fake", **CHAT)
        assert first.headers["x-ratelimit-remaining-requests"] == "0"
        answer = client.chat.completions.create(model="fake", **CHAT)
        client.close()
    assert answer.choices[0].message.content
    assert [told for told, _ in waits] == [None, "1", None]
    assert waits[2][1] - waits[1][1] >= 1


def test_streams_carry_the_headers_too(limited):
    served = limited(requests=(10, 3), tokens=1000)
    response = served.complete("abcd", max_tokens=10, stream=True)
    assert headers(response, "requests") == ("3", "2", "6s")
    assert headers(response, "tokens") == ("1000", "986", "840ms")
    assert events(response).done
