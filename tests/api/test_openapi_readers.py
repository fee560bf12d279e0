"""The document as others read it: its examples, and the programs that make clients of it."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from tests.api.conftest import Served

# npm install openapi-typescript @stoplight/spectral-cli typescript@5; pip install openapi-python-client
READERS = {
    "openapi-typescript": ["openapi-typescript", "openapi.json", "-o", "api.d.ts"],
    "openapi-python-client": ["openapi-python-client", "generate", "--path", "openapi.json"],
    "spectral": ["spectral", "lint", "openapi.json", "--fail-severity", "error"],
}


def test_every_example_is_one_of_its_schema(served: Served) -> None:
    document = served.client.get("/openapi.json").get_json()
    wrong, count = [], 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody") if isinstance(operation, dict) else None
            content = body["content"].get("application/json", {}) if body else {}
            if "example" in content:
                schema = {**content["schema"], "components": document["components"]}
                errors = Draft202012Validator(schema).iter_errors(content["example"])
                wrong += [f"{method} {path}: {error.message}" for error in errors]
                count += 1
    assert not wrong
    assert count > 10


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_makers_of_clients_read_the_document(served: Served, tmp_path: Path, reader: str) -> None:
    command = shutil.which(reader)
    if command is None:
        pytest.skip(f"{reader} is not installed")
    (tmp_path / "openapi.json").write_text(
        json.dumps(served.client.get("/openapi.json").get_json())
    )
    (tmp_path / ".spectral.yaml").write_text('extends: ["spectral:oas"]\n')
    arguments = [command, *READERS[reader][1:]]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning(s)" not in done.stdout, done.stdout
