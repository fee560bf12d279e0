"""API keys over HTTP: what needs one, of which scope, how a refusal looks, and CORS beside it."""

from __future__ import annotations

import re

import httpx2
import openai
import pytest

from transformers_api.api.http.auth import scope_of
from transformers_api.app import create_app
from transformers_api.config.settings import Settings
from transformers_api.serving.limits.key_file import KeyFile

from tests.fakes import FakeLoader  # isort: skip

# The scope of every route; (method, rule), "*" is any method. All others are for any key.
OPEN = {
    "/health",
    "/healthz",
    "/readyz",
    "/docs",
    "/redoc",
    "/openapi.json",
    "/docs/assets/<path:filename>",
    "/",
    "/ui",
    "/ui/<version>/<path:name>",
}
ADMIN = {
    ("POST", "/v1/models"),
    ("DELETE", "/v1/models/<path:model_id>"),
    ("POST", "/models/<path:model_name>/load"),
    ("POST", "/models/<path:model_name>/unload"),
    ("DELETE", "/models/<path:model_name>/unload"),
    ("POST", "/load_model"),
    ("*", "/metrics"),
    ("*", "/status"),
}
PAGE = "http://localhost:3000"
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys"


@pytest.fixture
def keys(path):
    """Secrets by name: ann may infer, root may everything."""
    return {name: KeyFile(path).add(name, s) for name, s in (("ann", "infer"), ("root", "admin"))}


@pytest.fixture
def locked(serve, path, keys):
    """An application that wants keys."""
    return serve(api_keys_file=path)


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def url_of(rule):
    return re.sub(r"<[^>]+>", "fake", rule.rule)


def every_route(app):
    for rule in app.url_map.iter_rules():
        for method in sorted(rule.methods - {"OPTIONS"}):
            yield method, rule


def complete_app(tmp_path, **settings):
    """The real application, with whatever routes it has."""
    folders = {"model_store": tmp_path / "store", "hf_home": tmp_path / "hub"}
    return create_app(Settings(preload_model=False, **folders, **settings), FakeLoader())


def test_every_route_declares_the_scope_that_is_listed_here(tmp_path):
    app = complete_app(tmp_path)
    for method, rule in every_route(app):
        is_admin = {(method, rule.rule), ("*", rule.rule)} & ADMIN
        listed = "open" if rule.rule in OPEN else "admin" if is_admin else "infer"
        assert scope_of(app.view_functions[rule.endpoint]) == listed, f"{method} {rule.rule}"


def test_the_document_says_which_routes_need_no_key(tmp_path, path, keys):
    app = complete_app(tmp_path, api_keys_file=path)
    document = app.test_client().get("/openapi.json").get_json()
    without = {
        rule
        for rule, operations in document["paths"].items()
        for method, operation in operations.items()
        if method in ("get", "post") and operation.get("security") == []
    }
    assert without == {"/", "/health", "/healthz", "/readyz"}
    assert document["security"] == [{"ApiKey": []}]


def test_every_route_is_closed_unless_it_is_listed_as_open(tmp_path, path, keys):
    app = complete_app(tmp_path, api_keys_file=path, enable_embeddings_backend=True)
    client = app.test_client()
    routes = list(every_route(app))
    assert len(routes) > 30
    for method, rule in routes:
        for headers in ({}, bearer("wrong"), {"X-Api-Key": "wrong"}, bearer("")):
            response = client.open(url_of(rule), method=method, headers=headers)
            refused = response.status_code == 401
            assert refused is (rule.rule not in OPEN), f"{method} {rule.rule}"
            response.close()


def test_every_route_of_an_admin_refuses_a_key_that_may_only_infer(tmp_path, path, keys):
    app = complete_app(tmp_path, api_keys_file=path)
    client = app.test_client()
    refused = {
        (method, rule.rule)
        for method, rule in every_route(app)
        if client.open(url_of(rule), method=method, headers=bearer(keys["ann"])).status_code == 403
    }
    wanted = {
        (method, rule.rule)
        for method, rule in every_route(app)
        if {(method, rule.rule), ("*", rule.rule)} & ADMIN
    }
    assert refused == wanted
    assert len([method for method, _ in wanted if method in ("POST", "DELETE")]) == 6


