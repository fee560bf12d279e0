"""Talk to a running server from a terminal; standard library only.

    python api_client.py                        chat, line by line
    python api_client.py "Why is the sky blue?" one answer
    python api_client.py --models               what may be served, and what is in memory
    python api_client.py --model ID "Hello"     ask another model; the server switches to it
    python api_client.py --demo                 a walk through the native API

API_BASE_URL and API_KEY (or OPENAI_API_KEY) in the environment stand for --base-url and --api-key.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlsplit

BASE_URL = "http://127.0.0.1:5000"
Json = dict[str, Any]


class ApiClientError(Exception):
    """The server refused, failed or was not there; the message can be shown to a person."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ApiClient:
    """One method for each thing that the server can do. Safe from several threads."""

    def __init__(
        self, base_url: str = BASE_URL, api_key: str | None = None, timeout: float = 600
    ) -> None:
        parts = urlsplit(base_url if "//" in base_url else f"//{base_url}", scheme="http")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ApiClientError(f"{base_url!r} is not an http or https address")
        self.base_url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._parts = parts
        self._api_key = api_key
        self._timeout = timeout

    def health(self) -> Json:
        """How the server is, and which model is in memory."""
        return self._call("GET", "/health")

    def models(self) -> list[Json]:
        """Every model that may be named, with ``loaded``."""
        return list(self._call("GET", "/v1/models")["data"])

    def model(self, model: str) -> Json:
        """One model."""
        return self._call("GET", _path(model))

    def load(self, model: str) -> Json:
        """Make ``model`` the resident one; returns when it is."""
        return self._call("POST", "/v1/models", {"model": model})

    def unload(self, model: str) -> Json:
        """Take ``model`` out of memory."""
        return self._call("DELETE", _path(model))

    def chat(self, messages: list[Json], **fields: Any) -> Json:
        """A chat completion; ``fields`` as in the OpenAI API."""
        return self._call("POST", "/v1/chat/completions", {"messages": messages, **fields})

    def stream_chat(self, messages: list[Json], **fields: Any) -> Iterator[str]:
        """The text of a chat completion, piece by piece as it comes."""
        body = {"messages": messages, **fields, "stream": True}
        for chunk in self._events("/v1/chat/completions", body):
            for choice in chunk.get("choices", []):
                if text := choice["delta"].get("content"):
                    yield text

    def complete(self, prompt: str, **fields: Any) -> Json:
        """A completion; ``fields`` as in the OpenAI API."""
        return self._call("POST", "/v1/completions", {"prompt": prompt, **fields})

    def stream_complete(self, prompt: str, **fields: Any) -> Iterator[str]:
        """The text of a completion, piece by piece as it comes."""
        for chunk in self._events("/v1/completions", {"prompt": prompt, **fields, "stream": True}):
            for choice in chunk.get("choices", []):
                if text := choice.get("text"):
                    yield text

    def _call(self, method: str, path: str, body: Json | None = None) -> Json:
        with self._response(method, path, body) as response:
            answer: Json = _parsed(response.read(), response.status)
            return answer

    def _events(self, path: str, body: Json) -> Iterator[Json]:
        """The data of every server-sent event, up to ``[DONE]``."""
        with self._response("POST", path, body) as response:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = _parsed(data, response.status)
                if "error" in event or "detail" in event:
                    raise ApiClientError(_message(event, response.status), response.status)
                yield event
            raise ApiClientError("The stream ended before it was complete")

    @contextlib.contextmanager
    def _response(
        self, method: str, path: str, body: Json | None
    ) -> Iterator[http.client.HTTPResponse]:
        connection = self._connect()
        headers = {"Accept": "application/json, text/event-stream"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, self._parts.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            if response.status >= 400:
                message = _message(_parsed(response.read(), response.status), response.status)
                raise ApiClientError(message, response.status)
            yield response
        except ConnectionRefusedError:
            raise ApiClientError(
                f"Nothing listens on {self.base_url}; start the server with `make run`"
            ) from None
        except TimeoutError:
            raise ApiClientError(f"No answer within {self._timeout:g} seconds") from None
        except (OSError, http.client.HTTPException) as error:
            raise ApiClientError(f"The connection to {self.base_url} failed: {error!r}") from error
        finally:
            connection.close()

    def _connect(self) -> http.client.HTTPConnection:
        kind: type[http.client.HTTPConnection] = http.client.HTTPConnection
        if self._parts.scheme == "https":
            kind = http.client.HTTPSConnection
        assert self._parts.hostname
        return kind(self._parts.hostname, self._parts.port, timeout=self._timeout)


class TinyGPTClient(ApiClient):
    """The native API, by the names that the client of the TinyGPT service has."""

    def health_check(self) -> Json:
        """How the server is: ``status``, ``models_loaded``, ``uptime`` and more."""
        return self.health()

    def list_models(self) -> list[Json]:
        """Every registered model, with ``description``, ``parameters``, ``loaded``, ``config``."""
        with self._response("GET", "/models", None) as response:
            return list(_parsed(response.read(), response.status))

    def load_model(self, model_name: str) -> Json:
        """Begin to load a model in the background; ``wait_until_loaded`` waits for it."""
        return self._call("POST", f"/models/{_quoted(model_name)}/load")

    def wait_until_loaded(self, model_name: str, poll_s: float = 0.2) -> Json:
        """Wait while a model is being loaded; ApiClientError when that fails."""
        while True:
            model = self._call("GET", f"/models/{_quoted(model_name)}")
            if model["state"] == "loaded":
                return model
            if model["state"] != "loading":
                reason = model["error"] or "nobody has asked for it"
                raise ApiClientError(f"Model '{model_name}' is not being loaded: {reason}")
            time.sleep(poll_s)

    def unload_model(self, model_name: str) -> Json:
        """Take a model out of memory."""
        return self._call("DELETE", f"/models/{_quoted(model_name)}/unload")

    def generate_text(
        self,
        prompt: str | list[str],
        model: str | None = None,
        max_new_tokens: int = 100,
        temperature: float = 0.7,
        top_k: int = 50,
        top_p: float = 0.95,
        word_repetition_penalty: float = 1.0,
        **fields: Any,
    ) -> Json:
        """Continue a text, or a list of texts together; ``model`` None is the server's own."""
        body = {
            "prompt": prompt,
            "model": model,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "word_repetition_penalty": word_repetition_penalty,
        }
        return self._call("POST", "/generate", body | fields)

    def stream_text(self, prompt: str, **fields: Any) -> Iterator[str]:
        """The continuation of a text, piece by piece; ``fields`` as of ``generate_text``."""
        for event in self._events("/generate/stream", {"prompt": prompt, **fields}):
            if "text" in event:
                yield event["text"]


def _path(model: str) -> str:
    return f"/v1/models/{_quoted(model)}"


def _quoted(model: str) -> str:
    return quote(model, safe="/")


def _parsed(data: bytes, status: int) -> Any:
    try:
        found = json.loads(data)
    except ValueError:
        found = None
    if not isinstance(found, dict | list):
        start = data[:200].decode(errors="replace")
        raise ApiClientError(f"Not an answer of this server (status {status}): {start!r}", status)
    return found


def _message(answer: Any, status: int) -> str:
    """The human part of an error in any of the server's shapes."""
    error = answer
    if isinstance(answer, dict):
        error = answer.get("error", answer.get("detail", answer))
    if isinstance(error, dict):
        error = error.get("message", error)
    return f"{error} (status {status})"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        client = TinyGPTClient(options.base_url, options.api_key)
        if options.demo:
            _show_around(client, options)
        elif options.models:
            _show_models(client)
        elif options.prompt:
            _say(client, [{"role": "user", "content": " ".join(options.prompt)}], options)
        else:
            _converse(client, options)
    except ApiClientError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt", nargs="*", help="what to ask; without it: a conversation")
    parser.add_argument("--base-url", default=os.environ.get("API_BASE_URL", BASE_URL))
    key = os.environ.get("API_KEY") or os.environ.get("OPENAI_API_KEY")
    parser.add_argument("--api-key", default=key, help="where the server wants one")
    parser.add_argument("--model", help="which model answers; default: the server's")
    parser.add_argument("--models", action="store_true", help="list the models and stop")
    parser.add_argument("--demo", action="store_true", help="walk through the native API and stop")
    parser.add_argument("--max-tokens", type=int, help="longest answer")
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest token always")
    return parser


def _show_models(client: ApiClient) -> None:
    models = client.models()
    width = max((len(model["id"]) for model in models), default=0)
    for model in models:
        state = "in memory" if model.get("loaded") else ""
        print(f"{model['id']:{width}}  {state}".rstrip())


def _show_around(client: TinyGPTClient, options: argparse.Namespace) -> None:
    health = client.health_check()
    print(f"Status: {health['status']}, up {health['uptime']}")
    print(f"In memory: {', '.join(health['models_loaded']) or 'no model yet'}\n")
    for model in client.list_models():
        print(f"{model['name']}: {model['description']}")
    if options.model:
        print(f"\n{client.load_model(options.model)['message']}")
        client.wait_until_loaded(options.model)
    chosen = {"model": options.model, "max_new_tokens": options.max_tokens or 80}
    chosen["temperature"] = 0.8 if options.temperature is None else options.temperature
    answer = client.generate_text("Once upon a time, there was a brave little mouse", **chosen)
    print(f"\n{answer['model_used']}: {answer['generated_text']}")
    print(
        f"({answer['tokens_generated']} tokens in {answer['generation_time']} s, "
        f"{answer['tokens_per_second']} tokens/s)\n"
    )
    prompt = "The dragon flew over the castle and"
    print(prompt, end="", flush=True)
    for piece in client.stream_text(prompt, **chosen):
        print(piece, end="", flush=True)
    print()


def _converse(client: ApiClient, options: argparse.Namespace) -> None:
    shown = options.model or client.health().get("current_model") or "the default model"
    print(f"{client.base_url}, {shown}. An empty line starts anew, Ctrl-D ends.")
    messages: list[Json] = []
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if not text:
            messages.clear()
            continue
        messages.append({"role": "user", "content": text})
        try:
            answer = _say(client, messages, options)
        except ApiClientError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
        else:
            messages.append({"role": "assistant", "content": answer})


def _say(client: ApiClient, messages: list[Json], options: argparse.Namespace) -> str:
    chosen = {
        "model": options.model,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
    }
    fields = {name: value for name, value in chosen.items() if value is not None}
    pieces = []
    for piece in client.stream_chat(messages, **fields):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return "".join(pieces)


if __name__ == "__main__":
    sys.exit(main())
