"""Look up the locked packages among the known vulnerabilities: `make audit`.

Ends with 0 only when every package was looked up and none is vulnerable; with 2 when the service
that knows them cannot be asked, which says nothing about the packages.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCKS = (
    *("requirements.lock", "deploy/ray.lock"),
    *("deploy/torch-cpu.lock", "deploy/torch-cu130.lock"),
)
SERVICE = "https://pypi.org/pypi/{package}/json"
NOT_ASKED = 2


def why_not(service: str) -> str | None:
    """Why ``service`` cannot tell of vulnerabilities; None when it can."""
    package, version = (ROOT / LOCKS[0]).read_text().split()[0].split("==")
    url = service.format(package=f"{package}/{version}")  # as pip-audit asks
    try:
        with urllib.request.urlopen(url, timeout=20) as answer:
            is_told = b'"vulnerabilities"' in answer.read()
    except (OSError, urllib.error.URLError) as error:
        return f"{url}: {error}"
    return None if is_told else f"{url} says nothing of vulnerabilities"


def main(service: str = SERVICE) -> int:
    """The exit status."""
    if reason := why_not(service):
        sys.stderr.write(f"Nothing was audited, as the service cannot be asked: {reason}\n")
        return NOT_ASKED
    for lock in LOCKS:
        command = [sys.executable, "-m", "pip_audit", "--strict", "--disable-pip"]
        done = subprocess.run([*command, "--require-hashes", "-r", lock], cwd=ROOT, check=False)
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