def test_what_changes_the_models_is_for_admins(tmp_path):
    """A new route that changes something has to be thought about."""
    app = complete_app(tmp_path)
    changing = {
        (method, rule.rule)
        for method, rule in every_route(app)
        if re.search(r"models|load", rule.rule) and method not in ("GET", "HEAD")
    }
    assert changing <= ADMIN
    assert not OPEN & {rule for _, rule in ADMIN}


@pytest.mark.parametrize("url", ["/v1/nope", "/nope", "/health/nope", "/docs/../v1/models"])
def test_an_unknown_url_needs_a_key_too(locked, keys, url):
    assert locked.client.get(url).status_code == 401
    assert locked.client.get(url, headers=bearer(keys["ann"])).status_code == 404


@pytest.mark.parametrize("url", ["/health", "/healthz", "/readyz", "/docs", "/openapi.json"])
def test_probes_and_pages_are_open(locked, url):
    assert locked.client.get(url).status_code == 200
    assert locked.client.get(url, headers=bearer("wrong")).status_code == 200


@pytest.mark.parametrize("name", ["ann", "root"])
def test_a_key_opens_in_either_header(locked, keys, name):
    key = keys[name]
    ways = ({"Authorization": f"bearer  {key} "}, bearer(key), {"x-api-key": key})
    for headers in ways:
        response = locked.client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == 200, response.get_data(as_text=True)
    mixed = {"Authorization": "Basic YTpi", "X-Api-Key": key}
    assert locked.client.get("/v1/models", headers=mixed).status_code == 200


def test_the_first_header_counts_where_both_are_there(locked, keys):
    headers = {**bearer("wrong"), "X-Api-Key": keys["ann"]}
    assert locked.client.get("/v1/models", headers=headers).status_code == 401


def test_no_key_and_a_wrong_key_are_refused_as_openai_refuses(locked, keys):
    secret = keys["ann"][:-1] + "x"
    for headers, start in (({}, "You did not provide"), (bearer(secret), "Incorrect API key")):
        response = locked.client.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"].startswith("Bearer ")
        error = response.get_json()["error"]
        assert error.pop("message").startswith(start)
        assert error == {
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_api_key",
        }
        assert secret not in response.get_data(as_text=True)
        assert response.headers["x-request-id"]
    assert locked.engine.submitted == []


def test_refusals_are_in_the_dialect_of_the_route(locked, keys):
    said = locked.client.post("/generate", json={"prompt": "Hi"})
    assert (said.status_code, list(said.get_json())) == (401, ["detail"])
    said = locked.client.post("/chat/stream", json=CHAT)
    assert (said.status_code, said.get_json()["code"]) == (401, "invalid_api_key")
    said = locked.client.post("/load_model", json={}, headers=bearer(keys["ann"]))
    assert said.status_code == 403
    assert said.get_json() == {"detail": "POST /load_model needs an API key of the scope admin"}
    said = locked.client.post("/v1/models", json={"model": "fake"}, headers=bearer(keys["ann"]))
    assert said.status_code == 403
    assert said.get_json()["error"]["code"] == "insufficient_permissions"
    assert "WWW-Authenticate" not in said.headers


def test_an_admin_loads_and_unloads(locked, keys):
    client, headers = locked.client, bearer(keys["root"])
    assert client.post("/v1/models", json={"model": "fake"}, headers=headers).status_code == 200
    assert client.delete("/v1/models/fake", headers=bearer(keys["ann"])).status_code == 403
    assert client.delete("/v1/models/fake", headers=headers).status_code == 200


def test_a_key_counts_from_the_moment_it_is_added_until_it_is_removed(locked, keys, path):
    def status(key):
        return locked.client.get("/v1/models", headers=bearer(key)).status_code

    new = KeyFile(path).add("ann-2", "infer")
    assert (status(keys["ann"]), status(new)) == (200, 200)
    KeyFile(path).remove("ann")
    assert (status(keys["ann"]), status(new)) == (401, 200)
    path.write_text("nonsense")
    assert (status(keys["ann"]), status(new)) == (401, 200)


def test_without_keys_everything_is_open_and_any_key_is_taken(served):
    for headers in ({}, bearer("anything")):
        assert served.client.get("/v1/models", headers=headers).status_code == 200
    assert served.client.post("/v1/models", json={"model": "fake"}).status_code == 200


