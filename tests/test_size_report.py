"""scripts/model_size_report.py, against a small Hub and files on this machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import model_size_report
from tests.hub_server import HubServer
from tests.model_folders import model_files, write_files

ROOT = Path(__file__).parent.parent
REPO = "someone/tiny"
MIB = 1 << 20


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = HubServer({REPO: model_files() | {"pytorch_model.bin": bytes(5000)}})
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.close()


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Run the script for these registry entries; what it writes."""
    monkeypatch.setenv("INCLUDE_DEFAULT_MODELS", "false")
    monkeypatch.setenv("MODEL_REGISTRY_PATH", str(tmp_path / "models.json"))
    for name in ("MODEL_ALLOW_LIST", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(entries, *arguments):
        (tmp_path / "models.json").write_text(json.dumps(entries))
        assert model_size_report.main(arguments) == 0
        return capsys.readouterr().out

    return run


def needed(files):
    return sum(map(len, files.values()))


def test_a_model_of_the_hub_is_measured_without_a_download(hub, report):
    text = report([{"name": "tiny", "hf_repo": REPO}])
    head, dashes, row, more, total = text.splitlines()
    assert head.split() == ["Model", "Repository", "Size"]
    assert set(dashes) == set(more) == {"-"}
    size = f"{needed(model_files())}.00 B"
    assert re.fullmatch(rf"tiny +{REPO} +{re.escape(size)}", row)
    assert re.fullmatch(rf"Total +{re.escape(size)}", total)
    assert [path for _, path, _ in hub.requests] == [f"/api/models/{REPO}"]


def test_json_has_exact_bytes_of_what_is_needed_and_of_the_whole_repository(hub, report):
    found = json.loads(report([{"name": "tiny", "hf_repo": REPO}], "--json"))
    (model,) = found["models"]
    assert model["bytes"] == found["total_bytes"] == needed(model_files())
    assert model["repository_bytes"] == needed(hub.repos[REPO])
    assert model["error"] is None


def test_a_file_of_a_repository_is_measured_alone(hub, report):
    hub.repos[REPO]["m.gguf"] = bytes(700)
    found = json.loads(report([{"name": "m", "hf_repo": REPO, "file": "m.gguf"}], "--json"))
    assert found["models"][0]["bytes"] == 700


def test_files_of_this_machine_are_measured_where_they_lie(report, tmp_path):
    write_files(tmp_path / "mine", model_files())
    (tmp_path / "one.gguf").write_bytes(bytes(300))
    entries = [
        {"name": "folder", "path": "mine"},
        {"name": "file", "path": "one.gguf"},
        {"name": "package", "package": "pytest", "file": "pytest/py.typed"},
    ]
    found = json.loads(report(entries, "--json"))
    sizes = {model["model"]: model["bytes"] for model in found["models"]}
    assert sizes == {"folder": needed(model_files()), "file": 300, "package": 0}
    assert found["total_bytes"] == needed(model_files()) + 300


def test_what_two_entries_share_counts_once_in_the_total(report, tmp_path):
    (tmp_path / "one.gguf").write_bytes(bytes(300))
    entries = [{"name": name, "path": "one.gguf"} for name in ("a", "b")]
    assert json.loads(report(entries, "--json"))["total_bytes"] == 300


def test_what_cannot_be_measured_is_named_and_the_rest_is_there(hub, report, tmp_path):
    (tmp_path / "one.gguf").write_bytes(bytes(300))
    hub.repos["someone/gated"] = {}
    hub.gated.add("someone/gated")
    text = report(
        [
            {"name": "good", "path": "one.gguf"},
            {"name": "absent", "hf_repo": "someone/else"},
            {"name": "gated", "hf_repo": "someone/gated"},
            {"name": "gone", "path": "nowhere"},
            {"name": "uninstalled", "package": "no-such-package", "file": "m.gguf"},
        ],
        "--limit-mb=1",
    )
    assert re.search(r"^good .* 300.00 B +yes$", text, re.MULTILINE)
    assert len(re.findall(r" unknown +unknown$", text, re.MULTILINE)) == 4
    assert re.search(r"^Total +300.00 B +no$", text, re.MULTILINE)
    assert "absent: someone/else does not exist on the Hub, or is private" in text
    assert "gated: someone/gated is gated" in text
    assert "gone: No such file or directory" in text
    assert "uninstalled: the Python package is not installed" in text


def test_without_a_network_the_report_says_so_for_each_model(hub, report):
    hub.close()
    text = report([{"name": name, "hf_repo": REPO} for name in ("a", "b")])
    assert len(re.findall(r"^[ab]: someone/tiny could not be fetched", text, re.MULTILINE)) == 2


def test_the_token_reaches_the_hub_and_no_output(hub, report, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info",
        lambda api, *a, **k: seen.append(api.token) or _refuse(api.token),
    )
    text = report([{"name": "tiny", "hf_repo": REPO}], "--token", "hf_secretsecretsecret")
    assert seen == ["hf_secretsecretsecret"]
    assert "secret" not in text
    assert "***" in text


def _refuse(token):
    raise OSError(f"refused for {token}")


@pytest.mark.parametrize(("limit", "fits"), [("1", "no"), ("4", "yes")])
def test_a_limit_says_what_fits_a_bundle(report, tmp_path, limit, fits):
    (tmp_path / "one.gguf").write_bytes(bytes(2 * MIB))
    (tmp_path / "two.gguf").write_bytes(bytes(2 * MIB))
    entries = [{"name": name, "path": f"{name}.gguf"} for name in ("one", "two")]
    rows = report(entries, "--limit-mb", limit).splitlines()
    assert rows[0].endswith(f"Fits {limit}.00 MB")
    assert [row.split()[-1] for row in rows[2:4] + rows[5:]] == [fits] * 3
    found = json.loads(report(entries, "--limit-mb", "3", "--json"))
    assert [model["fits"] for model in found["models"]] == [True, True]
    assert (found["limit_bytes"], found["total_fits"]) == (3 * MIB, False)


def test_an_empty_registry_says_so(report):
    assert report([]) == "No models available in the registry.\n"


def test_the_allow_list_restricts_the_report(report, tmp_path, monkeypatch):
    (tmp_path / "one.gguf").write_bytes(b"1")
    monkeypatch.setenv("MODEL_ALLOW_LIST", "b")
    entries = [{"name": name, "path": "one.gguf"} for name in ("a", "b")]
    found = json.loads(report(entries, "--json"))
    assert [model["model"] for model in found["models"]] == ["b"]


def test_a_wrong_setting_is_one_line(report, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MODEL_ALLOW_LIST", "nobody")
    (tmp_path / "models.json").write_text("[]")
    assert model_size_report.main([]) == 2
    assert "MODEL_ALLOW_LIST=nobody is not allowed" in capsys.readouterr().err


@pytest.mark.parametrize("limit", ["0", "-1", "x", "inf", "nan"])
def test_a_wrong_limit_is_refused(limit, capsys):
    with pytest.raises(SystemExit):
        model_size_report.main(["--limit-mb", limit])
    assert "expected a number of MB above 0" in capsys.readouterr().err


def test_it_runs_as_documented(tmp_path):
    (tmp_path / "models.json").write_text("[]")
    done = subprocess.run(
        [sys.executable, "scripts/model_size_report.py", "--token", ""],
        cwd=ROOT,
        env={"MODEL_REGISTRY_PATH": str(tmp_path / "models.json"), "INCLUDE_DEFAULT_MODELS": "0"},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, "No models available in the registry.\n"), done
