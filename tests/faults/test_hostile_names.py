"""Names, addresses and templates that a request should not be able to bring along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import Measured
from tests.servers import ROOT

# In a process of its own: an audit hook cannot be taken away again.
PROGRAM = """
import json, sys
from pathlib import Path
from tests.faults.hostile import Auditor, ask_everything
from tests.served_app import create_app
from transformers_api.config.settings import Settings

folder = Path(sys.argv[1])
client = create_app(
    Settings(
        model_store=folder / "store",
        hf_home=folder / "hub",
        residency_lock=False,
        allow_download=False,
        preload_model=False,
    )
).test_client()
ask_everything(client, folder)  # what is imported at its first use is imported
auditor = Auditor(folder)
sys.addaudithook(auditor)
auditor.is_on = True
(folder / "canary").read_text()
noticed = auditor.events.pop()
answers = ask_everything(client, folder)
auditor.is_on = False
json.dump({"answers": answers, "events": auditor.events, "noticed": noticed}, sys.stdout)
"""


def test_no_name_reaches_a_file_the_network_or_a_program(
    tmp_path: Path, measured: Measured
) -> None:
    (tmp_path / "canary").write_text("a secret")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    statuses = sorted({status for status, _ in found["answers"]})
    texts = " ".join(text for _, text in found["answers"])
    measured(
        f"{len(found['answers'])} requests, statuses {statuses}; files, connections and programs "
        f"beyond those of any request: {found['events']}"
    )
    assert len(found["answers"]) > 200
    assert found["events"] == []
    assert "canary" in found["noticed"]  # it does see what is opened
    assert set(statuses) <= {200, 308, 400, 404}
    assert "a secret" not in texts
    assert "root:x:0" not in texts
