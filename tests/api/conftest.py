"""An application around fakes: the real registry, store and swapper, no torch, no network."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from werkzeug.test import TestResponse

from tests.fakes import FakeEngine, FakeLoader, fake_model, fake_spec
from transformers_api import api
from transformers_api.api.http.disconnect import DisconnectWatcher
from transformers_api.api.http.rate_limits import RateLimits
from transformers_api.api.http.services import Services
from transformers_api.config.settings import Settings
from transformers_api.serving.inspect.queue import Inspections
from transformers_api.serving.limits.access import Access
from transformers_api.serving.limits.admission import Admission
from transformers_api.serving.limits.in_flight import InFlight
from transformers_api.serving.models.registry import ModelRegistry
from transformers_api.serving.models.spec import ModelSpec
from transformers_api.serving.models.store import ModelStore
from transformers_api.serving.response_store import ResponseStore
from transformers_api.serving.swap.policy import SwapRules
from transformers_api.serving.swap.swapper import Swapper


@dataclass
class Events:
    """A stream, read to its end."""

    payloads: list[dict[str, Any]]
    done: bool  # it ended in [DONE]
    pings: int

    def text(self, index: int = 0) -> str:
        """What a chat or completion client would show."""
        choices = [c for p in self.payloads for c in p.get("choices", []) if c["index"] == index]
        return "".join(c["text"] if "text" in c else c["delta"].get("content", "") for c in choices)

    def reasons(self) -> list[tuple[int, str]]:
        """(choice, finish reason) as they came."""
        choices = [c for p in self.payloads for c in p.get("choices", [])]
        return [(c["index"], c["finish_reason"]) for c in choices if c["finish_reason"]]


def events(response: TestResponse) -> Events:
    """Read a streamed response and close it."""
    assert response.status_code == 200, response.get_data(as_text=True)
    body = response.get_data(as_text=True)
    response.close()
    assert body.endswith("\n\n")
    frames = body[:-2].split("\n\n")
    data = [frame.removeprefix("data: ") for frame in frames if frame.startswith("data: ")]
    done = bool(data) and data[-1] == "[DONE]"
    assert len(data) + frames.count(": ping") == len(frames)
    return Events(
        [json.loads(text) for text in (data[:-1] if done else data)], done, frames.count(": ping")
    )


@dataclass
class Served:
    """An application and what is behind it."""

    app: Flask
    services: Services
    loader: FakeLoader
    engines: dict[str, FakeEngine]
    client: FlaskClient = field(init=False)

    def __post_init__(self) -> None:
        self.client = self.app.test_client()

    @property
    def engine(self) -> FakeEngine:
        """The default model's."""
        return self.engines["fake"]

    @property
    def swapper(self) -> Swapper:
        return self.services.swapper

    def chat(self, content: Any = "Hi", **fields: Any) -> TestResponse:
        messages = fields.pop("messages", [{"role": "user", "content": content}])
        return self.client.post("/v1/chat/completions", json={"messages": messages, **fields})

    def complete(self, prompt: Any = "Hi", **fields: Any) -> TestResponse:
        return self.client.post("/v1/completions", json={"prompt": prompt, **fields})

    def params(self) -> Any:
        """The sampling parameters of the last submit."""
        return self.engine.submitted[-1][0].params


Serve = Callable[..., Served]


@pytest.fixture
def watcher() -> DisconnectWatcher:
    """What notices that clients leave; tests may put another in its place."""
    return DisconnectWatcher()


@pytest.fixture
def serve(tmp_path: Path, watcher: DisconnectWatcher) -> Iterator[Serve]:
    """Make an application; arguments are the engine of "fake", other specs, and settings.

    ``rates`` are fields of its Access: without RATE_LIMIT_PER_MIN nothing is limited.
    """
    made: list[Swapper] = []

    def build(
        engine: FakeEngine | None = None,
        specs: tuple[ModelSpec, ...] = (),
        ready: Callable[[], tuple[bool, str]] = lambda: (True, "ready"),
        devices: tuple[str, ...] = ("cpu",),
        rates: Mapping[str, Any] = MappingProxyType({}),
        **settings: Any,
    ) -> Served:
        options = {
            "default_model": "fake",
            "model_store": tmp_path / "store",
            "hf_home": tmp_path / "hub",
            "allow_download": False,
            "keepalive_s": 0.05,
        } | settings
        chosen = Settings(**options)
        if "fake" not in {spec.name for spec in specs}:
            specs = (fake_spec(), fake_spec("owner/second", aliases=("two",)), *specs)
        engines = {spec.name: FakeEngine() for spec in specs} | {"fake": engine or FakeEngine()}
        loader = FakeLoader(lambda spec: fake_model(spec, engines[spec.name]))
        store = ModelStore(chosen)
        registry = ModelRegistry(specs, False, store.has_repo)
        swapper = Swapper(
            registry,
            loader,
            SwapRules(swap_after_s=0, drain_s=10),
            wait_s=10,
            auto_load=chosen.auto_load,
        )
        made.append(swapper)
        access = Access.from_settings(chosen)
        if not chosen.rate_limit_per_min:
            access = replace(access, requests=None)
        access = replace(access, **{"spares_local": False, **rates})
        admission = Admission(chosen.max_inflight, chosen.max_queue, chosen.request_timeout_s)
        services = Services(
            settings=chosen,
            access=access,
            limits=RateLimits(access, chosen.redis_url),
            registry=registry,
            store=store,
            swapper=swapper,
            admission=admission,
            in_flight=InFlight(
                chosen.cluster_max_inflight,
                chosen.client_max_inflight,
                chosen.redis_url,
                admission.retry_after,
            ),
            responses=ResponseStore(chosen.responses_store_mb << 20, chosen.responses_store_ttl_s),
            inspections=Inspections(chosen.inspect_queue, chosen.inspect_timeout_s),
            watcher=watcher,
            ready=ready,
            fault=lambda: None,
            text_of=loader.text,
            devices=lambda: devices,
            drain=lambda grace_s: None,
        )
        app = Flask("tests", static_folder=None)
        app.testing = False  # errors are rendered, as in production
        api.register(app, services)
        return Served(app, services, loader, engines)

    yield build
    for swapper in made:
        swapper.close()


@pytest.fixture
def served(serve: Serve) -> Served:
    """An application whose default model answers at once."""
    return serve()
