"""What `pip install .` gives: a wheel that is whole, what it asks for, a command that serves."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.instruction_sets import distinct
from tests.servers import ROOT, started
from tests.test_end_to_end import save_tiny
from transformers_api.kernels.build import build
from transformers_api.kernels.variants import of_machine

PACKAGE = ROOT / "transformers_api"
PIP_S = 240.0  # a few seconds where nothing else runs
pytestmark = pytest.mark.timeout(300)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = ["3.11", "3.12", "3.13"]


@pytest.fixture(scope="module")
def compilers(tmp_path_factory, native_cache) -> Path:
    """A compiler that has all compiled already that tests need; nothing for other processors."""
    folder = tmp_path_factory.mktemp("compilers")
    made = dict.fromkeys(variant.name for variant in of_machine())
    made |= {variant.name: build(native_cache, variant=variant) for variant in distinct()}
    lines = [f'*/kernels-{name}-*) cp {made[name] or "/dev/null"} "$made" ;;' for name in made]
    compiler = folder / "g++"
    text = "\n".join(["for made; do :; done", 'case "$made" in', *lines, "esac"])
    compiler.write_text(f"#!/bin/sh\n{text}\n")
    compiler.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, compilers) -> Path:
    """The wheel of a copy: in this checkout it would leave a folder build/ behind."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    path = f"{compilers}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        command, check=True, capture_output=True, timeout=PIP_S, env=os.environ | {"PATH": path}
    )
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def metadata(wheel):
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(files.read(name).decode())


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """The commands of an environment that has the wheel, and the packages of this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    bin, python = folder / "bin", folder / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command = [*pip, "--no-index", "--no-deps", "--no-compile", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=PIP_S)
    return bin


def test_every_file_of_the_package_is_in_the_wheel(wheel):
    with zipfile.ZipFile(wheel) as files:
        packed = {name for name in files.namelist() if ".dist-info/" not in name}
    libraries = {name for name in packed if name.endswith(".so")}
    names = {Path(name).name.split("-")[1] for name in libraries}
    assert names == {variant.name for variant in of_machine()}
    here = {
        str(path.relative_to(ROOT))
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed - libraries == here
    suffixes = {Path(name).suffix for name in packed}
    assert suffixes >= {".py", ".cpp", ".html", ".js", ".css"}


def test_what_the_wheel_asks_for_is_what_it_is_tested_with(metadata):
    wanted = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    assert len(wanted) > 30
    pins = (ROOT / "requirements-ray.txt").read_text()
    optional = dict(re.findall(r"^([\w.-]+)(?:\[\w+\])?==(\S+)", pins, re.MULTILINE))
    assert [
        str(requirement)
        for requirement in wanted
        if (optional.get(requirement.name) or importlib.metadata.version(requirement.name))
        not in requirement.specifier
    ] == []


def test_the_wheel_asks_for_every_package_that_is_imported_and_pinned():
    text = (ROOT / "requirements.txt").read_text().split("# Pulled in")[0]
    pinned = set(re.findall(r"^([\w.-]+)==", text, re.MULTILINE))
    assert {Requirement(text).name for text in PROJECT["dependencies"]} == pinned


def test_the_versions_of_python_are_the_same_everywhere(metadata):
    assert metadata["Requires-Python"] == f">={PYTHONS[0]}"
    versions = [c.split(" :: ")[-1] for c in PROJECT["classifiers"] if ":: 3." in c]
    matrix = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert versions == matrix["jobs"]["ci"]["strategy"]["matrix"]["python"] == PYTHONS


def test_the_command_is_that_of_the_module(scripts, tmp_path):
    def help_of(*command):
        done = subprocess.run(
            [*command, "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout

    ours = help_of(str(scripts / "transformers-api"))
    assert ours == help_of(str(scripts / "python"), "-m", "transformers_api")
    assert "serve" in ours


def test_the_installed_command_answers_a_chat_from_an_empty_directory(scripts, isas, tmp_path):
    model = save_tiny(tmp_path / "tiny", "llama")
    registry = tmp_path / "models.json"
    registry.write_text(json.dumps([{"name": "tiny", "path": str(model)}]))
    (tmp_path / "empty").mkdir()
    settings = {"MODEL_REGISTRY_PATH": str(registry), "DEFAULT_MODEL": "tiny", "PORT": "0"}
    settings |= {"MODEL_STORE": str(tmp_path / "store"), "TORCH_THREADS": "1", "HOST": "127.0.0.1"}
    # Nobody could compile anything: the kernels are those of the wheel.
    settings |= {"NATIVE_CACHE": str(tmp_path / "native"), "PATH": "/nowhere"}
    # `sh` goes where nothing of this checkout can be imported.
    command = ["/bin/sh", "-c", 'cd "$0" && exec "$1" serve', str(tmp_path / "empty")]
    with started(*command, str(scripts / "transformers-api"), **settings) as server:
        host, port = server.address()
        server.said("Loaded tiny")
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
        body |= {"temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://{host}:{port}/v1/chat/completions",
            json.dumps(body).encode(),
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            usage = json.load(answer)["usage"]
        with urllib.request.urlopen(f"http://{host}:{port}/status", timeout=20) as answer:
            resident = json.load(answer)["resident"]
    assert (resident["kernels"], resident["isa"]) == ("native", isas[0])
    assert not (tmp_path / "native").exists()
    assert usage["completion_tokens"] == 3
    assert list((tmp_path / "empty").iterdir()) == []


def test_the_workflow_runs_what_runs_here_and_has_no_secrets():
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    workflow = yaml.safe_load(text)
    steps = workflow["jobs"]["ci"]["steps"]
    assert ".ci/run" in [step.get("run") for step in steps]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets" not in text
