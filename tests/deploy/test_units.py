"""The systemd units and the settings that go with them."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import generate_env
from tests.servers import ROOT, WAIT_S
from transformers_api.config.described import described
from transformers_api.config.settings import Settings
from transformers_api.server.serve import BAD_SETTING

UNITS = ROOT / "deploy" / "systemd"
SERVICE, SOCKET = UNITS / "transformers-api.service", UNITS / "transformers-api.socket"
EXAMPLE = ROOT / "deploy" / "env.example"
ANALYZE = shutil.which("systemd-analyze")
EXPOSURE = 1.5
# Of Python, the C library and the Hub's library; everything else that is set must be ours.
OF_OTHERS = {
    "HF_HUB_DISABLE_TELEMETRY",
    "HF_TOKEN_PATH",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "PYTHONUNBUFFERED",
    "XDG_CACHE_HOME",
}

needs_systemd = pytest.mark.skipif(
    not ANALYZE, reason="systemd-analyze is needed: scripts/install_test_tools.sh installs it"
)


class Many(dict):
    """A section whose names may come more than once: the values, a line each."""

    def __setitem__(self, name, value):
        if isinstance(value, list) and isinstance(self.get(name), list):
            value = self[name] + value
        super().__setitem__(name, value)


def read(unit):
    parser = configparser.RawConfigParser(strict=False, dict_type=Many, delimiters="=")
    parser.optionxform = str
    parser.read(unit)
    return parser


def of_service(name):
    return read(SERVICE)["Service"][name]


def environment():
    lines = of_service("Environment").splitlines()
    return dict(part.split("=", 1) for line in lines for part in shlex.split(line))


def settings_of(text):
    """What a file of NAME=value lines sets."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@needs_systemd
def test_the_service_is_exposed_as_little_as_was_promised():
    done = subprocess.run(
        [ANALYZE, "security", "--offline=true", f"--threshold={EXPOSURE * 10:.0f}", str(SERVICE)],
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        env=os.environ | {"SYSTEMD_PAGER": ""},
    )
    assert done.returncode == 0, done.stdout
    (level,) = re.findall(r"Overall exposure level for \S+: ([\d.]+)", done.stdout)
    assert float(level) <= EXPOSURE


@needs_systemd
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path):
    for unit in (SERVICE, SOCKET):
        text = re.sub(
            r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text(), flags=re.M
        )
        (tmp_path / unit.name).write_text(text)
    files = [str(tmp_path / unit.name) for unit in (SERVICE, SOCKET)]
    done = subprocess.run(
        [ANALYZE, "verify", "--man=no", *files], capture_output=True, text=True, timeout=WAIT_S
    )
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line]
    assert (done.returncode, ours) == (0, []), done.stderr


def test_the_socket_is_where_the_proxy_looks():
    settings = Settings()
    assert read(SOCKET)["Socket"]["ListenStream"] == f"{settings.host}:{settings.port}"
    assert read(SERVICE)["Unit"]["Requires"] == SOCKET.name


def test_running_answers_have_their_time_before_systemd_kills():
    assert int(of_service("TimeoutStopSec")) >= Settings().graceful_s + 10
    assert of_service("KillMode") == "mixed"


def test_a_bad_setting_is_not_tried_again():
    assert int(of_service("RestartPreventExitStatus")) == BAD_SETTING
    assert of_service("Restart") == "always"


def test_the_worker_may_tell_that_it_is_ready_and_alive():
    assert of_service("Type") == "notify"
    assert of_service("NotifyAccess") == "all"
    assert int(of_service("WatchdogSec")) > 60  # gunicorn sees to a hung worker earlier


def test_the_memory_of_the_machine_can_be_read():
    """Whether a model fits is in /proc/meminfo."""
    assert "ProcSubset" not in read(SERVICE)["Service"]


def test_there_is_a_thread_for_each_request_and_a_file_for_each_connection():
    assert int(of_service("TasksMax")) > 4 * Settings().threads
    assert int(of_service("LimitNOFILE")) >= 65536


def test_no_secret_is_in_the_environment():
    assert of_service("LoadCredential") == "hf-token:/etc/transformers-api/hf-token"
    assert environment()["HF_TOKEN_PATH"] == "%d/hf-token"
    assert "HF_TOKEN=" not in EXAMPLE.read_text()


def test_what_the_unit_sets_is_known():
    known = OF_OTHERS | {name for name, *_ in described()}
    assert sorted(set(environment()) - known) == []


def test_models_lie_in_the_folder_of_the_service(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", environment()["XDG_CACHE_HOME"])
    settings = Settings.from_env(environment())
    state = Path("/var/lib") / of_service("StateDirectory")
    assert settings.model_store.is_relative_to(state)
    assert settings.hf_home.is_relative_to(state)


def test_the_example_names_every_setting_and_no_other():
    text = EXAMPLE.read_text()
    assert text == generate_env.text(), "deploy/env.example is stale: run `make docs`"
    named = set(re.findall(r"^#?([A-Z_]+)=", text, flags=re.M))
    assert named == {name for name, *_ in described()} - generate_env.LEFT_OUT


def test_the_example_is_a_server_behind_a_proxy_that_asks_for_keys():
    settings = Settings.from_env(settings_of(EXAMPLE.read_text()))
    assert settings.listens_on_loopback
    assert not settings.downloads_allowed
    assert settings.trusted_proxies == 1
    assert settings.api_keys_file == Path("/etc/transformers-api/api-keys")


def test_each_line_of_the_example_is_allowed_when_it_is_no_comment():
    lines = re.findall(r"^#([A-Z_]+)=(.+)$", EXAMPLE.read_text(), flags=re.M)
    assert len(lines) > 20
    for name, value in lines:
        Settings.from_env({name: value})  # raises where the value is not allowed