def test_a_start_that_others_can_reach_without_keys_is_told(tmp_path, path, keys, caplog):
    complete_app(tmp_path, host="0.0.0.0", port=80)
    assert "EVERYBODY who reaches 0.0.0.0:80 may use this server" in caplog.text
    caplog.clear()
    complete_app(tmp_path, host="0.0.0.0", api_keys_file=path)
    complete_app(tmp_path)
    assert "EVERYBODY" not in caplog.text


def test_the_document_says_how_to_send_a_key(locked, served):
    document = locked.client.get("/openapi.json").get_json()
    assert document["components"]["securitySchemes"]["ApiKey"]["scheme"] == "bearer"
    assert document["security"] == [{"ApiKey": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []
    assert "security" not in document["paths"]["/v1/models"]["get"]
    assert served.client.get("/openapi.json").get_json()["security"] == [{}, {"ApiKey": []}]


def preflight(client, origin):
    return client.options(
        "/v1/chat/completions",
        headers={
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
        },
    )


@pytest.fixture
def with_pages(serve, path, keys):
    return serve(
        api_keys_file=path, cors_allow_origins=(PAGE, "https://chat.example"), rate_limit_per_min=60
    )


def test_a_preflight_passes_without_a_key(with_pages):
    for origin in (PAGE, "https://chat.example"):
        response = preflight(with_pages.client, origin)
        assert response.status_code == 200
        assert response.headers.getlist("Access-Control-Allow-Origin") == [origin]
        allowed = response.headers["Access-Control-Allow-Headers"]
        assert {"authorization", "content-type", "x-stainless-lang"} <= set(allowed.split(", "))


@pytest.mark.parametrize("origin", ["null", "http://evil.example", "http://localhost:3000.evil"])
def test_a_preflight_of_another_page_gets_no_permission(with_pages, origin):
    response = preflight(with_pages.client, origin)
    assert not [name for name, _ in response.headers if "Allow-Origin" in name]


def test_a_page_can_read_why_it_was_refused(with_pages, keys):
    client, limited = with_pages.client, bearer(keys["ann"])
    page = {"Origin": PAGE}
    answers = [
        client.post("/v1/chat/completions", json=CHAT, headers=page),
        client.delete("/v1/models/fake", headers=page | limited),
        client.post("/v1/chat/completions", json={}, headers=page | limited),
        *(client.post("/v1/chat/completions", json={}, headers=page | limited) for _ in range(3)),
    ]
    assert [answer.status_code for answer in answers] == [401, 403, 400, 400, 400, 429]
    for answer in answers:
        assert answer.headers["Access-Control-Allow-Origin"] == PAGE
        exposed = answer.headers["Access-Control-Expose-Headers"].lower()
        assert "x-ratelimit-remaining-requests" in exposed
        assert "retry-after" in exposed


def test_caches_keep_the_answers_for_different_pages_apart(with_pages):
    for headers in ({}, {"Origin": PAGE}, {"Origin": "http://evil.example"}):
        response = with_pages.client.get("/healthz", headers=headers)
        assert "Origin" in response.vary
    plain = with_pages.client.get("/healthz")
    assert "Access-Control-Allow-Origin" not in plain.headers


@pytest.fixture
def sdk(locked):
    clients = []

    def build(key):
        transport = httpx2.WSGITransport(locked.app)
        client = openai.OpenAI(
            base_url="http://testserver/v1",
            api_key=key,
            max_retries=0,
            http_client=httpx2.Client(transport=transport),
        )
        clients.append(client)
        return client

    yield build
    for client in clients:
        client.close()


def test_the_sdk_with_a_right_a_wrong_and_a_removed_key(sdk, keys, path):
    client = sdk(keys["ann"])
    answer = client.chat.completions.create(model="fake", **CHAT)
    assert answer.choices[0].message.content
    with pytest.raises(openai.AuthenticationError) as caught:
        sdk("sk-wrong").chat.completions.create(model="fake", **CHAT)
    assert caught.value.code == "invalid_api_key"
    with pytest.raises(openai.PermissionDeniedError) as denied:
        client.models.delete("fake")
    assert denied.value.code == "insufficient_permissions"
    KeyFile(path).remove("ann")
    with pytest.raises(openai.AuthenticationError):
        client.chat.completions.create(model="fake", stream=True, **CHAT)
