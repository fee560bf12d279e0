"""Every command of the documents runs, against a real server with the embedded default model."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from api_client import ApiClient
from benchmarks.load import Server, measure
from tests.repeats import slow

ROOT = Path(__file__).parent.parent
ADDRESS = "http://127.0.0.1:5000"
DEFAULT_MODEL = "smollm2-135m-instruct"
FENCE = re.compile(r"^```(bash|python|yaml)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MODEL_OF_README = "/srv/models/my-model"

# Starting the server converts the embedded model, once per checkout.
pytestmark = pytest.mark.timeout(300)


def blocks(page, language):
    return [text for found, text in FENCE.findall((ROOT / page).read_text()) if found == language]


def commands(page):
    """The commands of a page, a line each unless a quote or backslash carries it on."""
    for block in blocks(page, "bash"):
        command = ""
        for line in block.splitlines():
            command = f"{command}\n{line}" if command else line
            if command.count("'") % 2 == 0 and not command.endswith("\\"):
                yield command.strip()
                command = ""
        assert not command, f"{page}: {command!r} is not complete"


README = list(commands("README.md"))


def those(start, page="README.md"):
    return [command for command in commands(page) if start in command.split("\n")[0].split()]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """What `make run` would have, with this checkout's own store and the README's registry."""
    folder = tmp_path_factory.mktemp("readme")
    registry = folder / "models.yaml"
    tiny = folder / "tiny"
    build_tiny_model(tiny)
    (example,) = blocks("README.md", "yaml")
    assert MODEL_OF_README in example
    registry.write_text(example.replace(MODEL_OF_README, str(tiny)))
    settings = {
        "MODEL_STORE": str(ROOT / "build" / "test-models"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "MODEL_REGISTRY_PATH": str(registry),
        "TOKENIZERS_PARALLELISM": "false",
        "ENABLE_EMBEDDINGS_BACKEND": "1",
        "RATE_LIMIT_PER_MIN": "0",  # every example of a page is asked in one go
        "TORCH_THREADS": "1",  # another test process has the other core
    }
    return {**os.environ, **settings}


def build_tiny_model(folder):
    """Two random layers, with the byte tokenizer of the other tests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests import tokenizers

    torch.manual_seed(0)
    tokenizer = tokenizers.byte_level()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def url(environment, tmp_path_factory):
    """The address of a server that is ready; it ends with its process group."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers_api", "serve"],
            cwd=ROOT,
            env={**environment, "PORT": "0"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield wait_until_ready(process, log)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            status = process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    assert status == 0, log.read_text()[-4000:]


def answers(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=30) as answer:
        return answer.status == 200
    return False


def wait_until_ready(process, log, limit_s=240):
    """The address that it has chosen itself."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-4000:]
        listens = re.search(r"Listening at: (http://\S+:\d+)", log.read_text())
        if listens and answers(f"{listens[1]}/readyz"):
            return listens[1]
        time.sleep(0.1)  # polling, with a deadline
    pytest.fail(f"it was not ready:\n{log.read_text()[-4000:]}")


def run(command, environment):
    """What a shell command prints; it must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def curl(command, url):
    """Run a curl command against ``url``; statuses from 400 on fail."""
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    quiet = re.sub(r"^curl ", "curl -sS --fail-with-body ", command, flags=re.MULTILINE)
    return run(quiet.replace(ADDRESS, url), dict(os.environ))


def in_this_environment(command):
    """The interpreter of the tests instead of the one in .venv."""
    return re.sub(r"^(\.venv/bin/)?python\b", sys.executable, command)


def test_every_command_of_the_readme_is_of_a_kind_that_is_run_here():
    kinds = {"make", "curl", "python", ".venv/bin/python", "pip", "transformers-api"}
    others = [c for c in README if not kinds & set(c.split("\n")[0].split())]
    assert others == []
    assert len(README) >= 10


def test_the_package_is_installed_as_another_test_installs_it():
    """tests/test_package.py installs the wheel and asks the server that the command starts."""
    (torch,) = re.findall(r"^torch==.*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    installing = [f"pip install {torch}", "pip install ."]
    assert [*those("pip"), *those("transformers-api")] == [*installing, "transformers-api serve"]


@pytest.mark.parametrize("command", [*those("make"), *those("make", "CONTRIBUTING.md")])
def test_make_targets_exist_and_do_what_is_said(command):
    """`make -n` shows the commands; CI runs `make lint test`, people the rest."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    planned = run(command.replace("make ", "make -n ", 1), outside)
    if "run" in command.split():
        assert planned.rstrip().endswith("exec .venv/bin/python -m transformers_api serve")
    assert planned.strip()


@pytest.mark.parametrize("command", those("curl"))
def test_curl_commands_of_the_readme_are_answered(command, url):
    assert "error" not in json.loads(curl(command, url))


@pytest.mark.parametrize("command", those("curl", "docs/api.md"))
def test_curl_commands_of_the_api_page_are_answered(command, url):
    check(curl(command, url), command)


