"""The container files, without a container engine: what they copy, set, run and publish."""

from __future__ import annotations

import http.client
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.servers import WAIT_S, started
from transformers_api.config.described import described
from transformers_api.config.settings import Settings
from transformers_api.kernels.build import find

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
HADOLINT = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
PRODUCTION, DEVELOPMENT = "tinygpt-api", "tinygpt-api-dev"
# Of Python, the C library and the shell; everything else that is set must be a setting of ours.
OF_OTHERS = {
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "PATH",
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONUNBUFFERED",
    "XDG_CACHE_HOME",
}


def stages():
    """The instructions before the first build stage and of each: (keyword, rest)."""
    found = [[]]
    lines = [line for line in DOCKERFILE.splitlines() if line and not line.startswith("#")]
    for instruction in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        keyword, _, rest = instruction.partition(" ")
        if keyword == "FROM":
            found.append([])
        found[-1].append((keyword, rest.strip()))
    return found


BEFORE, PACKAGES, KERNELS, IMAGE = stages()


def those(keyword, stage=IMAGE):
    return [rest for found, rest in stage if found == keyword]


def the(keyword):
    (rest,) = those(keyword)
    return rest


def exec_form(rest):
    """The command of a JSON list; the shell form would hide signals from the server."""
    return yaml.safe_load(rest[rest.index("[") :])


def copies(stage):
    """(sources, target) of each COPY from the build context."""
    for rest in those("COPY", stage):
        if not rest.startswith("--from"):
            *sources, target = rest.split()
            yield sources, target


def image_environment():
    """What ENV sets, with ``$PATH`` left as it is."""
    return dict(part.split("=", 1) for rest in those("ENV") for part in shlex.split(rest))


