"""Load a model, list, chat twice, unload: plain HTTP with requests.

    make run
    .venv/bin/python examples/example_usage.py

API_BASE_URL names another server, MODEL another model, API_KEY the key where one is needed.
"""

import os
from typing import Any

import requests

BASE_URL = os.environ.get("API_BASE_URL", "http://127.0.0.1:5000")
MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")
KEY = os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY")
HEADERS = {"Authorization": f"Bearer {KEY}"} if KEY else {}
TIMEOUT_S = 600  # the first load of a model may download it


def call(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The JSON of an answer; an error of the server is an exception that says what it was."""
    response = requests.request(
        method, f"{BASE_URL}{path}", json=body, headers=HEADERS, timeout=TIMEOUT_S
    )
    answer: dict[str, Any] = response.json()
    if not response.ok:
        raise SystemExit(f"{method} {path}: {answer}")
    return answer


def chat(*messages: tuple[str, str]) -> None:
    """One answer to a conversation."""
    body = {
        "model": MODEL,
        "messages": [{"role": role, "content": content} for role, content in messages],
        "max_tokens": 100,
        "temperature": 0.7,
    }
    answer = call("POST", "/v1/chat/completions", body)
    print(f"{messages[-1][1]}\n  {answer['choices'][0]['message']['content']}")
    print(f"  ({answer['usage']['total_tokens']} tokens)")


def main() -> None:
    """What the API can do with one model."""
    loaded = call("POST", "/v1/models", {"model": MODEL, "device": "cpu"})
    print(f"{loaded['id']}: {loaded['status']} on {loaded['device']}")
    models = call("GET", "/v1/models")["data"]
    print(f"{len(models)} models, in memory: {[m['id'] for m in models if m['loaded']]}")
    chat(("system", "You are a helpful assistant."), ("user", "What is AI?"))
    chat(("user", "Tell me a short story."))
    print(call("DELETE", f"/v1/models/{MODEL}"))


if __name__ == "__main__":
    try:
        main()
    except requests.ConnectionError:
        raise SystemExit(f"Nothing answers at {BASE_URL}; start the server: make run") from None
