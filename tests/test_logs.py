from __future__ import annotations

import json
import logging
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.servers import serving
from transformers_api import logs


@pytest.fixture
def line():
    token = logs.request_id.set("-")  # another test's request may have run on this thread
    formatter = logs.LineFormatter("%(levelname)s [%(request_id)s] %(message)s")

    def format_(message, *args, exc_info=None):
        record = logging.LogRecord("x", logging.INFO, __file__, 1, message, args, exc_info)
        return formatter.format(record)

    yield format_
    logs.request_id.reset(token)


def test_each_line_has_the_id_of_its_request(line):
    token = logs.request_id.set("abc-1")
    try:
        assert line("hello") == "INFO [abc-1] hello"
    finally:
        logs.request_id.reset(token)
    assert line("hello") == "INFO [-] hello"


def test_what_a_client_sends_cannot_make_a_second_line(line):
    assert (
        line("model %s", "a\nERROR forged\r\n\x1b[31m") == "INFO [-] model a ERROR forged \\x1b[31m"
    )


@pytest.mark.parametrize("secret", ["hf_abcdefgh12345", "sk-abcdefgh12345", "Bearer abc.def"])
def test_secrets_are_hidden(line, secret):
    assert line("got %s here", secret) == "INFO [-] got *** here"


def test_a_trace_follows_indented(line):
    try:
        raise ValueError("broken")
    except ValueError:
        text = line("failed", exc_info=sys.exc_info())
    head, *trace = text.splitlines()
    assert head == "INFO [-] failed"
    assert trace[-1] == "    ValueError: broken"
    assert all(part.startswith("    ") for part in trace)


def record(message, *args, **extra):
    made = logging.LogRecord("x", logging.INFO, __file__, 1, message, args, None)
    made.__dict__.update(extra)
    return made


def json_line(message, *args, shows_texts=False, **extra):
    text = logs.JsonFormatter(shows_texts=shows_texts).format(record(message, *args, **extra))
    assert text.isascii()
    assert "\n" not in text
    return json.loads(text)


def test_a_json_line_has_level_logger_message_and_fields():
    line = json_line("hello %s", "you", fields={"status": 200, "model": "m", "stream": True})
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "x",
        "message": "hello you",
        "status": 200,
        "model": "m",
        "stream": True,
    } | ({"request_id": line["request_id"]} if "request_id" in line else {})


def test_a_line_may_name_the_requests_that_it_is_about():
    assert json_line("failed", request_id="a,b")["request_id"] == "a,b"


@given(st.text())
def test_whatever_comes_a_json_line_is_one_line_of_json(text):
    line = json_line("got %s", text, fields={"path": text})
    assert line["path"] == logs.hidden(text)


@given(st.text())
def test_whatever_comes_a_text_line_is_one_line(text):
    line = logs.LineFormatter("%(message)s").format(record("got %s", text, fields={"path": text}))
    assert len(line.splitlines()) == 1
    assert line.isprintable() or not set(line) & set(map(chr, range(32)))


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefgh12345",
        "sk-abcdefgh12345",
        "sk-proj-abc_def-123",
        "Bearer abc.def",
        "bearer abcdefgh",
        "someone:password",
    ],
)
def test_secrets_are_hidden_in_fields_messages_and_traces(secret):
    text = f"redis://{secret}@host" if "password" in secret else f"got {secret}"
    try:
        raise ValueError(text)
    except ValueError:
        failed = record("failed: %s", text, fields={"path": text}, exc_info=sys.exc_info())
    for formatter in (logs.JsonFormatter(), logs.LineFormatter()):
        line = formatter.format(failed)
        assert secret not in line
        assert line.count("***") >= 3
    json.loads(logs.JsonFormatter().format(failed))


def raised(text):
    try:
        try:
            raise KeyError(text)
        except KeyError as error:
            raise ValueError(f"cannot use {text}") from error
    except ValueError:
        return sys.exc_info()


@pytest.mark.parametrize("how", ["text", "json"])
def test_a_private_trace_has_its_frames_and_types_and_no_message(how):
    failed = record("Unexpected error", private=True, exc_info=raised("my prompt"))
    line = logs.formatter(how).format(failed)
    assert "my prompt" not in line
    assert "in raised" in line
    assert "ValueError" in line
    assert "KeyError" in line
    assert "my prompt" in logs.formatter(how, shows_texts=True).format(failed)


def test_the_system_s_own_words_are_no_secret():
    try:
        open("/nonexistent/my-file")  # noqa: SIM115
    except OSError:
        failed = record("Unexpected error", private=True, exc_info=sys.exc_info())
    line = logs.LineFormatter().format(failed)
    assert "No such file or directory" in line
    assert "FileNotFoundError: No such" in line


def test_a_line_on_another_thread_can_be_carried_the_request_s_id():
    token = logs.request_id.set("abc-1")
    try:
        function = logs.carried(logs.request_id.get)
    finally:
        logs.request_id.reset(token)
    seen = []
    thread = threading.Thread(target=lambda: seen.extend([function(), logs.request_id.get()]))
    thread.start()
    thread.join(30)
    assert seen == ["abc-1", "-"]


def test_every_line_of_a_server_without_a_terminal_is_json():
    with serving() as server:
        server.get("/pid")
        server.process.terminate()
        assert server.wait() == 0
    lines = [json.loads(line) for line in server.lines]
    assert any("Listening at" in line["message"] for line in lines)
    assert {line["level"] for line in lines} == {"info"}
