"""Ten thousand malformed bodies, for every route that takes one: no 5xx, and each error says why."""

from __future__ import annotations

import io
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.api.test_fuzz import SEEDS

COUNT = 10_000
COMPLETION = {k: v for k, v in SEEDS["/v1/completions"].items() if not k.startswith("stream")}
BODIES = SEEDS | {
    "/v1/completions": COMPLETION,
    "/v1/responses": {"input": [{"role": "user", "content": "Hi"}], "max_output_tokens": 3},
    "/v1/responses/input_tokens": {"input": "Hi", "instructions": "Be brief"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/api/chat": {"messages": [{"role": "user", "content": "Hi"}], "options": {"num_predict": 3}},
    "/api/generate": {"prompt": "Hi", "options": {"num_predict": 3, "temperature": 0.5}},
    "/api/show": {"model": "fake"},
    "/api/embed": {"model": "fake", "input": ["Hi"]},
    "/api/embeddings": {"model": "fake", "prompt": "Hi"},
    "/v1/rerank": {"model": "fake", "query": "a", "documents": ["b", "c"], "top_n": 1},
    "/rerank": {"model": "fake", "query": "a", "documents": [{"text": "b"}]},
    "/v1/score": {"model": "fake", "text_1": "a", "text_2": ["b", "c"]},
    "/score": {"model": "fake", "text_1": ["a"], "text_2": ["b"]},
    "/apply-template": {"messages": [{"role": "user", "content": "Hi"}]},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "n_predict": 3},
    "/generate": {"prompt": ["Hi"], "max_new_tokens": 3, "temperature": 0.5, "stop": ["x"]},
    "/generate/stream": {"prompt": "Hi", "max_length": 5, "top_p": 0.5, "seed": 1},
    "/v1/embeddings": {"input": ["Hi", "Ho"], "model": "fake", "dimensions": 2},
    "/load_model": {"model_name": "fake"},
    "/inspect/tokens": {"prompt": "Hi"},
    "/inspect/heads": {"prompt": "Hi", "thumb": 4},
    "/inspect/logit_lens": {"prompt": "Hi", "topk": 3, "layers": [0], "positions": [0]},
    "/inspect/attribution": {"prompt": "Hi", "method": "occlusion", "steps": 4},
    "/inspect/hidden_states": {"prompt": "Hi", "layers": [0], "format": "json"},
    "/inspect/rollout": {"prompt": "Hi", "format": "json"},
    "/inspect/patch": {"clean": "Hi", "corrupt": "Ho", "layers": [0], "positions": [0]},
    "/inspect/ablate": {"prompt": "Hi", "part": "attn", "layers": [0]},
    "/inspect/stability": {"prompt": "Hi", "layer": 0, "samples": 2},
    "/inspect/runs": {"prompt": "Hi", "max_tokens": 3, "seed": 1, "trace": {"topk": 2}},
    "/inspect/logit_parts": {"prompt": "Hi", "by": "head", "against": "mean", "topk": 3},
}
AT_THE_TOP = ("/tokenize", "/detokenize", "/rerank", "/score", "/apply-template", "/infill")
EXTREMES = (
    *(0, -1, -(10**6), 2**31, 2**53 + 1, 2**63 - 1, -(2**63), 10**9, 1e308, -1e308, 5e-324, 0.1),
    *("", " ", "5", "true", "\x00", "a" * 3000, "\u202e\n\x1b[31m", "../../etc/passwd"),
    *(None, True, False, [], {}, [[]], [None], [{}], {"": None}, [1] * 600, {"a": {"b": [1]}}),
)
TOKENS = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"9" * 6000, b"-" + b"9" * 30),
    *(b'"\\ud800"', b'"\\udfff\\ud800"', b"'a'", b"0x10", b"01", b"1.", b".5", b"+1", b"undefined"),
    *(b"[" * 70 + b"]" * 70, b"[" * 5000, b'{"a":' * 2000, b'"\xff\xfe"', b'"\xed\xa0\x80"'),
    *(b'{"a":1,"a":2}', b"//", b'"\n"', b'"\\x"', b"\xef\xbb\xbf", b"1 2", b""),
)
WHOLE = (
    *(
        b"",
        b" ",
        b"null",
        b"[]",
        b'"text"',
        b"5",
        b"true",
        b"{",
        b"}",
        b"{}{}",
        b"\xff\xfe{\x00}\x00",
    ),
    *(b"[" * 100_000, b"{" * 100_000, b'{"a":' * 50_000, b"\x00", b"<xml/>", b"a=b&c=d"),
)
Made = tuple[str, bytes, str | None]  # route, body, the field that is wrong


def random_place(chance: random.Random, value: Any) -> tuple[Any, ...]:
    """A path to something inside."""
    path: tuple[Any, ...] = ()
    while isinstance(value, dict | list) and value and (not path or chance.random() < 0.6):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = chance.choice(keys)
        path, value = (*path, key), value[key]
    return path


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(value[path[0]], path[1:], new)
    return copy