def expanded(text):
    """A value of the Compose file where the shell sets nothing."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def service_environment(name):
    given = COMPOSE["services"][name]["environment"]
    return {key: expanded(value) for key, value in given.items() if value is not None}


def settings_in(name):
    return Settings.from_env(image_environment() | service_environment(name))


@pytest.fixture
def image(tmp_path):
    """The folder /app of the image."""
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for sources, target in copies(IMAGE):
        for source in sources:
            assert f"!{source}" in allowed
            into = tmp_path / target / (source if target == "./" else "")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, into, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, into)
    return tmp_path


def in_folder(folder, command):
    """A command of the image, run in ``folder`` by the interpreter of the tests."""
    assert command[0] == "python"
    line = shlex.join([sys.executable, *command[1:]])
    return ["sh", "-c", f"cd {shlex.quote(str(folder))} && exec {line}"]


def on_this_machine(folder):
    """The environment of the image, except that nobody else reaches the server."""
    here = {"HOST": "127.0.0.1", "PORT": "0", "PRELOAD_MODEL": "false", "PATH": os.environ["PATH"]}
    return image_environment() | {"XDG_CACHE_HOME": str(folder / "cache")} | here


@pytest.mark.parametrize("stage", [PACKAGES, KERNELS, IMAGE], ids=["packages", "kernels", "image"])
def test_what_is_copied_exists_and_reaches_the_builder(stage):
    everything, *allowed = [
        line
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if not line.startswith("#")
    ]
    assert everything == "*"
    copied = [source for sources, _ in copies(stage) for source in sources]
    assert copied
    assert [source for source in copied if not (ROOT / source).exists()] == []
    assert [source for source in copied if f"!{source}" not in allowed] == []


def test_the_image_serves_and_finds_itself_healthy(image):
    with started(*in_folder(image, exec_form(the("CMD"))), **on_this_machine(image)) as server:
        _, port = server.address()
        server.get("/healthz")  # its worker has begun: the check itself waits no longer than Docker
        check = in_folder(image, exec_form(the("HEALTHCHECK")))
        environ = {**os.environ, **on_this_machine(image), "PORT": str(port)}
        tries = (subprocess.run(check, env=environ, timeout=WAIT_S, check=False) for _ in range(9))
        # As Docker does: on a busy machine one may take too long.
        assert any(done.returncode == 0 for done in tries)
    done = subprocess.run(check, env=environ, timeout=WAIT_S, check=False, capture_output=True)
    assert done.returncode == 1


def test_the_image_needs_no_root_and_says_what_it_offers():
    user, _, group = the("USER").partition(":")
    assert int(user) > 0
    assert int(group) > 0
    assert f"--uid {user} " in the("RUN")
    assert int(the("EXPOSE")) == Settings().port
    assert Settings.from_env(image_environment()).host == "0.0.0.0"


def test_the_volume_holds_models_and_the_hub_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", image_environment()["XDG_CACHE_HOME"])
    settings = Settings.from_env(image_environment())
    assert settings.model_store.is_relative_to(the("VOLUME"))
    assert settings.hf_home.is_relative_to(the("VOLUME"))


def test_a_published_image_downloads_only_when_it_is_told_to():
    assert not Settings.from_env(image_environment()).downloads_allowed


def test_every_package_has_a_hash_and_torch_is_of_the_build_that_is_asked_for():
    assert those("ARG", PACKAGES) == ["TORCH=cpu", "EXTRA="]
    environment = " ".join(those("ENV", PACKAGES))
    assert "PIP_REQUIRE_HASHES=1" in environment
    assert "PIP_ONLY_BINARY=:all:" in environment
    (run,) = those("RUN", PACKAGES)
    _, torch, others = run.split(" && ")
    assert '--no-deps --requirement "torch-${TORCH}.lock"' in torch
    assert (
        '--no-deps --requirement requirements.lock ${EXTRA:+--requirement "${EXTRA}.lock"}'
        in others
    )
    copied = [source for sources, _ in copies(PACKAGES) for source in sources]
    builds = sorted(path.name for path in (ROOT / "deploy").glob("torch-*.lock"))
    assert builds == ["torch-cpu.lock", "torch-cu130.lock"]
    assert copied == [
        "requirements.lock",
        *(f"deploy/{name}" for name in builds),
        "deploy/ray.lock",
    ]


def test_all_stages_stand_on_one_base_that_can_be_named_by_its_digest():
    assert BEFORE == [("ARG", "BASE=python:3.11-slim")]
    assert [those("FROM", stage) for stage in (PACKAGES, KERNELS, IMAGE)] == [
        ["${BASE} AS packages"],
        ["${BASE} AS kernels"],
        ["${BASE}"],
    ]


def test_the_image_finds_the_kernels_that_were_compiled_for_it_and_has_no_compiler(tmp_path):
    """The command of the stage, by a compiler that says with what it was called."""
    said = tmp_path / "said"
    write_script(tmp_path / "bin" / "g++", f'echo "$@" >>{said}\nfor made; do :; done\n: >"$made"')
    command = those("RUN", KERNELS)[-1].replace("/kernels", str(tmp_path / "kernels"))
    path = f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", command], env=os.environ | {"PATH": path}, cwd=ROOT, timeout=WAIT_S
    )
    assert done.returncode == 0
    assert "-march" not in said.read_text()  # the machine that builds is not the one that runs
    assert "-mavx512bf16" in said.read_text()
    assert find(tmp_path / "kernels") is not None
    assert f"--from=kernels /kernels {image_environment()['NATIVE_CACHE']}" in those("COPY")
    assert not [run for run in those("RUN") if "g++" in run]


def write_script(path, text):
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.skipif(not HADOLINT, reason="hadolint is not made for this machine")
def test_hadolint_has_nothing_to_say():
    done = subprocess.run([HADOLINT, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", [PRODUCTION, DEVELOPMENT])
def test_a_service_writes_to_its_volume_and_to_tmp_only_and_may_do_nothing(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["pids_limit"] > settings_in(name).threads
    assert image_environment()["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize("name", [PRODUCTION, DEVELOPMENT])
def test_all_that_is_set_are_settings(name):
    known = OF_OTHERS | {name for name, *_ in described()}
    assert sorted({*image_environment(), *COMPOSE["services"][name]["environment"]} - known) == []
    settings_in(name)  # raises where a value is not allowed


@pytest.mark.parametrize(
    ("name", "port", "profiles"), [(PRODUCTION, 8000, None), (DEVELOPMENT, 8001, ["dev"])]
)
def test_the_services_are_the_documented_ones(name, port, profiles):
    service = COMPOSE["services"][name]
    assert service.get("profiles") == profiles
    assert [expanded(published) for published in service["ports"]] == [f"127.0.0.1:{port}:{port}"]
    assert settings_in(name).port == port
    assert settings_in(name).host == "0.0.0.0"
    assert service["build"]["context"] == "."
    assert f"weights:{the('VOLUME')}" in service["volumes"]
    assert "weights" in COMPOSE["volumes"]
    assert "healthcheck" not in service  # the image has one
    grace_s = float(service["stop_grace_period"].removesuffix("s"))
    assert grace_s > settings_in(name).graceful_s


def test_what_only_this_machine_reaches_may_download():
    for name, service in COMPOSE["services"].items():
        assert all(expanded(port).startswith("127.0.0.1:") for port in service["ports"])
        assert settings_in(name).downloads_allowed


def test_production_runs_what_the_image_runs_and_development_this_folder():
    assert "command" not in COMPOSE["services"][PRODUCTION]
    assert COMPOSE["services"][PRODUCTION]["volumes"] == ["weights:/models"]
    assert f".:{the('WORKDIR')}:ro" in COMPOSE["services"][DEVELOPMENT]["volumes"]


@pytest.mark.slow
def test_the_development_service_answers_with_changed_code(image):
    command = COMPOSE["services"][DEVELOPMENT]["command"]
    with started(*in_folder(image, command), **on_this_machine(image)) as server:
        assert server.get("/healthz") == '{"status":"ok"}'
        view = image / "transformers_api" / "api" / "ops" / "health.py"
        server.said("Reloader is on")
        view.write_text(view.read_text().replace('{"status": "ok"}', '{"status": "changed"}'))
        assert changed(server, view) == '{"status":"changed"}'
        server.said(r"Worker reloading: \S+health\.py modified")


def changed(server, file):
    """The answer of ``/healthz`` once it is another one; connections may break meanwhile."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if "Worker reloading" not in server.log:
            os.utime(file)  # the reloader compares with the first time that it saw
        try:
            answer = server.get("/healthz")
        except (OSError, http.client.HTTPException):
            answer = "ok"
        if "ok" not in answer:
            return answer
        time.sleep(0.1)  # polling, with a deadline
    pytest.fail(f"the code was not loaded again:\n{server.log}")


def test_the_command_line_has_the_documented_options():
    done = subprocess.run(
        [sys.executable, "app.py", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    for option in ("--host", "--port", "--reload", "--workers"):
        assert option in done.stdout
