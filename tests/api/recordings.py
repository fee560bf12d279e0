"""What the originals answered, and how far an answer of ours has the same shape."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient

FOLDER = Path(__file__).parent.parent / "fixtures" / "http"


@dataclass(frozen=True)
class Recorded:
    """One request to an original and its answer."""

    method: str
    path: str
    body: Any
    status: int
    headers: dict[str, str]
    text: str

    def __str__(self) -> str:
        return f"{self.method} {self.path} {json.dumps(self.body)}"


def recording(name: str) -> list[Recorded]:
    return [Recorded(**entry) for entry in json.loads((FOLDER / f"{name}.json").read_text())]


def complaints(recorded: Recorded, client: FlaskClient) -> tuple[int, list[str]]:
    """Our status, and in what our answer differs: in status, headers, framing or shape."""
    response = client.open(recorded.path, method=recorded.method, json=recorded.body)
    text = response.get_data(as_text=True)
    response.close()
    found = []
    if response.status_code != recorded.status:
        found.append(f"status {response.status_code} instead of {recorded.status}: {text}")
    for name, value in recorded.headers.items():
        # Whether a connection stays open is the HTTP server's affair.
        if name != "connection" and response.headers.get(name) != value:
            found.append(f"{name}: {response.headers.get(name)!r} instead of {value!r}")
    if not found:
        found = [*content(recorded, text)]
    return response.status_code, found


def content(recorded: Recorded, text: str) -> Iterator[str]:
    kind = recorded.headers["content-type"].partition(";")[0]
    if kind == "application/json":
        yield from misfits(json.loads(recorded.text), json.loads(text))
    elif kind == "text/event-stream":
        theirs, ours = frames(recorded.text), frames(text)
        if theirs is None:
            yield "the recorded stream has no event"
        elif ours is None or ours[-1] != theirs[-1]:
            yield f"the stream does not end in {theirs[-1]}"
        else:
            for frame in theirs[:-1]:
                if all([*misfits(frame, other)] for other in ours[:-1]):
                    yield f"no event is like {frame}"


def frames(text: str) -> list[Any] | None:
    """The data of every event; None where that is not what the text is."""
    if not text.endswith("\n\n") or not text.startswith("data: "):
        return None
    found = [frame.removeprefix("data: ") for frame in text[:-2].split("\n\n")]
    return [frame if frame == "[DONE]" else json.loads(frame) for frame in found]


def misfits(theirs: Any, ours: Any, place: str = "answer") -> Iterator[str]:
    """Every name that ours lacks and every value of another type; null may stand for anything."""
    if theirs is None:
        return
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name, value in theirs.items():
            if name in ours:
                yield from misfits(value, ours[name], f"{place}.{name}")
            else:
                yield f"{place} has no {name}"
    elif isinstance(theirs, list) and isinstance(ours, list):
        for index, item in enumerate(theirs):  # ours may list more
            if all([*misfits(item, other)] for other in ours):
                yield f"{place} has nothing like [{index}]: {item!r}"
    elif kind(theirs) is not kind(ours):
        yield f"{place} is {ours!r}, not like {theirs!r}"


def kind(value: Any) -> type:
    return float if type(value) is int else type(value)
