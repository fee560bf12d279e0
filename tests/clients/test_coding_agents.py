"""Coding agents at their command lines: a turn with a tool, and what the model says of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clients.conftest import CLIENTS

LIMIT_S = 120

pytestmark = [pytest.mark.slow, pytest.mark.timeout(LIMIT_S + 240)]


def script(tool: str, **arguments: object) -> str:
    """What the scripted model is asked to do: write a file by this tool."""
    return f"CALL {tool} {json.dumps(arguments)}\nSAY Written."


@pytest.fixture
def ask(environment: dict[str, str], tmp_path: Path):
    """Run an agent in an empty folder; what it prints."""

    def run(*command: str, text: str = "", **variables: str) -> str:
        program = CLIENTS / command[0]
        if not program.exists():
            pytest.skip(f"{program.name} is not installed: `make clients`")
        if program.parent.name == ".bin" and not shutil.which("node"):
            pytest.skip("node is not installed")
        (tmp_path / "work").mkdir()
        done = subprocess.run(
            [str(program), *command[1:]],
            cwd=tmp_path / "work",
            env=os.environ | {"HOME": str(tmp_path), "PWD": str(tmp_path / "work")} | variables,
            input=text,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_codex(ask, environment, tmp_path):
    (tmp_path / "config.toml").write_text(
        f'model = "{environment["MODEL"]}"\nmodel_provider = "local"\n'
        '[model_providers.local]\nname = "local"\nwire_api = "responses"\n'
        f'base_url = "{environment["SCRIPTED_URL"]}/v1"\n'
    )
    options = ("--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox")
    text = script("exec_command", cmd="echo hi > made.txt")
    said = ask("node_modules/.bin/codex", "exec", *options, text, CODEX_HOME=str(tmp_path))
    assert "Written." in said
    assert (tmp_path / "work" / "made.txt").read_text() == "hi\n"


def test_claude_code(ask, environment, tmp_path):
    said = ask(
        *("node_modules/.bin/claude", "--model", environment["MODEL"], "--allowedTools", "Bash"),
        *("-p", script("Bash", command="echo hi > made.txt", description="Write a file")),
        ANTHROPIC_BASE_URL=environment["SCRIPTED_URL"],
        ANTHROPIC_API_KEY="none",
        CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC="1",
    )
    assert "Written." in said
    assert (tmp_path / "work" / "made.txt").read_text() == "hi\n"


def test_qwen_code(ask, environment, tmp_path):
    said = ask(
        *("node_modules/.bin/qwen", "--auth-type", "openai", "-y"),
        *("-p", script("run_shell_command", command="echo hi > made.txt", is_background=False)),
        OPENAI_BASE_URL=environment["SCRIPTED_URL"] + "/v1",
        OPENAI_API_KEY="none",
        OPENAI_MODEL=environment["MODEL"],
    )
    assert "Written." in said
    assert (tmp_path / "work" / "made.txt").read_text() == "hi\n"


def test_opencode(ask, environment, tmp_path):
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "local",
        "options": {"baseURL": environment["SCRIPTED_URL"] + "/v1"},
        "models": {environment["MODEL"]: {"name": "local"}},
    }
    (tmp_path / "opencode.json").write_text(json.dumps({"provider": {"local": provider}}))
    said = ask(
        *("node_modules/.bin/opencode", "run", "-m", f"local/{environment['MODEL']}"),
        text=script("bash", command="echo hi > made.txt", description="Write a file"),
        OPENCODE_CONFIG=str(tmp_path / "opencode.json"),
    )
    assert "Written." in said
    assert (tmp_path / "work" / "made.txt").read_text() == "hi\n"


@pytest.fixture
def aider(ask, environment):
    """Ask aider for one answer, which it prints."""

    def run(said: str, *options: str) -> str:
        return ask(
            *("aider/bin/aider", "--model", f"openai/{environment['MODEL']}", "--no-git"),
            *("--yes-always", "--no-check-update", "--no-show-model-warnings"),
            *("--analytics-disable", "--map-tokens", "0", "--no-pretty", *options),
            *("--message", f"SAY {said}"),
            OPENAI_API_BASE=environment["SCRIPTED_URL"] + "/v1",
            OPENAI_API_KEY="none",
        )

    return run


def test_aider(aider):
    assert "Hello to you." in aider("Hello to you.")


@pytest.mark.parametrize(
    ("edit_format", "said"),
    [
        ("whole", "made.txt\n```\nhi\n```"),
        ("diff", "made.txt\n```\n<<<<<<< SEARCH\n=======\nhi\n>>>>>>> REPLACE\n```"),
    ],
)
def test_aider_edits_a_file(aider, tmp_path, edit_format, said):
    aider(json.dumps(said), "--edit-format", edit_format, "made.txt")
    assert (tmp_path / "work" / "made.txt").read_text() == "hi\n"


def test_continue(ask, environment, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        "name: local\nversion: 0.0.1\nschema: v1\nmodels:\n  - name: local\n    provider: openai\n"
        f"    model: {environment['MODEL']}\n    apiBase: {environment['SCRIPTED_URL']}/v1\n"
        "    apiKey: none\n    roles: [chat]\n    capabilities: [tool_use]\n"
    )
    path = str(tmp_path / "work" / "made.txt")
    text = script("Write", filepath=path, content="hi\n")
    said = ask(
        "node_modules/.bin/cn",
        *("--print", "--config", str(config), "--auto", text),
        CONTINUE_GLOBAL_DIR=str(tmp_path / "continue"),
        CONTINUE_TELEMETRY_ENABLED="0",
    )
    assert "Written." in said
    assert (tmp_path / "work" / "made.txt").read_text() == "hi\n"
