"""The error object everywhere, request ids, CORS."""

import re

import pytest

from tests.api.test_bodies import error
from transformers_api.api.http import dialects
from transformers_api.api.http.dialects import Dialect
from transformers_api.api.http.error_schemas import Error
from transformers_api.errors import EngineDead, ServerShuttingDown

PAGE = "http://localhost:3000"


@pytest.mark.parametrize("url", ["/v1", "/v1/nope", "/v1/chat", "/tokenize/nope"])
def test_an_unknown_url_is_404_in_openais_shape(served, url):
    body = error(served.client.get(url), 404)
    assert (body["type"], body["code"], body["param"]) == (
        "invalid_request_error",
        "not_found",
        None,
    )
    assert url in body["message"]


def test_a_url_that_is_no_route_is_answered_in_the_dialect_of_the_longest_prefix(monkeypatch):
    new = Dialect(error_body=lambda error: {"type": "error"}, error_schema=Error)
    monkeypatch.setattr(dialects, "BY_PREFIX", (("/v1/messages", new), *dialects.BY_PREFIX))
    assert dialects.by_path("/v1/messages") is dialects.by_path("/v1/messages/nope") is new
    assert dialects.by_path("/v1/messagesx") is dialects.by_path("/v1") is dialects.OPENAI
    assert dialects.by_path("/inspect/nope") is dialects.NIELS
    assert dialects.by_path("/v1x") is dialects.PLAIN


@pytest.mark.parametrize("url", ["/nope", "/v1x", "/docs/assets/nope.js", "/generate/nope"])
def test_an_unknown_url_outside_of_openais_routes_is_404_with_a_detail(served, url):
    response = served.client.get(url)
    assert response.status_code == 404
    assert response.get_json() == {"detail": f"Unknown URL: GET {url}"}


def test_a_wrong_method_is_405_and_says_which_are_right(served):
    response = served.client.get("/v1/completions")
    assert error(response, 405)["code"] == "method_not_allowed"
    assert "POST" in response.headers["Allow"]
    assert served.client.put("/v1/models").status_code == 405


def test_head_and_options_are_fine(served):
    assert served.client.head("/v1/models").status_code == 200
    assert served.client.options("/v1/chat/completions").status_code == 200


def test_a_slash_at_the_end_does_not_matter(served):
    assert served.client.get("/v1/models/").get_json() == served.client.get("/v1/models").get_json()
    assert served.client.get("/health/").status_code == 200


def test_an_unexpected_error_is_500_without_internals(served, monkeypatch, caplog):
    def broken():
        raise RuntimeError("secret")

    monkeypatch.setattr(served.services.registry, "list", broken)
    body = error(served.client.get("/v1/models"), 500)
    assert "secret" not in body["message"]
    assert body["code"] == "engine_failed"
    assert "RuntimeError: secret" in caplog.text


@pytest.mark.parametrize(
    ("raised", "status", "code"),
    [
        (EngineDead("The engine is dead"), 503, "engine_dead"),
        (ServerShuttingDown("Bye", retry_after=0), 503, "server_shutting_down"),
    ],
)
def test_an_error_has_its_status_and_code(served, monkeypatch, raised, status, code):
    def refuse(*_, **__):
        raise raised

    monkeypatch.setattr(served.services.swapper, "lease", refuse)
    response = served.chat()
    assert error(response, status)["code"] == code
    if raised.retry_after is not None:
        assert response.headers["Retry-After"] == "1"
    else:
        assert "Retry-After" not in response.headers


def test_every_answer_has_an_id_and_a_time(served):
    for response in (served.chat(), served.chat(n=0), served.client.get("/nope")):
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
        assert response.headers["openai-processing-ms"].isdigit()
    assert served.chat().headers["x-request-id"] != served.chat().headers["x-request-id"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1.2_X", True), ("x" * 64, True), ("x" * 65, False), ("a b", False), ("é", False)],
)
def test_a_clients_id_is_kept_where_it_is_harmless(served, given, kept):
    response = served.client.get("/healthz", headers={"X-Request-Id": given})
    assert (response.headers["X-Request-Id"] == given) is kept


def test_no_page_may_read_answers_by_default(served):
    response = served.client.get("/v1/models", headers={"Origin": PAGE})
    assert "Access-Control-Allow-Origin" not in response.headers


def test_the_pages_of_allowed_origins_may(serve):
    served = serve(cors_allow_origins=(PAGE, "https://chat.example"))
    response = served.client.options(
        "/v1/chat/completions",
        headers={
            "Origin": PAGE,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os",
        },
    )
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert "x-stainless-os" in response.headers["Access-Control-Allow-Headers"]
    response = served.client.post("/v1/completions", json={}, headers={"Origin": PAGE})
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    exposed = response.headers["Access-Control-Expose-Headers"].lower()
    assert "retry-after" in exposed
    assert "x-request-id" in exposed
    assert "Access-Control-Allow-Credentials" not in response.headers


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost:3001",
        "http://localhost:30000",
        "http://localhost:3000.evil.example",
        "https://chatXexample",
        "https://chat.example.evil",
        "null",
    ],
)
def test_other_pages_may_not(serve, origin):
    served = serve(cors_allow_origins=(PAGE, "https://chat.example"))
    response = served.client.get("/v1/models", headers={"Origin": origin})
    assert "Access-Control-Allow-Origin" not in response.headers
