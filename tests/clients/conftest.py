"""What programs of others need: two live servers, and where the programs are installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.served_app import serving
from tests.servers import ROOT, started
from tests.test_end_to_end import DEFAULT, save_tiny, wait_until_ready

CLIENTS = ROOT / "build" / "clients"  # `make clients` installs there


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """``URL`` has the default model, ``SCRIPTED_URL`` one that does what its prompt says."""
    folder = tmp_path_factory.mktemp("clients")
    path = str(save_tiny(folder / "tiny", "llama"))
    entries = [{"name": "tiny", "path": path, "embedding": {"pooling": "mean"}}]
    (folder / "models.json").write_text(json.dumps(entries))
    settings = {
        "PORT": "0",
        "HOST": "127.0.0.1",
        "MODEL_STORE": str(ROOT / "build" / "test-models"),
        "MODEL_REGISTRY_PATH": str(folder / "models.json"),
        "HF_HOME": str(folder / "hub"),
        "TORCH_THREADS": "1",
        "RATE_LIMIT_PER_MIN": "0",
        "ENABLE_EMBEDDINGS_BACKEND": "1",
    }
    command = [sys.executable, "-m", "transformers_api", "serve"]
    with (
        started(*command, **settings) as real,
        serving(folder, "tests.clients.scripted:create_app", RATE_LIMIT_PER_MIN="0") as scripted,
    ):
        yield {
            "URL": wait_until_ready(real),
            "SCRIPTED_URL": wait_until_ready(scripted),
            "MODEL": DEFAULT,
            "EMBEDDING_MODEL": "tiny",
        }
