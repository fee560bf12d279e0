"""What niels-gpt answered over HTTP, and what we answer with the same checkpoints.

The same statuses, headers and framing, the same token ids and texts, numbers within 1e-4. Fields of
ours may stand beside theirs. Where an answer has to differ, DIFFERENT says how and why; an entry
that no longer differs fails too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.recordings import Recorded
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

FIXTURES = Path(__file__).parent.parent / "fixtures" / "niels_v1"
TOLERANCE = 1e-4  # theirs have all digits, ours five
TOO_LONG = "'x' * 17000"  # how the recording writes a message of that length
HEADERS = ("content-type", "cache-control", "x-accel-buffering")

BY_THE_DOCUMENT = "the document's text has no ', got N', which the code appended here"
ONE_LINE = "one line of text instead of pydantic's list: what is wrong, and in which field"
DIFFERENT = {
    6: ({"detail": "trace_layer is required"}, ONE_LINE),
    7: ({"detail": "messages[0].role must be one of 'system', 'user', 'assistant'"}, ONE_LINE),
    10: ({"detail": "trace_layer must be in [0, 1]"}, BY_THE_DOCUMENT),
    11: ({"detail": "head must be in [0, 3]"}, BY_THE_DOCUMENT),
}


def recording(name: str) -> list[Recorded]:
    entries = json.loads((FIXTURES / name / "http.json").read_text())
    return [Recorded(**entry) for entry in entries]


REQUESTS = [(name, place) for name in ("public", "chat") for place in range(13)]


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """For each checkpoint a server of its own, as the original has one model only."""
    apps = {}
    for name in ("public", "chat"):
        folder = tmp_path_factory.mktemp(name)
        entry = {"name": "niels", "path": str(FIXTURES / name / "best.pt")}
        (folder / "models.json").write_text(json.dumps([entry]))
        settings = Settings(
            model_registry_path=folder / "models.json",
            include_default_models=False,
            default_model="niels",
            preload_model=False,
            model_store=folder / "store",
            hf_home=folder / "hub",
            torch_threads=1,
            rate_limit_per_min=0,
        )
        apps[name] = create_app(settings)
        apps[name].extensions[EXTENSION].swapper.load("niels")
    yield {name: app.test_client() for name, app in apps.items()}
    for app in apps.values():
        app.extensions[EXTENSION].drain(0.0)


def test_every_recorded_request_is_replayed():
    for name in ("public", "chat"):
        assert len(recording(name)) == sum(found == name for found, _ in REQUESTS)


@pytest.mark.parametrize(("name", "place"), REQUESTS)
def test_a_recorded_request_is_answered_alike(clients, name, place):
    recorded = recording(name)[place]
    response = clients[name].open(
        recorded.path, method=recorded.method, json=whole(recorded.body) if recorded.body else None
    )
    text = response.get_data(as_text=True)
    assert response.status_code == recorded.status, text
    for header in HEADERS:
        assert response.headers.get(header) == recorded.headers.get(header)
    theirs, ours = content(recorded.headers, recorded.text), content(recorded.headers, text)
    if place in DIFFERENT:
        expected, _ = DIFFERENT[place]
        assert ours == expected != theirs
    else:
        assert [*differences(theirs, ours)] == []


def whole(body: dict[str, Any]) -> dict[str, Any]:
    """The body that was sent: one message is written as a formula."""
    messages = [
        {**message, "content": "x" * 17000} if message["content"] == TOO_LONG else message
        for message in body["messages"]
    ]
    return {**body, "messages": messages}


def content(headers: dict[str, str], text: str) -> Any:
    """JSON, or a stream as (name, data) of each event, with nothing between them."""
    if headers["content-type"] == "application/json":
        return json.loads(text)
    assert text.endswith("\n\n")
    found = []
    for frame in text[:-2].split("\n\n"):
        name, data = frame.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        found.append([name[7:], json.loads(data[6:])])
    return found


def differences(theirs: Any, ours: Any, place: str = "answer") -> Iterator[str]:
    """Where ours lacks something of theirs or has something else in its place."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        yield from in_fields(theirs, ours, place)
    elif isinstance(theirs, list) and isinstance(ours, list):
        if len(theirs) != len(ours):
            yield f"{place} has {len(ours)} items, not {len(theirs)}"
        for index, (one, other) in enumerate(zip(theirs, ours, strict=False)):
            yield from differences(one, other, f"{place}[{index}]")
    elif isinstance(theirs, float) and isinstance(ours, float | int):
        if not abs(theirs - ours) <= TOLERANCE:
            yield f"{place} is {ours}, not {theirs}"
    elif type(theirs) is not type(ours) or theirs != ours:
        yield f"{place} is {ours!r}, not {theirs!r}"


def in_fields(theirs: dict[str, Any], ours: dict[str, Any], place: str) -> Iterator[str]:
    for name, value in theirs.items():
        if name not in ours:
            yield f"{place} has no {name}"
        elif name == "topk":
            yield from differences(possible(value), possible(ours[name]), f"{place}.{name}")
        else:
            yield from differences(value, ours[name], f"{place}.{name}")


def possible(topk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At temperature 0 all tokens but one are equally impossible: which of them is chance."""
    assert all(0 <= token["prob"] <= 1 for token in topk)
    return [token if token["prob"] else {"prob": 0.0} for token in topk]


@pytest.mark.parametrize(
    ("ours", "complaint"),
    [
        ([["token", {"id": 1, "p": 0.5, "more": 1}]], None),
        ([["token", {"id": 1, "p": 0.50009}]], None),
        ([["token", {"id": 1, "p": 0.5002}]], "answer[0][1].p is 0.5002, not 0.5"),
        ([["token", {"id": 2, "p": 0.5}]], "answer[0][1].id is 2, not 1"),
        ([["token", {"p": 0.5}]], "answer[0][1] has no id"),
        ([["trace", {"id": 1, "p": 0.5}]], "answer[0][0] is 'trace', not 'token'"),
        ([], "answer has 0 items, not 1"),
    ],
)
def test_a_difference_is_noticed(ours, complaint):
    found = [*differences([["token", {"id": 1, "p": 0.5}]], ours)]
    assert found == ([] if complaint is None else [complaint])
