"""The image, built and run for real: read-only, as its user, alone and by Compose."""

from __future__ import annotations

import json
import re
import shlex
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from tests.deploy import containers
from tests.deploy.containers import Containers
from tests.servers import ROOT, reserve_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(containers.missing() is not None, reason=str(containers.missing())),
]
READY_S = 120.0
SERVICES = (ROOT / "docker-compose.yml").read_text()
COMPOSE = re.findall(r"^#   (docker-compose .*? --build [\w-]+)", SERVICES, re.M)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    one = Containers(tmp_path_factory.mktemp("containers"))
    try:
        one.build()
        yield one
    finally:
        one.close()


def documented_run() -> list[str]:
    """The `docker run` of the Dockerfile's first lines."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n#", "")
    (line,) = re.findall(r"^#   (docker run .*)$", text, re.M)
    return shlex.split(line)[2:]


def ask(port: int, path: str, body: Any = None) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=READY_S) as answer:
        return json.load(answer)


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            assert ask(port, "/readyz") == {"status": "ready", "reason": "ready"}
            return
        except (urllib.error.HTTPError, OSError):
            assert time.monotonic() < deadline
        time.sleep(0.2)  # polling, with a deadline


def chats(port: int) -> bool:
    question = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 4}
    return bool(ask(port, "/v1/chat/completions", question)["choices"][0]["message"]["content"])


def is_healthy(engine: Containers, name: str) -> bool:
    """The check of the image, by the engine."""
    return not engine.fails("podman", "healthcheck", "run", name)


@pytest.fixture
def port() -> Iterator[int]:
    with reserve_port() as holder:
        yield holder.getsockname()[1]


def test_the_image_serves_read_only_as_its_user_and_finds_itself_healthy(engine, port) -> None:
    options = [part.replace(":5000:5000", f":{port}:5000") for part in documented_run()]
    engine.run("podman", "run", "--detach", "--name=alone", *options[1:])
    wait_until_ready(port)
    assert chats(port)
    assert is_healthy(engine, "alone")
    inside = ("podman", "exec", "alone")
    assert engine.run(*inside, "id", "--user").strip() == "1000"
    rights = engine.run(*inside, "cat", "/proc/1/status")
    assert re.search(r"^CapEff:\t0+$", rights, re.M)
    assert re.search(r"^NoNewPrivs:\t1$", rights, re.M)
    assert engine.fails(*inside, "touch", "/app/file")
    assert not engine.fails(*inside, "touch", "/tmp/file", "/models/file")
    assert "ready in /kernels/" in engine.run(
        *inside, "python", "-m", "transformers_api", "kernels"
    )
    assert engine.fails(*inside, "g++", "--version")
    engine.run("podman", "stop", "--time=40", "alone")
    assert engine.run("podman", "wait", "alone").strip() == "0"


@pytest.mark.parametrize("command", COMPOSE, ids=lambda text: text.split()[-1])
def test_the_documented_commands_of_compose_serve(engine, command) -> None:
    port = 8001 if command.endswith("-dev") else 8000
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            pytest.skip(f"port {port} of this machine is taken")
    down = [*command.split(" up ")[0].split(), "down", "--volumes"]
    with engine.answering_compose():
        try:
            engine.run(
                *command.replace(" up ", " up --detach ").split(), timeout_s=containers.BUILD_S
            )
            wait_until_ready(port)
            assert chats(port)
            (container,) = engine.run("podman", "ps", "--quiet").split()
            assert is_healthy(engine, container)
            assert engine.fails("podman", "exec", container, "touch", "/app/file")
        finally:
            engine.run(*down)


def test_nothing_of_this_machine_s_package_index_is_in_the_image(engine) -> None:
    _, paths = containers.pip_configuration()
    history = engine.run("podman", "history", "--no-trunc", containers.IMAGE)
    assert not [path for path in paths if str(path) in history]
    inside = ("podman", "run", "--rm", containers.IMAGE)
    assert engine.fails(*inside, "test", "-s", "/etc/pip.conf")  # where it was mounted
