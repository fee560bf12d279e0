"""Everything together: a live gunicorn, real models, the official OpenAI SDK."""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from tests.servers import ROOT, Server, started

DEFAULT = "smollm2-135m-instruct"
ADAPTER = "smollm2-adapted"
WIDTHS = {"q_proj": 576, "v_proj": 192}  # outputs of the default model's layers
PLAN = "Explain in a few sentences "
TOPICS = ["rain", "bread", "the moon", "glass", "music", "snow", "bees", "tea"] * 2

pytestmark = pytest.mark.timeout(300)  # the first start converts the embedded model


def save_tiny(folder: Path, kind: str) -> Path:
    """A small random model with a byte tokenizer: loads in a moment, answers nonsense."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from tests import tokenizers

    torch.manual_seed(0)
    tokenizer = tokenizers.byte_level()
    size = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        config = GPT2Config(**size, n_embd=32, n_layer=2, n_head=4, n_positions=512)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            **size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path) -> Path:
    """A random adapter of the default model."""
    import torch

    from tests import lora

    random = torch.Generator().manual_seed(0)
    sizes = {f"model.layers.{i}.self_attn.{n}": o for i in range(30) for n, o in WIDTHS.items()}
    parts = {
        path: (
            torch.randn(4, 576, generator=random) / 24,
            torch.randn(width, 4, generator=random) / 4,
        )
        for path, width in sizes.items()
    }
    return lora.save(folder, parts)


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    names = ("tiny-llama", "tiny-gpt2")
    entries = [{"name": n, "path": str(save_tiny(folder / n, n.split("-")[1]))} for n in names]
    entries.append({"name": ADAPTER, "adapter": str(save_adapter(folder / "a")), "base": DEFAULT})
    (folder / "models.json").write_text(json.dumps(entries))
    return {
        "PORT": "0",
        "HOST": "127.0.0.1",
        "MODEL_STORE": str(ROOT / "build" / "test-models"),
        "MODEL_REGISTRY_PATH": str(folder / "models.json"),
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_THREADS": "1",
        "SWAP_AFTER_S": "0.2",
    }


def serve(environment, **more):
    return started(sys.executable, "-m", "transformers_api", "serve", **environment, **more)


def base_url(server: Server) -> str:
    host, port = server.address()
    return f"http://{host}:{port}"


def wait_until_ready(server: Server, limit_s: float = 240) -> str:
    url = base_url(server)
    deadline = time.monotonic() + limit_s
    while httpx.get(f"{url}/readyz", timeout=30).status_code != 200:
        assert server.process.poll() is None, server.log
        assert time.monotonic() < deadline, server.log
        time.sleep(0.05)  # polling, with a deadline
    return url


@pytest.fixture(scope="module")
def url(environment):
    with serve(environment) as server:
        yield wait_until_ready(server)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0, server.log
        assert "Traceback" not in server.log


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, topic, **options):
    options = {"model": DEFAULT, "temperature": 0, "max_tokens": 24} | options
    messages = [{"role": "user", "content": f"{PLAN}{topic}."}]
    return client.chat.completions.create(messages=messages, **options)


def streamed(client, topic, **options) -> str:
    chunks = list(ask(client, topic, stream=True, **options))
    assert sum(chunk.choices[0].finish_reason is not None for chunk in chunks) == 1
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_the_default_model_answers_with_sense(client):
    answer = client.chat.completions.create(
        model=DEFAULT,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
    )
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_sixteen_streams_at_once_each_equal_their_solo_run(client):
    alone = {topic: ask(client, topic).choices[0].message.content for topic in set(TOPICS)}
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda topic: streamed(client, topic), TOPICS))
    assert together == [alone[topic] for topic in TOPICS]


def test_an_adapter_and_its_base_stream_together_as_each_alone(client, url):
    models = [DEFAULT, ADAPTER] * 3
    alone = {name: ask(client, "rain", model=name).choices[0].message.content for name in models}
    assert alone[ADAPTER] != alone[DEFAULT]
    swaps = httpx.get(f"{url}/status", timeout=30).json()["swaps"]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda name: streamed(client, "rain", model=name), models))
    assert together == [alone[name] for name in models]
    seen = httpx.get(f"{url}/status", timeout=30).json()
    assert seen["swaps"] == swaps
    assert [each["model"] for each in seen["resident"]["adapters"]] == [ADAPTER]


def test_a_seed_gives_the_same_text_streamed_or_not_alone_or_not(client):
    options = {"temperature": 1.0, "seed": 11}
    alone = ask(client, "rain", **options).choices[0].message.content
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(streamed, client, topic, temperature=1.0) for topic in TOPICS[1:7]]
        assert streamed(client, "rain", **options) == alone
        assert all(other.result() for other in others)
    assert ask(client, "rain", temperature=1.0, seed=12).choices[0].message.content != alone


def test_the_next_turn_of_a_conversation_is_read_from_the_cache(client):
    messages = [{"role": "user", "content": "Name three colours, please."}]
    options = {"model": DEFAULT, "temperature": 0, "max_tokens": 20}
    first = client.chat.completions.create(messages=messages, **options)
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And one more?"},
    ]
    second = client.chat.completions.create(messages=messages, **options)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 1


def test_a_prompt_can_be_scored_as_evaluation_harnesses_do(client):
    def score(text):
        answer = client.completions.create(
            model=DEFAULT, prompt=text, max_tokens=0, echo=True, logprobs=1
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs.token_logprobs[0] is None
        assert "".join(logprobs.tokens) == text
        return sum(logprobs.token_logprobs[1:])

    assert score("The sun rises in the east.") > score("The sun rises in the soup.")


def test_emoji_and_chinese_arrive_whole_in_a_stream(client, url):
    text = "Repeat: 😀🎉 你好，世界"
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={"prompt": text, "max_tokens": 60, "temperature": 0, "stream": True, "echo": True},
        timeout=120,
    ) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["text"] for event in events]
    assert "".join(pieces).startswith(text)
    written = "".join(pieces)[len(text) :]
    assert any(ord(char) > 0x1F000 for char in written)  # it does write emoji
    assert "�" not in written[:-1]  # the last one may be cut off by max_tokens


def test_a_stop_string_ends_the_text_before_it(client):
    whole = ask(client, "rain", max_tokens=40).choices[0].message.content
    stop = whole[20:26]
    answer = ask(client, "rain", max_tokens=40, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert streamed(client, "rain", max_tokens=40, stop=[stop]) == whole[: whole.index(stop)]


@pytest.mark.slow
def test_a_server_that_imports_torch_as_a_whole_says_the_same(environment, client):
    asked = {"model": "tiny-llama", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    with serve(environment, LAZY_TORCH="false", DEFAULT_MODEL="tiny-llama") as server:
        url = wait_until_ready(server)
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60).json()
    assert answer["choices"][0]["text"] == client.completions.create(**asked).choices[0].text


def test_models_are_switched_back_and_forth_under_load_without_a_failed_request(client):
    names = ["tiny-llama", "tiny-gpt2"]

    def complete(number: int) -> str:
        name = names[number % 2]
        answer = client.completions.create(
            model=name, prompt="abc", max_tokens=8, temperature=0, extra_body={"ignore_eos": True}
        )
        assert answer.model == name
        assert answer.usage.completion_tokens == 8
        return answer.choices[0].text

    expected = [complete(0), complete(1)]
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(complete, range(48)))
    assert answers == expected * 24
    listed = {model.id: model.loaded for model in client.models.list()}
    assert sum(listed.values()) == 1
    assert set(names) < set(listed)


def test_a_model_that_cannot_be_loaded_leaves_the_resident_one_serving(client, url, environment):
    registry = Path(environment["MODEL_REGISTRY_PATH"])
    assert client.completions.create(model="tiny-gpt2", prompt="abc", max_tokens=2).choices
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="google/flan-t5-small", prompt="abc")
    assert refused.value.code == "model_not_servable"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=f"../{registry.name}", prompt="abc")
    assert caught.value.code == "model_not_found"
    assert httpx.get(f"{url}/health", timeout=30).json()["current_model"] == "tiny-gpt2"


def test_loading_listing_and_unloading_over_v1_models(client, url):
    loaded = httpx.post(f"{url}/v1/models", content=b'{"model": "tiny-llama"}', timeout=60)
    assert (loaded.status_code, loaded.json()["status"]) == (200, "loaded")
    assert client.models.retrieve("tiny-llama").loaded
    assert client.models.delete("tiny-llama").deleted
    assert not client.models.retrieve("tiny-llama").loaded


def test_a_client_that_leaves_frees_its_slot(client, url):
    def running() -> int:
        return httpx.get(f"{url}/health", timeout=30).json()["active_requests"]

    stream = ask(client, "rain", stream=True, max_tokens=2000, extra_body={"ignore_eos": True})
    next(iter(stream))
    assert running() == 1
    stream.close()
    deadline = time.monotonic() + 30
    while running():
        assert time.monotonic() < deadline
        time.sleep(0.02)  # polling, with a deadline


def test_not_ready_while_loading_then_ready_and_sigterm_ends_a_stream_with_an_error(environment):
    with serve(environment, GRACEFUL_S="1") as server:
        first = httpx.get(f"{base_url(server)}/readyz", timeout=30)
        assert first.status_code == 503
        assert httpx.get(f"{base_url(server)}/healthz", timeout=30).json() == {"status": "ok"}
        url = wait_until_ready(server)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = ask(
                client, "rain", stream=True, max_tokens=4000, extra_body={"ignore_eos": True}
            )
            chunks = iter(stream)
            next(chunks)
            server.signal(signal.SIGTERM)
            with pytest.raises(openai.APIError, match="shutting down"):
                list(chunks)
        assert server.wait() == 0, server.log


def test_sigint_ends_an_idle_server_cleanly(environment):
    with serve(environment, PRELOAD_MODEL="false") as server:
        wait_until_ready(server)
        server.signal(signal.SIGINT)
        assert server.wait() == 0, server.log
        assert "Traceback" not in server.log


def test_a_port_in_use_and_a_bad_setting_are_one_clear_line(environment):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serve(environment | {"PORT": port}) as server:
            assert server.wait() == 1
            assert port in server.log
            assert "Traceback" not in server.log
    with serve(environment, DTYPE="float13") as server:
        assert server.wait() == 2
        assert server.log.strip().count("\n") == 0
        assert "DTYPE" in server.log


def test_requests_that_come_while_the_model_loads_wait_for_it(environment):
    with serve(environment, DEFAULT_MODEL="tiny-llama", PRELOAD_MODEL="false") as server:
        url = base_url(server)
        answers = []

        def complete() -> None:
            body = {"prompt": "abc", "max_tokens": 3}
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120).status_code)

        threads = [threading.Thread(target=complete) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == [200] * 10
        assert server.log.count("Loaded tiny-llama") == 1