def extreme(chance: random.Random, route: str) -> Made:
    path = random_place(chance, BODIES[route])
    body = with_value(BODIES[route], path, chance.choice(EXTREMES))
    return route, json.dumps(body).encode(), path[0]


def odd_token(chance: random.Random, route: str) -> Made:
    path = random_place(chance, BODIES[route])
    body = json.dumps(with_value(BODIES[route], path, "@@")).encode()
    return route, body.replace(b'"@@"', chance.choice(TOKENS), 1), None


def missing(chance: random.Random, route: str) -> Made:
    body = dict(BODIES[route])
    for key in chance.sample(list(body), chance.randint(1, len(body))):
        del body[key]
    return route, json.dumps(body).encode(), None


def damaged(chance: random.Random, route: str) -> Made:
    raw = bytearray(json.dumps(BODIES[route]).encode())
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(raw))
        raw[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
    return route, bytes(raw), None


def twice(chance: random.Random, route: str) -> Made:
    key = chance.choice(list(BODIES[route]))
    again = json.dumps({key: BODIES[route][key]}).encode()
    return route, json.dumps(BODIES[route]).encode()[:-1] + b"," + again[1:], key


def whole(chance: random.Random, route: str) -> Made:
    return route, chance.choice(WHOLE), None


KINDS: tuple[Callable[[random.Random, str], Made], ...] = (
    *(extreme, extreme, extreme, odd_token, odd_token, missing, damaged, twice, whole),
)


def made(count: int) -> Iterator[Made]:
    chance = random.Random(20260701)
    routes = sorted(BODIES)
    for number in range(count):
        yield chance.choice(KINDS)(chance, routes[number % len(routes)])


def post(app: Any, route: str, body: bytes) -> tuple[int, str, bytes]:
    """(status, content type, body), without the cost of a test client."""
    answered: list[Any] = []
    environ = {
        "REQUEST_METHOD": "POST",
        "PATH_INFO": route,
        "QUERY_STRING": "",
        "SERVER_NAME": "localhost",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1",
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.url_scheme": "http",
        "wsgi.version": (1, 0),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    pieces = app(environ, lambda status, headers, _=None: answered.extend((status, dict(headers))))
    try:
        content = b"".join(pieces)
    finally:
        pieces.close()
    return int(answered[0].split()[0]), answered[1].get("Content-Type", ""), content


def text_of(route: str, status: int, content: bytes) -> str:
    """What the error says, in the dialect of its route."""
    body = json.loads(content)
    if route.startswith("/v1/messages"):
        assert body.keys() == {"type", "error", "request_id"}
        return str(body["error"]["message"])
    if route.startswith("/api/"):
        assert body.keys() == {"error"}
        return str(body["error"])
    if route.startswith(("/v1/", *AT_THE_TOP)):
        assert body.keys() == {"error"}
        error = body["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"]
        return str(error["message"])
    if route.startswith(("/chat/stream", "/inspect")) and status != 422:
        assert body.keys() == {"error", "code"}
        return str(body["error"])
    assert body.keys() <= {"detail", "code"}
    return str(body["detail"])


def test_every_route_that_takes_a_body_is_among_them(served: Any) -> None:
    routes = {
        rule.rule
        for rule in served.app.url_map.iter_rules()
        if "POST" in rule.methods and "<" not in rule.rule
    }
    assert routes == set(BODIES)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Ten thousand lines of the log say nothing here, and take longer than the requests."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("quiet")
@pytest.mark.slow  # test_fuzz.py asks a tenth of them
def test_ten_thousand_malformed_bodies(serve: Any) -> None:
    served = serve()
    app = served.app
    took, statuses = [], dict.fromkeys((200, 400, 404, 422), 0)
    for route, body, field in made(COUNT):
        began = time.perf_counter()
        status, kind, content = post(app, route, body)
        took.append(time.perf_counter() - began)
        about = (route, body[:300], status, content[:300])
        statuses[status] = statuses.get(status, 0) + 1
        if status == 501 and route.endswith(("/embeddings", "/embed", "/rerank", "/score")):
            continue  # it is off, and says so before it looks
        assert status < 500, about
        if status < 400:
            continue
        assert kind == "application/json", about
        text = text_of(route, status, content)
        assert text, about
        if status in (400, 422) and field is not None and route != "/infill":  # never can here
            assert field in text or text.startswith("prompt is too long"), about
    assert min(statuses[status] for status in (200, 400, 404, 422)) > 10
    assert served.swapper.status().leases == 0
    assert len(served.services.admission) == 0
    assert sorted(took)[int(0.99 * COUNT)] < 0.2  # 5 ms where nothing else runs
