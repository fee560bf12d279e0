"""The terminal client, against a small HTTP server that answers what the tests script."""

from __future__ import annotations

import http.server
import io
import json
import socket
import threading

import pytest

import api_client
from api_client import ApiClient, ApiClientError, TinyGPTClient


class Scripted(http.server.ThreadingHTTPServer):
    """Answers by (method, path); keeps what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {}
        self.asked = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def events(self, *payloads):
        return b"".join(
            b"data: " + (p if isinstance(p, bytes) else json.dumps(p).encode()) + b"\n\n"
            for p in payloads
        )


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self):
        length = int(self.headers.get("Content-Length", 0))
        body = json.loads(self.rfile.read(length)) if length else None
        self.server.asked.append((self.command, self.path, body, dict(self.headers)))
        found = self.server.answers[self.command, self.path]
        status, answer = found if isinstance(found, tuple) else next(found)
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chunk(text):
    return {"choices": [{"index": 0, "delta": {"content": text}}]}


def test_chat_prints_the_pieces_as_they_come(server, capsys):
    role = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
    usage = {"choices": [], "usage": {"total_tokens": 3}}
    server.answers["POST", "/v1/chat/completions"] = (
        200,
        b": keep-alive\n\n" + server.events(role, chunk("Blue "), chunk("sky"), usage, b"[DONE]"),
    )
    options = ["--base-url", server.url, "--model", "m", "--temperature", "0", "Why", "blue?"]
    assert api_client.main(options) == 0
    assert capsys.readouterr().out == "Blue sky\n"
    asked = server.asked[0][2]
    assert asked["messages"] == [{"role": "user", "content": "Why blue?"}]
    assert asked["stream"] is True
    assert (asked["model"], asked["temperature"]) == ("m", 0)


def test_a_conversation_sends_all_turns_and_an_empty_line_forgets_them(server, capsys, monkeypatch):
    server.answers["GET", "/health"] = (200, {"current_model": "tiny"})
    server.answers["POST", "/v1/chat/completions"] = (200, server.events(chunk("Yes"), b"[DONE]"))
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n\nthree\n"))
    assert api_client.main(["--base-url", server.url]) == 0
    assert "tiny" in capsys.readouterr().out
    turns = [
        [message["content"] for message in body["messages"]]
        for method, _, body, _ in server.asked
        if method == "POST"
    ]
    assert turns == [["one"], ["one", "Yes", "two"], ["three"]]


def test_models_are_listed_with_the_resident_one_marked(server, capsys):
    data = [{"id": "a/b", "loaded": True}, {"id": "c", "loaded": False}]
    server.answers["GET", "/v1/models"] = (200, {"object": "list", "data": data})
    assert api_client.main(["--base-url", server.url, "--models"]) == 0
    assert capsys.readouterr().out == "a/b  in memory\nc\n"


def test_every_method_asks_its_route(server):
    client = ApiClient(server.url + "/", api_key="secret")
    server.answers.update({
        ("GET", "/health"): (200, {"status": "healthy"}),
        ("GET", "/v1/models/org/name"): (200, {"id": "org/name"}),
        ("POST", "/v1/models"): (200, {"status": "loaded"}),
        ("DELETE", "/v1/models/org/name"): (200, {"deleted": True}),
        ("POST", "/v1/chat/completions"): (200, {"choices": []}),
        ("POST", "/v1/completions"): (200, {"choices": [{"text": "x"}]}),
    })  # fmt: skip
    assert client.health() == {"status": "healthy"}
    assert client.model("org/name") == {"id": "org/name"}
    assert client.load("org/name") == {"status": "loaded"}
    assert client.unload("org/name") == {"deleted": True}
    assert client.chat([], seed=1) == {"choices": []}
    assert client.complete("Once", max_tokens=2)["choices"] == [{"text": "x"}]
    assert server.asked[2][2] == {"model": "org/name"}
    assert server.asked[5][2] == {"prompt": "Once", "max_tokens": 2}
    assert all(headers["Authorization"] == "Bearer secret" for *_, headers in server.asked)


def test_streamed_completions_yield_their_text(server):
    pieces = [{"choices": [{"text": text}]} for text in ("a", "", "b")]
    server.answers["POST", "/v1/completions"] = (200, server.events(*pieces, b"[DONE]"))
    assert list(ApiClient(server.url).stream_complete("Once")) == ["a", "b"]


def test_the_native_methods_ask_their_routes(server):
    client = TinyGPTClient(server.url)
    server.answers.update({
        ("GET", "/health"): (200, {"status": "healthy"}),
        ("GET", "/models"): (200, [{"name": "a/b", "loaded": True}]),
        ("POST", "/models/a/b/load"): (200, {"message": "Loading"}),
        ("DELETE", "/models/a/b/unload"): (200, {"message": "Unloaded"}),
        ("POST", "/generate"): (200, {"generated_text": "Once more"}),
    })  # fmt: skip
    assert client.health_check() == {"status": "healthy"}
    assert client.list_models() == [{"name": "a/b", "loaded": True}]
    assert client.load_model("a/b") == {"message": "Loading"}
    assert client.unload_model("a/b") == {"message": "Unloaded"}
    assert client.generate_text("Once", seed=3) == {"generated_text": "Once more"}
    assert server.asked[-1][2] == {
        "prompt": "Once",
        "model": None,
        "max_new_tokens": 100,
        "temperature": 0.7,
        "top_k": 50,
        "top_p": 0.95,
        "word_repetition_penalty": 1.0,
        "seed": 3,
    }


def test_a_native_stream_yields_its_text_and_raises_its_error(server):
    done = {"done": True, "generated_text": "Once ab"}
    pieces = [{"index": 0, "text": text} for text in ("a", "b")]
    server.answers["POST", "/generate/stream"] = (200, server.events(*pieces, done, b"[DONE]"))
    assert list(TinyGPTClient(server.url).stream_text("Once", max_new_tokens=2)) == ["a", "b"]
    assert server.asked[-1][2] == {"prompt": "Once", "max_new_tokens": 2}
    failure = {"detail": "The engine failed"}
    server.answers["POST", "/generate/stream"] = (200, server.events(pieces[0], failure))
    with pytest.raises(ApiClientError, match="The engine failed"):
        list(TinyGPTClient(server.url).stream_text("Once"))


def test_waiting_for_a_model_ends_when_it_is_there_or_has_failed(server):
    answers = [("loading", None), ("loading", None), ("loaded", None)]
    server.answers["GET", "/models/m"] = states(answers)
    assert TinyGPTClient(server.url).wait_until_loaded("m", poll_s=0)["state"] == "loaded"
    assert len(server.asked) == 3
    server.answers["GET", "/models/m"] = states([("failed", "No such files")])
    with pytest.raises(ApiClientError, match="No such files"):
        TinyGPTClient(server.url).wait_until_loaded("m", poll_s=0)
    server.answers["GET", "/models/m"] = states([("not_loaded", None)])
    with pytest.raises(ApiClientError, match="nobody has asked"):
        TinyGPTClient(server.url).wait_until_loaded("m", poll_s=0)


def states(shown):
    return iter([(200, {"state": state, "error": error}) for state, error in shown])


def test_nothing_listening_is_one_readable_line(capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        for what in ("hello", "--demo", "--models"):
            assert api_client.main(["--base-url", url, what]) == 1
            assert capsys.readouterr().err == (
                f"error: Nothing listens on {url}; start the server with `make run`\n"
            )


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param({"error": {"message": "Model 'x' not found"}}, id="openai"),
        pytest.param({"detail": "Model 'x' not found"}, id="native"),
        pytest.param({"error": "Model 'x' not found", "code": "no"}, id="short"),
    ],
)
def test_an_error_of_any_dialect_shows_its_message(server, capsys, answer):
    server.answers["POST", "/v1/chat/completions"] = (404, answer)
    assert api_client.main(["--base-url", server.url, "hello"]) == 1
    assert capsys.readouterr().err == "error: Model 'x' not found (status 404)\n"


def test_an_error_in_the_middle_of_a_stream_is_raised(server):
    events = server.events(chunk("Hal"), {"error": {"message": "The engine failed"}}, b"[DONE]")
    server.answers["POST", "/v1/chat/completions"] = (200, events)
    pieces = ApiClient(server.url).stream_chat([])
    assert next(pieces) == "Hal"
    with pytest.raises(ApiClientError, match="The engine failed"):
        next(pieces)


def test_a_stream_that_breaks_off_is_an_error(server):
    server.answers["POST", "/v1/chat/completions"] = (200, server.events(chunk("Hal")))
    with pytest.raises(ApiClientError, match="before it was complete"):
        list(ApiClient(server.url).stream_chat([]))


def test_another_program_on_the_port_is_recognised(server):
    server.answers["GET", "/health"] = (200, b"<html>hello</html>")
    with pytest.raises(ApiClientError, match="Not an answer of this server"):
        ApiClient(server.url).health()


def test_a_wrong_address_is_named():
    with pytest.raises(ApiClientError, match="ftp://x"):
        ApiClient("ftp://x")


@pytest.mark.parametrize(
    ("environ", "options", "expected"),
    [
        ({}, [], None),
        ({"OPENAI_API_KEY": "b"}, [], "Bearer b"),
        ({"API_KEY": "a", "OPENAI_API_KEY": "b"}, [], "Bearer a"),
        ({"API_KEY": "a", "OPENAI_API_KEY": "b"}, ["--api-key", "c"], "Bearer c"),
    ],
)
def test_the_key_of_the_command_line_goes_before_those_of_the_environment(
    server, monkeypatch, environ, options, expected
):
    for name in ("API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    server.answers["GET", "/v1/models"] = (200, b'{"data": []}')
    assert api_client.main(["--base-url", server.url, "--models", *options]) == 0
    assert server.asked[-1][3].get("Authorization") == expected
