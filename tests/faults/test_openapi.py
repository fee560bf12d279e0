"""The whole OpenAPI document against the real application, with real engines of small models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance import Survey
from tests.conftest import Measured
from tests.test_end_to_end import save_tiny
from transformers_api.api.http.services import EXTENSION
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

KINDS = ("llama", "gpt2")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_application_answers_as_documented(tmp_path: Path, measured: Measured) -> None:
    entries = [{"name": kind, "path": str(save_tiny(tmp_path / kind, kind))} for kind in KINDS]
    (tmp_path / "models.json").write_text(json.dumps(entries))
    app = create_app(
        Settings(
            model_registry_path=tmp_path / "models.json",
            include_default_models=False,
            default_model=KINDS[0],
            preload_model=False,
            allow_download=False,
            model_store=tmp_path / "store",
            hf_home=tmp_path / "hub",
            residency_lock=False,
            torch_threads=1,
            swap_after_s=0,
            rate_limit_per_min=0,
            metrics_enabled=True,
        )
    )
    client = app.test_client()
    survey = Survey(KINDS, examples=40)
    try:
        survey.ask(app, lambda: client.post("/v1/models", json={"model": KINDS[0]}))
    finally:
        app.extensions[EXTENSION].drain(0.0)
    routes = {route for route, _ in survey.seen}
    succeeded = {route for route, status in survey.seen if status == 200}
    measured(
        f"{survey.seen.total()} requests for {len(routes)} operations, {len(succeeded)} of which "
        f"also succeeded: {len(survey.wrong)} not as documented"
    )
    assert not survey.wrong, "\n\n".join(survey.wrong[:5])
