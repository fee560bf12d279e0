"""deploy/nginx.conf in a real nginx, in front of the real application with a fake engine."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
import subprocess
import time

import pytest

from tests.deploy.activation import Unit, active, unit, until
from tests.deploy.fake_app import create_app
from tests.deploy.nginx import CONFIGURATION, NAME, Answer, Proxy, needs_nginx
from tests.servers import WAIT_S
from transformers_api.config.settings import Settings

pytestmark = needs_nginx

app = create_app(Settings(preload_model=False, allowed_hosts=("api.example.org",)))
LIMIT = app.config["MAX_CONTENT_LENGTH"]
HALTING = {"model": "halting", "prompt": "Hello", "max_tokens": 9}
HIDDEN = {
    "/load_model",
    "/metrics",
    "/status",
}  # of the routes that there are, those that stay inside
HELD = 200


def log_with(proxy: Proxy, request_id: str) -> list[str]:
    """The lines of the log once that request has one: nginx writes it after the answer."""
    log = proxy.folder / "access.log"
    until(lambda: request_id in log.read_text())
    return log.read_text().splitlines()


def test_the_configuration_is_accepted_without_a_warning(proxy: Proxy) -> None:
    done = subprocess.run([*proxy.command, "-t"], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr
    assert "test is successful" in done.stderr


def test_plain_http_is_sent_to_https_except_for_the_proof_of_the_name(proxy: Proxy) -> None:
    proofs = proxy.folder / ".well-known" / "acme-challenge"
    proofs.mkdir(parents=True)
    (proofs / "token").write_text("proof")
    plain = http.client.HTTPConnection("127.0.0.1", proxy.http, timeout=WAIT_S)
    plain.request("GET", "/v1/models?a=b", headers={"Host": NAME})
    redirect = plain.getresponse()
    redirect.read()
    assert redirect.status == 308
    assert redirect.headers["Location"] == f"https://{NAME}/v1/models?a=b"
    plain.request("GET", "/.well-known/acme-challenge/token", headers={"Host": NAME})
    assert plain.getresponse().read() == b"proof"
    plain.close()


def test_other_names_get_no_answer(proxy: Proxy) -> None:
    with pytest.raises(ssl.SSLError):
        proxy.socket(name="other.example.org")
    with socket.create_connection(("127.0.0.1", proxy.http), WAIT_S) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\nHost: other.example.org\r\n\r\n")
        assert plain.recv(1) == b""


def test_answers_have_the_headers_for_browsers_once_and_name_no_version(proxy: Proxy) -> None:
    for path in ("/health", "/nothing"):
        headers = proxy.ask("GET", path).headers
        assert headers.get_all("Strict-Transport-Security") == ["max-age=63072000"]
        assert headers.get_all("X-Content-Type-Options") == ["nosniff"]
        assert headers["Server"] == "nginx"


def test_events_are_not_held_back_and_a_client_that_leaves_is_noticed(
    proxy: Proxy, server: Unit
) -> None:
    connection = proxy.connect()
    connection.request("POST", "/v1/completions", json.dumps(HALTING | {"stream": True}))
    response = connection.getresponse()
    assert response.headers["Content-Type"].startswith("text/event-stream")
    events = [response.readline() for _ in range(6)]  # with an empty line after each
    assert [event[:5] for event in events[::2]] == [b"data:"] * 3
    assert active(server) == 1
    response.close()
    connection.close()
    until(lambda: active(server) == 0)


def test_a_client_that_leaves_before_the_first_byte_is_noticed(proxy: Proxy, server: Unit) -> None:
    connection = proxy.connect()
    connection.request("POST", "/v1/completions", json.dumps(HALTING))
    until(lambda: active(server) == 1)
    connection.close()
    until(lambda: active(server) == 0)


@pytest.mark.parametrize("is_chunked", [False, True], ids=["length", "chunked"])
def test_a_body_over_the_limit_is_413_before_the_server_sees_it(
    proxy: Proxy, is_chunked: bool
) -> None:
    connection = proxy.connect()
    body = b" " * (LIMIT + 1)
    chunks = (body[i : i + 65536] for i in range(0, len(body), 65536))
    with contextlib.suppress(OSError):  # the answer may come before the whole body was sent
        connection.request("POST", "/v1/completions", chunks if is_chunked else body)
    response = connection.getresponse()
    assert response.status == 413
    error = json.load(response)["error"]
    assert error["code"] == "payload_too_large"
    assert error["type"] == "invalid_request_error"
    assert "OpenAI-Processing-Ms" not in response.headers


def test_a_body_as_large_as_the_server_allows_reaches_it(proxy: Proxy) -> None:
    body = json.dumps({"model": "none", "prompt": "x"}).encode().ljust(LIMIT)
    assert proxy.ask("POST", "/v1/completions", body).comes_from_the_server


def half_sent(proxy: Proxy, number: int) -> ssl.SSLSocket:
    """Half of a header, or half of a body, from one of ten addresses."""
    connection = proxy.socket(source=f"127.0.0.{10 + number % 10}")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {NAME}\r\n"
    whole = "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    connection.sendall((head + (whole if number % 2 else "Content-Ty")).encode())
    return connection


def test_half_sent_requests_occupy_no_thread_of_the_server(
    proxy: Proxy, server: Unit, measured
) -> None:
    assert Settings.from_env(server.environ).threads < HELD
    held = [half_sent(proxy, number) for number in range(HELD)]
    try:
        for _ in range(5):
            began = time.monotonic()
            assert proxy.ask("GET", "/health").comes_from_the_server
            took_s = time.monotonic() - began
        measured(f"{HELD} half-sent requests; /health meanwhile after {took_s * 1000:.0f} ms")
        for connection in held:  # none was answered or closed
            connection.settimeout(0)
            with pytest.raises(ssl.SSLWantReadError):
                connection.recv(1)
    finally:
        for connection in held:
            connection.close()


def test_every_route_is_offered_or_hidden_on_purpose(proxy: Proxy) -> None:
    rules = {str(rule): re.sub("<.*>", "a/b", str(rule)) for rule in app.url_map.iter_rules()}
    reached = {rule: proxy.ask("GET", path).comes_from_the_server for rule, path in rules.items()}
    shut = {rule for rule, is_reached in reached.items() if not is_reached}
    assert shut <= HIDDEN, "a new route: offer it in deploy/nginx.conf, or say here that it is not"
    assert not any(reached.get(rule) for rule in HIDDEN)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/owner/name"),
        ("POST", "/models/paced/load"),
        ("POST", "/models/paced/unload"),
        ("DELETE", "/models/paced/unload"),
    ],
)
def test_models_are_loaded_and_unloaded_from_inside_only(
    proxy: Proxy, method: str, path: str
) -> None:
    answer = proxy.ask(method, path, {})
    assert answer.status == 403
    shown = answer.json["error"] if path.startswith("/v1") else answer.json
    assert shown.get("message", shown.get("detail")) == "This is not offered from outside"


@pytest.mark.parametrize(
    "path",
    ["/metrics", "/metrics/", "/status", "/load_model", "/admin/reload", "/.git/config", "/v1"],
)
def test_what_is_not_offered_is_404(proxy: Proxy, path: str) -> None:
    answer = proxy.ask("GET", path)
    assert answer.status == 404
    shown = answer.json["error"] if path == "/v1" else answer.json
    assert shown.get("message", shown.get("detail")) == "There is no such route"
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-Id"])


LONG = "x" * 9000
REFUSALS = {
    "no route": ("GET", "{}/nothing", {}, 404, "not_found"),
    "too large": ("POST", "{}/nothing", {"Content-Length": str(LIMIT + 1)}, 413, None),
    "a long line": ("GET", "{}/" + LONG, {}, 414, "uri_too_long"),
    "a long header": ("GET", "{}/nothing", {"X-Long": LONG}, 431, "headers_too_large"),
    "a method": ("TRACE", "{}/nothing", {}, 405, "method_not_allowed"),
    "no length": ("POST", "{}/nothing", {"Content-Length": "none"}, 400, "bad_request"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
@pytest.mark.parametrize("start", ["/v1", "/nothing", "/inspect"])
def test_what_nginx_refuses_itself_is_json_as_the_server_has_it(
    proxy: Proxy, start: str, refusal: str
) -> None:
    method, path, fields, status, code = REFUSALS[refusal]
    if start == "/inspect" and code == "not_found":
        start = "/chat/stream"  # below /inspect the server answers itself
    head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": NAME, **fields}.items())
    with proxy.socket() as client:
        client.sendall(f"{method} {path.format(start)} HTTP/1.1\r\n{head}\r\n".encode())
        response = http.client.HTTPResponse(client)
        response.begin()
        answer = Answer(response)
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]
    if start == "/v1" or status == 414:  # a line that is too long was not read: it has no path
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
        assert answer.json["error"]["type"] == "invalid_request_error"
        assert code is None or answer.json["error"]["code"] == code
    elif start == "/nothing":
        assert list(answer.json) == ["detail"]
    else:
        assert list(answer.json) == ["error", "code"]


def test_plain_http_on_the_port_for_tls_is_answered_in_json(proxy: Proxy) -> None:
    plain = http.client.HTTPConnection("127.0.0.1", proxy.https, timeout=WAIT_S)
    plain.request("GET", "/v1/models", headers={"Host": NAME})
    answer = Answer(plain.getresponse())
    plain.close()
    assert (answer.status, answer.json["error"]["code"]) == (400, "bad_request")


def test_a_stolen_key_opens_nothing_that_was_said_before(server: Unit, tmp_path) -> None:
    """Also TLS 1.2 with a key of RSA, whose older ciphers send the secret under that key."""
    with Proxy(tmp_path, server.port, key="rsa:2048").running() as proxy:
        with proxy.socket(ciphers="ECDHE-RSA-AES128-GCM-SHA256") as client:
            assert client.version() == "TLSv1.2"
        for old in ("AES256-GCM-SHA384", "AES128-SHA", "ECDHE-RSA-AES128-SHA"):
            with pytest.raises(ssl.SSLError, match=r"(?i)handshake.failure"):
                proxy.socket(ciphers=f"{old}:@SECLEVEL=0")


def test_a_client_cannot_say_that_it_is_another_address(proxy: Proxy) -> None:
    given = {"X_Forwarded_For": "9.9.9.9", "X_Forwarded_Proto": "ftp"}
    answer = proxy.ask("GET", "/v1/tests/headers", source="127.0.0.7", **given)
    assert answer.json["X-Forwarded-For"] == "127.0.0.7"
    assert answer.json["X-Forwarded-Proto"] == "https"
    assert answer.json["Host"] == NAME


def test_the_id_of_a_request_is_the_clients_where_it_is_a_good_one(proxy: Proxy) -> None:
    path = "/v1/tests/headers"
    assert proxy.ask("GET", path, X_Request_ID="mine-1").headers["X-Request-Id"] == "mine-1"
    other = proxy.ask("GET", path, X_Request_ID='a" b').headers["X-Request-Id"]
    assert re.fullmatch("[0-9a-f]{32}", other)
    assert {"mine-1", other} <= {json.loads(line)["id"] for line in log_with(proxy, other)}


def test_the_log_has_neither_queries_nor_bodies(proxy: Proxy) -> None:
    body = {"prompt": "canary", "model": "none"}
    asked = proxy.ask("POST", "/v1/completions?secret=canary", body)
    assert not [line for line in log_with(proxy, asked.headers["X-Request-Id"]) if "canary" in line]


def test_a_flood_from_one_address_gets_429_and_nobody_else(server: Unit, tmp_path) -> None:
    with Proxy(tmp_path, server.port, rate="5r/s").running() as guarded:
        flood = [guarded.ask("GET", "/v1/models") for _ in range(100)]
        refused = [answer for answer in flood if answer.status == 429]
        assert refused
        assert refused[0].json["error"]["code"] == "rate_limited"
        assert refused[0].headers["Retry-After"] == "1"
        assert guarded.ask("GET", "/v1/models", source="127.0.0.9").status == 200
        assert guarded.ask("GET", "/health").status == 200


def test_rates_are_counted_for_each_client_whatever_it_says(tmp_path, tmp_path_factory) -> None:
    limits = {"RATE_LIMIT_PER_MIN": "1", "RATE_LIMIT_BURST": "3"}
    path, body = "/v1/completions", {"model": "paced", "prompt": "Hello", "max_tokens": 1}
    with (
        unit(tmp_path, TRUSTED_PROXIES="1", **limits) as service,
        Proxy(tmp_path_factory.mktemp("nginx"), service.port).running() as proxy,
    ):
        spoofed = [
            proxy.ask("POST", path, body, source="127.0.0.21", X_Forwarded_For=f"9.9.9.{number}")
            for number in range(6)
        ]
        assert [answer.status for answer in spoofed] == [200] * 3 + [429] * 3
        assert spoofed[-1].comes_from_the_server
        assert proxy.ask("POST", path, body, source="127.0.0.22").status == 200


def test_without_a_server_there_is_a_clear_502(tmp_path) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # does not listen
        with Proxy(tmp_path, nobody.getsockname()[1]).running() as lonely:
            answer = lonely.ask("GET", "/v1/models")
    assert answer.status == 502
    assert answer.json["error"]["type"] == "server_error"
    assert answer.json["error"]["code"] == "unavailable"
    assert answer.headers["Retry-After"] == "2"


def test_the_configuration_agrees_with_the_server() -> None:
    settings = Settings()
    assert f"server {settings.host}:{settings.port} " in CONFIGURATION
    assert f"client_max_body_size {LIMIT >> 20}m;" in CONFIGURATION
    (read_s,) = re.findall(r"proxy_read_timeout (\d+)s;", CONFIGURATION)
    assert settings.request_timeout_s is not None
    assert int(read_s) > settings.request_timeout_s
