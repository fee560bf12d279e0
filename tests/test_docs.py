"""The documents say what the code does: tables, routes, error codes, file names, links."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from scripts import generate_docs
from tests.fakes import FakeLoader
from transformers_api import errors
from transformers_api.app import create_app
from transformers_api.config.described import described
from transformers_api.config.settings import Settings
from transformers_api.serving.models.registry_file import read_registry_file

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "transformers_api"
FOLDERS = sorted(file.parent for file in PACKAGE.rglob("__init__.py"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]
API = DOCS / "api.md"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)")


def page_id(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    settings = Settings(preload_model=False, model_store=folder, hf_home=folder)
    return create_app(settings, FakeLoader())


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_generated_tables_are_up_to_date(page):
    text = page.read_text()
    if page.is_relative_to(DOCS):
        assert generate_docs.rendered(text) == text, f"{page_id(page)} is stale: run `make docs`"


def test_every_table_stands_in_some_page():
    pages = [page.read_text() for page in PAGES]
    shown = {match["name"] for text in pages for match in generate_docs.BLOCK.finditer(text)}
    assert shown == set(generate_docs.TABLES)


def test_every_setting_is_documented():
    text = (DOCS / "settings.md").read_text()
    assert [name for name, *_ in described() if f"| `{name}` |" not in text] == []


def test_every_error_code_is_documented():
    codes = {kind.code for kind in family(errors.ApiError) if kind.code}
    text = API.read_text()
    assert sorted(code for code in codes if f"| `{code}` |" not in text) == []


def family(kind):
    for child in kind.__subclasses__():
        if child.__module__ == errors.__name__:
            yield child
            yield from family(child)


def test_every_route_is_documented(app):
    text = re.sub(r"\{\w+\}", "{}", API.read_text())
    routes = {
        f"{method} {re.sub(r'<[^>]+>', '{}', rule.rule)}"
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert len(routes) > 10
    missing = [route for route in routes if not re.search(rf"{re.escape(route)}(?![\w/])", text)]
    assert sorted(missing) == []


def test_every_documented_route_exists(app):
    rules = {
        (method, re.sub(r"<[^>]+>", "{}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in rule.methods
    }
    named = re.findall(r"\b(GET|POST|DELETE) (/[\w/{}.-]*)", API.read_text())
    assert len(named) > 10
    missing = [n for n in named if (n[0], re.sub(r"\{\w+\}", "{}", n[1])) not in rules]
    assert missing == []


def test_the_tree_of_the_architecture_names_every_folder_and_no_other():
    tree = blocks_without_language(DOCS / "architecture.md")[0]
    named, path = set(), [PACKAGE]
    for line in tree.splitlines()[1:]:
        depth, folder = len(line[: line.index("─")]) // 4 + 1, re.search(r"── (\w+)/", line)
        path = [*path[:depth], path[depth - 1] / folder[1]]
        named.add(path[-1])
    folders = {file.parent for kind in ("*.py", "*.cpp") for file in PACKAGE.rglob(kind)}
    assert named == {f for f in folders - {PACKAGE} if f.name != "schemas"}


def test_every_file_that_the_architecture_names_exists():
    text = (DOCS / "architecture.md").read_text()
    files = set(re.findall(r"(?<![\w/])[a-z_]+(?:/[a-z_]+)*\.py\b", text))
    assert len(files) > 20
    roots = (PACKAGE, PACKAGE / "serving", PACKAGE / "engine", ROOT)
    assert sorted(f for f in files if not any((root / f).exists() for root in roots)) == []


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_says_where_to_begin_with_files_that_exist(folder):
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    assert len(text.splitlines()) <= 6
    named = set(re.findall(r"``([\w/]+(?:\.py|/))``", text))
    assert named
    assert (
        sorted(n for n in named if not any((r / n).exists() for r in (folder, PACKAGE / "api")))
        == []
    )


def blocks_without_language(page):
    return re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_to_files_resolve(page):
    broken = [
        target
        for target, _ in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_data_in_the_pages_is_well_formed(page):
    for text in blocks(page, "json"):
        json.loads(text)
    for text in blocks(page, "yaml"):
        yaml.safe_load(text)


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "settings.md"], ids=page_id)
def test_registry_examples_are_valid(page, tmp_path):
    examples = blocks(page, "yaml")
    assert examples
    for number, text in enumerate(examples):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        assert read_registry_file(file)


def test_every_registry_field_is_documented(tmp_path):
    """The registry names its fields when it meets one that it does not know."""
    file = tmp_path / "models.json"
    file.write_text('[{"name": "m", "path": ".", "nonsense": 1}]')
    with pytest.raises(ValueError, match="fields are") as refusal:
        read_registry_file(file)
    names = str(refusal.value).split("fields are ")[1].split(", ")
    text = (DOCS / "settings.md").read_text()
    assert [name for name in names if f"`{name}`" not in text] == []
