"""docs/seeds.md names routes, settings, files and commands that there are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.fakes import FakeLoader
from transformers_api.app import create_app
from transformers_api.config.described import described
from transformers_api.config.settings import Settings
from transformers_api.serving.models.builtin import builtin_models

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "seeds.md").read_text()
ABSENT = "not in this version"
ROUTE = re.compile(r"\b(GET|POST|DELETE) (/[\w/{}]*)")
# Of the documents and of other programs; the page says what stands for them.
OTHER_NAMES = {"CKPT_REPO_ID", "CKPT_FILENAME", "FLASK_ENV", "CUDA_VISIBLE_DEVICES"}
OF_THE_CONTAINER_FILES = {"PUBLISH", "TORCH"}
OF_THE_CLIENTS = {"API_BASE_URL"}


@pytest.fixture(scope="module")
def routes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    settings = Settings(preload_model=False, model_store=folder, hf_home=folder)
    rules = create_app(settings, FakeLoader()).url_map.iter_rules()
    return {(method, plain(rule.rule)) for rule in rules for method in rule.methods}


def plain(route):
    return re.sub(r"<[^>]+>|\{\w+\}", "{}", route)


def lines(*, absent):
    return "\n".join(line for line in PAGE.splitlines() if (ABSENT in line) is absent)


def test_every_route_that_is_promised_is_there(routes):
    named = {(method, plain(route)) for method, route in ROUTE.findall(lines(absent=False))}
    assert len(named) > 15
    assert sorted(named - routes) == []


def test_what_is_said_to_be_absent_is(routes):
    named = {(method, plain(route)) for method, route in ROUTE.findall(lines(absent=True))}
    assert sorted(named & routes) == []
    settings = {name for name, *_ in described()}
    assert sorted(name for name in settings if f"`{name}`" in lines(absent=True)) == []


def test_every_setting_is_one_or_another_name_of_one():
    known = {name for name, _, aliases, _ in described() for name in (name, *aliases.split(", "))}
    named = set(re.findall(r"\b([A-Z]{2,}(?:_[A-Z]+)+|HOST|PORT|DEVICE|DTYPE)\b", PAGE))
    ours = OTHER_NAMES | OF_THE_CONTAINER_FILES | OF_THE_CLIENTS
    absent = set(re.findall(r"`([A-Z_]+)`", lines(absent=True)))
    assert len(named) > 15
    assert sorted(named - known - ours - absent) == []


def test_the_models_are_built_in():
    known = {name for spec in builtin_models() for name in (spec.name, *spec.aliases)}
    named = {
        "tinygpt",
        "niels-gpt",
        "gpt2",
        "microsoft/DialoGPT-small",
        "google/flan-t5-small",
        "GPT3-dev-350m-2805",
    }
    assert [name for name in named if name not in PAGE] == []
    assert sorted(named - known) == []


def test_files_modules_and_services_exist():
    files = re.findall(r"\b((?:examples|scripts)/\w+\.py|api_client\.py|app\.py)", PAGE)
    assert sorted({name for name in files if not (ROOT / name).is_file()}) == []
    modules = re.findall(r"python -m (benchmarks\.\w+)", PAGE)
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert set(re.findall(r"up --build ([\w-]+)", PAGE)) == set(services)


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("app.py", ("--host", "--port", "--reload", "--workers")),
        ("api_client.py", ("--demo", "--base-url")),
        ("scripts/model_size_report.py", ("--token", "--json", "--limit-mb")),
    ],
)
def test_options_of_the_page_exist(script, options):
    shown = subprocess.run(
        [sys.executable, script, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    ).stdout
    assert [option for option in options if option not in shown] == []
