from __future__ import annotations

import logging
import sys

import pytest

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
