"""The same requests about a model's inside, in one process and through Ray: the same answers."""

from __future__ import annotations

import io
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest

from tests.api.test_intervene import ADD
from tests.api.test_lenses import BYTES, npz, numbers, tuned
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

TEXT = "The colour of the sea"
GREEDY = {"prompt": TEXT, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
PAIRS = [{"positive": f"good {word}", "negative": f"bad {word}"} for word in ("day", "sea", "tea")]
PATCH = {"do": "patch", "layer": 1, "at": [-1], "from": {"prompt": "Another text", "at": [-1]}}
EDITS: dict[str, dict[str, Any]] = {
    "add": ADD,
    "add the derived": {"do": "add", "vector": "mood", "layers": [0], "scale": 2, "units": "norm"},
    "erase": {"do": "erase", "vector": "mood", "layers": [1]},
    "ablate": {"do": "ablate", "part": "mlp", "layer": 1, "with": "mean"},
    "feature": {"do": "feature", "sae": "one", "feature": 3, "value": 4},
    "patch": PATCH,
    "block": {"do": "block", "layer": 1, "heads": [1], "queries": "last", "keys": [0, 1]},
}
# Ids (``meta`` has them, too), times, sizes in memory, and what the cache of prompts has.
OWN = re.compile(r"id|meta|created|ms|seconds|.*_s|bytes|cached_tokens")
RUN = re.compile(r"run-[0-9a-f]+")
Ask = Callable[..., tuple[int, str, bytes]]


@dataclass
class Conversation:
    """Everything that one side answered, by the name of the request."""

    ask: Ask
    answers: dict[str, Any] = field(default_factory=dict)

    def __call__(self, name: str, method: str, path: str, body: object = None) -> Any:
        status, kind, data = self.ask(method, path, body)
        answer = numbers_of(data) if data[:2] == b"PK" else read(kind, data)
        self.answers[name] = [status, answer]
        assert status < 400, (name, answer)
        return answer


def read(kind: str, data: bytes) -> Any:
    """JSON, also by lines, or text."""
    if "json" not in kind:
        return data.decode()
    lines = [json.loads(line) for line in data.splitlines()]
    return lines if len(lines) > 1 else lines[0]


def numbers_of(data: bytes) -> dict[str, Any]:
    with numpy.load(io.BytesIO(data)) as archive:
        return {name: archive[name].tolist() for name in archive.files}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if not OWN.fullmatch(name)}
    if isinstance(value, list):
        return [plain(part) for part in value]
    return RUN.sub("run", value) if isinstance(value, str) else value


def converse(ask: Ask) -> dict[str, Any]:
    said = Conversation(ask)
    vectors = "/inspect/vectors"
    said("derive", "POST", f"{vectors}/mood/derive", {"pairs": PAIRS})
    said("vector", "GET", f"{vectors}/mood")
    said("calibration", "PUT", "/inspect/calibration", {"texts": ["Water boils.", "def add(a):"]})
    said("lens", "PUT", "/inspect/lenses/mine", tuned(0.1))
    said("lenses", "GET", "/inspect/lenses")
    said("cells", "POST", "/inspect/logit_lens", {"prompt": TEXT, "via": "mine", "topk": 2})
    said("sae", "PUT", "/inspect/saes/one?layer=0", npz(numbers()))
    said("feature", "GET", "/inspect/saes/one/features/3")
    for name, edit in EDITS.items():
        body = GREEDY | {"intervene": {"edits": [edit], "compare": "forced"}, "logprobs": 2}
        said(f"edit: {name}", "POST", "/v1/completions", body)
        body = {"prompt": TEXT, "logprobs": True, "intervene": {"edits": [edit]}}
        said(f"read: {name}", "POST", "/inspect/tokens", body)
    first = said(
        "first",
        "POST",
        "/v1/completions",
        GREEDY | {"trace": {"lens": {"layers": "all", "topk": 1}}},
    )
    branch = {"completion_id": first["id"], "step": 2, "token_id": 65}
    said("branch", "POST", "/v1/completions", GREEDY | {"branch": branch})
    said("as written", "POST", "/inspect/tokens", {"completion_id": first["id"]})
    traced = {"features": {"sae": "one", "topk": 2}, "lens": {"layers": "all", "via": "mine"}}
    said("traced", "POST", "/v1/completions", GREEDY | {"trace": traced})
    asked = {"prompt": TEXT, "max_tokens": 4, "seed": 1}
    one = said("run", "POST", "/inspect/runs", asked | {"intervene": {"edits": [ADD]}})["id"]
    other = said("other run", "POST", "/inspect/runs", asked)["id"]
    said("run again", "POST", f"/inspect/runs/{one}/replay")
    said("run's steps", "GET", f"/inspect/runs/{one}")
    said("run's numbers", "GET", f"/inspect/runs/{one}?format=npz")
    said("compared", "GET", f"/inspect/runs/compare?a={one}&b={other}")
    grid = {"clean": "The sea is", "corrupt": "The tea is", "job": True}
    said("job", "GET", finished(said, said("grid", "POST", "/inspect/patch", grid)["id"]))
    said("ablated", "POST", "/inspect/ablate", {"prompt": TEXT, "layers": [1]})
    said("rollout", "POST", "/inspect/rollout", {"prompt": TEXT})
    said("attention", "POST", "/inspect/full_attn", {"prompt": "abc", "trace_layer": 0, "head": 1})
    said("no calibration", "DELETE", "/inspect/calibration")
    for kind in ("vectors/mood", "lenses/mine", "saes/one"):
        said(f"no {kind}", "DELETE", f"/inspect/{kind}")
    return said.answers


def finished(said: Conversation, job: str) -> str:
    path, until = f"/inspect/jobs/{job}", time.monotonic() + 150
    while said("state", "GET", path)["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.05)
    return path


@pytest.fixture
def local(cluster) -> Any:
    """The application with the same models, in this process."""
    environment = {**cluster.environment, "MODEL_STORE": str(cluster.folder / "here")}
    for name in ("REDIS_URL", "CLUSTER_MAX_INFLIGHT"):
        del environment[name]
    app = create_app(Settings.from_env(environment))
    yield app.test_client()
    app.extensions[EXTENSION].swapper.close()


def test_what_is_inside_is_the_same_through_ray(cluster, front, local):
    def here(method: str, path: str, body: object) -> tuple[int, str, bytes]:
        sent = {"json": body} if not isinstance(body, bytes) else {"data": body}
        sent |= {"content_type": BYTES} if isinstance(body, bytes) else {}
        answer = local.open(path, method=method, **(sent if body is not None else {}))
        return answer.status_code, answer.content_type, answer.data

    def there(method: str, path: str, body: object) -> tuple[int, str, bytes]:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        kind = BYTES if isinstance(body, bytes) else "application/json"
        request = urllib.request.Request(
            front.url + path, data, {"Content-Type": kind}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=150) as answer:
                return answer.status, answer.headers["Content-Type"], answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["Content-Type"], error.read()

    answers, own = converse(there), converse(here)
    assert list(answers) == list(own)
    different = [name for name in own if plain(answers[name]) != plain(own[name])]
    assert not different, {name: (plain(answers[name]), plain(own[name])) for name in different}