def check(answer, command):
    """Whether it is whole: a stream with its end, or JSON."""
    if "/chat/stream" in command:
        events = re.findall(r"^event: (\w+)$", answer, re.MULTILINE)
        assert events == ["token", "trace"] * (len(events) // 2) + ["done"]
        assert len(events) > 8
    elif command.startswith("curl -N"):
        assert answer.rstrip().endswith("data: [DONE]")
    else:
        assert json.loads(answer)


GUIDE = those("curl", "docs/inspect.md")
LONG = [command for command in GUIDE if "integrated_gradients" in command]


@pytest.mark.parametrize(
    "command", [*(command for command in GUIDE if command not in LONG), *slow(*LONG)]
)
def test_curl_commands_of_the_guide_are_answered(command, url, tmp_path):
    answer = curl(f"cd {tmp_path}\n{command}", url)
    saved = re.search(r" -o (\S+)", command)
    if saved:
        begins = {".png": b"\x89PNG", ".html": b"<!doctype html>", ".npz": b"PK"}
        data = (tmp_path / saved[1]).read_bytes()
        assert data.startswith(begins[Path(saved[1]).suffix])
    else:
        check(answer, command)


PROGRAMS = [
    (page, number)
    for page in ("README.md", "docs/api.md", "docs/inspect.md")
    for number in range(len(blocks(page, "python")))
]


@pytest.mark.parametrize(("page", "number"), PROGRAMS)
def test_python_of_the_documents_streams_an_answer(page, number, url, capsys):
    """In this process: half a program's time would be its imports. Warnings are errors here, too."""
    code = blocks(page, "python")[number].replace(ADDRESS, url)
    exec(compile(code, f"{page}, {number}", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", those("python"))
def test_the_terminal_client_answers(command, url, environment):
    answer = run(in_this_environment(command), {**environment, "API_BASE_URL": url})
    assert answer.strip()


@pytest.mark.parametrize("command", those(".venv/bin/python"))
def test_the_command_line_of_the_readme_works(command, environment):
    # A port of its own: `check` looks whether it is free.
    answer = run(in_this_environment(command), {**environment, "PORT": "0"})
    assert DEFAULT_MODEL in answer


def test_the_example_for_the_sdk_chats_streams_and_switches(url, environment):
    settings = {"OPENAI_BASE_URL": f"{url}/v1", "OTHER_MODEL": "my-model"}
    answer = run(f"{sys.executable} examples/openai_sdk.py", {**environment, **settings})
    assert f"in memory: {DEFAULT_MODEL}" in answer or "in memory: my-model" in answer
    assert "\nmy-model: " in answer
    assert answer.count(f"\n{DEFAULT_MODEL}: ") + answer.startswith(DEFAULT_MODEL) == 2


def test_the_heat_map_of_an_answer_is_saved(url, environment, tmp_path):
    command = f"{sys.executable} examples/attention_heatmap.py --layer 3 --output {tmp_path}/map"
    answer = run(command, {**environment, "OPENAI_BASE_URL": f"{url}/v1"})
    assert "the last token read from" in answer
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert "<canvas" in (tmp_path / "map.html").read_text()


def test_the_agent_calls_what_it_was_given(url, environment):
    answer = run(
        f"{sys.executable} examples/agent.py", {**environment, "OPENAI_BASE_URL": f"{url}/v1"}
    )
    assert re.match(r"(add|multiply)\(\{", answer)
    assert " = " in answer.splitlines()[0]


def test_a_person_is_read_out_of_a_text(url, environment):
    command = f"{sys.executable} examples/structured_extraction.py"
    answer = run(command, {**environment, "OPENAI_BASE_URL": f"{url}/v1"})
    assert re.match(r"name='.*' age=-?\d+ city='.*' hobbies=\[", answer)


def test_the_terminal_client_talks_to_the_real_server(url):
    client = ApiClient(url)
    messages = [{"role": "user", "content": "Say hello."}]
    options = {"max_tokens": 8, "temperature": 0, "model": DEFAULT_MODEL}
    whole = client.chat(messages, **options)["choices"][0]["message"]["content"]
    assert "".join(client.stream_chat(messages, **options)) == whole
    text = client.complete("Once", **options)["choices"][0]["text"]
    assert "".join(client.stream_complete("Once", **options)) == text
    assert client.load("my-model")["status"] in ("loaded", "already_loaded")
    assert client.health()["current_model"] == "my-model"
    loaded = {model["id"] for model in client.models() if model["loaded"]}
    assert loaded - {"all-minilm-l6-v2"} == {"my-model"}  # an encoder lives beside the model
    assert client.unload("my-model")["deleted"] is True
    assert client.model("my-model")["loaded"] is False


def test_the_load_client_counts_tokens_and_times(url):
    fields = {"ignore_eos": True, "stream_options": {"include_usage": True}}
    server = Server(f"{url}/v1", "my-model", fields)
    level = asyncio.run(measure(server, 2, 4, words=5, max_tokens=6, seed=1))
    assert (level.streams, level.requests, level.tokens) == (2, 4, 24)
    assert level.prompt_tokens > 5
    assert level.itl_ms >= 0
    assert level.ttft_ms > 0
    assert 0 < level.tokens_per_s < 24e3 / level.ttft_ms


def test_the_load_client_says_why_a_server_refuses(url):
    server = Server(f"{url}/v1", "no-such-model")
    with pytest.raises(ExceptionGroup) as refused:
        asyncio.run(measure(server, 1, 1, words=5, max_tokens=6, seed=1))
    assert "no-such-model" in str(refused.value.exceptions[0])
