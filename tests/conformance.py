"""Whether a server answers as its OpenAPI document promises, found out by schemathesis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import schemathesis
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi import checks

# That an answer is one of those that are documented, also where it is an error.
DOCUMENTED = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
OFF = 501  # what a setting turns on, and nobody has
_NAMES = ("model", "model_name", "model_id")


def operations(app: Flask) -> list[Any]:
    """Every route of the document with its method."""
    document = schemathesis.openapi.from_wsgi("/openapi.json", _closing(app))
    return [found.ok() for found in document.get_all_operations()]


def _closing(app: Flask) -> Callable[..., Iterable[bytes]]:
    """``app``, whose answers are read and closed: a stream that is not keeps its model leased."""

    def call(environ: Any, start_response: Any) -> Iterable[bytes]:
        answer: Any = app(environ, start_response)
        with closing(answer):
            return [b"".join(answer)]

    return call


def ordinary(operation: Any, model: str) -> Any:
    """The request that the document shows as an example, for a model that exists."""
    path = dict.fromkeys((p.name for p in operation.path_parameters), model)
    body = operation.definition.raw.get("requestBody")
    if body is None:
        return operation.Case(path_parameters=path)
    media_type, content = next(iter(body["content"].items()))  # JSON, before other forms
    if "example" not in content:  # a file
        return operation.Case(path_parameters=path, body=b"a file", media_type=media_type)
    example = {**content["example"], **({"model": model} if "model" in content["example"] else {})}
    return operation.Case(path_parameters=path, body=example, media_type=media_type)


def departures(case: Any) -> tuple[int, list[str]]:
    """The status of the answer, and how it is not as documented."""
    response = case.call()
    try:
        case.validate_response(response, checks=DOCUMENTED)
    except FailureGroup as group:
        text = f"{case.method} {case.formatted_path}: {response.status_code} {response.text[:300]}"
        return response.status_code, [f"{text}\n{found}" for found in group.exceptions]
    return response.status_code, []


class Survey:
    """What came of requests by chance: ``seen`` counts (route, status)."""

    def __init__(self, models: Sequence[str], examples: int) -> None:
        self.seen: Counter[tuple[str, int]] = Counter()
        self.wrong: list[str] = []
        self._models = st.sampled_from([None, *models])
        self._settings = settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

    def ask(self, app: Flask, before: Callable[[], Any]) -> None:
        """Requests that fit the document, and requests that do not; none may be a 5xx."""
        for operation in operations(app):
            for mode in GenerationMode:
                before()
                self._ask(operation, operation.as_strategy(generation_mode=mode))

    def _ask(self, operation: Any, cases: Any) -> None:
        @self._settings
        @given(cases, self._models)
        def one(case: Any, model: str | None) -> None:
            for place in _named(case) if model else ():
                place.update({name: model for name in _NAMES if name in place})
            status, wrong = departures(case)
            self.seen[operation.label, status] += 1
            self.wrong += wrong
            if status >= 500 and status != OFF:
                self.wrong.append(f"{operation.label}: {status} for {case.body!r}")

        try:
            one()
        except Unsatisfiable:  # nothing can be wrong with a request for this route
            return


def _named(case: Any) -> Iterator[dict[str, Any]]:
    """Where a request names its model."""
    yield from (place for place in (case.path_parameters, case.body) if isinstance(place, dict))
