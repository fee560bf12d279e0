"""The packages of a server: named by their hashes, listed, and looked up."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scripts import audit
from tests.servers import ROOT

LOCK = ROOT / "requirements.lock"
TORCH = [ROOT / "deploy" / "torch-cpu.lock", ROOT / "deploy" / "torch-cu130.lock"]
HASH = re.compile(r"    --hash=sha256:[0-9a-f]{64}(?: \\)?")


def pins(path):
    """{name: version} of a file of requirements."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", path.read_text(), flags=re.M)
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_the_lock_has_every_package_at_its_version_except_torch():
    wanted = pins(ROOT / "requirements.txt") | pins(ROOT / "requirements-models.txt")
    del wanted["torch"]
    assert pins(LOCK) == wanted, "requirements.lock is stale: run `make lock`"


@pytest.mark.parametrize("lock", TORCH, ids=lambda path: path.stem)
def test_every_build_of_torch_is_the_pinned_version_and_fits_the_other_packages(lock):
    wanted, locked = pins(ROOT / "requirements.txt"), pins(lock)
    assert locked["torch"] == wanted["torch"]
    differ = {name for name in locked if name in wanted and locked[name] != wanted[name]}
    assert differ == set(), f"{lock.name} is stale: run `make lock`"
    assert any(name.startswith("nvidia-") for name in locked) == ("cu130" in lock.name)


@pytest.mark.parametrize("lock", [LOCK, *TORCH], ids=lambda path: path.stem)
def test_every_package_has_hashes_and_no_index_is_named(lock):
    is_hashed = True
    for line in lock.read_text().splitlines():
        if HASH.fullmatch(line):
            is_hashed = True
            continue
        assert is_hashed, f"no hash before {line}"
        assert re.fullmatch(r"[a-z0-9._-]+==[^\s/]+ \\", line)
        is_hashed = False
    assert is_hashed


@pytest.mark.parametrize("body", [None, b"{}"], ids=["nobody", "no word of vulnerabilities"])
def test_an_audit_without_its_service_fails_and_says_so(body, capsys):
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        status = audit.main(f"http://127.0.0.1:{server.server_port}/{{package}}")
        server.shutdown()
    assert status == audit.NOT_ASKED
    assert "Nothing was audited" in capsys.readouterr().err
