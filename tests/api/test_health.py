"""/health, /healthz, /readyz, /, and the documentation."""

import re

import pytest

from transformers_api import __version__


def test_health_has_the_keys_of_all_predecessors(served):
    body = served.client.get("/health").get_json()
    assert re.fullmatch(r"\d+h \d+m \d+s", body.pop("uptime"))
    assert set(body.pop("system")) == {"platform", "python", "cpu_count"}
    memory = body.pop("memory")
    assert body == {
        "status": "degraded",
        "ok": True,
        "model_ready": False,
        "model_loaded": False,
        "current_model": None,
        "models_loaded": [],
        "loaded_models": 0,
        "active_requests": 0,
        "total_models": 2,
        "cuda_available": False,
        "device": None,
        "cache_dir": None,
    }
    assert memory["model_bytes"] == 0
    assert memory["process_bytes"] is None or memory["process_bytes"] > 1 << 20
    served.chat()
    body = served.client.get("/health").get_json()
    assert (body["status"], body["model_ready"], body["model_loaded"]) == ("healthy", True, True)
    assert (body["current_model"], body["models_loaded"]) == ("fake", ["fake"])
    assert body["loaded_models"] == 1
    assert (body["device"], body["memory"]["model_bytes"]) == ("cpu", 1000)


def test_uptime_counts_hours_minutes_and_seconds(served, monkeypatch):
    began = served.services.started_at
    monkeypatch.setattr("time.monotonic", lambda: began + 2 * 3600 + 30 * 60 + 45.9)
    assert served.client.get("/health").get_json()["uptime"] == "2h 30m 45s"


def test_health_tells_of_gpus(serve):
    served = serve(devices=("cpu", "cuda", "cuda:0"))
    assert served.client.get("/health").get_json()["cuda_available"] is True


def test_healthz_says_ok(served):
    assert served.client.get("/healthz").get_json() == {"status": "ok"}


def test_readyz_says_why_not(serve):
    state = [False, "Loading fake"]
    served = serve(ready=lambda: tuple(state))
    response = served.client.get("/readyz")
    assert response.status_code == 503
    assert response.get_json() == {"status": "not ready", "reason": "Loading fake"}
    state[:] = [True, "ready"]
    assert served.client.get("/readyz").status_code == 200
    assert served.client.get("/healthz").status_code == 200


def test_the_root_says_what_this_is(served):
    body = served.client.get("/").get_json()
    assert body["version"] == __version__
    assert (body["documentation"], body["health"], body["status"]) == ("/docs", "/health", "ok")
    assert {"name", "message"} <= set(body)
    for url in body["endpoints"].values():
        assert served.client.options(url).status_code == 200


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_a_page_loads_nothing_from_elsewhere(served, page):
    response = served.client.get(page)
    html = response.get_data(as_text=True)
    assert response.content_type.startswith("text/html")
    assert "://" not in html
    assert "img-src 'self'" in response.headers["Content-Security-Policy"]
    assets = re.findall(r'(?:src|href)="([^"]+)"', html)
    assert assets
    for url in assets:
        asset = served.client.get(url)
        assert asset.status_code == 200
        assert len(asset.get_data()) > 100_000
        asset.close()
    assert "openapi.json" in html


def test_the_document_describes_every_route(served):
    spec = served.client.get("/openapi.json").get_json()
    assert spec["openapi"].startswith("3.")
    described = {(path, method) for path, ops in spec["paths"].items() for method in ops}
    for rule in served.app.url_map.iter_rules():
        if rule.endpoint.startswith(("api-docs", "assets", "page")):
            continue
        path = re.sub(r"<(?:[^:>]+:)?(\w+)>", r"{\1}", rule.rule)
        for method in rule.methods - {"HEAD", "OPTIONS"}:
            assert (path, method.lower()) in described
            assert spec["paths"][path][method.lower()]["summary"]


def test_the_document_has_bounds_and_no_dangling_references(served):
    text = served.client.get("/openapi.json").get_data(as_text=True)
    spec = served.client.get("/openapi.json").get_json()
    for kind, name in re.findall(r'"#/components/(\w+)/([^"]+)"', text):
        assert name in spec["components"][kind]
    fields = spec["components"]["schemas"]["ChatRequest"]["properties"]
    assert (fields["temperature"]["minimum"], fields["temperature"]["maximum"]) == (0, 2)
    assert fields["n"]["type"] == "integer"
    required = spec["components"]["schemas"]["ChatRequest"]["required"]
    assert required == ["messages"]


def test_each_request_is_one_line_of_the_log_and_probes_are_none(served, caplog):
    with caplog.at_level("INFO", logger="transformers_api.api.http.request_log"):
        served.client.get("/healthz").close()
        served.client.get("/v1/models/nothing").close()
    (record,) = caplog.records
    told = {k: record.fields[k] for k in ("method", "path", "status", "error")}
    assert told == {
        "method": "GET",
        "path": "/v1/models/nothing",
        "status": 404,
        "error": "model_not_found",
    }


def test_the_pages_fill_in_examples_that_work(served):
    paths = served.client.get("/openapi.json").get_json()["paths"]
    for url in ("/v1/chat/completions", "/v1/completions", "/generate", "/tokenize"):
        content = paths[url]["post"]["requestBody"]["content"]["application/json"]
        assert served.client.post(url, json=content["example"]).status_code == 200
