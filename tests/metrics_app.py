"""The whole application with its metrics, around fakes; and how to read what it shows."""

from __future__ import annotations

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flask import Flask
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes import FakeEngine, FakeLoader, fake_model
from transformers_api.app import create_app
from transformers_api.config.settings import Settings
from transformers_api.logs import JsonFormatter

Samples = dict[str, float]


def make_app(
    folder: Path, engines: dict[str, FakeEngine] | None = None, **settings: Any
) -> tuple[Flask, FakeLoader]:
    """Models "one" and "two", "one" by default; none is loaded."""
    known = engines or {}
    registry = folder / "models.json"
    registry.write_text(
        json.dumps([{"name": n, "path": str(folder)} for n in known or ("one", "two")])
    )
    options = {
        "default_model": "one",
        "preload_model": False,
        "include_default_models": False,
        "model_registry_path": registry,
        "model_store": folder / "store",
        "hf_home": folder / "hub",
        "keepalive_s": 5.0,
        "swap_after_s": 0.0,
    } | settings
    loader = FakeLoader(lambda spec: fake_model(spec, known.get(spec.name)))
    return create_app(Settings(**options), loader), loader


def scrape(client: FlaskClient) -> Samples:
    """Every sample, by its name and labels as they are written."""
    answer = client.get("/metrics")
    assert answer.status_code == 200, answer.get_data(as_text=True)
    samples = {}
    for family in text_string_to_metric_families(answer.get_data(as_text=True)):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            key = sample.name + (f"{{{labels}}}" if labels else "")
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return samples


def post(client: FlaskClient, route: str = "/v1/chat/completions", **body: Any) -> int:
    """Ask, read the answer to its end and close it; gives the status."""
    said = {"messages": [{"role": "user", "content": "Hi"}]} if "chat" in route else {}
    response = client.post(route, json=said | body)
    response.get_data()
    response.close()
    return response.status_code


@contextmanager
def logged(level: int = logging.DEBUG, **options: Any) -> Iterator[io.StringIO]:
    """What the package logs meanwhile, as JSON lines."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    handler.setFormatter(JsonFormatter(**options))
    logger = logging.getLogger("transformers_api")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield text
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def lines_of(text: io.StringIO, message: str | None = None) -> list[dict[str, Any]]:
    """The lines, or those with that message."""
    lines = [json.loads(line) for line in text.getvalue().splitlines()]
    return [line for line in lines if message in (None, line["message"])]


def wait_for(condition: Callable[[], bool], limit_s: float = 10) -> None:
    """Until it holds."""
    gate, end = threading.Event(), time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        gate.wait(0.005)
