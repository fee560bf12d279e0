"""Large bodies that are in memory already, read in one piece."""

from __future__ import annotations

import io

import pytest
from gunicorn.http.body import Body, LengthReader
from gunicorn.http.unreader import IterUnreader

from transformers_api.server.gathered_body import LARGE, read_at_once


def environ(data, length):
    unreader = IterUnreader(iter([]))
    unreader.unread(data)
    body = Body(LengthReader(unreader, length))
    return {"wsgi.input": body, "CONTENT_LENGTH": str(length)}, body


def test_a_large_body_is_read_at_once_and_what_follows_stays():
    body, behind = b"x" * LARGE, b"GET / HTTP/1.1\r\n\r\n"
    request, reader = environ(body + behind, LARGE)
    read_at_once(request)
    assert isinstance(request["wsgi.input"], io.BytesIO)
    assert request["wsgi.input"].read() == body
    assert reader.read(10) == b""  # to gunicorn it has been read
    assert reader.reader.unreader.take_buffered() == behind


@pytest.mark.parametrize(("there", "length"), [(100, 100), (100, LARGE), (0, LARGE)])
def test_a_small_body_and_one_that_is_not_here_are_left_to_gunicorn(there, length):
    request, reader = environ(b"x" * there, length)
    read_at_once(request)
    assert request["wsgi.input"] is reader
    assert reader.reader.unreader.take_buffered() == b"x" * there


def test_a_request_without_a_body_is_left_alone():
    request = {"wsgi.input": io.BytesIO(b"")}
    read_at_once(request)
    assert request["wsgi.input"].read() == b""
