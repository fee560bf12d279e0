"""Which build of torch `make run` takes, and where from."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scripts import torch_index
from tests.servers import ROOT, WAIT_S

INDEX = "--extra-index-url=https://index.example/cpu"
(TORCH,) = (
    line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:6] == "torch="
)


class Checkout:
    """A folder with the Makefile, whose .venv has a Python that notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._log = folder, folder / "asked"
        for name in ("Makefile", "requirements.txt", "requirements-models.txt"):
            shutil.copy(ROOT / name, folder)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(
            f'#!/bin/sh\ncase "$*" in\n*scripts.torch_index) echo {INDEX} ;;\n'
            f'*) echo "$*" >>{self._log} ;;\nesac\n'
        )
        python.chmod(0o755)

    def install(self, **environment: str) -> list[str]:
        """What pip is asked for torch, one string for each time."""
        self._log.write_text("")
        environ = {k: v for k, v in os.environ.items() if k != "TORCH" and k[:4] != "MAKE"}
        subprocess.run(
            ["make", "--silent", ".venv/run.stamp"],
            cwd=self.folder,
            env=environ | environment,
            check=True,
            timeout=WAIT_S,
            stdout=subprocess.DEVNULL,
        )
        asked = self._log.read_text().splitlines()
        return [line.split("--quiet ")[1] for line in asked if " torch" in line]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture
def index(tmp_path):
    """The address of an index that has a page for torch, and nothing else."""
    (tmp_path / "torch").mkdir()
    handler = partial(Quiet, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_the_build_for_cpus_is_taken_from_pytorchs_index(checkout):
    assert checkout.install() == [f"{INDEX} {TORCH}"]
    assert checkout.install() == []


def test_the_build_for_cuda_replaces_the_other_and_stays_until_another_is_asked_for(checkout):
    checkout.install()
    assert checkout.install(TORCH="cuda") == ["--yes torch", TORCH]
    assert checkout.install() == []
    assert checkout.install(TORCH="cpu") == ["--yes torch", f"{INDEX} {TORCH}"]


def test_another_build_is_refused_by_name(checkout):
    with pytest.raises(subprocess.CalledProcessError):
        checkout.install(TORCH="cu12")
    done = subprocess.run(
        ["make", "TORCH=cu12"], cwd=checkout.folder, capture_output=True, text=True, timeout=WAIT_S
    )
    assert "TORCH=cu12 is not allowed: expected cpu or cuda" in done.stderr


def test_an_index_that_answers_is_named_to_pip(index):
    assert index_option(index) == f"--extra-index-url={index}\n"


def test_an_index_that_refuses_or_has_no_torch_is_left_out(index):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        assert index_option(f"http://127.0.0.1:{nobody.getsockname()[1]}") == ""
    assert index_option(f"{index}/nothing") == ""


def test_an_index_that_never_answers_is_not_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        assert not torch_index.is_reachable(f"http://127.0.0.1:{silent.getsockname()[1]}", 0.2)
        assert time.monotonic() - began < 30


def index_option(index: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.torch_index", index],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
