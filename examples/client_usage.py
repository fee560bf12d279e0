"""Health, models, the native and the OpenAI routes, and switching models by asking for another.

    make run
    .venv/bin/python examples/client_usage.py

API_BASE_URL names another server, MODEL another first model, OTHER_MODEL a second one to switch to,
API_KEY the key where one is needed (of the scope admin, as this loads a model).
"""

import os
from typing import Any

import requests

BASE_URL = os.environ.get("API_BASE_URL", "http://127.0.0.1:5000")
MODEL = os.environ.get("MODEL", "smollm2-135m-instruct")
OTHER_MODEL = os.environ.get("OTHER_MODEL", MODEL)


class Client:
    """A few of the server's routes; ``requests.HTTPError`` where it refuses."""

    def __init__(self, base_url: str) -> None:
        self._base_url = base_url.rstrip("/")
        self._session = requests.Session()
        if key := os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY"):
            self._session.headers["Authorization"] = f"Bearer {key}"

    def health(self) -> Any:
        """How the server is, and which model is in memory."""
        return self._call("GET", "/health")

    def models(self) -> Any:
        """What may be asked for."""
        return self._call("GET", "/v1/models")["data"]

    def load(self, model: str) -> Any:
        """Load a model; optional, for any request loads the one it names."""
        return self._call("POST", "/load_model", model_name=model, task="text-generation")

    def generate(self, prompt: str, model: str, max_length: int = 150) -> Any:
        """The native route: the prompt and its continuation."""
        fields = {"prompt": prompt, "model": model, "max_length": max_length}
        return self._call("POST", "/generate", **fields)["generated_text"]

    def complete(self, prompt: str, model: str, **fields: Any) -> Any:
        """A completion."""
        answer = self._call("POST", "/v1/completions", prompt=prompt, model=model, **fields)
        return answer["choices"][0]["text"]

    def chat(self, messages: list[dict[str, str]], model: str, **fields: Any) -> Any:
        """The next turn of a conversation."""
        answer = self._call(
            "POST", "/v1/chat/completions", messages=messages, model=model, **fields
        )
        return answer["choices"][0]["message"]["content"]

    def _call(self, method: str, path: str, **body: Any) -> Any:
        response = self._session.request(
            method, f"{self._base_url}{path}", json=body or None, timeout=600
        )
        response.raise_for_status()
        return response.json()


def converse(client: Client, model: str) -> None:
    """Two turns; the second one knows the first."""
    messages = [{"role": "user", "content": "Hello, how are you?"}]
    for question in ("What do you like to do?", None):
        answer = client.chat(messages, model, max_tokens=40, temperature=0.7)
        print(f"  {messages[-1]['content']}\n  {model}: {answer}")
        if question:
            messages += [
                {"role": "assistant", "content": answer},
                {"role": "user", "content": question},
            ]


def main() -> None:
    """Each route once, then the models in turn."""
    client = Client(BASE_URL)
    print(f"Health: {client.health()['status']}")
    for model in client.models()[:5]:
        print(f"  {model['id']}")
    print(client.load(MODEL)["message"])
    print(f"Generated: {client.generate('The future of AI is', MODEL, max_length=50)}")
    print("Conversation:")
    converse(client, MODEL)
    text = client.complete("Hello world", OTHER_MODEL, max_tokens=40)  # switches, if it is another
    print(f"{OTHER_MODEL}: Hello world{text}")
    print(f"In memory now: {client.health()['current_model']}")
    try:
        client.complete("Translate to German: hello", "google/flan-t5-small")
    except requests.HTTPError as error:  # an encoder-decoder: refused with the reason
        print(
            f"Refused ({error.response.status_code}): {error.response.json()['error']['message']}"
        )


if __name__ == "__main__":
    try:
        main()
    except requests.ConnectionError:
        raise SystemExit(f"Nothing answers at {BASE_URL}; start the server: make run") from None
