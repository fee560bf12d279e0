"""What the OpenAPI document promises is what the server answers, errors included."""

from __future__ import annotations

import json
import re
from collections import Counter
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import Serve, Served
from tests.conformance import Survey, departures, operations, ordinary
from tests.fakes import FakeEngine, fake_model
from tests.repeats import slow
from transformers_api.api.http.body import MAX_BODY_BYTES
from transformers_api.errors import ApiError
from transformers_api.serving.limits.key_file import KeyFile

# What answers otherwise here: the registry and the tokens of the examples are not those of fakes.
OTHERWISE = {
    "POST /api/{action}": 404,
    "DELETE /api/delete": 501,
    "POST /api/embed": 501,
    "POST /api/embeddings": 501,
    "GET /v1/responses/{response_id}": 404,
    "DELETE /v1/responses/{response_id}": 404,
    "GET /v1/responses/{response_id}/input_items": 404,
    "POST /v1/responses/{response_id}/cancel": 404,
    "POST /v1/embeddings": 501,
    "POST /v1/rerank": 501,
    "POST /rerank": 501,
    "POST /v1/score": 501,
    "POST /score": 501,
    "POST /infill": 400,
    "GET /metrics": 404,
    "POST /load_model": 404,
    "POST /detokenize": 400,
    "GET /inspect/jobs/{job_id}": 404,
    "DELETE /inspect/jobs/{job_id}": 404,
    "GET /inspect/jobs/{job_id}/events": 404,
    "PUT /inspect/lenses/{name}": 422,
    "GET /inspect/lenses/{name}": 404,
    "DELETE /inspect/lenses/{name}": 404,
    "PUT /inspect/saes/{name}": 422,
    "GET /inspect/saes/{name}": 404,
    "DELETE /inspect/saes/{name}": 404,
    "GET /inspect/saes/{name}/features/{feature}": 404,
    "PUT /inspect/vectors/{name}": 201,
    "POST /inspect/runs": 201,
    "GET /inspect/runs/{run_id}": 404,
    "DELETE /inspect/runs/{run_id}": 404,
    "POST /inspect/runs/{run_id}/replay": 404,
    "GET /inspect/runs/compare": 422,
    "POST /inspect/vectors/{name}/derive": 201,
}


def all_errors(kind: type[ApiError] = ApiError) -> list[type[ApiError]]:
    return [e for child in kind.__subclasses__() for e in (child, *all_errors(child))]


# Some 160 s beside others, and worth it: nothing else sends bodies that nobody thought of to every route.
@pytest.mark.timeout(600)
@pytest.mark.slow  # the examples of every route, and every error on it, are asked below
def test_answers_to_requests_by_chance_are_as_documented_and_never_a_server_error(
    served: Served,
) -> None:
    served.loader.build = lambda spec: fake_model(spec, FakeEngine())
    survey = Survey(["fake", "owner/second"], examples=8)

    def load() -> None:  # an operation before may have unloaded it
        served.client.post("/v1/models", json={"model": "fake"})

    survey.ask(served.app, load)
    assert not survey.wrong, "\n\n".join(survey.wrong[:5])
    answered = {route for route, status in survey.seen if status == HTTPStatus.OK}
    assert len(answered) > 25
    assert served.swapper.status().leases == 0


def test_generators_of_clients_can_read_the_document(served: Served) -> None:
    document = served.client.get("/openapi.json").get_json()
    assert document["servers"][0]["url"] == "/"
    assert document["info"]["description"]
    methods = [
        operation
        for path in document["paths"].values()
        for method, operation in path.items()
        if method != "parameters"
    ]
    names = [operation["operationId"] for operation in methods]
    assert len(set(names)) == len(names) > 25
    assert all(name.isidentifier() for name in names)
    text = json.dumps(document)
    patterns = re.findall(r'"pattern": ("(?:[^"\\\\]|\\\\.)*")', text)
    assert patterns
    for pattern in map(json.loads, patterns):
        assert not re.search(r"\\[AZz]|\(\?[P<#i]", pattern)  # Python's, not ECMAScript's
        assert not re.search(pattern, "auto\n")


def test_every_route_succeeds_as_documented_with_the_example_of_the_document(
    served: Served,
) -> None:
    served.loader.build = lambda spec: fake_model(spec, FakeEngine())
    for operation in operations(served.app):
        served.client.post("/v1/models", json={"model": "fake"})
        status, wrong = departures(ordinary(operation, "fake"))
        assert not wrong, wrong[0]
        assert status == OTHERWISE.get(operation.label, 200), operation.label


def errors_by_status() -> list[Any]:
    """One error of each status; the others, which look alike, for `make test-all`."""
    firsts = {(kind.status, kind.type): kind for kind in reversed(all_errors())}
    return [
        *firsts.values(),
        *slow(*(kind for kind in all_errors() if kind not in firsts.values())),
    ]


@pytest.mark.parametrize("kind", errors_by_status(), ids=lambda kind: kind.__name__)
def test_every_error_is_as_documented_wherever_it_happens(
    served: Served, monkeypatch: pytest.MonkeyPatch, kind: type[ApiError]
) -> None:
    def fail(*_: object) -> None:
        error = kind.__new__(kind)
        ApiError.__init__(error, "what happened", retry_after=3)
        raise error

    monkeypatch.setattr(served.services.admission, "enter", fail)
    monkeypatch.setattr(served.services.registry, "resolve", fail)
    hit = 0
    for operation in operations(served.app):
        status, wrong = departures(ordinary(operation, "fake"))
        assert not wrong, wrong[0]
        hit += status >= 400
    assert hit > 20


def test_the_refusals_of_keys_are_as_documented(serve: Serve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    secret = KeyFile(keys).add("ann", "infer")
    locked = serve(api_keys_file=keys)
    for header, status, routes in (({}, 401, 25), ({"x-api-key": secret}, 403, 6)):
        assert statuses(locked, header=header)[status] >= routes


def test_the_refusals_of_limits_are_as_documented(serve: Serve) -> None:
    assert statuses(serve(rate_limit_per_min=1, rate_limit_burst=1))[429] > 15


def test_bodies_that_are_too_long_are_refused_as_documented(served: Served) -> None:
    assert statuses(served, filler="x" * MAX_BODY_BYTES)[413] > 15


def statuses(served: Served, header: dict[str, str] | None = None, **fields: str) -> Counter[int]:
    """How many routes answer so, all of them as documented."""
    seen: Counter[int] = Counter()
    for operation in operations(served.app):
        case = ordinary(operation, "fake")
        case.headers.update(header or {})
        if isinstance(case.body, dict):
            case.body.update(fields)
        status, wrong = departures(case)
        assert not wrong, wrong[0]
        seen[status] += 1
    return seen
