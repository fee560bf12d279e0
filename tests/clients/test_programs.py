"""Real programs, unchanged, against a live server: those that `make clients` has installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import CLIENTS

PROGRAMS = Path(__file__).parent / "programs"
LIMIT_S = 300

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 60)]


def run(environment: dict[str, str], folder: Path, *command: str) -> None:
    """Run a program's tests; all must pass."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("*.py")), ids=lambda path: path.stem)
def test_python(program: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    python = CLIENTS / program.stem / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{program.stem} is not installed: `make clients`")
    options = ("-c", os.devnull, "--confcutdir", str(PROGRAMS), "-p", "no:cacheprovider")
    environment = request.getfixturevalue("environment")
    run(environment, tmp_path, str(python), "-m", "pytest", "-q", *options, str(program))


@pytest.mark.parametrize("program", sorted(PROGRAMS.glob("*.mjs")), ids=lambda path: path.stem)
def test_node(program: Path, request: pytest.FixtureRequest) -> None:
    text = program.read_text()
    packages = re.findall(r"^// needs: (.*)$", text, re.MULTILINE)[0].split()
    modules = CLIENTS / "node_modules"
    if not shutil.which("node") or not all((modules / name).is_dir() for name in packages):
        pytest.skip(f"{program.stem} is not installed: `make clients`")
    environment = request.getfixturevalue("environment")
    run(environment, CLIENTS, "node", "--input-type=module", "-e", text)
