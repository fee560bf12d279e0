"""What is served at / and /ui: who gets the page, under which headers, and that its files fit together."""

from __future__ import annotations

import gzip
import re

import pytest
from flask.testing import FlaskClient

from tests.fakes import FakeLoader
from transformers_api.api.web.assets import FOLDER, assets
from transformers_api.app import create_app
from transformers_api.config.settings import Settings

FIREFOX = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
MOST_LINES = 300
MOST_BYTES = 480_000  # before the first message, uncompressed, fonts included
MOST_GZIPPED = 200_000
MOST_FILES = 60
STATIC_IMPORT = re.compile(
    r"""^(?:import|export)\s(?:[^;"'()]*?\sfrom\s+)?["']([^"']+)["']""", re.MULTILINE
)
LAZY_IMPORT = re.compile(r"""\bimport\(\s*["'`]([^"'`]+)["'`]""")
SCRIPTS = sorted((FOLDER / "js").rglob("*.js"))
OURS = [*SCRIPTS, *sorted((FOLDER / "css").glob("*.css"))]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> FlaskClient:
    settings = Settings(model_store=tmp_path_factory.mktemp("page"), preload_model=False)
    return create_app(settings, FakeLoader()).test_client()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (FIREFOX, "text/html"),
        ("Text/HTML", "text/html"),
        ("text/html", "text/html"),
        ("application/json;q=0.9,text/html", "text/html"),
        ("text/html;q=0.5,application/json;q=0.4", "text/html"),
        ("text/html, application/json", "application/json"),
        ("text/html;q=0.5, */*", "application/json"),
        ("text/html;q=0", "application/json"),
        ("text/*", "application/json"),
        ("*/*", "application/json"),
        ("application/json", "application/json"),
        ("", "application/json"),
        ("nonsense;;q=x", "application/json"),
        (None, "application/json"),
    ],
)
def test_the_root_is_the_page_for_who_prefers_html_by_name_and_json_for_others(
    client, accept, kind
):
    answer = client.get("/", headers={} if accept is None else {"Accept": accept})
    assert answer.status_code == 200
    assert answer.mimetype == kind
    assert "Accept" in answer.vary
    assert client.get("/ui", headers={"Accept": accept or "*/*"}).mimetype == "text/html"


@pytest.mark.parametrize("path", ["/ui", "/ui/"])
def test_the_page_is_asked_for_again_each_time_and_not_sent_again(client, path):
    answer = client.get(path)
    assert answer.headers["Cache-Control"] == "no-cache"
    again = client.get(path, headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")
    packed = client.get(path, headers={"Accept-Encoding": "br, gzip"})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(packed.data) == answer.data
    assert packed.headers["ETag"] != answer.headers["ETag"]
    refused = client.get(path, headers={"Accept-Encoding": "gzip;q=0"})
    assert "Content-Encoding" not in refused.headers


@pytest.mark.parametrize("path", ["/ui", "js/app.js", "css/base.css", "icon.svg"])
def test_the_headers_let_nothing_else_in(client, path):
    url = path if path.startswith("/") else f"/ui/{assets().version}/{path}"
    answer = client.get(url)
    assert answer.status_code == 200
    assert answer.headers["Content-Security-Policy"] == POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert "Accept-Encoding" in answer.vary


def test_files_are_kept_for_a_year_under_the_digest_of_all_of_them(client):
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.name != "index.html"]
    assert len(files) > 50
    for path in files:
        url = f"/ui/{assets().version}/{path.relative_to(FOLDER).as_posix()}"
        answer = client.get(url)
        assert answer.data == path.read_bytes()
        assert answer.headers["Cache-Control"] == "public, max-age=31536000, immutable"
        assert answer.mimetype != "application/octet-stream"


@pytest.mark.parametrize(
    "path", ["index.html", "nope.js", "../views.py", "..%2fviews.py", "js", ""]
)
def test_nothing_else_is_served(client, path):
    assert client.get(f"/ui/{assets().version}/{path}").status_code == 404
    assert client.get(f"/ui/{'0' * 16}/js/app.js").status_code == 404


def test_the_page_needs_no_key(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("")
    settings = Settings(model_store=tmp_path, preload_model=False, api_keys_file=keys)
    client = create_app(settings, FakeLoader()).test_client()
    assert client.get("/", headers={"Accept": FIREFOX}).mimetype == "text/html"
    assert client.get(f"/ui/{assets().version}/js/app.js").status_code == 200
    assert client.get("/v1/models").status_code == 401


def test_the_html_has_no_inline_script_or_style_and_names_files_that_exist():
    html = assets().page.raw.decode()
    assert "style=" not in html
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=", html)
    names = re.findall(rf'/ui/{assets().version}/([^"]+)"', html)
    assert len(names) > 5
    assert set(names) <= set(assets().files)


@pytest.mark.parametrize(
    "path", SCRIPTS, ids=lambda path: path.relative_to(FOLDER / "js").as_posix()
)
def test_a_module_imports_by_relative_paths_what_exists_and_names_no_other_host(path):
    text = path.read_text()
    for name in STATIC_IMPORT.findall(text) + LAZY_IMPORT.findall(text):
        assert name.startswith("."), name
        target = name.replace("${language}", "python")
        assert (path.parent / target).is_file(), name
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert not re.search(
        r"\.(?:innerHTML|outerHTML)\b|insertAdjacentHTML|document\.write|eval\(|new Function", text
    )


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.name)
def test_our_files_are_short(path):
    assert len(path.read_text().splitlines()) <= MOST_LINES


def imported(name: str, seen: set[str]) -> set[str]:
    """The module and what it imports at once, by their names below static/."""
    if name in seen:
        return seen
    seen.add(name)
    path = FOLDER / name
    for target in STATIC_IMPORT.findall(path.read_text()):
        imported((path.parent / target).resolve().relative_to(FOLDER).as_posix(), seen)
    return seen


def test_what_is_loaded_before_the_first_message_keeps_to_its_budget():
    html = assets().page.raw.decode()
    linked = set(re.findall(rf'/ui/{assets().version}/([^"]+)"', html))
    names = linked | imported("js/app.js", set())
    raw = {name: (FOLDER / name).read_bytes() for name in names}
    packed = [assets().files[name].gzipped or content for name, content in raw.items()]
    assert len(names) <= MOST_FILES
    assert sum(map(len, raw.values())) + len(html) <= MOST_BYTES
    assert sum(map(len, packed)) <= MOST_GZIPPED


def test_a_picture_has_a_name_before_it_shows_anything():
    made = [
        line.strip()
        for path in SCRIPTS
        for line in path.read_text().splitlines()
        if 'role: "img"' in line
    ]
    assert made
    assert [line for line in made if "aria-label" not in line] == []
