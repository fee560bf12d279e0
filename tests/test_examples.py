"""Every program under examples/, the terminal client's demo and TinyGPT, against a live server."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from safetensors import safe_open

from api_client import TinyGPTClient
from tests.servers import ROOT
from tests.test_end_to_end import save_tiny, serve, wait_until_ready

pytestmark = pytest.mark.timeout(180)
TINYGPT = ROOT / "tests" / "fixtures" / "tinygpt" / "public"
EXAMPLES = ("example_usage.py", "openai_client_demo.py", "client_usage.py")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server with a tiny model in the place of gpt2, and a small original TinyGPT checkpoint."""
    folder = tmp_path_factory.mktemp("models")
    entries = [
        {"name": "gpt2", "path": str(save_tiny(folder / "one", "gpt2"))},
        {"name": "tinygpt", "path": str(TINYGPT / "final_model_weights.pt")},
    ]
    (folder / "models.json").write_text(json.dumps(entries))
    environment = {
        "PORT": "0",
        "HOST": "127.0.0.1",
        "DEFAULT_MODEL": "gpt2",
        "MODEL_STORE": str(folder / "store"),
        "MODEL_REGISTRY_PATH": str(folder / "models.json"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_THREADS": "1",
    }
    with serve(environment) as server:
        yield wait_until_ready(server)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
        assert "Traceback" not in server.log


def run(url, program, *options, status=0):
    environment = {
        "API_BASE_URL": url,
        "OPENAI_BASE_URL": f"{url}/v1",
        "MODEL": "gpt2",
        "OTHER_MODEL": "tinygpt",
    }
    done = subprocess.run(
        [sys.executable, program, *options],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if status == 0 else done.stderr


def test_every_example_is_run_here():
    found = {path.name for path in (ROOT / "examples").glob("*.py")}
    others = {"openai_sdk.py", "attention_heatmap.py", "agent.py", "structured_extraction.py"}
    assert found == {*EXAMPLES, *others}  # in test_readme.py


RUNTIME = {
    re.split("[=;]", line)[0].strip()
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if "==" in line
}
PROGRAMS = [
    *(
        (path.name, path.read_text(), path.read_text())
        for path in [*(ROOT / "examples").glob("*.py"), ROOT / "api_client.py"]
    ),
    *(
        (f"{page.name} {number}", code, page.read_text())
        for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
        for number, code in enumerate(
            re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
        )
    ),
]


@pytest.mark.parametrize(
    ("code", "page"), [program[1:] for program in PROGRAMS], ids=[name for name, *_ in PROGRAMS]
)
def test_a_program_imports_what_is_installed_or_its_page_says_how_to_install_it(code, page):
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else names(node))
    }
    others = imported - sys.stdlib_module_names - RUNTIME - {"transformers_api"}
    assert sorted(name for name in others if f"pip install {name}" not in page) == []


def names(node):
    return [alias.name for alias in node.names]


def test_example_usage_loads_lists_chats_and_unloads(url):
    shown = run(url, "examples/example_usage.py")
    assert "on cpu" in shown.splitlines()[0]
    assert "in memory: ['gpt2']" in shown
    assert shown.count("tokens)") == 2
    assert "'deleted': True" in shown


def test_openai_client_demo_lists_and_completes(url):
    shown = run(url, "examples/openai_client_demo.py")
    assert "  gpt2\n" in shown
    assert "gpt2: he is a doctor. His main goal is" in shown


def test_client_usage_uses_every_route_and_switches(url):
    shown = run(url, "examples/client_usage.py")
    assert "Model gpt2 loaded successfully" in shown
    assert "Generated: The future of AI is" in shown
    assert "What do you like to do?" in shown
    assert "tinygpt: Hello world" in shown
    assert "In memory now: tinygpt" in shown
    assert "Refused (400): " in shown


@pytest.mark.parametrize("program", EXAMPLES)
def test_nothing_listening_is_one_readable_line(program):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        said = run(url, f"examples/{program}", status=1)
    assert said.startswith("Nothing answers at ")
    assert said.count("\n") == 1


def test_the_demo_of_the_terminal_client_loads_and_generates(url):
    shown = run(url, "api_client.py", "--base-url", url, "--demo", "--model", "tinygpt")
    assert "Status: " in shown
    assert "\ntinygpt: Once upon a time, there was a brave little mouse" in shown
    assert "tokens/s)" in shown
    assert "\nThe dragon flew over the castle and" in shown


def test_the_native_client_polls_loads_generates_streams_and_unloads(url):
    client = TinyGPTClient(url)
    for name in ("gpt2", "tinygpt"):
        assert name in client.load_model(name)["message"]
        assert client.wait_until_loaded(name, poll_s=0.02)["loaded"] is True
    assert client.health_check()["models_loaded"] == ["tinygpt"]
    assert client.health_check()["memory"]["model_bytes"] > 0
    options = {"model": "tinygpt", "max_new_tokens": 12, "seed": 5}
    alone = client.generate_text("Once", **options)
    assert "".join(client.stream_text("Once", **options)) == (
        alone["generated_text"].removeprefix("Once")
    )
    together = client.generate_text(["Once", "Once", "Twice"], **options)
    assert together["generated_text"][:2] == [alone["generated_text"]] * 2
    assert sum(together["tokens_generated"]) >= 3
    assert client.unload_model("tinygpt")["message"] == "Model 'tinygpt' unloaded successfully"
    assert client.health_check()["status"] == "degraded"


def test_the_penalty_of_repeated_tokens_changes_what_is_generated(url):
    def generate(penalty):
        body = {"prompt": "abc", "temperature": 0, "max_new_tokens": 16, "model": "gpt2"}
        body["word_repetition_penalty"] = penalty
        return httpx.post(f"{url}/generate", json=body, timeout=60).json()["generated_text"]

    assert generate(1.0) == generate(1.0)
    assert generate(1.0) != generate(2.0)


def test_an_original_checkpoint_continues_as_its_own_program_did(url):
    with safe_open(TINYGPT / "reference.safetensors", "np") as reference:
        prompt, greedy = (
            reference.get_tensor(f"{name}_ids")[0].tolist() for name in ("prompt", "greedy")
        )
    body = {
        "model": "tinygpt",
        "prompt": prompt,
        "max_tokens": len(greedy),
        "temperature": 0,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
    assert answer["choices"][0]["token_ids"] == greedy


def test_tinygpt_takes_prompts_and_answers_longer_than_its_window(url):
    client = TinyGPTClient(url)
    answer = client.generate_text("Once upon a time " * 20, "tinygpt", 100, temperature=0)
    assert answer["timings"]["prompt_tokens"] > 64
    assert answer["tokens_generated"] == 100
    config = next(m["config"] for m in client.list_models() if m["name"] == "tinygpt")
    assert config == {
        "vocab_size": 512,
        "block_size": 64,
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
    }
