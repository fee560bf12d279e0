"""The image and the services of Compose in a container engine of their own, for tests as root.

The base is made from Debian's packages, because a registry of images may be out of reach; podman
builds and runs, and answers docker-compose in the place of Docker.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.servers import ROOT, WAIT_S

PROGRAMS = ("debootstrap", "podman", "runc", "docker-compose")
BASE = "docker.io/library/python:3.11-slim"  # the Dockerfile's default; here it is a Debian
SUITE, PACKAGES = "bookworm", "ca-certificates,python-is-python3,python3-venv"
IMAGE = "docker.io/library/transformers-api"
BUILD_S = 1500.0
ENGINE = """\
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
[network]
network_config_dir = "{folder}/networks"
"""
STORAGE = """\
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""


def missing() -> str | None:
    """Why there can be no image here; None where there can."""
    if os.geteuid() != 0:
        return "building an image needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if not absent:
        return None
    return f"{', '.join(absent)} not there: `scripts/install_test_tools.sh image` installs them"


class Containers:
    """A podman whose images, containers and networks lie in ``folder``; built once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "networks").mkdir()
        (folder / "containers.conf").write_text(ENGINE.format(folder=folder))
        (folder / "storage.conf").write_text(STORAGE.format(folder=folder))
        self._environ = os.environ | {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
            "DOCKER_HOST": f"unix://{folder}/docker.sock",
            "COMPOSE_PROJECT_NAME": "transformers-api-test",
            "DEFAULT_MODEL": "smollm2-135m-instruct",  # the one that the image has
        }

    def run(self, *command: str, timeout_s: float = 3 * WAIT_S) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def fails(self, *command: str) -> bool:
        """True where a command ends with another status than 0."""
        ended = subprocess.run(command, env=self._environ, capture_output=True, timeout=3 * WAIT_S)
        return ended.returncode != 0

    def build(self) -> None:
        """Make the base, then the image as `docker build` does, with pip set up as it is here."""
        root = self._folder / "base"
        self.run(
            "debootstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, str(root),
            timeout_s=BUILD_S,
        )  # fmt: skip
        archive = self._folder / "base.tar"
        self.run("tar", "-C", str(root), "-cf", str(archive), ".")
        self.run("podman", "import", "--quiet", str(archive), BASE, timeout_s=BUILD_S)
        configuration, paths = pip_configuration()
        pip = self._folder / "pip.conf"
        pip.write_text(configuration)
        volumes = [f"--volume={pip}:/etc/pip.conf:ro", *(f"--volume={p}:{p}:ro" for p in paths)]
        # The options of Compose, so that its own `--build` finds the same layers.
        options = ["--format=docker", "--network=host", "--isolation=chroot"]
        self.run(
            "podman", "build", *options, *volumes, "--build-arg=TORCH=cpu", f"--tag={IMAGE}", ".",
            timeout_s=BUILD_S,
        )  # fmt: skip

    @contextmanager
    def answering_compose(self) -> Iterator[None]:
        """Be the Docker that docker-compose asks."""
        socket = self._folder / "docker.sock"
        service = subprocess.Popen(
            ["podman", "system", "service", "--time=0", f"unix://{socket}"],
            env=self._environ,
            stderr=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + WAIT_S
            while not socket.exists():
                assert time.monotonic() < deadline
                time.sleep(0.05)  # polling, with a deadline
            yield
        finally:
            service.terminate()
            service.wait(WAIT_S)

    def close(self) -> None:
        """Leave nothing of several gigabytes behind."""
        self.run("podman", "rm", "--all", "--force", "--time=0")
        for kind in ("overlay", "overlay-containers"):
            mount = self._folder / "images" / kind
            subprocess.run(["umount", "--recursive", str(mount)], capture_output=True)
        shutil.rmtree(self._folder)


def pip_configuration() -> tuple[str, list[Path]]:
    """pip.conf with the settings of this machine, and what of its disk they name."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=WAIT_S,
    )
    settings: dict[str, str] = {}
    paths: set[Path] = set()
    for line in listed.stdout.splitlines():
        name, _, quoted = line.partition("=")
        key = name.rpartition(".")[2]
        if key != "constraint":  # the hashes say which versions
            settings[key] = ast.literal_eval(quoted)
    for value in settings.values():
        paths |= {Path(path).parent for path in re.findall(r"file://(/\S+)", value)}
        paths |= {Path(word) for word in value.split() if word.startswith("/")}
    lines = [f"{key} = {value}" for key, value in settings.items()]
    return "\n".join(["[global]", *lines, ""]), sorted(path for path in paths if path.exists())
